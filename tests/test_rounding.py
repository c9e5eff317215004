"""training/rounding.py: bfloat16 weights that are right on average, in runs that resume to the same bits."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_contract import command as following
from test_finetune import command as finetune
from test_lora import draw_photos
from test_optimizers import ends_equal, installed
from warm import cli, cli_many, digest, tiny

from oneloop.configs import BadInput
from oneloop.settings import command_line
from oneloop.training import optimizers, rounding

KINDS = ("adamw", "adamw8bit", "adafactor", "muon")
NARROW = {"base.weights": "bf16", "base.mixed_precision": "bf16"}


def made(kind, params, rate=1e-4):
    """An optimizer as the settings make it."""
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8}
    return optimizers.make(params, SimpleNamespace(optimizer=installed(kind), learning_rate=rate, **adam))


def test_rounding_is_to_a_neighbour_and_right_on_average():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1 + 2**-9, -(1 + 3 * 2**-10), 3.1e-39, -7.77e20, 0.3])  # a quarter, three eighths, ... of the way
    several = torch.stack([rounding.rounded(x, generator).float() for _ in range(4000)])
    below = x.view(torch.int32) & -(2**16)
    step = ((below + 2**16).view(torch.float32) - below.view(torch.float32)).abs()  # between the two neighbours
    assert ((several - x).abs() < step * 1.01).all() and (several.std(0) > 0.1 * step).all()
    assert ((several.mean(0) - x).abs() < 5 * step * 0.5 / 4000**0.5).all()
    exact = torch.tensor([0.0, 1.0, -2.5, 1e30]).bfloat16().float()
    assert torch.equal(rounding.rounded(exact, generator).float(), exact)
    odd = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000], dtype=torch.int32).view(torch.float32)  # nan, inf, -inf
    assert (
        torch.equal(rounding.rounded(odd, generator).isnan(), odd.isnan())
        and not rounding.rounded(odd, generator).isfinite().any()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_float32_ones_rounded(kind, monkeypatch):
    """With several parameters of which two are copied at a time, one without a gradient and one in float32."""
    torch.manual_seed(0)
    wide = [torch.nn.Parameter(torch.randn(96, 64).bfloat16().float()) for _ in range(3)]
    wide += [torch.nn.Parameter(torch.randn(64).bfloat16().float()), torch.nn.Parameter(torch.randn(64))]
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide[:-1]] + [torch.nn.Parameter(wide[-1].detach().clone())]
    whole, ours = made(kind, wide, 1e-2), made(kind, narrow, 1e-2)
    monkeypatch.setattr(rounding, "TOGETHER", 2 * 96 * 64)
    rounding.attach(ours, 0, "all")
    addresses = [p.data_ptr() for p in narrow]
    before = [p.detach().clone() for p in narrow]
    for _ in range(3):
        for p, q in zip(wide, narrow, strict=True):
            if p is not wide[1]:
                q.grad = torch.randn_like(q)
                p.grad = q.grad.float()
        whole.step(), ours.step()
    assert [p.data_ptr() for p in narrow] == addresses and [p for g in ours.param_groups for p in g["params"]]
    for p, q, old in zip(wide, narrow, before, strict=True):
        assert (p is wide[1]) == torch.equal(q, old)
        apart = (p - q.float()).abs()
        assert (apart <= 3 * (p.abs() + 0.03) * 2**-7).all() and (apart.any() or p is wide[1] or p is wide[-1])
        if p is not wide[1] and kind != "adafactor":  # whose state is of the weights too
            same = {key: x for key, x in whole.state[p].items() if torch.is_tensor(x)}
            assert same and all(torch.equal(ours.state[q][key], x) for key, x in same.items())
        assert p is wide[1] or (kind == "muon" and p.ndim == 2) or int(ours.state[q]["step"]) == 3
    assert {id(p) for p in ours.state} <= {id(p) for p in narrow}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_goes_on_in_the_same_bits(kind):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(96, 64).bfloat16()), torch.nn.Parameter(torch.randn(64).bfloat16())]

    def steps(params, optimizer, numbers):
        for n in numbers:
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * n + i)).bfloat16()
            optimizer.step()

    optimizer = made(kind, params)
    rounding.attach(optimizer, 0, "all")
    steps(params, optimizer, range(3))
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = made(kind, again)
    rounding.attach(resumed, 0, "all")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(params, optimizer, range(3, 6)), steps(again, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    other = [torch.nn.Parameter(p.detach().clone()) for p in params]
    unlike = made(kind, other)
    rounding.attach(unlike, 1, "all")
    unlike.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(params, optimizer, [6]), steps(other, unlike, [6])
    assert not torch.equal(params[0], other[0])  # another seed


def test_parameters_and_optimizers_draw_for_themselves():
    """Equal ones, with equal gradients: of one part, of the other part of muon, and of another optimizer."""
    torch.manual_seed(0)
    start, params = torch.randn(64, 8).bfloat16(), []
    for kind, name in (("muon", "one"), ("muon", "other"), ("adamw", "third")):
        several = [torch.nn.Parameter(start.clone()) for _ in range(2)] + [torch.nn.Parameter(start[:, 0].clone())]
        optimizer = made(kind, several)
        rounding.attach(optimizer, 0, name)
        for _ in range(3):
            for p in several:
                p.grad = torch.ones_like(p)
            optimizer.step()
        params.append(several)
    matrices = [p for several in params for p in several[:2]]
    assert not any(torch.equal(p, q) for i, p in enumerate(matrices) for q in matrices[:i])
    assert not torch.equal(params[0][2], params[1][2])


def test_steps_that_the_nearest_value_would_lose_are_taken():
    """A hundred steps of 1e-4 from 1: a bfloat16 below 1 is 2^-8 away."""
    ends = []
    for attached in (True, False):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = made("adamw", [p])
        if attached:
            rounding.attach(optimizer, 0, "all")
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends.append(p.detach().float())
    assert float(ends[0].mean()) == pytest.approx(0.99, abs=1e-3) and (ends[1] == 1).all()
    assert float(ends[0].std()) == pytest.approx((100 * 0.0256) ** 0.5 / 256, rel=0.2)  # each step draws for itself


def test_runs_resume_in_the_same_bits_and_export(tmp_path, built):
    """Models of their own, two optimizers of them, and one that is fine-tuned with its text encoder, whose load.py draws; the
    EMA is float32, what trains and its export are bfloat16."""
    photos, run = draw_photos(tmp_path / "photos"), {"base.max_train_steps": 4, "base.checkpointing_steps": 2}
    own = tiny(tmp_path, "ddpm", **run, **NARROW)
    more = {key.replace(".", "__"): value for key, value in (run | NARROW).items()}
    tuned = finetune(tmp_path, built("sd"), photos, "tuned", finetune__train_text_encoder=True, **more)
    pair = tiny(tmp_path, "pair", 4, "vae", **run, **NARROW)
    ends_equal(tmp_path, {"ddpm": own, "tuned": tuned, "pair": pair})
    done = subprocess.run([sys.executable, "load.py"], cwd=tmp_path / "tuned" / "checkpoint-4", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("ddpm", "tuned"):
        state = tmp_path / name / "checkpoint-4" / "state"
        weights, average = load_file(state / "model.safetensors"), load_file(state / "ema.safetensors")
        assert {x.dtype for x in average.values()} == {torch.float32}
        assert {x.dtype for x in weights.values() if x.is_floating_point()} == {torch.bfloat16}
    exported = load_file(tmp_path / "tuned" / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(x.bfloat16(), average[f"unet.{key}"].bfloat16()) for key, x in exported.items())


def test_two_processes_round_alike(tmp_path):
    results = cli_many(tmp_path, 2, *tiny(tmp_path, "two", **{"base.max_train_steps": 4, "data.train_batch_size": 2}, **NARROW))
    assert all(result.code == 0 for result in results), results[0].err
    assert cli(tmp_path, *tiny(tmp_path, "one", **{"base.max_train_steps": 4, "data.train_batch_size": 4}, **NARROW)).code == 0
    one, two = (load_file(tmp_path / name / "checkpoint-4" / "state" / "model.safetensors") for name in ("one", "two"))
    assert digest(tmp_path / "one") and max(float((x.float() - two[key].float()).abs().max()) for key, x in one.items()) < 0.02


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--base.weights", "bf16"], "--base.weights is 'bf16'; expected --base.mixed-precision bf16 beside it"),
        (
            [
                "--base.weights",
                "bf16",
                "--base.mixed-precision",
                "bf16",
                "--ddpm.optimizer",
                "prodigy",
                "--ddpm.learning-rate",
                "1",
            ],
            "--base.weights is 'bf16'; expected float32 with --ddpm.optimizer prodigy",
        ),
    ],
)
def test_what_does_not_go_is_a_line(flags, says):
    with pytest.raises((BadInput, SystemExit)) as refused:
        command_line.parse(["ddpm", *flags])
    assert says in str(refused.value)


def test_batch_norms_and_followers_stay_float32(tmp_path):
    more = {name.replace(".", "__"): value for name, value in NARROW.items()}
    done = cli(tmp_path, *following(tmp_path, "out", following__moving=True, **more))
    assert done.code == 0, done.err
    state = next((tmp_path / "out").glob("checkpoint-*/state"))
    kinds = {key: x.dtype for key, x in load_file(state / "model.safetensors").items() if x.is_floating_point()}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}, kinds
    assert {key for key, kind in kinds.items() if kind == torch.float32} == {key for key in kinds if "norm" in key}
    assert {x.dtype for x in load_file(state / "ema.safetensors").values()} == {torch.float32}
