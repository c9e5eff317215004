"""What the loop owns: steps, clipping, averages, precision, records, checkpoints, and the settings that may change."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from test_settings import refused
from warm import ROOT, checkpoints, cli, cli_many, digest, free_port, metrics, tensors, tiny

from oneloop import checkpoint, loop
from oneloop.configs import Base, Data
from oneloop.inputs import sources
from oneloop.machine import internals
from oneloop.machine.placement import trains
from oneloop.tasks import Loss, Task, frozen


@dataclass(frozen=True)
class Nothing:
    """No settings."""


@dataclass(frozen=True)
class Config:
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    toy: Nothing = field(default_factory=Nothing)


class Scale(torch.nn.Module):
    """w * x."""

    def __init__(self, start=0.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((3,), start))

    def forward(self, x):
        return self.w * x


def toy(loss_fn, models=lambda cfg: {"a": Scale()}, lr=1.0, **functions):
    """A task of one or two little models under plain SGD."""
    sgd = lambda models, cfg: {k: torch.optim.SGD(m.parameters(), lr) for k, m in models.items() if trains(m)}  # noqa: E731
    common = {"sample_fn": lambda *a: {}, "export_fn": lambda models, examples, path, cfg: "load"} | functions
    return Task(config=Config, make_models=models, make_optim=sgd, loss_fn=loss_fn, **common)


def settings(out, data=None, **base):
    common = {"output_dir": str(out), "logger": (), "lr_scheduler": "constant", "max_train_steps": 1, "use_ema": False}
    examples = {"num_shapes": 24, "resolution": 8, "train_batch_size": 4} | (data or {})
    return Config(base=Base(**common | base), data=Data(**examples))


@pytest.mark.parametrize(("limit", "moved"), [(1.0, 1.0), (5.0, 5.0), (0.0, 10.0), (100.0, 10.0)])
def test_clipping_clips(tmp_path, limit, moved):
    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", (models["a"](torch.tensor([6.0, 8.0, 0.0]))).sum())

    state = loop.run(toy(loss_fn), settings(tmp_path / "out", max_grad_norm=limit))
    assert state.models["a"].w.norm().item() == pytest.approx(moved, rel=1e-4)
    assert metrics(tmp_path / "out")[0]["grad_norm"] == pytest.approx(10.0, rel=1e-4)


def test_two_optimizers_in_order(tmp_path):
    """The second loss sees the first's step; the first puts nothing on the second's parameters."""
    seen = []

    def loss_fn(models, batch, rng, cfg):
        one = torch.ones(3)
        with frozen(models["b"]) as b:
            yield Loss("a", b(models["a"](one)).sum())
        seen.append([models["a"].w.tolist(), models["b"].w.grad])
        yield Loss("b", models["b"](models["a"](one).detach()).sum())

    models = lambda cfg: {"a": Scale(1.0), "b": Scale(2.0)}  # noqa: E731
    state = loop.run(toy(loss_fn, models, lr=0.5), settings(tmp_path / "out", max_grad_norm=0))
    assert seen == [[[0.0] * 3, None]]  # 1 - 0.5 * 2
    assert state.models["b"].w.tolist() == [2.0] * 3  # its gradient was a's new value, 0
    assert set(metrics(tmp_path / "out")[0]) >= {"loss/a", "loss/b", "lr/a", "grad_norm/b"}


def test_a_loss_that_leaks_is_refused(tmp_path):
    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", models["b"](models["a"](torch.ones(3))).sum())
        yield Loss("b", models["b"](torch.ones(3)).sum())

    with pytest.raises(ValueError, match=r"the loss 'a' put gradients on the parameters of 'b'.*frozen"):
        loop.run(toy(loss_fn, lambda cfg: {"a": Scale(1.0), "b": Scale(2.0)}), settings(tmp_path / "out"))


def test_a_loss_without_an_optimizer_is_refused(tmp_path):
    def loss_fn(models, batch, rng, cfg):
        yield Loss("unet", models["a"](torch.ones(3)).sum())

    with pytest.raises(ValueError, match=r"the task yields a loss 'unet', and its optimizers are: a"):
        loop.run(toy(loss_fn), settings(tmp_path / "out"))


def test_frozen_and_trained_precision(tmp_path):
    """Frozen weights in the precision of the run, trained ones in float32, adapters on a frozen base too."""
    seen = {}

    def models(cfg):
        mixed = torch.nn.ModuleDict({"base": Scale(1.0), "adapter": Scale(1.0)})
        mixed["base"].requires_grad_(False)
        mixed.forward = lambda x: mixed["adapter"](mixed["base"](x))
        return {"a": mixed, "teacher": Scale(1.0).requires_grad_(False)}

    def loss_fn(models, batch, rng, cfg):
        a, teacher = models["a"], models["teacher"]
        seen.update(base=a["base"].w.dtype, adapter=a["adapter"].w.dtype, teacher=teacher.w.dtype, eval=not teacher.training)
        yield Loss("a", a(torch.ones(3)).float().sum())

    state = loop.run(toy(loss_fn, models), settings(tmp_path / "out", mixed_precision="bf16"))
    assert seen == {"base": torch.bfloat16, "adapter": torch.float32, "teacher": torch.bfloat16, "eval": True}
    assert set(state.models) == {"a"}
    assert {k for k in tensors(tmp_path / "out") if k.startswith("model")} == {"model/adapter.w"}


def test_averages_are_in_place_for_samples_and_exports_only(tmp_path):
    shown = []

    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", models["a"](torch.ones(3)).sum())

    def sample_fn(models, examples, rng, cfg):
        assert not torch.is_grad_enabled() and not models["a"].training
        shown.append(models["a"].w[0].item())
        return {}

    def export_fn(models, examples, path, cfg):
        shown.append(models["a"].w[0].item())
        return "load"

    task = toy(loss_fn, sample_fn=sample_fn, export_fn=export_fn)
    cfg = settings(
        tmp_path / "out", max_train_steps=3, use_ema=True, ema_decay=0.5, ema_power=10.0, max_grad_norm=0, num_samples=4
    )
    state = loop.run(task, cfg)
    # weights -1, -2, -3; averages -1 (decay 0), -1.5, -2.25 (decay 0.5)
    assert state.models["a"].w[0] == -3 and state.models["a"].training
    assert shown == [-2.25, -2.25] and state.ema["a.w"][0] == -2.25


def test_metrics_are_means_over_everything(tmp_path):
    """Over batches, updates and processes since the last line: example n costs n here."""
    (tmp_path / "mean_of_n.py").write_text(
        "import torch\nfrom dataclasses import dataclass, field\nfrom oneloop.configs import Base, Data\n"
        "from oneloop.tasks import Loss, Task\n"
        "@dataclass(frozen=True)\nclass S:\n    'None.'\n"
        "@dataclass(frozen=True)\nclass Config:\n    base: Base = field(default_factory=Base)\n"
        "    data: Data = field(default_factory=Data)\n    mean_of_n: S = field(default_factory=S)\n"
        "class M(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(1))\n    def forward(self, x):\n        return x + 0 * self.w\n"
        "def loss_fn(models, batch, rng, cfg):\n"
        "    yield Loss('m', models['m'](batch['n'].float()).mean(), {'twice': 2 * batch['n'].float().mean()})\n"
        "task = Task(config=Config, make_models=lambda cfg: {'m': M()}, loss_fn=loss_fn,\n"
        "    make_optim=lambda models, cfg: {'m': torch.optim.SGD(models['m'].parameters(), 0.1)},\n"
        "    sample_fn=lambda *a: {}, export_fn=lambda *a: 'load')\n"
    )
    flags = tiny(tmp_path, base__logging_steps=2, steps=4)[1:]
    flags = [w for i in range(0, len(flags), 2) if not flags[i].startswith("--ddpm") for w in flags[i : i + 2]]
    for result in cli_many(tmp_path, 2, "mean_of_n", *flags, "--base.gradient-accumulation-steps", "2"):
        assert result.code == 0, result.err
    lines = metrics(tmp_path / "out")  # an update is 2 x 2 x 4 examples; a line covers two
    assert [line["loss"] for line in lines] == [15.5, 47.5] and [line["twice"] for line in lines] == [31.0, 95.0]
    assert [line["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_rates_do_not_depend_on_the_layout(tmp_path, processes, accumulation):
    flags = tiny(tmp_path, steps=8, base__logging_steps=1, base__lr_scheduler="linear", base__lr_warmup_steps=4)
    flags += ["--base.gradient-accumulation-steps", str(accumulation), "--ddpm.learning-rate", "0.008"]
    for result in cli_many(tmp_path, processes, *flags):
        assert result.code == 0, result.err
    rates = [line["lr"] for line in metrics(tmp_path / "out")]
    assert rates == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.006, 0.004, 0.002], abs=1e-12)


def test_scale_lr_and_length_in_epochs(tmp_path):
    flags = tiny(tmp_path, steps=None, base__num_epochs=1.5, base__scale_lr=True, base__lr_scheduler="constant")
    assert cli(tmp_path, *flags, "--base.gradient-accumulation-steps", "2", "--ddpm.learning-rate", "0.001").code == 0
    (line,) = metrics(tmp_path / "out")
    assert line["step"] == 5 and line["lr"] == pytest.approx(0.008)  # ceil(1.5 * 24 / 8) steps


def test_recomputing_changes_nothing(tmp_path):
    flags = tiny(tmp_path, "plain", ddpm__learning_rate=1e-4)
    (tmp_path / "unet.json").write_text((tmp_path / "unet.json").read_text().replace("0.1", "0.0"))
    assert cli(tmp_path, *flags).code == 0
    flags[flags.index(str(tmp_path / "plain"))] = str(tmp_path / "recomputed")
    assert cli(tmp_path, *flags, "--base.gradient-checkpointing").code == 0
    assert digest(tmp_path / "plain") == digest(tmp_path / "recomputed")


def test_bf16_trains_float32_weights(tmp_path):
    assert cli(tmp_path, *tiny(tmp_path, base__mixed_precision="bf16")).code == 0
    assert {v.dtype for k, v in tensors(tmp_path / "out").items() if k.startswith("model")} == {torch.float32}
    assert metrics(tmp_path / "out")[-1]["loss"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Records.


def test_samples_trackers_and_card(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = tiny(tmp_path, base__validation_steps=3, base__logging_steps=2, base__num_samples=3, base__logger="tensorboard")
    flags.insert(flags.index("tensorboard") + 1, "wandb")
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    result = cli(tmp_path, *flags, env=env, timeout=180)
    assert result.code == 0, result.err
    out = tmp_path / "out"
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["3.png", "6.png"]
    events = EventAccumulator(str(out / "logs" / "oneloop")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 6]
    assert [e.step for e in events.Images("samples")] == [3, 3, 3, 6, 6, 6] or events.Images("samples")
    assert list(out.glob("wandb/offline-run-*"))
    card = (out / "export" / "README.md").read_text()
    assert "DDPMPipeline.from_pretrained" in card and str(tmp_path) not in card.replace("model_config", "")[:400]
    assert (out / "export" / "samples.png").exists()
    assert sorted(p.name for p in (out / "export").iterdir()) == [
        "README.md",
        "model_index.json",
        "samples.png",
        "scheduler",
        "unet",
    ]


def test_samples_use_the_same_seeds(tmp_path):
    """With a learning rate of zero the images stay the same."""
    flags = tiny(tmp_path, base__validation_steps=3, base__use_ema=False, ddpm__learning_rate=0)
    assert cli(tmp_path, *flags).code == 0
    first, last = [(tmp_path / "out" / "samples" / f"{n}.png").read_bytes() for n in (3, 6)]
    assert first == last


def test_sampling_does_not_touch_the_training(tmp_path):
    assert cli(tmp_path, *tiny(tmp_path, "without")).code == 0
    assert cli(tmp_path, *tiny(tmp_path, "with", base__validation_steps=1, base__logging_steps=1)).code == 0
    assert digest(tmp_path / "without") == digest(tmp_path / "with")


def test_diffusers_and_accelerate_open_a_checkpoint(tmp_path):
    from accelerate import Accelerator
    from diffusers import DDPMPipeline, UNet2DModel

    assert cli(tmp_path, *tiny(tmp_path, base__checkpointing_steps=3)).code == 0
    out = tmp_path / "out"
    assert checkpoints(out) == [3, 6]
    pipeline = DDPMPipeline.from_pretrained(out / "checkpoint-3")
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    exported = DDPMPipeline.from_pretrained(out / "export").unet.state_dict()
    averages = {k.removeprefix("ema/unet."): v for k, v in tensors(out).items() if k.startswith("ema/")}
    assert all(torch.equal(exported[k], v) for k, v in averages.items()) and averages
    accelerator = Accelerator(cpu=True)
    model = UNet2DModel.from_config(json.loads((tmp_path / "unet.json").read_text()) | {"sample_size": 8})
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.load_state(out / "checkpoint-6" / "state")
    weights = {k.removeprefix("model/"): v for k, v in tensors(out).items() if k.startswith("model/")}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


def test_old_checkpoints_go(tmp_path):
    flags = tiny(tmp_path, base__checkpointing_steps=1, base__checkpoints_total_limit=2)
    assert cli(tmp_path, *flags).code == 0
    assert checkpoints(tmp_path / "out") == [5, 6]
    assert not list((tmp_path / "out").glob(".*"))


def test_push_uploads_the_export_and_nothing_else(tmp_path):
    def patch():
        import huggingface_hub

        def create_repo(name, **kwargs):
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(repo_id, folder_path, **kwargs):
            print("UPLOAD", repo_id, *sorted(os.listdir(folder_path)))

        huggingface_hub.create_repo, huggingface_hub.upload_folder = create_repo, upload_folder
        huggingface_hub.upload_file = lambda path_in_repo, repo_id, **kwargs: print("CARD", repo_id, path_in_repo)

    result = cli(tmp_path, *tiny(tmp_path, base__push_to_hub=True), env={"HF_TOKEN": "hf_canary"}, patch=patch)
    assert result.code == 0, result.err
    assert "UPLOAD me/out README.md model_index.json samples.png scheduler unet\nCARD me/out README.md" in result.out
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hf_canary" not in path.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming.


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("done")
    assert cli(folder, *tiny(folder, base__checkpointing_steps=3)).code == 0
    return folder


def again(done, tmp_path, **more):
    shutil.copytree(done / "out", tmp_path / "out")
    return cli(tmp_path, *tiny(tmp_path, **more))


def test_a_finished_run_says_so(done, tmp_path):
    result = again(done, tmp_path)
    assert result.code == 0 and "already done, 6 of 6 steps" in result.err
    assert digest(tmp_path / "out") == digest(done / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"ddpm__learning_rate": 5e-4},
        {"data__train_batch_size": 8},
        {"base__gradient_accumulation_steps": 3},
        {"base__lr_scheduler": "linear"},
        {"base__mixed_precision": "bf16"},
        {"base__logging_steps": 1},
        {"data__dataloader_num_workers": 1},
    ],
)
def test_changes_that_are_honoured(done, tmp_path, change):
    result = again(done, tmp_path, steps=9, **change)
    assert result.code == 0 and "resuming after step 6" in result.err, result.err
    assert checkpoints(tmp_path / "out")[-1] == 9
    manifest = json.loads((tmp_path / "out" / "checkpoint-9" / "manifest.json").read_text())
    batch = change.get("data__train_batch_size", 4) * change.get("base__gradient_accumulation_steps", 1)
    assert manifest["examples"] == 6 * 4 + 3 * batch


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base__seed": 1}, ["--base.seed was 0 and is now 1"]),
        ({"base__use_ema": False}, ["--base.use-ema was True and is now False"]),
        ({"data__resolution": 16}, ["--data.resolution was 8 and is now 16"]),
        ({"data__random_flip": True}, ["--data.random-flip was False and is now True"]),
        ({"data__num_shapes": 25}, ["--data.num-shapes was 24 and is now 25"]),
        ({"ddpm__prediction_type": "epsilon"}, ["--ddpm.prediction-type was", "is now 'epsilon'"]),
        ({"ddpm__ddpm_num_steps": 500}, ["--ddpm.ddpm-num-steps was 1000 and is now 500"]),
    ],
)
def test_changes_that_would_be_another_run(done, tmp_path, change, words):
    refused(again(done, tmp_path, steps=9, **change), "another run", *words)
    assert digest(tmp_path / "out") == digest(done / "out")


def test_another_model_or_task_is_refused(done, tmp_path):
    flags = tiny(tmp_path, steps=9)
    (tmp_path / "unet.json").write_text((tmp_path / "unet.json").read_text().replace("[8, 8]", "[8, 16]"))
    shutil.copytree(done / "out", tmp_path / "out")
    refused(cli(tmp_path, *flags), "unet's block_out_channels was [8, 8] and is now [8, 16]")


def test_another_version_of_the_random_stream_is_refused(done, tmp_path):
    """In a line, before a model is made; a manifest that does not say its version is of before there was another."""
    shutil.copytree(done / "out", tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-6" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("stream") == internals.STREAM
    for version, patch in (({"stream": "older"}, lambda: setattr(loop, "make_models", None)), ({}, lambda: None)):
        path.write_text(json.dumps(manifest | version | {"sha256": checkpoint._digest(manifest | version)}))
        result = cli(tmp_path, *tiny(tmp_path, steps=9), patch=patch)
        if version:
            refused(result, "another run", f"stream was older and is now {internals.STREAM}")
    assert result.code == 0 and "resuming after step 6" in result.err, result.err


def test_a_path_to_continue_from(done, tmp_path):
    source = done / "out" / "checkpoint-3"
    flags = tiny(tmp_path, base__resume_from_checkpoint=source)
    assert cli(tmp_path, *flags).code == 0
    assert digest(tmp_path / "out") == digest(done / "out")
    refused(cli(tmp_path, *tiny(tmp_path, base__resume_from_checkpoint=source)), "holds a later checkpoint-6")
    missing = cli(tmp_path, *tiny(tmp_path, "new", base__resume_from_checkpoint=tmp_path / "no"))
    refused(missing, "--base.resume-from-checkpoint", "not a valid checkpoint")
    assert not (tmp_path / "new").exists()
    refused(cli(tmp_path, *tiny(tmp_path, base__resume_from_checkpoint="none")), "starts over", "holds a run")


def test_resuming_opens_nothing_it_has_read(done, tmp_path, monkeypatch):
    """The first batch after step k is example k * batch, whatever k is: nothing is dealt out and dropped."""
    from oneloop import data

    cfg = Data(num_shapes=24, resolution=8, train_batch_size=4)
    examples = data.Examples(sources.open_source(cfg), cfg, 0)
    asked = []
    monkeypatch.setattr(data.Examples, "__getitem__", lambda self, numbers: asked.append(numbers) or {})
    next(examples.stream(10**9, 4))
    assert asked == [range(10**9, 10**9 + 4)]


def test_torchrun(tmp_path):
    """As a user starts two processes: trains, logs, samples, saves and continues, equal to one with accumulation.

    On a CPU with torchrun: of two processes on a CPU, `accelerate launch` starts one.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    common = {"data__train_batch_size": 2, "base__checkpointing_steps": 3, "base__mixed_precision": "no"}
    flags = tiny(tmp_path, steps=6, base__validation_steps=3, **common)
    done = subprocess.run([*command, ROOT / "loop.py", *flags], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 x 1 accumulated x 2 processes" in done.stderr, done.stderr[-2000:]
    out = tmp_path / "out"
    assert checkpoints(out) == [3, 6] and (out / "samples" / "3.png").exists() and metrics(out)[-1]["step"] == 6
    shutil.rmtree(out / "checkpoint-6")
    shutil.rmtree(out / "export")
    for result in cli_many(tmp_path, 2, *flags):
        assert result.code == 0 and checkpoints(out) == [3, 6], result.err
    one = tiny(tmp_path, "one", steps=6, base__gradient_accumulation_steps=2, **common)
    assert cli(tmp_path, *one).code == 0
    assert digest(out) == digest(tmp_path / "one")


def test_the_lock_names_its_holder(tmp_path):
    held = checkpoint.lock(tmp_path / "out", type("A", (), {"is_main_process": True, "num_processes": 1}))
    with held:
        refused(cli(tmp_path, *tiny(tmp_path)), "is in use by process", str(os.getpid()))
    assert not (tmp_path / "out").exists()
    assert cli(tmp_path, *tiny(tmp_path)).code == 0


@pytest.mark.parametrize("fused", [False, True])
def test_each_step_has_its_own_learning_rate(tmp_path, fused):
    """Gradients of one move a weight by the sum of the rates: linear, after two steps of warm-up, from a peak of a half."""

    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", models["a"](torch.ones(3)).sum())

    run = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 6, "max_grad_norm": 0, "logging_steps": 1}
    state = loop.run(toy(loss_fn, lr=0.5), settings(tmp_path / "out", **run, fused_backward_pass=fused))
    rates = [0.5 * factor for factor in (0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4)]
    assert torch.allclose(state.models["a"].w, torch.full((3,), -sum(rates)), atol=1e-6)
    assert [line["lr"] for line in metrics(tmp_path / "out")][:6] == pytest.approx(rates)
