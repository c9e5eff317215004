"""What a run keeps and removes on the disk, what makes a checkpoint valid, what is loaded from it, and what is still owed."""

import errno
import json
import os
import re
import shutil
import time
import types

import pytest
import torch
from accelerate import Accelerator
from cases import flip, sign
from safetensors.torch import load_file, save_file
from test_loop import settings, toy
from test_settings import refused
from warm import cli, digest, start, tiny

from oneloop import checkpoint, configs, loop
from oneloop.configs import BadInput
from oneloop.inputs import store
from oneloop.machine import files
from oneloop.tasks import Loss
from oneloop.views import publish
from oneloop.views.trackers import check_trackers

FACTS = {"task": "toy", "examples": 4, "skipped": 0, "settings": {"base": {}}}


class Estimating(torch.optim.SGD):
    """Keeps state in its groups, as Prodigy and schedule-free optimizers do: an estimate, a count, a name that comes later."""

    def __init__(self, params, lr, decay=0.5):
        super().__init__(params, lr, momentum=0.9)
        for group in self.param_groups:
            group |= {"decay": decay, "d": 1e-6, "k": 0, "scale": torch.tensor(1.0)}

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["d"], group["k"], group["late"] = group["d"] * 3 + 1e-3, group["k"] + 1, (group["k"], "seen")
            group["scale"].mul_(1.25)


def prepared(make=torch.optim.AdamW, side=4, ema=True, stepped=True, **given):
    """An accelerator with a linear model and its optimizer after a step, attached, and the EMA."""
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(side, 2)
    optimizer = accelerator.prepare(make(model.parameters(), lr=0.1, **given))
    accelerator.prepare(model)
    average = {"model.weight": model.weight.detach().clone()} if ema else {}
    checkpoint.attach(accelerator, {"model": model}, average)
    if stepped:
        model(torch.ones(1, side)).sum().backward()
        optimizer.step()
    return accelerator, optimizer, average


def export(folder):
    (folder / "load.py").write_text("load\n")
    (folder / "model.json").write_text("{}")


def save(accelerator, out, *steps, limit=None, export=export):
    """These checkpoints, and what was said."""
    said = []
    with checkpoint.Saves(accelerator, out, limit, said.append) as saves:
        for step in steps:
            saves.save(step, FACTS, export)
            saves.settle()
    return said


def made(out):
    """The names of the checkpoints in a folder."""
    return sorted(path.name for path in out.iterdir() if re.match("(replaced-)?checkpoint-", path.name))


# ---------------------------------------------------------------------------------------------------------------------
# What a run removes.


