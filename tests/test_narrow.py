"""Weights in bfloat16: models compute in it from end to end, without a cast inside, and say what they say in float32."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_lora import draw_photos
from test_lora_families import NAMES, command, config, encoded
from torch.utils._python_dispatch import TorchDispatchMode
from warm import cli, metrics

from oneloop.machine import narrow, placement
from oneloop.tasks import Follow, Rng, lora

BF16 = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")


class Counted(TorchDispatchMode):
    """Counts operations, casts among them, and those of weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.seen = weights, Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **kwargs or {})
        if op._schema.name == "aten::_to_copy" and made.dtype != args[0].dtype:
            self.seen["weight" if id(args[0]) in self.weights else "cast"] += 1
        else:
            self.seen["other"] += 1
        return made


@pytest.mark.parametrize("name", ["sd", "sdxl", *NAMES])
def test_every_family_computes_in_bf16_alone(built, name):
    """Its loss is that of float32 within bf16's precision; its forward pass casts no weight, and little else."""
    cfg = config(built(name), rank=2)
    torch.manual_seed(0)
    models = lora.make_models(cfg)
    trained = lora.family(cfg.lora).TRAINED
    with torch.no_grad():
        for key, p in models[trained].named_parameters():
            p.copy_(torch.nn.init.normal_(p, std=0.05) if "lora_" in key else p).copy_(p.bfloat16())
    batch = encoded(models, cfg)
    if trained == "unet":
        batch |= {key: torch.tensor([[32, 32]] * 2) for key in ("original_size", "crop_top_left")}
    (wide,) = [loss.value.item() for loss in lora.loss_fn(models, batch, Rng.of(7, range(2)), cfg)]
    placement.place(models, BF16, False, (), torch.bfloat16)
    assert {p.dtype for p in models[trained].parameters() if p.is_floating_point()} == {torch.bfloat16}
    weights = {id(p) for p in models[trained].parameters()}
    counts, own = Counted(weights), models[trained].forward

    def counted(*args, **kwargs):
        with counts:
            return own(*args, **kwargs)

    models[trained].forward = counted
    with torch.autocast("cpu", torch.bfloat16):
        (loss,) = [loss.value for loss in lora.loss_fn(models, batch, Rng.of(7, range(2)), cfg)]
    loss.backward()
    assert loss.item() == pytest.approx(wide, rel=0.03)
    assert all(p.grad.dtype == torch.bfloat16 for p in models[trained].parameters() if p.grad is not None)
    casts = 0.01 if trained == "unet" else 0.12  # transformers round and norm some in float32 themselves
    assert counts.seen["cast"] <= casts * counts.seen.total() and not counts.seen["weight"], counts.seen


def test_autocast_casts_weights(built):
    """Which the counting sees."""
    cfg = config(built("sd"), rank=2)
    models = lora.make_models(cfg)
    batch = encoded(models, cfg)
    placement.place(models, BF16, False, ())
    with torch.autocast("cpu", torch.bfloat16), Counted({id(p) for p in models["unet"].parameters()}) as counts:
        next(lora.loss_fn(models, batch, Rng.of(7, range(2)), cfg))
    assert counts.seen["weight"] >= sum("lora_" in key for key, _ in models["unet"].named_parameters())


class Sees(torch.nn.Module):
    """Remembers what its forward pass was given."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

    def forward(self, x, timestep, more=None, img_ids=None, several=()):
        self.given = [x, timestep, img_ids, *several, *(more or {}).values()]
        return self.norm(self.layer(x))


def test_what_counts_is_given_as_it_is():
    model = Sees()
    placement.place({"a": model}, BF16, False, (), torch.bfloat16)
    x, t, sizes = torch.randn(2, 4), torch.tensor([999.5, 1.5]), torch.tensor([[1001.0, 513.0]] * 2)
    more = {"text_embeds": x, "time_ids": sizes}
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, more=more, img_ids=sizes, several=[x, torch.arange(3)])
    kinds = [y.dtype for y in model.given]
    low, high = torch.bfloat16, torch.float32
    assert kinds == [low, high, high, low, torch.int64, low, high] and out.dtype == low  # a norm's too
    assert torch.equal(model.given[2], sizes) and more["text_embeds"] is x


def test_a_follower_and_a_run_in_float32_are_left_to_autocast():
    models = {"a": Sees()}
    placement.place(models, BF16, False, (), torch.bfloat16)
    follower = placement.followers(models, {"b": Follow("a", 0.9)})["b"]
    with torch.autocast("cpu", torch.bfloat16):
        follower(torch.randn(2, 4), torch.ones(2))
        assert follower.given[0].dtype == torch.float32 and not hasattr(follower.forward, "narrow")
        models["a"](torch.randn(2, 4), torch.ones(2))
    assert models["a"].given[0].dtype == torch.bfloat16 and follower.given[0].dtype == torch.float32
    plain = Sees()
    placement.place({"a": plain}, BF16, False, ())
    assert not hasattr(plain.forward, "narrow")


def test_a_forward_that_is_a_closure_computes_too():
    model = Sees()
    forward = model.forward
    model.forward = lambda x, t: forward(x, t) + 1
    narrow.narrow(model.bfloat16())
    other = copy.deepcopy(model.layer)
    assert torch.equal(model(torch.ones(1, 4), torch.ones(1)), model.norm(other(torch.ones(1, 4).bfloat16())) + 1)


@pytest.mark.parametrize("kind", ["float8", "int8", "nf4"])
def test_a_base_that_is_stored_in_less(tmp_path, built, kind):
    photos = draw_photos(tmp_path / "photos")
    more = {"base__weights": "bf16", "base__mixed_precision": "bf16", "lora__base_precision": kind}
    done = cli(tmp_path, *command(tmp_path, built("FluxPipeline"), photos, **more))
    assert done.code == 0, done.err
    losses = [line["loss"] for line in metrics(tmp_path / "out") if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
