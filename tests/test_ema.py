"""Averages of any length after training: the mathematics, and runs whose checkpoints hold what they are made of."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from warm import cli, tiny

from oneloop import checkpoint, loop
from oneloop.configs import Base
from oneloop.machine import memory
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


def summed(files, length, step):
    """The average that files of these steps hold together."""
    pairs = [(at, own) for at in files for own in LENGTHS]
    factors, _ = ema.coefficients(pairs, step, length)
    states = {at: load_file(path / "state/ema.safetensors") for at, path in files.items()}
    shown = [key for key in states[step] if "/" not in key]
    return {
        key: sum(factor * states[at][f"{own}/{key}"] for factor, (at, own) in zip(factors, pairs, strict=True)) for key in shown
    }


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.allclose(x, wanted[key], atol=1e-5) for key, x in found.items())


def shown(folder):
    """The average that samples and exports show."""
    state = load_file(folder / "state/ema.safetensors")
    return {key: x for key, x in state.items() if "/" not in key}


def test_an_average_of_another_length_is_a_run_of_its_own(run, tmp_path):
    """The sum, in the export and in the samples; a stored length is what was stored; a step has what was before it alone."""
    made, files = tmp_path / "made", {8: run / "out/checkpoint-8", 4: run / "out/checkpoint-4"}
    said = cli(run, "ema", "out", "--length", "0.07", "--to", made)
    assert said.code == 0 and "averages of length 0.05, 0.1 in 2 checkpoints come within" in said.out, said.err
    found, unet = shown(made / "checkpoint-8"), load_file(made / "checkpoint-8/unet/diffusion_pytorch_model.safetensors")
    assert same(found, summed(files, 0.07, 8)) and {f"unet.{key}" for key in unet} == found.keys()
    assert all(torch.equal(x, found[f"unet.{key}"]) for key, x in unet.items())
    assert cli(run, "ema", "out", "--length", "0.1", "--to", tmp_path / "same").code == 0
    kept = load_file(run / "out/checkpoint-8/state/ema.safetensors")
    assert same(shown(tmp_path / "same/checkpoint-8"), {key: kept[f"0.1/{key}"] for key in found})
    assert cli(run, "ema", "out/checkpoint-4", "--length", "0.07", "--to", tmp_path / "early").code == 0
    assert same(shown(tmp_path / "early/checkpoint-4"), summed({4: run / "out/checkpoint-4"}, 0.07, 4))
    for name, to in ((made, "made.png"), ("out", "own.png")):
        assert cli(run, "sample", name, "--num", "2", "--to", tmp_path / to).code == 0
    assert (tmp_path / "made.png").read_bytes() != (tmp_path / "own.png").read_bytes()
    for settings in (json.loads((made / "run.json").read_text()), checkpoint.verify(made / "checkpoint-8")["settings"]):
        assert settings["base"]["output_dir"] == str(made)
    longer = cli(tmp_path, *tiny(tmp_path, "made", steps=9, task="edm"), *HELD)
    assert longer.code == 2 and "checkpoint-8 has no optimizer's state: what `python loop.py ema` made" in longer.err


def test_what_is_not_of_the_run_is_left_out(run, tmp_path):
    """Another run's checkpoint, a damaged one and a folder of someone's, a line each; a checkpoint elsewhere is alone."""
    out = shutil.copytree(run / "out", tmp_path / "out")
    assert cli(tmp_path, *tiny(tmp_path, "other", steps=6, task="edm"), *HELD, "--base.seed", "5").code == 0
    shutil.copytree(tmp_path / "other/checkpoint-6", out / "checkpoint-6")
    damaged = shutil.copytree(out / "checkpoint-4", out / "checkpoint-2") / "state/ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (out / "checkpoint-mine").mkdir()
    said = cli(tmp_path, "ema", "out", "--length", "0.07", "--to", "made")
    assert said.code == 0 and said.err.count("left out: ") == 3 and "checkpoint-6 is of another run" in said.err, said
    assert said.out.count("\n") == 1 and said.out.startswith("made: "), said
    files = {8: out / "checkpoint-8", 4: out / "checkpoint-4"}
    assert same(shown(tmp_path / "made/checkpoint-8"), summed(files, 0.07, 8))
    alone = shutil.copytree(out / "checkpoint-8", tmp_path / "best")
    said = cli(tmp_path, "ema", "best", "--length", "0.07", "--to", "one")
    assert said.code == 0 and "in 1 checkpoint come within" in said.out, said
    assert same(shown(tmp_path / "one/checkpoint-8"), summed({8: alone}, 0.07, 8))


def test_mistakes_are_a_line(run, tmp_path):
    def told(folder, length, to=tmp_path / "new"):
        said = cli(run, "ema", folder, "--length", length, "--to", to)
        assert said.code == 2 and said.err.strip().count("\n") == 0, said
        return said.err

    assert cli(tmp_path, *tiny(tmp_path, steps=2, task="edm")).code == 0
    assert "its checkpoints hold no averages; expected a run with --base.ema-lengths" in told(tmp_path / "out", "0.1")
    assert "--length is 0.5; expected" in told("out", "0.5") and "there is no such folder" in told("nowhere", "0.1")
    assert "--length is 0.001; expected one that they can make: the averages of length 0.05, 0.1 in 2" in told("out", "0.001")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for taken in (tmp_path, tmp_path / "dangling", run / "out/checkpoint-9"):
        assert "expected a name that is not taken, outside the run" in told("out", "0.1", taken)
    assert not (tmp_path / "new").exists() and not (run / "out/checkpoint-9").exists()
    averaging = ("0.1", "--edm.optimizer", "schedulefree", "--base.lr-scheduler", "constant")
    for lengths in (("0.05", "0.05"), ("0.1", "--base.no-use-ema"), ("0.4",), averaging):
        said = cli(tmp_path, *tiny(tmp_path, steps=2, task="edm"), "--base.ema-lengths", *lengths)
        assert said.code == 2 and "--base.ema-lengths" in said.err, said.err


def test_what_they_take_is_counted():
    """A copy of what trains for each length, where the EMA is."""
    weights = {"net.w": torch.nn.Parameter(torch.zeros(1000))}
    state = loop.TrainState({}, {}, ema.begin(weights, False))
    counted = lambda: memory.bytes_of({}, state, torch.device("cpu"), False)["averages"]  # noqa: E731
    assert counted() == 4000
    for each in ema.of_lengths(weights, Base(output_dir="unused", ema_lengths=LENGTHS, offload_ema=True)):
        state.kept |= each.values
        assert each.offloaded
    assert counted() == 12000