def plant(folder, names):
    """Files that are somebody's, in the places of a run's own; returns what must still be there."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return {name: f"mine: {name}" for name in names}


def test_others_files_stay(tmp_path):
    """Hidden names, folders, links: a run that starts, saves, prunes and ends removes nothing that it did not write."""
    out = tmp_path / "out"
    mine = plant(
        tmp_path,
        [
            f"out/{name}"
            for name in (".checkpoint-old/notes", ".a.removed/b", ".c.writing", ".export.writing/d", "checkpoint-²/e")
        ]
        + [f"out/examples/{name}" for name in ("pictures-holidays/1.jpg", ".f.writing", "pictures-1/columns.safetensors")]
        + [f"out/{name}" for name in ("checkpoint-2/notes", "checkpoint-07/g", "examples/ab/cd/.g.writing")]
        + ["precious", "elsewhere/h", ".dry-run-mine/i"],
    )
    (out / ".lock").symlink_to(tmp_path / "precious")
    (out / ".run.json.writing").symlink_to(tmp_path / "precious")
    (out / ".report.html.writing").symlink_to(tmp_path / "precious")
    (out / ".checkpoint-1.removed").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(out / "checkpoint-2", tmp_path / "aside")
    shutil.rmtree(out / "checkpoint-2")
    result = cli(tmp_path, *tiny(tmp_path, steps=1))
    assert result.code == 0, result.err
    shutil.copytree(tmp_path / "aside", out / "checkpoint-2")
    result = cli(tmp_path, *tiny(tmp_path, steps=4, base__checkpointing_steps=1, base__checkpoints_total_limit=1))
    assert result.code == 0, result.err
    (replaced,) = out.glob("replaced-checkpoint-2*")
    assert str(replaced) in result.err and "not written" not in result.err, result.err
    assert made(out)[:3] == ["checkpoint-07", "checkpoint-4", "checkpoint-²"]
    shutil.move(replaced, out / "checkpoint-2")
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    assert not (out / files.WORK).exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link", "card", "more"])
def test_an_export_of_somebody_is_refused_at_the_start(done, tmp_path, kind):
    shutil.copytree(done, out := tmp_path / "out")
    export = out / "export"
    if kind in ("folder", "file", "link"):
        shutil.move(export, tmp_path / "theirs")
    if kind == "folder":
        plant(export, ["thesis.tex"])
    elif kind == "file":
        export.write_text("mine")
    elif kind == "link":
        export.symlink_to(tmp_path / "theirs")
    else:
        plant(export, ["README.md" if kind == "card" else "unet/notes"])
    before = {path: path.read_bytes() for path in sorted(export.rglob("*")) if path.is_file()}
    refused(cli(tmp_path, *tiny(tmp_path, steps=9)), str(export), "did not write", "move it away")
    assert before == {path: path.read_bytes() for path in sorted(export.rglob("*")) if path.is_file()}
    if kind == "card":  # who edits the card of a finished run may start it again
        result = cli(tmp_path, *tiny(tmp_path))
        assert result.code == 0 and "already done" in result.err
    if kind == "more":  # what the system leaves in folders is nobody's
        os.rename(export / "unet" / "notes", export / "unet" / ".DS_Store")
        assert cli(tmp_path, *tiny(tmp_path, steps=7)).code == 0


def test_a_pruned_link_stops_nothing(tmp_path):
    """A checkpoint that was moved to another disk, with a link in its place: the link and what it leads to stay."""
    accelerator, *_ = prepared()
    save(accelerator, tmp_path / "out", 1)
    shutil.move(tmp_path / "out" / "checkpoint-1", tmp_path / "large-disk")
    (tmp_path / "out" / "checkpoint-1").symlink_to(tmp_path / "large-disk")
    plant(tmp_path / "out" / "checkpoint-2", ["notes"])
    said = save(accelerator, tmp_path / "out", 3, 4, 5, limit=1)
    assert made(tmp_path / "out") == ["checkpoint-1", "checkpoint-2", "checkpoint-5"]
    assert sum("was not removed" in text for text in said) == 2, said  # each is said once
    with checkpoint.lock(tmp_path / "out", accelerator):
        checkpoint.Saves(accelerator, tmp_path / "out", 1, said.append).tidy(5)
    assert checkpoint.read(tmp_path / "large-disk")["step"] == 1


def test_what_is_pruned_is_older_than_what_was_saved(tmp_path):
    """A damaged checkpoint of a later step takes no good one's place."""
    accelerator, *_ = prepared()
    save(accelerator, tmp_path, 2, 8)
    flip(tmp_path / "checkpoint-8" / "state" / "model.safetensors")
    save(accelerator, tmp_path, 3, limit=1)
    assert made(tmp_path) == ["checkpoint-3", "checkpoint-8"]
    assert checkpoint.find(tmp_path, "latest", lambda text: None)[0].name == "checkpoint-3"


@pytest.mark.parametrize("kind", ["folder", "link", "lock that is a link", "pipe"])
def test_a_hidden_folder_of_somebody_is_refused(tmp_path, kind):
    out, accelerator = tmp_path / "out", Accelerator(cpu=True)
    mine = plant(tmp_path, ["precious", "out/.oneloop/notes" if kind == "folder" else "other/lock"])
    if kind == "link":
        out.mkdir()
        (out / ".oneloop").symlink_to(tmp_path / "other")
    elif kind != "folder":
        (out / ".oneloop").mkdir(parents=True)
        lock = out / ".oneloop" / "lock"
        os.mkfifo(lock) if kind == "pipe" else lock.symlink_to(tmp_path / "precious")
    with pytest.raises(BadInput, match=r"--base\.output-dir"), checkpoint.lock(out, accelerator):
        pass
    assert {name: (tmp_path / name).read_text() for name in mine} == mine


def test_records_of_somebody_are_not_replaced(tmp_path):
    mine = plant(tmp_path, ["out/metrics.jsonl"])
    refused(cli(tmp_path, *tiny(tmp_path)), "metrics.jsonl", "not of a run")
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == mine["out/metrics.jsonl"]


def test_killed_between_two_renames(tmp_path):
    """A checkpoint whose export is made anew gives way in two renames; after a kill between them it is back."""
    accelerator, *_ = prepared()
    save(accelerator, tmp_path, 3)
    (tmp_path / ".oneloop").mkdir(exist_ok=True)
    (tmp_path / ".oneloop" / "lock").touch()
    os.rename(tmp_path / "checkpoint-3", tmp_path / ".oneloop" / "checkpoint-3.replaced")
    with checkpoint.lock(tmp_path, accelerator):
        assert checkpoint.find(tmp_path, "latest", lambda text: None)[0].name == "checkpoint-3"


