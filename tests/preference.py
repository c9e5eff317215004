"""Diffusion-DPO on pixels (Wallace et al. 2023, arXiv:2311.12908, eq. 14): of two images of a caption one is preferred. The
second image is a column of the data set that a setting of the task names; the reference is the model before its adapters."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from oneloop.configs import Base, Data
from oneloop.tasks import Column, Loss, Task, mean, without_adapters


@dataclass(frozen=True)
class Settings:
    """The toy."""

    rejected_column: str = "rejected"
    """The data set's column of the images that are not preferred."""
    beta: float = 5.0
    """How far the model may go from the reference."""


@dataclass(frozen=True)
class Config:
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    preference: Settings = field(default_factory=Settings)


def make_models(cfg):
    from diffusers import UNet2DModel
    from peft import LoraConfig, inject_adapter_in_model

    unet = UNet2DModel(
        sample_size=cfg.data.resolution,
        down_block_types=2 * ["DownBlock2D"],
        up_block_types=2 * ["UpBlock2D"],
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
    ).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights="gaussian"), unet)
    return {"unet": unet}


def make_optim(models, cfg):
    return {"unet": torch.optim.AdamW([p for p in models["unet"].parameters() if p.requires_grad], 1e-2)}


def loss_fn(models, batch, rng, cfg):
    pair = torch.cat([batch["pixel_values"], batch["rejected"]])  # [2 B, 3, H, W], the preferred ones first
    noise, t = rng.normal("noise", *pair.shape[1:]).repeat(2, 1, 1, 1), rng.uniform("timestep").repeat(2)  # shared by a pair
    x_t = torch.lerp(pair, noise, t[:, None, None, None])
    error = lambda model: (model(x_t, 1000 * t).sample - (noise - pair)).square().flatten(1).mean(1)  # noqa: E731
    with torch.no_grad(), without_adapters(models["unet"]) as reference:
        base = error(reference)
    won, lost = (error(models["unet"]) - base).chunk(2)  # [B] each
    logs = {"margin": (lost - won).detach().mean()}
    yield Loss("unet", mean(-torch.nn.functional.logsigmoid(-cfg.preference.beta * (won - lost)), batch), logs)


def export_fn(models, examples, path: Path, cfg):
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = {name: x.contiguous() for name, x in get_peft_model_state_dict(models["unet"]).items()}
    save_file(weights, path / "adapters.safetensors")
    return "from safetensors.torch import load_file\nadapters = load_file({path} + '/adapters.safetensors')"


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=lambda models, examples, rng, cfg: {},
    export_fn=export_fn,
    multiple=lambda cfg: 2,
    columns={"rejected": Column("image", like="pixel_values", setting="preference.rejected_column")},
)
