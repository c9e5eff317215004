"""What is said of a run before it is one, and that saying it leaves nothing behind."""

import io
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from test_loop import settings
from test_settings import refused
from test_validate import ran
from warm import cli, cli_many, digest, metrics, tiny

from oneloop import data, loop
from oneloop.configs import Data
from oneloop.inputs import decoding, sources, store
from oneloop.machine import memory as memory_module
from oneloop.views import data_report


def number(pattern, text):
    """The number that a pattern's group finds."""
    return float(re.search(pattern, text)[1].replace(",", ""))


# ---------------------------------------------------------------------------------------------------------------------
# The estimate.


@pytest.mark.parametrize("task", ["ddpm", "vae"])
def test_a_dry_run_leaves_nothing(tmp_path, task):
    flags = tiny(
        tmp_path, "deep/out", task=task, steps=12, base__dry_run=True, data__num_shapes=60, data__validation_split="0.3"
    )
    flags += ["--base.num-samples", "9"]  # more than a batch, and drawn in parts
    result = ran(tmp_path, *flags)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".fork")} == {"unet.json", "vae.json", "dit.json"}
    for words in (
        "parameters ",
        "trainable, 0 frozen",
        "12 steps",
        "1 validation with samples",
        "1 checkpoint ",
        "images/s",
    ):
        assert words in result.out, result.out
    assert number(r"([\d.]+) GiB of the machine", result.out) > 0.1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_dry_run_leaves_nothing(tmp_path, number, code):
    """Before the short run has begun, when nobody else listens."""

    def patch():
        from oneloop.views import estimate

        estimate.shortened = lambda *_: os.kill(os.getpid(), number) or time.sleep(9)

    result = cli(tmp_path, *tiny(tmp_path, base__dry_run=True), patch=patch)
    assert result.code == code and "Traceback" not in result.err, result.err
    assert not list(tmp_path.glob(".dry-run*"))


@pytest.mark.parametrize("task", ["lora", "finetune", "lcm", "dmd", "textual_inversion"])
def test_images_are_looked_at_without_the_checkpoint(tmp_path, task):
    """What they are is said though the hub cannot be reached; a dry run, which needs it, is refused before it begins."""

    def patch():
        from oneloop.families import hub

        hub.unreachable = lambda: "the hub cannot be reached"

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    line = (task, "--data.train-data-dir", tmp_path, "--data.train-batch-size", "1", "--base.output-dir", tmp_path / "out")
    looked = cli(tmp_path, *line, "--base.check", patch=patch)
    assert looked.code == 0 and "trained on: 1 images" in looked.out and "example 0   a.png: 'a dog'" in looked.out, looked
    assert ("captions    not measured in tokens: the hub cannot be reached" in looked.out) == (task != "textual_inversion")
    planned = cli(tmp_path, *line, "--base.dry-run", patch=patch)
    assert planned.code == 2 and "the hub cannot be reached" in planned.err and "a short run" not in planned.err, planned.err