def test_leftovers_go_at_the_next_start(done, tmp_path):
    """What hard exits left, in a finished run too: staged files, dry runs whose process is gone, checkpoints over the limit."""
    shutil.copytree(done, out := tmp_path / "out")
    plant(out, [".oneloop/lock", ".oneloop/checkpoint-9/state/x", ".oneloop/run.json.12", ".oneloop/export.ab/unet/x"])
    plant(tmp_path, [".dry-run-gone/.oneloop/lock", ".dry-run-gone/out/x", ".dry-run-mine/notes", ".dry-run-lives/x"])
    ready = tmp_path / "ready"

    def hold():
        with checkpoint.lock(tmp_path / ".dry-run-lives", Accelerator(cpu=True)):
            ready.touch()
            time.sleep(60)

    holder = start(tmp_path, patch=hold)
    while not ready.exists():
        time.sleep(0.01)
    try:
        result = cli(tmp_path, *tiny(tmp_path, base__checkpoints_total_limit=1))
    finally:
        os.kill(holder.pid, 9)
        holder.wait()
    assert result.code == 0 and "already done" in result.err, result.err
    assert made(out) == ["checkpoint-6"] and not (out / ".oneloop").exists()
    assert sorted(path.name for path in tmp_path.glob(".dry-run-*")) == [".dry-run-lives", ".dry-run-mine"]


def test_leftovers_in_the_examples(tmp_path):
    staged = f".pictures-{'0' * 16}.{'a' * 32}.writing"
    plant(tmp_path, [f"{staged}/pixels", "caption-1/ab/.abcd-mirrored.12.writing", "caption-1/ab/abcd.safetensors"])
    mine = plant(tmp_path, [".pictures-1.writing", "caption-1/ab/.notes.writing", "pictures-2/a.jpg"])
    unused = plant(tmp_path, ["pictures-3/pixels"])
    save_file({"x": torch.ones(1)}, tmp_path / "pictures-3" / "columns.safetensors", {"hash": "", "facts": ""})
    store.tidy(tmp_path, set())
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*mine, "caption-1/ab/abcd.safetensors"} and unused


# ---------------------------------------------------------------------------------------------------------------------
# What makes a checkpoint valid.


def test_the_state_decides(tmp_path):
    """Neither what is beside the state nor what systems put into it makes a checkpoint invalid; what would be loaded does."""
    accelerator, *_ = prepared()
    save(accelerator, tmp_path, 1, 2)
    new, said = tmp_path / "checkpoint-2", []
    plant(new, ["state/.DS_Store", "state/.nfs0001", "state/._model.safetensors", "state/notes.txt"])
    assert checkpoint.find(tmp_path, "latest", said.append)[0] == new and not said
    (new / "load.py").unlink()
    assert checkpoint.find(tmp_path, "latest", said.append)[0] == new
    assert len(said) == 1 and "checkpoint-2/load.py: missing" in said[0]
    plant(new, ["state/optimizer_1.bin"])
    assert checkpoint.find(tmp_path, "latest", said.append)[0].name == "checkpoint-1"
    assert "optimizer_1.bin: is not in the manifest" in said[1]


def test_a_damaged_export_is_made_anew(done, tmp_path):
    """A finished run whose last checkpoint lacks files of its export, and that owes OUT/export, makes both from its state."""
    shutil.copytree(done, out := tmp_path / "out")
    shutil.rmtree(out / "export")
    (out / "checkpoint-6" / "model_index.json").unlink()
    flip(out / "checkpoint-6" / "load.py")
    result = cli(tmp_path, *tiny(tmp_path))
    assert result.code == 0 and "training needs only its state" in result.err, result.err
    assert digest(out) == digest(done) and made(out) == ["checkpoint-3", "checkpoint-6"]
    for name in ("export/model_index.json", "checkpoint-6/model_index.json", "checkpoint-6/load.py"):
        assert (out / name).read_bytes() == (done / name).read_bytes()
    assert "already done" in cli(tmp_path, *tiny(tmp_path)).err


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded.


