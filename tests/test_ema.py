"""Averages of any length after training: the mathematics, and runs whose checkpoints hold what they are made of."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from warm import cli, tiny

from oneloop.configs import Base
from oneloop.training import ema

LENGTHS = (0.05, 0.1)
HELD = ("--base.ema-lengths", "0.05", "0.1", "--base.checkpointing-steps", "4", "--base.lr-scheduler", "constant")


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_a_length_is_the_deviation_of_the_steps_that_it_averages(length):
    """By summing over them; and gamma = 6.94 is 0.10 in the paper, 16.97 is 0.05."""
    weights, steps = np.arange(1, 100_001) / 1e5, np.arange(1, 100_001) / 1e5
    weights = weights ** ema.exponent(length)
    mean = (weights * steps).sum() / weights.sum()
    assert math.sqrt((weights * (steps - mean) ** 2).sum() / weights.sum()) == pytest.approx(length, rel=1e-3)
    published = {0.05: 16.97, 0.1: 6.94}.get(length)
    assert published is None or ema.exponent(length) == pytest.approx(published, abs=5e-3)


def walked(total, seed=0):
    """A weight that drifts and trembles, a value a step, [total + 1] float64."""
    noise = torch.randn(total + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linspace(0, 3, total + 1, dtype=torch.float64).sqrt() + noise.cumsum(0) / 40


def averaged(path, length):
    """The average of this length after each step, [total + 1], by its definition: each step's value has the weight s^gamma."""
    power = ema.exponent(length) + 1
    weights = torch.arange(len(path), dtype=torch.float64) ** power
    weights = torch.cat([weights[:1], weights.diff()])
    return (weights * path).cumsum(0) / weights.cumsum(0).clamp(min=1e-300)


def test_the_update_is_the_average_by_its_definition():
    path = walked(50)
    weight = torch.nn.Parameter(path[:1].float())
    base = Base(output_dir="unused", ema_lengths=LENGTHS)
    kept = ema.of_lengths({"net.w": weight}, base)
    assert [list(each.values) for each in kept] == [["0.05/net.w"], ["0.1/net.w"]]
    for step in range(1, 51):
        weight.data.copy_(path[step : step + 1])
        for each in kept:
            each.update(step, 50)
    for each, length in zip(kept, LENGTHS, strict=True):
        (value,) = each.values.values()
        assert value.item() == pytest.approx(averaged(path, length)[-1].item(), rel=1e-5)


@pytest.mark.parametrize("length", [0.04, 0.07, 0.12, 0.2])
def test_another_length_is_a_sum_of_stored_ones(length):
    """The sum lies far nearer to the average of that length than the stored ones do: the mean square over walks."""
    stored = [(step, own) for step in range(200, 2001, 200) for own in LENGTHS]
    factors, apart = ema.coefficients(stored, 2000, length)
    assert sum(factors) == pytest.approx(1) and apart < 0.1
    off = []
    for seed in range(20):
        path = walked(2000, seed)
        own = {each: averaged(path, each) for each in (*LENGTHS, length)}
        made = sum(x * own[each][step] for x, (step, each) in zip(factors, stored, strict=True))
        off.append([float(x - own[length][-1]) ** 2 for x in (made, *(own[each][-1] for each in LENGTHS))])
    made, *others = np.mean(off, 0)
    assert made < 0.02 * min(others)


def test_a_stored_length_is_itself():
    factors, apart = ema.coefficients([(50, 0.05), (50, 0.1), (100, 0.05), (100, 0.1)], 100, 0.1)
    assert factors == pytest.approx([0, 0, 0, 1], abs=1e-6) and apart < 1e-3
    alone, far = ema.coefficients([(50, 0.05)], 100, 0.1)
    assert alone == [pytest.approx(1)] and far > 0.9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert cli(folder, *tiny(folder, steps=8, task="edm"), *HELD).code == 0
    return folder


