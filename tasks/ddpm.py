"""Train a diffusion model of images from scratch, alone or by class.

    python loop.py ddpm --base.num-epochs 10
    python loop.py ddpm --ddpm.class-conditional

Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models (arXiv:2006.11239). The export is a `DDPMPipeline`.
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
from oneloop.tasks import Batch, Images, Loss, Models, Optims, Rng, Task, masked, mean
from oneloop.training import optimizers


@dataclass(frozen=True)
class Settings(New):
    """The model and its objective."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "sample"
    """What the model predicts: the noise, the clean image (best where training is short), or v."""
    snr_gamma: Annotated[float, Range(0, 3e38, without=0)] | None = 1.0
    """Clamp of the min-SNR loss weight; 5 is usual, a smaller one attends to the whole rather than to detail. None: unweighted,
    and weighted by the SNR for `sample`."""
    ddpm_num_steps: Annotated[int, Range(1, 100_000)] = 1000
    """Timesteps of the noise schedule."""
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Noise schedule."""
    sampler: Live[Literal["dpm++", "ddim", "ddpm"]] = "dpm++"
    """How samples are drawn, also by the export: DPM-Solver++ with noise, DDIM or DDPM."""
    ddpm_num_inference_steps: Live[Annotated[int, Range(1, 100_000)] | None] = None
    """Steps to draw a sample. None: 25 with dpm++, 50 with ddim, 100 with ddpm, and twice as many on the schedule linear, where
    fewer would draw images too close to their mean."""

    def __post_init__(self):
        check(self, "ddpm")
        given, most = self.ddpm_num_inference_steps, self.ddpm_num_steps
        expected = f"1 to {most} (--ddpm.ddpm-num-steps), or None"
        require(given is None or given <= most, "ddpm.ddpm_num_inference_steps", given, expected)


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task."""

    base: Base = field(default_factory=scratch.base)
    data: Data = field(default_factory=lambda: Data(resolution=16, train_batch_size=8))
    ddpm: Settings = field(default_factory=Settings)

    def __post_init__(self):
        scratch.check_unet(self, "ddpm")


def model_config(cfg: Config) -> dict[str, Any]:
    """The UNet2DModel config that the settings name."""
    return scratch.unet_config(cfg.ddpm, "ddpm")


def scheduler(cfg: Config) -> Any:
    """The diffusers scheduler that draws the samples, which a `DDPMPipeline` takes: DPM-Solver++ of the diffusion SDE (Lu et
    al. 2022, arXiv:2211.01095), DDIM (Song, Meng, Ermon 2020, arXiv:2010.02502) or the ancestral one of DDPM."""
    import diffusers

    kinds = {"dpm++": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
    # Thresholding keeps the image in [-1, 1], as the others do. The clip of log SNR clips nothing: diffusers' own, minus
    # infinity, would make its config invalid JSON.
    solver = {"algorithm_type": "sde-dpmsolver++", "thresholding": True, "lambda_min_clipped": -20.0}
    return getattr(diffusers, kinds[cfg.ddpm.sampler])(
        num_train_timesteps=cfg.ddpm.ddpm_num_steps,
        beta_schedule=cfg.ddpm.ddpm_beta_schedule,
        prediction_type=cfg.ddpm.prediction_type,
        timestep_spacing="trailing",  # a sample begins at the last step, from pure noise
        **(solver if cfg.ddpm.sampler == "dpm++" else {}),
    )


def inference_steps(s: Settings) -> int:
    """Steps to draw a sample. Where None is given, as many as keep 93 % and more of the deviation of a Gaussian of deviation
    0.25, about that of images, whose best denoiser is known: 25 steps of dpm++ on the schedule linear would keep 87 %."""
    usual = {"dpm++": 25, "ddim": 50, "ddpm": 100}[s.sampler] * (2 if s.ddpm_beta_schedule == "linear" else 1)
    return s.ddpm_num_inference_steps or min(usual, s.ddpm_num_steps)


def make_models(cfg: Config) -> Models:
    return scratch.make_unet(cfg, "ddpm")


def make_optim(models: Models, cfg: Config) -> Optims:
    return {"unet": optimizers.make(models["unet"].parameters(), cfg.ddpm)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    x = batch["pixel_values"]  # [B, 3, H, W] in [-1, 1]
    noise = rng.normal("noise", *x.shape[1:])  # [B, 3, H, W]
    t = rng.integers("timestep", cfg.ddpm.ddpm_num_steps)  # [B]
    a = diffusion.alphas_cumprod(cfg.ddpm.ddpm_num_steps, cfg.ddpm.ddpm_beta_schedule, x.device)[t]  # [B]
    labels = classes.shown(batch, rng, cfg.ddpm)  # [B]
    given = {} if labels is None else {"class_labels": labels}
    prediction = models["unet"](diffusion.add_noise(x, noise, a), t, **given, return_dict=False)[0]
    error = diffusion.square_error(prediction, diffusion.target(cfg.ddpm.prediction_type, x, noise, a))  # [B, 3, H, W]
    weight = diffusion.loss_weight(cfg.ddpm.prediction_type, a, cfg.ddpm.snr_gamma)  # [B]
    yield Loss("unet", mean(weight * masked(error, batch), batch))


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    import torch
    from diffusers import DDPMPipeline

    if cfg.ddpm.class_conditional:  # a DDPMPipeline takes no labels
        x = drawing.samples(models["unet"], scheduler(cfg), rng, scratch.shape(cfg), inference_steps(cfg.ddpm), cfg.ddpm)
        return {"samples": (x / 2 + 0.5).clamp(0, 1)}
    pipeline = DDPMPipeline(unet=models["unet"], scheduler=scheduler(cfg))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=len(rng),
        generator=rng.generators("sample"),
        num_inference_steps=inference_steps(cfg.ddpm),
        output_type="np",
    ).images  # [N, H, W, 3] in [0, 1]
    return {"samples": torch.from_numpy(images).permute(0, 3, 1, 2)}


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    from diffusers import DDPMPipeline

    made = scheduler(cfg)
    DDPMPipeline(unet=models["unet"], scheduler=made).save_pretrained(path)
    if cfg.ddpm.class_conditional:
        call = drawing.arguments(scratch.shape(cfg), inference_steps(cfg.ddpm), cfg.ddpm)
        return drawing.lines({"unet": "UNet2DModel", "scheduler": type(made).__name__}, f"unet, scheduler, {call}")
    return (
        "from diffusers import DDPMPipeline\n"
        "pipeline = DDPMPipeline.from_pretrained({path})\n"
        f'pipeline(num_inference_steps={inference_steps(cfg.ddpm)}).images[0].save("sample.png")'
    )


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    resolve=lambda cfg, facts: classes.resolve(cfg, facts, "ddpm"),
    multiple=lambda cfg: scratch.unet_multiple(cfg.ddpm, "ddpm"),
    card=lambda cfg: {"pipeline_tag": "unconditional-image-generation", "tags": ["ddpm"]},
)