def test_what_an_optimizer_wrote_into_its_groups_is_state(tmp_path):
    accelerator, optimizer, _ = prepared(Estimating, decay=0.5)
    save(accelerator, tmp_path, 1)
    was = dict(optimizer.param_groups[0])
    for step, decay in ((2, 0.25), (3, 0.125)):  # resumed, and resumed again, with other settings each time
        accelerator, optimizer, _ = prepared(Estimating, decay=decay, stepped=False)
        checkpoint.load(accelerator, tmp_path / f"checkpoint-{step - 1}")
        group = optimizer.param_groups[0]
        assert [group[k] for k in ("d", "k", "late", "scale")] == [was[k] for k in ("d", "k", "late", "scale")]
        assert group["decay"] == decay and group["lr"] == 0.1 and group["momentum"] == 0.9
        save(accelerator, tmp_path, step)


def test_settings_own_what_they_gave(tmp_path):
    accelerator, *_ = prepared(betas=(0.9, 0.99), weight_decay=0.1)
    save(accelerator, tmp_path, 1)
    accelerator, optimizer, _ = prepared(betas=(0.8, 0.9), weight_decay=0.0, stepped=False)
    checkpoint.load(accelerator, tmp_path / "checkpoint-1")
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.9) and group["weight_decay"] == 0.0 and "given" not in group


def test_a_scale_of_the_loss_that_was_not_saved_starts_anew(tmp_path):
    accelerator, *_ = prepared()
    save(accelerator, tmp_path, 1)
    accelerator, optimizer, _ = prepared(stepped=False)
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # as in fp16
    said = []
    checkpoint.load(accelerator, tmp_path / "checkpoint-1", said.append)
    assert len(said) == 1 and "not saved in fp16" in said[0]
    assert accelerator.scaler is scaler and scaler.get_scale() == 64.0 and optimizer.state_dict()["state"]
    scaler.load_state_dict(scaler.state_dict() | {"scale": 16.0})
    scaler.scale(torch.ones(1))
    save(accelerator, tmp_path, 2)
    accelerator, *_ = prepared(stepped=False)
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    checkpoint.load(accelerator, tmp_path / "checkpoint-2", said.append)
    assert len(said) == 1 and scaler.get_scale() == 16.0


def change(file, edit):
    """Change what a file of tensors holds."""
    load, save = (
        (load_file, save_file) if file.suffix == ".safetensors" else (lambda f: torch.load(f, weights_only=True), torch.save)
    )
    content = load(file)
    changed = edit(content)
    save(content if changed is None else changed, file)


def test_what_does_not_fit_is_refused_in_a_line(tmp_path):
    """Whoever changes a state and seals it again: keys and shapes of all that is loaded are looked at."""
    accelerator, *_ = prepared()
    edits = {
        "ema.safetensors": [lambda x: {}, lambda x: {k: v[:1] for k, v in x.items()}, lambda x: x | {"more": torch.ones(1)}],
        "model.safetensors": [lambda x: {"weight": x["weight"]}, lambda x: x | {"weight": torch.ones(2, 5)}],
        "optimizer.bin": [
            lambda x: x | {"state": {}},
            lambda x: x | {"state": {0: x["state"][0]}},
            lambda x: x["state"][0].update(exp_avg=torch.ones(3)),
            lambda x: x["state"][0].pop("exp_avg_sq").sum().item() and None,
            lambda x: x | {"param_groups": []},
            lambda x: [1],
            lambda x: x | {"state": None},
            lambda x: {},
        ],
        "optimizers.json": [
            "[]",
            "{}",
            "[null]",
            '[{"content": 1}]',
            "[[]]",
            "[" * 9999,
            '[{"content": "4", "given": 3}]',
        ],
    }
    for i, (name, edit) in enumerate((name, edit) for name, several in edits.items() for edit in several):
        out = tmp_path / str(i)
        save(accelerator, out, 1)
        file = out / "checkpoint-1" / "state" / name
        file.write_text(edit) if isinstance(edit, str) else change(file, edit)
        manifest = json.loads((out / "checkpoint-1" / "manifest.json").read_text())
        entry = {"size": file.stat().st_size, "xxh3": files.xxh3(file)}
        sign(out / "checkpoint-1", files=manifest["files"] | {f"state/{name}": entry})
        found, _ = checkpoint.find(out, "latest", lambda text: None)
        other, *_ = prepared(stepped=False)
        with pytest.raises(BadInput) as error:
            checkpoint.load(other, found)
            pytest.fail(f"{name}, {i}: loaded")
        assert len(str(error.value)) < 2000 and str(out / "checkpoint-1" / "state") in str(error.value), (name, i)
        if name != "optimizers.json" and i < 9:
            assert name in str(error.value), error.value