def test_nothing_else_of_a_run_changes(run, tmp_path):
    """And one that was stopped and resumed holds the same; one with other lengths is another run."""
    line = tiny(tmp_path, steps=4, task="edm")
    assert cli(tmp_path, *line, *HELD).code == 0
    said = cli(tmp_path, *tiny(tmp_path, steps=8, task="edm"), "--base.ema-lengths", "0.05")
    assert said.code == 2 and "--base.ema-lengths" in said.err
    assert cli(tmp_path, *tiny(tmp_path, steps=8, task="edm"), *HELD).code == 0
    bare = tmp_path / "bare"
    bare.mkdir()
    assert cli(bare, *tiny(bare, steps=8, task="edm"), *HELD[3:]).code == 0
    whole, resumed, without = (load_file(f / "out/checkpoint-8/state/ema.safetensors") for f in (run, tmp_path, bare))
    assert whole.keys() == resumed.keys() and all(torch.equal(x, resumed[key]) for key, x in whole.items())
    assert {key for key in whole if "/" not in key} == without.keys() and len(whole) == 3 * len(without)
    assert all(torch.equal(x, whole[key]) for key, x in without.items())


def test_an_average_of_another_length_is_a_run_of_its_own(run, tmp_path):
    """A stored length is what was stored; another one is the sum, in the export and in the samples."""
    made, kept = tmp_path / "made", load_file(run / "out/checkpoint-8/state/ema.safetensors")
    said = cli(run, "ema", "out", "0.07", "--to", made)
    assert said.code == 0 and "made of 4 averages in 2 checkpoints, which come within" in said.out, said.err
    same = tmp_path / "same"
    assert cli(run, "ema", "out", "0.1", "--to", same).code == 0
    found = load_file(same / "checkpoint-8/state/ema.safetensors")
    assert all(torch.allclose(x, kept[f"0.1/{key}"], atol=1e-5) for key, x in found.items() if "/" not in key)
    before = load_file(run / "out/checkpoint-4/state/ema.safetensors")
    factors, _ = ema.coefficients([(4, 0.05), (4, 0.1), (8, 0.05), (8, 0.1)], 8, 0.07)
    terms = [(state, length) for state in (before, kept) for length in LENGTHS]
    names = ("state/ema.safetensors", "unet/diffusion_pytorch_model.safetensors")
    shown, unet = (load_file(made / "checkpoint-8" / name) for name in names)
    for key, x in unet.items():
        wanted = sum(c * state[f"{length:g}/unet.{key}"] for c, (state, length) in zip(factors, terms, strict=True))
        assert torch.allclose(x, wanted, atol=1e-5) and torch.equal(x, shown[f"unet.{key}"])
    assert cli(run, "sample", made, "--num", "2", "--to", tmp_path / "made.png").code == 0
    assert cli(run, "sample", "out", "--num", "2", "--to", tmp_path / "own.png").code == 0
    assert (tmp_path / "made.png").read_bytes() != (tmp_path / "own.png").read_bytes()
    assert json.loads((made / "run.json").read_text())["base"]["output_dir"] == str(made)
    assert cli(run, "ema", "out/checkpoint-4", "0.07", "--to", tmp_path / "early").code == 0
    assert [p.name for p in (tmp_path / "early").glob("checkpoint-*")] == ["checkpoint-4"]


def test_mistakes_are_a_line(run, tmp_path):
    def told(*argv):
        said = cli(run, "ema", *argv)
        assert said.code == 2 and said.err.strip().count("\n") == 0, said.err
        return said.err

    assert cli(tmp_path, *tiny(tmp_path, steps=2, task="edm")).code == 0
    to = ("--to", tmp_path / "new")
    assert "its checkpoints hold no averages; expected a run with --base.ema-lengths" in told(tmp_path / "out", "0.1", *to)
    assert "is 0.5; expected" in told("out", "0.5", *to) and "there is no such folder" in told("nowhere", "0.1", *to)
    assert "expected a name that is not taken" in told("out", "0.1", "--to", tmp_path)
    assert not (tmp_path / "new").exists()
    for lengths in (("0.05", "0.05"), ("0.1", "--base.no-use-ema"), ("0.4",)):
        said = cli(tmp_path, *tiny(tmp_path, steps=2, task="edm"), "--base.ema-lengths", *lengths)
        assert said.code == 2 and "--base.ema-lengths" in said.err
