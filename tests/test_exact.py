"""A run is a function of its settings, its seed and the step: stopping, splitting and loading change nothing."""

import json
import shutil

import pytest
from warm import UNET, cli, cli_many, digest, distance, metrics, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three passes over the data (18 steps) with accumulation, dropout and EMA, and all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    flags = tiny(folder, steps=18, base__checkpointing_steps=1, base__checkpoints_total_limit=None)
    result = cli(folder, *flags)
    assert result.code == 0, result.err
    return folder / "out"


@pytest.mark.parametrize("stop", range(1, 18))
def test_continued_is_equal(tmp_path, whole, stop):
    """From any update, over epochs' ends too, to the same bits."""
    shutil.copytree(whole / f"checkpoint-{stop}", tmp_path / "out" / f"checkpoint-{stop}")
    result = cli(tmp_path, *tiny(tmp_path, steps=18))
    assert result.code == 0 and f"resuming after step {stop}" in result.err, result.err
    assert digest(tmp_path / "out") == digest(whole)
    assert [m["step"] for m in metrics(tmp_path / "out")][-1] == 18


def test_layouts(tmp_path):
    """1 x 4, 2 accumulated x 2 and 2 processes x 2: the same examples and noise, so the same weights."""

    def command(out, **more):
        flags = tiny(tmp_path, out, ddpm__learning_rate=1e-4, ddpm__adam_epsilon=1e-3, **more)
        (tmp_path / "unet.json").write_text(json.dumps(UNET | {"dropout": 0.0}))
        return flags

    assert cli(tmp_path, *command("one")).code == 0
    split = {"data__train_batch_size": 2}
    assert cli(tmp_path, *command("accumulated", **split, base__gradient_accumulation_steps=2)).code == 0
    for result in cli_many(tmp_path, 2, *command("processes", **split)):
        assert result.code == 0, result.err
    assert 0 < distance(tmp_path / "one", tmp_path / "accumulated") < 1e-6
    assert digest(tmp_path / "accumulated") == digest(tmp_path / "processes")
