"""Train a diffusion model of images from scratch by EDM: preconditioned, its noise levels by a log-normal density.

    python loop.py edm --edm.class-conditional

Karras, Aittala, Aila, Laine 2022, Elucidating the Design Space of Diffusion-Based Generative Models (arXiv:2206.00364). The
export has the UNet and an EDM scheduler of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from oneloop.configs import Base, Data, Live, Range, check, require
from oneloop.families import classes, drawing, scratch
from oneloop.families.scratch import New
from oneloop.maths import diffusion
from oneloop.maths import edm as maths
from oneloop.tasks import Batch, Images, Loss, Models, Optims, Rng, Task, masked, mean
from oneloop.training import optimizers

Positive = Annotated[float, Range(0, 1e6, without=0)]


@dataclass(frozen=True)
class Settings(New):
    """The model, its noise levels and its sampler."""

    sigma_data: Positive = 0.5
    """Deviation of the data, as preconditioning takes it."""
    p_mean: Annotated[float, Range(-20, 20)] = 0.0
    """Mean of the logarithm of the noise levels that are trained on: of the paper -1.2, which attends to detail."""
    p_std: Annotated[float, Range(0, 20, without=0)] = 1.2
    """Its standard deviation."""
    sampler: Live[Literal["heun", "dpm++", "euler"]] = "heun"
    """How samples are drawn: Heun's method, which calls the model twice a step; DPM-Solver++ or Euler's method, which are
    diffusers'. The export has DPM-Solver++ in the place of Heun's, which diffusers lacks."""
    num_inference_steps: Live[Annotated[int, Range(2, 100_000)]] = 18
    """Steps to draw a sample."""
    sigma_min: Live[Positive] = 0.002
    """Least noise level of the sampler."""
    sigma_max: Live[Positive] = 80.0
    """Largest noise level of the sampler, at which it begins."""
    rho: Live[Annotated[float, Range(1, 1000)]] = 7.0
    """How far the sampler's noise levels are gathered at the least one."""

    def __post_init__(self):
        check(self, "edm")
        require(self.sigma_min < self.sigma_max, "edm.sigma_min", self.sigma_min, f"less than sigma_max, {self.sigma_max}")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task."""

    base: Base = field(default_factory=scratch.base)
    data: Data = field(default_factory=lambda: Data(resolution=16, train_batch_size=16))
    edm: Settings = field(default_factory=Settings)

    def __post_init__(self):
        scratch.check_unet(self, "edm")
        scratch.check_positional(scratch.unet_config(self.edm, "edm"), scratch.named(self.edm, "edm"))


def scheduler(cfg: Config) -> Any:
    """The diffusers scheduler that draws from the export."""
    import diffusers

    s = cfg.edm
    kind = "EDMEulerScheduler" if s.sampler == "euler" else "EDMDPMSolverMultistepScheduler"
    return getattr(diffusers, kind)(sigma_min=s.sigma_min, sigma_max=s.sigma_max, sigma_data=s.sigma_data, rho=s.rho)


def make_models(cfg: Config) -> Models:
    return scratch.make_unet(cfg, "edm")


def make_optim(models: Models, cfg: Config) -> Optims:
    return {"unet": optimizers.make(models["unet"].parameters(), cfg.edm)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    s, x = cfg.edm, batch["pixel_values"]  # [B, 3, H, W] in [-1, 1]
    noise = rng.normal("noise", *x.shape[1:])  # [B, 3, H, W]
    sigma = maths.noise_level(rng.uniform("timestep"), s.p_mean, s.p_std)  # [B]
    labels = classes.shown(batch, rng, s)  # [B]
    given = {} if labels is None else {"class_labels": labels}
    answer = lambda x, c: models["unet"](x, c, **given, return_dict=False)[0].float()  # noqa: E731
    guess = maths.denoised(answer, maths.add_noise(x, noise, sigma), sigma, s.sigma_data)
    error = maths.loss_weight(sigma, s.sigma_data) * masked(diffusion.square_error(guess, x), batch)  # [B]
    yield Loss("unet", mean(error, batch))


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    s, unet = cfg.edm, models["unet"]
    if s.sampler == "heun":
        levels = maths.sigmas(s.num_inference_steps, s.sigma_min, s.sigma_max, s.rho)
        labels, null = classes.in_turn(rng, s), s.num_classes or 0
        answer = lambda x, c: drawing.guided(unet, x, c, labels, null, s.guidance_scale)  # noqa: E731
        denoise = lambda x, sigma: maths.denoised(answer, x, sigma.expand(len(x)), s.sigma_data)  # noqa: E731
        x = maths.heun(denoise, s.sigma_max * rng.normal("start", *scratch.shape(cfg)), levels)
    else:
        x = drawing.samples(unet, scheduler(cfg), rng, scratch.shape(cfg), s.num_inference_steps, s)
    return {"samples": (x / 2 + 0.5).clamp(0, 1)}


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    made = scheduler(cfg)
    models["unet"].save_pretrained(path / "unet")
    made.save_pretrained(path / "scheduler")
    call = drawing.arguments(scratch.shape(cfg), cfg.edm.num_inference_steps, cfg.edm)
    return drawing.lines({"unet": "UNet2DModel", "scheduler": type(made).__name__}, f"unet, scheduler, {call}")


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    resolve=lambda cfg, facts: classes.resolve(cfg, facts, "edm"),
    multiple=lambda cfg: scratch.unet_multiple(cfg.edm, "edm"),
    card=lambda cfg: {"pipeline_tag": "unconditional-image-generation", "tags": ["edm"]},
)