def test_an_optimizer_that_has_taken_no_step_may_be_empty(tmp_path):
    accelerator, *_ = prepared(stepped=False)
    save(accelerator, tmp_path, 1)
    checkpoint.load(prepared(stepped=False)[0], tmp_path / "checkpoint-1")


# ---------------------------------------------------------------------------------------------------------------------
# Whose error it is.


def raises(error):
    def export(folder):
        raise error

    return export


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
        ),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/pictures/3.png"),
        OSError(errno.EIO, "Input/output error", "/pictures/3.png"),
        OSError("image file is truncated"),
        BadInput("3.png cannot be read"),
        KeyError("unet"),
    ],
)
def test_errors_that_are_not_of_the_storage_stay_what_they_are(tmp_path, error):
    accelerator, *_ = prepared()
    with pytest.raises(type(error)) as caught:
        save(accelerator, tmp_path, 1, export=raises(error))
    assert caught.value is error and "raises" not in str(error)
    assert any(entry.name == "export" for entry in caught.traceback), "its traceback is gone"
    assert not made(tmp_path) and not any((tmp_path / files.WORK).glob("*"))
    with pytest.raises(type(error)), checkpoint.lock(tmp_path / "out", accelerator):
        raise error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_errors_of_the_storage(tmp_path, code):
    accelerator, *_ = prepared()
    error = OSError(code, os.strerror(code), str(tmp_path / "x") if code == errno.EACCES else None)
    with pytest.raises(checkpoint.StorageError, match=f"checkpoint-1 failed: {os.strerror(code)}") as caught:
        save(accelerator, tmp_path, 1, export=raises(error))
    numbers = re.search(r"needs more than ([\d,]+) bytes, and ([\d,]+) are free", str(caught.value))
    assert bool(numbers) is (code == errno.ENOSPC)
    if numbers:
        needed, free = (int(number.replace(",", "")) for number in numbers.groups())
        assert needed >= free > 0


def test_an_image_that_cannot_be_read_any_more(tmp_path):
    """In an export, as in a step: bad input, by the file's name; a task's own error keeps its traceback."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")

    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", models["a"](torch.ones(3)).sum())
        if cfg.data.memory_budget == 0:
            flags.append(1)
            (tmp_path / "images" / "3.png").write_bytes(b"broken") if len(flags) == 1 else None

    flags = []
    measured = toy(loss_fn, export_fn=lambda models, examples, path, cfg: str(len(list(examples))))
    cfg = settings(tmp_path / "out", {"train_data_dir": str(tmp_path / "images"), "memory_budget": 0, "example_cache": "no"})
    with pytest.raises(BadInput, match=r"3\.png .*cannot be"):
        loop.run(measured, cfg)
    wrong = toy(loss_fn, export_fn=lambda *a: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        loop.run(wrong, settings(tmp_path / "other"))
    assert not (tmp_path / "other" / files.WORK).exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is owed after training.


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The output of a finished run of six steps."""
    folder = tmp_path_factory.mktemp("done")
    assert cli(folder, *tiny(folder, base__checkpointing_steps=3)).code == 0
    return folder / "out"


def hub(upload):
    """Patch: a hub whose uploads are this function."""

    def patch():
        import huggingface_hub

        huggingface_hub.create_repo = lambda name, **kwargs: types.SimpleNamespace(repo_id=f"me/{name}")
        huggingface_hub.upload_folder = upload
        huggingface_hub.upload_file = lambda **kwargs: print(kwargs["path_or_fileobj"].decode())

    return patch


def test_an_upload_that_failed_or_was_killed_is_tried_again(done, tmp_path):
    def unreachable(**kwargs):
        raise ConnectionError("the hub is\nnot there")

    flags, env, uploaded = (
        tiny(tmp_path, base__push_to_hub=True),
        {"HF_TOKEN": "hf_canary"},
        "print('UPLOAD', kwargs['repo_id'])",
    )
    shutil.copytree(done, out := tmp_path / "out")
    before = (out / "export" / "README.md").stat().st_mtime_ns
    result = cli(tmp_path, *flags, env=env, patch=hub(unreachable))
    assert result.code == 4 and "was not uploaded to out: ConnectionError: the hub is not there" in result.err, result.err
    assert "Traceback" not in result.err
    assert cli(tmp_path, *flags, env=env, patch=hub(lambda **kwargs: os.kill(os.getpid(), 9))).code == -9
    result = cli(tmp_path, *flags, env=env, patch=hub(lambda **kwargs: exec(uploaded)))
    assert result.code == 0 and "UPLOAD me/out" in result.out, result.err
    lines = re.search("```python\n(.*?)```", result.out, re.S)[1]
    assert lines.startswith("path = 'me/out'\n") and "from_pretrained(path)" in lines  # for who reads it on the hub
    assert "\npath = '.'  #" in (out / "export" / "README.md").read_text()
    result = cli(tmp_path, *flags, env=env, patch=hub(unreachable))
    assert result.code == 0 and "already done" in result.err
    assert (out / "export" / "README.md").stat().st_mtime_ns == before, "the export was made again"


