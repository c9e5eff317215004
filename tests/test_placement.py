"""Which models are those of a checkpoint's manifest: what the earlier run knew of them decides."""

import json

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from warm import UNET

from oneloop.machine.placement import altered, describe, identity


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
