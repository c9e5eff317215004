"""The update in the backward pass: the steps of a run without it, to the bit, with one gradient at a time."""

import dataclasses
import shutil

import pytest
import torch
from test_loop import Scale, settings, toy
from test_optimizers import installed
from torch.utils.checkpoint import checkpoint as recompute
from warm import checkpoints, cli_many, digest, fork, metrics, tiny

from oneloop import loop
from oneloop.configs import BadInput
from oneloop.settings import command_line
from oneloop.tasks import Loss
from oneloop.training import fused
from oneloop.training.guard import NonFinite

FUSED = {"base.fused_backward_pass": True, "base.max_grad_norm": 0}
RUN = {"base.max_train_steps": 4, "base.checkpointing_steps": 2, "base.logging_steps": 1, "base.max_grad_norm": 0}


KINDS = {
    **{
        kind: ("ddpm", {"ddpm.optimizer": kind, "ddpm.learning_rate": 3e-3})
        for kind in ("adamw", "adamw8bit", "adafactor", "muon")
    },
    "two optimizers": ("vae", {"vae.optimizer": "muon"}),
    "bf16 weights": ("ddpm", {"base.weights": "bf16", "base.mixed_precision": "bf16", "ddpm.optimizer": "muon"}),
    "recomputed": ("ddpm", {"base.gradient_checkpointing": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(tmp_path, kind):
    """As without it: weights, averages, states, rates and the norms that are logged; and where a resumed run changes over."""
    task, more = KINDS[kind]
    installed(more.get("ddpm.optimizer", "adamw"))
    module, cfg = command_line.parse(tiny(tmp_path, "out", 4, task, **RUN | more))

    def run(name, on):
        base = dataclasses.replace(cfg.base, output_dir=str(tmp_path / name), fused_backward_pass=on)
        loop.run(module.task, dataclasses.replace(cfg, base=base))

    def runs():
        for name, on, then in (("plain", False, False), ("fused", True, True), ("changed", True, False)):
            run(name, on)
            shutil.copytree(tmp_path / name / "checkpoint-2", tmp_path / f"{name}-2" / "checkpoint-2")
            run(f"{name}-2", then)

    result = fork(runs, tmp_path).wait(240)
    assert result.code == 0, result.err
    names = ("plain", "fused", "changed")
    assert len({digest(tmp_path / f"{name}{part}") for name in names for part in ("", "-2")}) == 1
    norms = [[{key: line[key] for key in line if "grad_norm" in key} for line in metrics(tmp_path / name)] for name in names]
    assert norms[0] == norms[1] == norms[2] and sum(map(bool, norms[0])) == 4


def test_one_gradient_at_a_time(tmp_path, monkeypatch):
    most, step = [], torch.optim.SGD.step

    def watched(optimizer, *given):
        most.append(sum(p.grad is not None for module in seen for p in module.parameters()))
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    seen = [torch.nn.Sequential(*(Scale(1.0) for _ in range(5)))]

    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", models["a"](torch.ones(3)).sum())

    task = toy(loss_fn, lambda cfg: {"a": seen[0]}, lr=0.1)
    for on, counts in ((False, [5]), (True, [1, 1, 1, 1, 1, 0])):
        most.clear()
        base = settings(tmp_path / str(on), max_grad_norm=0, fused_backward_pass=on)
        loop.run(task, base)
        assert most == counts


def test_what_it_cannot_do_is_a_line(tmp_path):
    for flags, says in {
        (): "--base.max-grad-norm is 1.0; expected 0 with --base.fused-backward-pass",
        (*("--base.max-grad-norm", "0"), "--base.gradient-accumulation-steps", "2"): "steps is 2; expected 1 with",
        (*("--base.max-grad-norm", "0"), "--base.max-skipped-updates", "1"): "updates is 1; expected 0 with",
        (*("--base.max-grad-norm", "0"), "--base.mixed-precision", "fp16"): "'fp16'; expected auto, bf16 or no with",
        (*("--base.max-grad-norm", "0", "--ddpm.learning-rate", "1"), "--ddpm.optimizer", "prodigy"): "expected false with",
    }.items():
        with pytest.raises((BadInput, SystemExit)) as refused:
            command_line.parse(["ddpm", "--base.fused-backward-pass", *flags])
        assert says in str(refused.value) and "\n" not in str(refused.value)
    results = cli_many(tmp_path, 2, *tiny(tmp_path, **FUSED))
    assert [r.code for r in results] == [2, 2] and "expected false on 2 processes" in results[0].err


def test_losses_that_step_together_and_gradients_in_parts_are_refused(tmp_path):
    def several(models, batch, rng, cfg):
        yield Loss("a", models["a"](torch.ones(3)).sum(), step=False)
        yield Loss("a", models["a"](torch.ones(3)).sum())

    def twice(models, batch, rng, cfg):
        part = lambda: recompute(models["a"], torch.ones(3, requires_grad=True), use_reentrant=True)  # noqa: E731
        yield Loss("a", (part() + part()).sum())

    for i, (loss_fn, says) in enumerate(((several, "several losses for 'a'"), (twice, "would step twice at once"))):
        with pytest.raises(BadInput, match=says):
            loop.run(toy(loss_fn), settings(tmp_path / str(i), max_grad_norm=0, fused_backward_pass=True))
        assert not checkpoints(tmp_path / str(i))


def test_another_losss_parameters_are_left_alone(tmp_path):
    """A gradient that leaks is refused before it moves anything."""
    made = {"a": Scale(1.0), "b": Scale(1.0)}

    def leaks(models, batch, rng, cfg):
        yield Loss("b", models["b"](torch.ones(3)).sum())
        yield Loss("a", models["b"](models["a"](torch.ones(3))).sum())

    with pytest.raises(ValueError, match="not its own"):
        loop.run(toy(leaks, lambda cfg: made, 0.5), settings(tmp_path / "out", max_grad_norm=0, fused_backward_pass=True))
    assert torch.equal(made["b"].w, torch.full((3,), 0.5)) and not torch.equal(made["a"].w, torch.ones(3))


def test_what_is_not_finite_stops_and_is_not_saved(tmp_path):
    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", models["a"](torch.ones(3)).sum() * (float("nan") if batch["step"] == 2 else 1.0))

    base = settings(tmp_path / "out", max_grad_norm=0, fused_backward_pass=True, max_train_steps=4, checkpointing_steps=1)
    with pytest.raises(NonFinite, match="at step 3"):
        loop.run(toy(loss_fn, lr=0.1), base)
    assert checkpoints(tmp_path / "out") == [1, 2]


def test_passes_that_do_not_train_move_nothing():
    """Those before the first step, whose gradients are thrown away."""
    model = Scale(1.0)
    fused.Fused(torch.optim.SGD(model.parameters(), 1.0))
    model(torch.ones(3)).sum().backward()
    assert torch.equal(model.w, torch.ones(3)) and torch.equal(model.w.grad, torch.ones(3))