def test_a_dry_run_of_a_run_that_stands(tmp_path):
    ran(tmp_path, *tiny(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    ran(tmp_path, *tiny(tmp_path, steps=20, base__dry_run=True))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert not list(tmp_path.glob(".dry-run*"))


@pytest.mark.parametrize("budget, kept", [(1.0, 0.047), (0.02, 0.001)])
def test_the_estimate_knows_the_memory_budget(tmp_path, budget, kept):
    """Pixels are on the disk where all of them fit it, not where those of the short run do."""
    large = {"data__num_shapes": 4000, "data__resolution": 64, "data__memory_budget": budget}
    result = cli(tmp_path, *tiny(tmp_path, base__dry_run=True, steps=4, **large))
    assert result.code == 0, result.err
    assert number(r"made of the examples once ([\d.]+)", result.out) == pytest.approx(kept, abs=0.0011)


def test_a_dry_run_of_two_processes(tmp_path):
    first, second = cli_many(tmp_path, 2, *tiny(tmp_path, steps=4, base__dry_run=True))
    assert first.code == second.code == 0, first.err + second.err
    assert "images/s" in first.out and not second.out and not list(tmp_path.glob(".dry-run*"))


def test_the_estimate_counts(tmp_path):
    """Parameters and disk to the byte; hours from the parts."""
    whole = tiny(tmp_path, steps=12, base__checkpointing_steps=2, base__validation_steps=3)
    out = ran(tmp_path, *whole, "--base.dry-run").out
    assert "4 validations with samples" in out and "6 checkpoints" in out and "3 checkpoints of" in out
    said = ran(tmp_path, *whole).err
    assert number(r"parameters +([\d,]+) trainable", out) == number(r"([\d,]+) trainable parameters", said)
    one = sum(p.stat().st_size for p in (tmp_path / "out" / "checkpoint-12").rglob("*") if p.is_file())
    assert number(r"checkpoints of ([\d.]+)", out) == pytest.approx(one / 2**30, abs=0.0006)


def test_waiting_for_data_is_a_share(tmp_path):
    def patch():
        import time

        read = data.Examples.__getitem__
        data.Examples.__getitem__ = lambda self, numbers: (time.sleep(0.2), read(self, numbers))[1]

    flags = tiny(tmp_path, base__logging_steps=3)
    assert cli(tmp_path, *flags, patch=patch).code == 0
    slow = [line["data_wait"] for line in metrics(tmp_path / "out")]
    ran(tmp_path, *tiny(tmp_path, "quick", base__logging_steps=3))
    quick = [line["data_wait"] for line in metrics(tmp_path / "quick")]
    assert min(slow) > 0.3 and max(slow) < 1 and max(quick) < 0.3
    assert digest(tmp_path / "out") == digest(tmp_path / "quick")


def test_fewer_pictures(tmp_path):
    result = ran(tmp_path, *tiny(tmp_path, steps=None, base__num_epochs=1, data__max_train_samples=12))
    assert "3 steps, 12 examples" in result.err
    refused(cli(tmp_path, *tiny(tmp_path, "other", data__max_train_samples=3)), "--data.train-batch-size is 4", "3 images")


# ---------------------------------------------------------------------------------------------------------------------
# The check.


def photograph(seed, side=96):
    """An image of soft colours, as photographs are to a hash."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path):
    """Eighteen images; one is a copy, one saved again worse and smaller, one wide, one grey, one transparent, one small."""
    place = tmp_path / "images"
    place.mkdir()
    for i in range(12):
        photograph(i).save(place / f"{i:02d}.png")
        (place / f"{i:02d}.txt").write_text(["a dog", "", "a cat"][i % 3])
    (place / "05.txt").unlink()
    shutil.copy(place / "00.png", place / "12.png")
    photograph(1).resize((80, 80)).save(place / "13.jpg", quality=60)
    photograph(14, 64).resize((128, 64)).save(place / "14.png")
    photograph(15).convert("L").save(place / "15.png")
    photograph(16).convert("RGBA").save(place / "16.png")
    photograph(17, 20).save(place / "17.png")
    return place


def looking(tmp_path, pictures, **more):
    """A command line that trains on them."""
    return tiny(tmp_path, **{"data__train_data_dir": pictures, "data__resolution": 32} | more)


def test_a_check_says_it_all(tmp_path, pictures):
    result = ran(tmp_path, *looking(tmp_path, pictures, base__check=True))
    for line in (
        "18 can be read, 0 cannot",
        "width       20 to 128, median 96",
        "aspect      1.00 to 2.00, median 1.00",
        "modes       RGB 16, L 1, RGBA 1",
        "1 are enlarged to 32",
        "cropped     3% of an image on average, 50% at most",
        "captions    2 different; 7 images have none, of 4 it is empty",
        "labels      none",
        "exact twins 1 (such as ",
        "near twins  1 (such as ",
    ):
        assert line in result.out, (line, result.out)
    assert re.search(r"exact.*12.png of .*00.png", result.out) and re.search(r"near.*13.jpg of .*01.png", result.out)
    assert not (tmp_path / "out").exists()


def test_broken_pictures(tmp_path, pictures):
    """Named and refused, by a check and by a run; or left out, which is said and listed, and does not end the run."""
    (pictures / "03.png").write_bytes((pictures / "03.png").read_bytes()[:400])
    (pictures / "05.png").write_text("not an image")
    checked = cli(tmp_path, *looking(tmp_path, pictures, base__check=True))
    refused(checked, "2 images cannot be read", "03.png", "05.png", "--data.skip-broken")
    assert "16 can be read, 2 cannot" in checked.out
    refused(cli(tmp_path, *looking(tmp_path, pictures)), "2 of 18 images cannot be read", "--data.skip-broken")
    assert not (tmp_path / "out").exists()
    said = ran(tmp_path, *looking(tmp_path, pictures, data__skip_broken=True, steps=12)).err
    assert "2 images cannot be read and are left out" in said
    assert [name in (tmp_path / "out" / "broken.txt").read_text() for name in ("03.png", "05.png", "04.png")] == [1, 1, 0]
    assert "16 can be read" in ran(tmp_path, *looking(tmp_path, pictures, base__check=True, data__skip_broken=True)).out


def test_a_run_says_what_is_worth_it_and_keeps_it(tmp_path, pictures):
    flags = looking(tmp_path, pictures, steps=2)
    said = ran(tmp_path, *flags).err
    assert "warning: 1 of 18 images are smaller than 32" in said and "warning: 7 of 18 images have no caption" in said
    assert "warning: 4 of 18 images have an empty caption" in said
    assert said.count("an earlier one") == 2
    kept = tmp_path / "out" / "check.json"
    found = json.loads(kept.read_text())
    kept.write_text(json.dumps(found | {"small": 7}))  # read, not made again
    assert "7 of 18 images are smaller" in ran(tmp_path, *flags, "--base.max-train-steps", "3").err
    kept.write_text(json.dumps(found | {"small": 7, "fingerprint": "of other images"}))
    assert "warning: 1 of 18 images are smaller" in ran(tmp_path, *flags, "--base.max-train-steps", "4").err


def test_a_check_decodes_large_jpegs_smaller(tmp_path):
    """Their sizes are those of the file, upright, and a file that ends early is found as ever."""
    place = tmp_path / "large"
    place.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for i in range(6):
        photograph(i, 400).resize((640, 400)).save(place / f"{i}.jpg", exif=exif if i == 0 else b"")
    cfg = Data(train_data_dir=str(place), resolution=100, train_batch_size=2)
    found, whole = (store.decode(sources.open_source(cfg), cfg, skim=skim).columns for skim in (True, False))
    assert found["size"].tolist() == whole["size"].tolist() == [[640, 400]] + 5 * [[400, 640]]
    assert not torch.equal(found["mark"], whole["mark"]) and torch.equal(found["room"], whole["room"])
    assert (found["thumb"].int() - whole["thumb"].int()).abs().float().mean((1, 2, 3)).max() < 2
    (place / "3.jpg").write_bytes((place / "3.jpg").read_bytes()[:-3000])
    refused(cli(tmp_path, *looking(tmp_path, place, base__check=True)), "1 images cannot be read", "3.jpg")


def test_near_twins():
    """Saved again at any size and quality: found. Other images, and the same in other colours: not."""
    originals = [photograph(seed, 200) for seed in range(100)]
    copies = []
    for image, side, quality in zip(originals, (60, 100, 200, 331) * 25, (40, 70, 95, 40) * 25, strict=True):
        buffer = io.BytesIO()
        image.resize((side, side)).save(buffer, "JPEG", quality=quality)
        copies.append(Image.open(buffer))
    turned = [Image.merge("RGB", image.split()[::-1]) for image in originals]
    thumbs = np.stack([decoding.thumb(image) for image in (*originals, *copies, *turned)])
    pairs = {tuple(pair) for pair in data_report.near_pairs(thumbs).tolist()}
    true = {(i, i + 100) for i in range(100)}
    assert len(pairs & true) > 92 and not pairs - true, (len(pairs & true), pairs - true)


def test_many_alike_take_no_quadratic_time():
    """Five thousand flat images, all of one hash: compared with their neighbours only."""
    thumbs = np.random.default_rng(0).integers(0, 256, (5000, 1, 1, 3), dtype=np.uint8).repeat(8, 1).repeat(9, 2)
    began = time.process_time()
    pairs = data_report.near_pairs(thumbs)
    assert time.process_time() - began < 10 and len(pairs) < 5000
    assert len(data_report.near_pairs(thumbs[:1].repeat(500, 0))) >= 499


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory.


def test_out_of_memory(tmp_path):
    """A real refusal by the allocator, in the second update: one line with figures, and a code of its own."""

    def patch():
        from oneloop.tasks import ddpm

        real = ddpm.loss_fn

        def loss_fn(models, batch, rng, cfg):
            if batch["step"] == 1:
                torch.empty(2**50)
            yield from real(models, batch, rng, cfg)

        object.__setattr__(ddpm.task, "loss_fn", loss_fn)

    flags = tiny(tmp_path, steps=3, base__checkpointing_steps=1, base__mixed_precision="no")
    result = cli(tmp_path, *flags, patch=patch)
    assert result.code == 5 and result.err.count("error: ") == 1, result.err
    line = result.err[result.err.index("error: ") :]
    assert len(line.strip().splitlines()) == 1 and line.startswith("error: out of memory on cpu, after 1 steps: ")
    for words in ("weights 0.00", "averages 0.00", "and 4194304.00 more were asked for", "--base.dry-run"):
        assert words in line, (words, line)
    assert line.count("saves about") == 3 and "--base.gradient-checkpointing saves about" in line
    assert ran(tmp_path, *flags).err.count("resuming after step 1") == 1


def test_what_takes_the_memory(tmp_path):
    """The figures, from a GPU's own words: a model of 2^28 weights in float32, of which a quarter trains."""
    with torch.device("meta"):
        models = {"a": torch.nn.Linear(2**14, 2**12, bias=False), "frozen": torch.nn.Linear(2**14, 3 * 2**12, bias=False)}
    models["frozen"].requires_grad_(False)
    sgd = {"a": torch.optim.SGD(models["a"].parameters())}
    state = loop.TrainState({"a": models["a"]}, sgd, {"a.weight": models["a"].weight})
    memory = memory_module.Memory(settings(tmp_path, {"train_batch_size": 3}, mixed_precision="no"), torch.device("meta"))
    memory.watch(models, state)
    parts = memory_module.bytes_of(models, state, torch.device("meta"), False)
    assert {name: n / 2**30 for name, n in parts.items()} == {
        "weights": 1.0,
        "gradients and optimizer": 0.75,
        "averages": 0.25,
    }
    assert memory_module.bytes_of(models, state, torch.device("meta"), True) == parts  # of a single parameter
    ways = dict(memory.ways(parts, 6 * 2**30))
    saved = {flags.split()[0]: n / 2**30 for flags, n in ways.items()}
    computed = {"data.train-batch-size": 4.0, "base.mixed-precision": 3.375, "base.offload-ema": 0.25, "data.resolution": 4.5}
    computed["base.fused-backward-pass"] = 0.25
    assert saved == pytest.approx({f"--{flag}": gib for flag, gib in computed.items()})
    with pytest.raises(memory_module.OutOfMemory, match=r"and 2.00 more were asked for; .* most: --data.resolution 4 "), memory:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
    with pytest.raises(RuntimeError, match="something else"), memory:
        raise RuntimeError("something else")
