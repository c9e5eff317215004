"""What is said of a run before it is one, and that saying it leaves nothing behind."""

import re

import pytest
from test_settings import refused
from test_validate import ran
from warm import cli, cli_many, digest, metrics, tiny


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
    result = ran(tmp_path, *flags)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".fork")} == {"unet.json", "vae.json"}
    for words in (
        "parameters ",
        "trainable, 0 frozen",
        "12 steps",
        "1 times validation and samples",
        "1 checkpoints",
        "pictures/s",
    ):
        assert words in result.out, result.out
    assert number(r"([\d.]+) GiB of the machine", result.out) > 0.1


def test_a_dry_run_of_a_run_that_stands(tmp_path):
    ran(tmp_path, *tiny(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    ran(tmp_path, *tiny(tmp_path, steps=20, base__dry_run=True))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert not list(tmp_path.glob(".dry-run*"))


def test_a_dry_run_of_two_processes(tmp_path):
    first, second = cli_many(tmp_path, 2, *tiny(tmp_path, steps=4, base__dry_run=True))
    assert first.code == second.code == 0, first.err + second.err
    assert "pictures/s" in first.out and not second.out and not list(tmp_path.glob(".dry-run*"))


def test_the_estimate_counts(tmp_path):
    """Parameters and disk to the byte; hours from the parts."""
    whole = tiny(tmp_path, steps=12, base__checkpointing_steps=2, base__validation_steps=3)
    out = ran(tmp_path, *whole, "--base.dry-run").out
    assert "4 times validation and samples" in out and "6 checkpoints" in out and "3 checkpoints of" in out
    said = ran(tmp_path, *whole).err
    assert number(r"parameters +([\d,]+) trainable", out) == number(r"([\d,]+) trainable parameters", said)
    one = sum(p.stat().st_size for p in (tmp_path / "out" / "checkpoint-12").rglob("*") if p.is_file())
    assert number(r"checkpoints of ([\d.]+)", out) == pytest.approx(one / 2**30, abs=0.0006)


def test_waiting_for_data_is_a_share(tmp_path):
    def patch():
        import time

        import data

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
    refused(cli(tmp_path, *tiny(tmp_path, "other", data__max_train_samples=3)), "--data.train-batch-size is 4", "3 pictures")
