"""Which models are those of a checkpoint's manifest: what the earlier run knew of them decides; samples that do not fit."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from warm import UNET

from oneloop.machine.placement import altered, batches, describe, draw, halves, identity
from oneloop.tasks import Rng


class Newer(UNet2DModel):
    """The same after an upgrade that brought a setting."""

    @register_to_config
    def __init__(self, sample_size=None, brought=(1, 2), **others):
        super().__init__(sample_size=sample_size, **others)


Newer.__name__ = "UNet2DModel"


def made(kind=UNet2DModel, **more):
    return {"unet": kind(**{k: v for k, v in UNET.items() if not k.startswith("_")} | {"sample_size": 8} | more)}


def test_a_key_that_a_newer_version_brought_is_no_difference():
    before = json.loads(json.dumps(identity(made())))
    newer = made(Newer)
    assert "brought" in newer["unet"].config
    before["made_of"]["unet"]["config"] = {
        k: v for k, v in before["made_of"]["unet"]["config"].items() if k in newer["unet"].config
    }
    assert altered(before, made()) == [] and altered(before, newer) == []
    assert altered(before, made(Newer, brought=(3,))) == ["unet's brought was [1, 2] and is now [3]"]


def test_what_the_earlier_run_knew_is_compared():
    before = json.loads(json.dumps(identity(made())))
    assert altered(before, made(act_fn="gelu")) == ["unet's act_fn was silu and is now gelu"]
    assert [line.split()[1] for line in altered(before, made(block_out_channels=[8, 16]))] == ["block_out_channels", "shapes"]
    assert any("class" in line for line in altered(before, {"unet": torch.nn.Linear(1, 1)}))
    assert altered(before, {}) and altered(before, made() | {"other": torch.nn.Linear(1, 1)})


def test_manifests_of_earlier_versions_are_valid():
    """They have a line for each model alone; another line is another model."""
    models = made()
    assert altered({"models": {"unet": describe(models["unet"])}}, models) == []
    assert altered({"models": {"unet": describe(models["unet"])}}, made(act_fn="gelu")) != []


@pytest.mark.parametrize("num", [1, 3, 7, 10, 13])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_samples_that_do_not_fit_are_drawn_in_parts_that_were_encoded(num, size):
    """Whatever fits at a time, from all samples to one; each sample once, in order."""
    encoded, todo = set(), batches(num, size)
    while todo:
        encoded.add(part := todo.pop())
        todo += halves(part)
    rng = Rng.of(0, range(num), "samples")
    for most in range(1, num + 1):
        drawn = []

        def sample(models, shown, some, cfg, most=most, drawn=drawn):
            assert shown == (some.numbers[0], len(some))
            if len(some) > most:
                raise RuntimeError("CUDA out of memory")
            drawn.append(range(some.numbers[0], some.numbers[-1] + 1))
            return {"samples": torch.tensor(some.numbers)}

        task, cfg = SimpleNamespace(sample_fn=sample), SimpleNamespace(data=SimpleNamespace(train_batch_size=size))
        nothing = SimpleNamespace(autocast=contextlib.nullcontext)
        images = draw(task, {}, {}, {}, lambda first, count: (first, count), rng, nothing, cfg)
        assert images["samples"].tolist() == list(range(num)) and set(drawn) <= encoded
        assert max(map(len, drawn)) <= most
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(
            SimpleNamespace(sample_fn=lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA out of memory"))),
            {},
            {},
            {},
            lambda *_: None,
            rng,
            nothing,
            cfg,
        )
