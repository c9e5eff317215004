"""A ControlNet on pixels (Zhang et al. 2023, arXiv:2302.05543): a trained copy of a frozen UNet's encoder sees a second image,
which a folder of the same file names holds. Written from docs/adding-a-task.md alone, to see whether that suffices."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from oneloop.configs import Base, Data
from oneloop.tasks import Column, Loss, Task, mean

STEPS = 100


@dataclass(frozen=True)
class Settings:
    """The toy."""

    learning_rate: float = 1e-3
    """Of AdamW."""


@dataclass(frozen=True)
class Config:
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    conditioned: Settings = field(default_factory=Settings)


def make_models(cfg):
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=cfg.data.resolution,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
    ).requires_grad_(False)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,), conditioning_channels=3)
    return {"unet": unet, "control": control}


def make_optim(models, cfg):
    return {"control": torch.optim.AdamW(models["control"].parameters(), cfg.conditioned.learning_rate)}


def predict(models, x_t, t, condition):
    """The noise in x_t [B, 3, H, W] at the timesteps t [B]."""
    text = x_t.new_zeros(len(x_t), 1, 8)
    down, middle = models["control"](x_t, t, text, controlnet_cond=condition, return_dict=False)
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return models["unet"](x_t, t, text, **more, return_dict=False)[0]


def alpha_bar(t):
    """The signal's power at timesteps t in [0, STEPS): a cosine."""
    return torch.cos((t + 1) / (STEPS + 1) * torch.pi / 2).square()[:, None, None, None]


def loss_fn(models, batch, rng, cfg):
    x = batch["pixel_values"]  # [B, 3, H, W]
    noise, t = rng.normal("noise", *x.shape[1:]), rng.integers("timestep", STEPS)
    x_t = alpha_bar(t).sqrt() * x + (1 - alpha_bar(t)).sqrt() * noise
    yield Loss("control", mean((predict(models, x_t, t, batch["conditioning"]) - noise).square(), batch))


def sample_fn(models, examples, rng, cfg):
    """Ten steps of DDIM, beside the condition and what it was drawn with."""
    batch = next(iter(examples))
    x = rng.normal("start", *batch["pixel_values"].shape[1:])
    for t in range(STEPS - 1, -1, -STEPS // 10):
        at, after = (torch.full((len(x),), max(step, 0), device=x.device) for step in (t, t - STEPS // 10))
        noise = predict(models, x, at, batch["conditioning"])
        clean = ((x - (1 - alpha_bar(at)).sqrt() * noise) / alpha_bar(at).sqrt()).clamp(-1, 1)
        x = alpha_bar(after).sqrt() * clean + (1 - alpha_bar(after)).sqrt() * noise
    return {"samples": torch.cat([batch["conditioning"], x, batch["pixel_values"]], -1) / 2 + 0.5}


def export_fn(models, examples, path: Path, cfg):
    models["control"].save_pretrained(path)
    return "from diffusers import ControlNetModel\ncontrol = ControlNetModel.from_pretrained({path})"


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    multiple=lambda cfg: 2,
    columns={
        "conditioning": Column(
            "image", like="pixel_values", setting="data.conditioning_column", folder="data.conditioning_data_dir"
        )
    },
)
