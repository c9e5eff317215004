"""What tasks that train a model of images from scratch share: the settings of a new model, and its UNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oneloop.configs import Amount, BadInput, Base, Live, Name, ShareBelowOne, read_model_config
from oneloop.families import building, classes
from oneloop.families.classes import Classes
from oneloop.families.settings import flag
from oneloop.tasks import Models
from oneloop.training import optimizers

DEFAULT_UNET = {  # 0.9 M parameters, fit for 16x16 on a CPU
    "layers_per_block": 1,
    "block_out_channels": [24, 48, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class Unconditional:
    """A new model and its optimizer."""

    model_config: Live[Name | None] = None
    """A diffusers UNet2DModel config: a JSON file, or a folder with a config.json. None: a small one fit for 16x16 on a CPU."""
    optimizer: optimizers.Kind = "adamw"
    """What turns gradients into steps: adamw, adamw8bit, adafactor, prodigy, schedulefree or muon (docs/optimizers.md)."""
    learning_rate: Live[Amount] = 2e-3
    """Peak learning rate: of AdamW; about 1 with prodigy."""
    adam_beta1: Live[ShareBelowOne] = 0.9
    """AdamW's beta1."""
    adam_beta2: Live[ShareBelowOne] = 0.99
    """AdamW's beta2."""
    adam_weight_decay: Live[Amount] = 1e-2
    """AdamW's weight decay."""
    adam_epsilon: Live[Amount] = 1e-8
    """AdamW's epsilon."""


@dataclass(frozen=True)
class New(Unconditional, Classes):
    """The same for a model that may have classes; AdamW forgets sooner, which a short run is better off with."""

    adam_beta1: Live[ShareBelowOne] = 0.8
    """AdamW's beta1."""
    adam_beta2: Live[ShareBelowOne] = 0.95
    """AdamW's beta2."""


def base() -> Base:
    """What the defaults of the whole run are in these tasks: the rate falls in a line, and the EMA is shorter."""
    return Base(lr_scheduler="linear", ema_power=0.6)


def named(s: Unconditional, group: str) -> str:
    """The model's config, as messages begin."""
    return f"{flag(group, 'model_config')} {s.model_config or '(the default)'}"


def unet_config(s: Unconditional, group: str) -> dict[str, Any]:
    """The UNet2DModel config that the settings name."""
    if s.model_config is None:
        return DEFAULT_UNET
    return read_model_config(s.model_config, f"{group}.model-config", "UNet2DModel")


def check_unet(cfg: Any, group: str) -> None:
    """Refuse settings that no UNet can be made of, as far as can be told without making it.

    Raises:
        BadInput: with the flag to change.
    """
    s = getattr(cfg, group)
    optimizers.check(s, group, cfg.base)
    classes.check(s, group)
    building.check_config(unet_config(s, group), named(s, group), cfg.data.resolution, 4)


def check_positional(config: dict[str, Any], what: str) -> None:
    """Refuse a UNet that embeds timesteps otherwise than by their sines: a logarithm of a noise level may be negative.

    Raises:
        BadInput: with `what`, the flag and the file.
    """
    if config.get("time_embedding_type", "positional") != "positional":
        raise BadInput(f"{what}: its time_embedding_type takes no logarithm of a noise level; expected positional")


def make_unet(cfg: Any, group: str) -> Models:
    """The UNet; with classes, an embedding for each and one for no label."""
    import torch

    s, side = getattr(cfg, group), cfg.data.resolution
    own = {"num_class_embeds": s.num_classes + 1} if s.class_conditional else {}
    given = {"class_labels": torch.zeros(2, dtype=torch.long)} if s.class_conditional else {}
    config = unet_config(s, group) | {"sample_size": side} | own
    call = lambda unet, x: unet(x, torch.zeros(len(x), dtype=torch.long), **given, return_dict=False)[0]  # noqa: E731
    return {"unet": building.build("UNet2DModel", config, named(s, group), (2, *shape(cfg)), call)}


def shape(cfg: Any) -> tuple[int, int, int]:
    """Of an image, [3, H, W]."""
    return 3, cfg.data.resolution, cfg.data.resolution


def unet_multiple(s: Unconditional, group: str) -> int:
    """What the sides of its images are multiples of."""
    return 2 ** (len(unet_config(s, group).get("block_out_channels", DEFAULT_UNET["block_out_channels"])) - 1)
