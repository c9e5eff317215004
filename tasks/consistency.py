"""Train a consistency model of images from scratch, which draws in one or two steps; without conditions and without a teacher.

    python loop.py consistency --base.num-epochs 10

Song and Dhariwal 2023, Improved Techniques for Training Consistency Models (arXiv:2310.14189): the model learns to answer alike
at neighbouring noise levels, of which there are more and more as the run goes on. The export is a `ConsistencyModelPipeline`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from oneloop.configs import Amount, Base, Count, Data, Live, Range, check, require
from oneloop.families import building
from oneloop.families.scratch import Unconditional, check_positional, named, unet_config, unet_multiple
from oneloop.maths import consistency
from oneloop.tasks import Batch, Images, Loss, Models, Optims, Rng, Task, frozen, masked, mean
from oneloop.training import optimizers

Positive = Annotated[float, Range(0, 3e38, without=0)]


@dataclass(frozen=True)
class Settings(Unconditional):
    """The model and its objective."""

    sigma_min: Positive = 0.002
    """The lowest noise level, that of the data; images are in [-1, 1]."""
    sigma_max: Positive = 80.0
    """The highest, from which samples begin."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data's pixels."""
    rho: Positive = 7.0
    """How much denser levels are at low noise."""
    discretization_s_0: Count = 10
    """Pairs of neighbouring noise levels at the start of the run."""
    discretization_s_1: Count = 1280
    """And at its end: doubled at even intervals."""
    p_mean: Annotated[float, Range(-100, 100)] = -1.1
    """Mean of the logarithm of the noise levels that are trained on."""
    p_std: Positive = 2.0
    """Standard deviation of that."""
    huber_c: Positive | None = None
    """Where pseudo-Huber turns from a square to an absolute value. None: 0.00054 sqrt(numbers of an image)."""
    num_inference_steps: Live[Annotated[int, Range(1, 40)]] = 2
    """Steps to draw a sample."""
    learning_rate: Live[Amount] = 1e-3
    """Peak learning rate: of AdamW; about 1 with prodigy."""
    adam_weight_decay: Live[Amount] = 0.0
    """AdamW's weight decay."""

    def __post_init__(self):
        check(self, "consistency")
        require(self.sigma_max > self.sigma_min, "consistency.sigma_max", self.sigma_max, f"above {self.sigma_min:g}")
        first, last = self.discretization_s_0, self.discretization_s_1
        require(last >= first, "consistency.discretization_s_1", last, f"at least --consistency.discretization-s-0, {first}")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task."""

    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=lambda: Data(resolution=16, train_batch_size=16))
    consistency: Settings = field(default_factory=Settings)

    def __post_init__(self):
        optimizers.check(self.consistency, "consistency", self.base)
        building.check_config(*made_of(self), self.data.resolution, 4)
        check_positional(*made_of(self))


def made_of(cfg: Config) -> tuple[dict[str, Any], str]:
    """The UNet2DModel config that the settings name, and how messages name it."""
    return unet_config(cfg.consistency, "consistency"), named(cfg.consistency, "consistency")


def scheduler(s: Settings) -> Any:
    """The diffusers scheduler that draws the samples."""
    from diffusers import CMStochasticIterativeScheduler

    return CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=s.sigma_min, sigma_max=s.sigma_max, sigma_data=s.sigma_data, rho=s.rho
    )


def make_models(cfg: Config) -> Models:
    import torch

    side, (config, name) = cfg.data.resolution, made_of(cfg)
    call = lambda unet, x: unet(x, torch.zeros(len(x)), return_dict=False)[0]  # noqa: E731
    return {"unet": building.build("UNet2DModel", config | {"sample_size": side}, name, (2, 3, side, side), call)}


def make_optim(models: Models, cfg: Config) -> Optims:
    return {"unet": optimizers.make(models["unet"].parameters(), cfg.consistency)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """Eq. 6 with the distance of eq. 8: at the higher of two levels the model shall say what it says at the lower one, under
    the same noise and the same dropout."""
    import torch

    s, x = cfg.consistency, batch["pixel_values"]  # [B, 3, H, W] in [-1, 1]
    noise = rng.normal("noise", *x.shape[1:])  # [B, 3, H, W]
    count = consistency.levels(batch["step"], batch["total"], s.discretization_s_0, s.discretization_s_1)
    sigma, share = consistency.ladder(count, s.sigma_min, s.sigma_max, s.rho, s.p_mean, s.p_std, x.device)
    i = torch.searchsorted(share, rng.uniform("timestep"), right=True).clamp(max=count - 2)  # [B]

    def f(net: Any, sigma: Any) -> Any:
        call = lambda x, t: net(x, t, return_dict=False)[0].float()  # noqa: E731
        return consistency.preconditioned(call, x + consistency.like(sigma, x) * noise, sigma, s.sigma_min, s.sigma_data)

    # The generator of dropout is put back, so that the model draws the same again.
    with torch.no_grad(), frozen(models["unet"]) as net, same_dropout(x):
        goal = f(net, sigma[i])
    square = masked((f(models["unet"], sigma[i + 1]) - goal).square(), batch) * x[0].numel()  # [B], the sum over an image
    c = s.huber_c or 0.00054 * x[0].numel() ** 0.5
    error = ((square + c * c).sqrt() - c) / (sigma[i + 1] - sigma[i])
    yield Loss("unet", mean(error, batch), {"levels": float(count)})


def same_dropout(x: Any) -> contextlib.AbstractContextManager[None]:
    """What layers draw inside is drawn again after it."""
    import torch

    return torch.random.fork_rng([x.device.index] if x.is_cuda else [])


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    import torch
    from diffusers import ConsistencyModelPipeline

    pipeline = ConsistencyModelPipeline(models["unet"], scheduler(cfg.consistency))
    pipeline.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": cfg.consistency.num_inference_steps, "output_type": "np"}
    images = pipeline(batch_size=len(rng), generator=rng.generators("sample"), **told).images  # [N, H, W, 3] in [0, 1]
    return {"samples": torch.from_numpy(images).permute(0, 3, 1, 2)}


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    from diffusers import ConsistencyModelPipeline

    ConsistencyModelPipeline(models["unet"], scheduler(cfg.consistency)).save_pretrained(path)
    return (
        "from diffusers import ConsistencyModelPipeline\n"
        "pipeline = ConsistencyModelPipeline.from_pretrained({path})\n"
        f'pipeline(num_inference_steps={cfg.consistency.num_inference_steps}).images[0].save("sample.png")'
    )


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    multiple=lambda cfg: unet_multiple(cfg.consistency, "consistency"),
    card=lambda cfg: {"pipeline_tag": "unconditional-image-generation", "tags": ["consistency-model"]},
)
