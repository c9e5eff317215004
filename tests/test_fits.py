"""Whether a run fits on a GPU that is not there: computed beside counted bytes, and the flags that are said help."""

import dataclasses
import itertools
import re

import pytest
import tiny_families
import tiny_models
import torch
from test_lora_families import config, encoded
from warm import tiny

from oneloop.settings import command_line
from oneloop.tasks import Rng, ddpm, lora
from oneloop.training import optimizers
from oneloop.views import estimate, fits


def held(task, cfg):
    models = task.make_models(cfg)
    if task is lora.task:
        batch = encoded(models, cfg)
        batch |= {key: torch.tensor([[32, 32]] * 2) for key in ("original_size", "target_size", "crop_top_left")}
    else:
        batch = {"pixel_values": torch.zeros(4, 3, 8, 8)}
    return fits.watch(models, lambda: next(task.loss_fn(models, batch, Rng.of(0, range(len(next(iter(batch.values()))))), cfg)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"sdxl": tiny_models.build(folder, "sdxl"), "flux": tiny_families.build("FluxPipeline", folder)}


def test_it_counts_what_is_there(tmp_path):
    """A model that trains whole: its weights, gradients, two moments and EMA, four bytes each; the loss is the task's own."""
    cfg = command_line.parse(tiny(tmp_path, base__mixed_precision="no"))[1]
    seen, loss = held(ddpm.task, cfg)
    numbers = sum(p.numel() for p in seen.models["unet"].parameters())
    found = fits.counted(seen, ddpm.task, cfg)
    sizes = (found.weights, found.adapters, found.gradients, found.optimizer, found.ema)
    assert sizes == (0, 4 * numbers, 4 * numbers, 8 * numbers, 4 * numbers)
    fused = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, max_grad_norm=0, fused_backward_pass=True))
    largest = 4 * max(p.numel() for p in seen.models["unet"].parameters())
    lengths = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, ema_lengths=(0.05, 0.1)))
    assert fits.counted(seen, ddpm.task, lengths) == dataclasses.replace(found, ema=3 * found.ema) and found.ema
    assert fits.counted(seen, ddpm.task, fused) == dataclasses.replace(found, gradients=largest)
    assert 0 < found.recomputed < found.activations == seen.kept.every and loss.value.requires_grad
    half = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, mixed_precision="bf16", offload_ema=True))
    narrow = fits.counted(seen, ddpm.task, half)
    assert narrow.activations == found.activations // 2 and narrow.ema == 0
    eight = fits.counted(seen, ddpm.task, cfg, optimizer="adamw8bit")
    large = [p for p in seen.models["unet"].parameters() if p.numel() >= 4096]
    assert found.optimizer - eight.optimizer == sum(8 * p.numel() - optimizers.state_bytes("adamw8bit", p.shape) for p in large)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_each_flag_needs_less_than_those_before_it(models, name):
    """Encoders and autoencoder, which leave the device, count only where nothing is cached."""
    cfg = config(models[name])
    seen, _ = held(lora.task, cfg)
    cfg = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, mixed_precision="bf16"))
    ways = list(fits.ways(seen, lora.task, cfg))
    flags = " ".join(flag for flag, _ in ways)
    for flag in ("--base.gradient-checkpointing", "--base.offload-ema", "--data.train-batch-size 1", "base-precision float8"):
        assert flag in flags
    peaks = [peak for flag, peak in ways if "float8" not in flag]  # whose copies may be more than it saves on a tiny model
    assert all(b <= a for a, b in itertools.pairwise(peaks)) and peaks[-1] < peaks[0]
    uncached = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, example_cache="no"))
    own = sum(p.numel() for key, m in seen.models.items() if key != lora.family(cfg.lora).TRAINED for p in m.parameters())
    more = fits.counted(seen, lora.task, uncached).weights - fits.counted(seen, lora.task, cfg).weights
    assert 2 * own <= more <= 4 * own


def test_a_card_is_said_with_the_first_flags_that_suffice(tmp_path, monkeypatch):
    cfg = command_line.parse(tiny(tmp_path, base__mixed_precision="no"))[1]
    seen, _ = held(ddpm.task, cfg)
    monkeypatch.setattr(fits, "SPARE", 0.0)
    steps = list(fits.ways(seen, ddpm.task, cfg))
    for number, (flag, peak) in enumerate(steps[:3]):
        if number and peak >= steps[number - 1][1]:
            continue
        asked = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, assume_gpu=(peak + 1) / 1e9))
        said = fits.line(seen, ddpm.task, asked)
        assert (flag in said) if flag else ("as it is" in said), said
        assert steps[number + 1][0] not in said and "not even" not in said
    tight = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, assume_gpu=steps[-1][1] / 2e9))
    assert "not even with" in fits.line(seen, ddpm.task, tight)
    monkeypatch.undo()
    assert re.search(r"computed: 12 GB as it is$", fits.line(seen, ddpm.task, cfg))


def test_the_first_step_alone_is_watched(tmp_path):
    """Its loss and its gradient are the task's own, to the bit, as are those of the steps after it."""
    cfg = command_line.parse(tiny(tmp_path))[1]
    models = ddpm.make_models(cfg)
    seen = estimate.Watch(10, 4)
    task, grads = seen.over(ddpm.task), []
    batch = {"pixel_values": torch.zeros(4, 3, 8, 8), "step": 0}
    models["unet"].eval()
    for one in (ddpm.task, task, task):
        models["unet"].zero_grad()
        (loss,) = one.loss_fn(models, batch, Rng.of(0, range(4)), cfg)
        first = seen.held
        loss.value.backward()
        grads.append([p.grad.clone() for p in models["unet"].parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))
    assert seen.held is first and first.kept.every > 0