@pytest.mark.parametrize("name", ["two words", "a/b/c", "me/", "a--b", "x" * 97, ".git", "über"])
def test_a_bad_repository_name_is_found_at_the_start(monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(BadInput, match=r"--base\.hub-model-id"):
        check_trackers(configs.Base(push_to_hub=True, hub_model_id=name, logger=(), output_dir="out"))
    if "/" not in name:
        with pytest.raises(BadInput, match=r"--base\.hub-model-id"):
            check_trackers(configs.Base(push_to_hub=True, logger=(), output_dir=f"runs/{name}"))
    check_trackers(configs.Base(push_to_hub=True, hub_model_id="me/good-name_1.0", logger=(), output_dir=f"runs/{name}"))


def test_what_else_is_owed(done, tmp_path):
    """A page that was not written, an export without a part of it, a record that is damaged or of another checkpoint."""
    shutil.copytree(done, out := tmp_path / "out")
    cfg, manifest = loop_cfg(out), checkpoint.verify(out / "checkpoint-6")
    owes = lambda: publish.owed(out, cfg, manifest, True)  # noqa: E731
    assert not owes()
    for name in ("report.html", "export/model_index.json", "export/unet/config.json", "export.json"):
        os.rename(out / name, tmp_path / "away")
        assert owes() is (name != "export.json"), name  # without a record its content tells
        os.rename(tmp_path / "away", out / name)
        assert not owes()
    os.utime(out / "report.html", (0, 0))  # written before the last metrics
    assert owes()
    result = cli(tmp_path, *tiny(tmp_path))
    assert result.code == 0 and not owes()
    record = json.loads((out / "export.json").read_text())
    for damage in ("", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "[" * 9999, json.dumps(record | {"files": 3})):
        (out / "export.json").write_text(damage)
        assert not owes()
    weights = out / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # somebody's own, who has no record of it
    with pytest.raises(BadInput, match="did not write"):
        owes()
    weights.write_bytes(content)
    (out / "export.json").write_text(json.dumps(record | {"checkpoint": "another"}))
    assert owes()


def loop_cfg(out):
    """Settings of a run in this folder that uploads nothing."""
    return types.SimpleNamespace(base=configs.Base(output_dir=str(out)))


def test_no_value_of_a_manifest_passes_by_its_seal(done, tmp_path):
    """Whoever seals another type, or another's, has a damaged checkpoint."""
    folder = tmp_path / "checkpoint-6"
    folder.mkdir()
    good = json.loads((done / "checkpoint-6" / checkpoint.MANIFEST).read_text())
    assert set(good) == {*checkpoint.FACTS, *checkpoint.MORE}
    cases = [(key, value) for key in good for value in (None, -1, 1.5, True, [1], {"a": 1}, {"a": {"config": 1}})]
    for key, value in cases:
        if (key, value) in (("models", {"a": 1}), ("models", {"a": {"config": 1}}), ("settings", {"a": {"config": 1}})):
            continue  # models are lines for people; of settings what is not known is refused by its name
        manifest = good | {key: value}
        manifest["sha256"] = checkpoint._digest(manifest) if key != "sha256" else value
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(checkpoint.Damaged):
            print(key, value, checkpoint.read(folder))


def test_a_record_that_is_a_pipe_is_not_waited_for(done, tmp_path):
    shutil.copytree(done, out := tmp_path / "out")
    for name in ("check.json", "starts.jsonl", "metrics.jsonl", "run.json", "export.json", "checkpoint-3/manifest.json"):
        (out / name).unlink()
        os.mkfifo(out / name)
    result = cli(tmp_path, *tiny(tmp_path), timeout=20)
    assert result.code == 0 and "Traceback" not in result.err, result.err
    with pytest.raises(checkpoint.Damaged, match=r"checkpoint-3/manifest\.json: not a file"):
        checkpoint.read(out / "checkpoint-3")
