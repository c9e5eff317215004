"""Distil a Stable Diffusion or SDXL into a latent consistency model, which draws in four steps: adapters, or all of its UNet.

    python loop.py lcm --data.train-data-dir photos

Luo et al. 2023, Latent Consistency Models (arXiv:2310.04378) and LCM-LoRA (arXiv:2311.05556). A step of DDIM with the teacher,
guided, leads from one point of a trajectory to an earlier one, at which an average of the student says what the student shall
say at the first. The export is a `pytorch_lora_weights.safetensors` for `load_lora_weights`, or a UNet that is told the
guidance, both for a pipeline with diffusers' LCMScheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oneloop.configs import Amount, BadInput, Base, Count, Data, Live, Name, Range, Share, check, require
from oneloop.families import adapted, distilled, stable_diffusion, text_to_image
from oneloop.families.settings import Adapters, Pretrained, check_unused
from oneloop.maths import consistency, diffusion
from oneloop.tasks import Batch, Encoders, Follow, Loss, Models, Rng, Task, mean, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
TARGETS += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


@dataclass(frozen=True)
class Settings(Pretrained, Adapters):
    """The teacher, what is made of it, and how."""

    trains: Literal["adapters", "all"] = "adapters"
    """What becomes the student: adapters on the teacher, or a copy of its UNet, which is then told the strength of guidance."""
    rank: Annotated[int, Range(1, 65_536)] = 64
    """Rank of the adapters."""
    target_modules: tuple[Name, ...] | None = TARGETS
    """Layers that get an adapter, as of `lora`; convolutions too."""
    num_ddim_timesteps: Count = 50
    """Timesteps of the teacher that are used, and how far from each other the two points are."""
    w_min: Amount = 3.0
    """Guidance of the teacher is drawn evenly between this and w_max: cond + w (cond - uncond), so 0 is none, and what a
    pipeline calls guidance_scale is 1 + w."""
    w_max: Amount = 15.0
    """The strongest guidance."""
    loss_type: Literal["huber", "l2"] = "huber"
    """Distance between the two answers."""
    huber_c: Annotated[float, Range(0, 3e38, without=0)] = 1e-3
    """Where pseudo-Huber turns from a square to an absolute value."""
    timestep_scaling_factor: Annotated[float, Range(0, 3e38, without=0)] = 10.0
    """How soon the student's answer stops to be its input as t grows."""
    unet_time_cond_proj_dim: Annotated[int, Range(4, 65_536)] = 256
    """With trains all: numbers that tell the UNet the guidance."""
    target_decay: Share = 0.95
    """Decay of the average that says what the student shall say; 0 is the student itself."""
    num_inference_steps: Live[Annotated[int, Range(1, 1000)] | None] = 4
    """Steps to draw a sample."""
    guidance_scale: Live[Amount | None] = None
    """Strength of guidance in samples. None: of adapters 1, which is what they learned; of a UNet 7.5, or what is nearest to it
    between 1 + w_min and 1 + w_max."""

    def __post_init__(self):
        check(self, "lcm")
        require(self.w_max >= self.w_min, "lcm.w_max", self.w_max, f"at least --lcm.w-min, {self.w_min:g}")
        width = self.unet_time_cond_proj_dim
        require(width % 2 == 0, "lcm.unet_time_cond_proj_dim", width, "an even number")
        check_unused(self, "lcm", ("snr_gamma", "noise_offset", "input_perturbation"), "has no part in distillation")
        distilled.check_settings(self, "lcm")

    @property
    def guidance(self) -> float | None:
        usual = 1.0 if self.trains == "adapters" else 1 + min(max(6.5, self.w_min), self.w_max)
        return usual if self.guidance_scale is None else self.guidance_scale

    @property
    def sampler(self) -> Mapping[str, Any]:
        steps, scaling = self.num_ddim_timesteps, self.timestep_scaling_factor
        return {"_class_name": "LCMScheduler", "original_inference_steps": steps, "timestep_scaling": scaling}


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for some thousand images."""

    base: Base = field(default_factory=lambda: Base(num_epochs=20, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    lcm: Settings = field(default_factory=Settings)

    def __post_init__(self):
        adapted.check(self)


def check_base(cfg: Config) -> None:
    """Refuse a checkpoint that this cannot be done to, from its configs alone."""
    s = cfg.lcm
    text_to_image.check_base(cfg)
    if (kind := stable_diffusion.kind(s)) not in stable_diffusion.PIPELINES:
        flag = f"--lcm.pretrained-model-name-or-path {s.pretrained_model_name_or_path}"
        raise BadInput(f"{flag} is a {kind}; expected one of {', '.join(stable_diffusion.PIPELINES)}")
    adapted.check_base(cfg)
    steps = stable_diffusion.config(s, "scheduler").get("num_train_timesteps", 1000)
    require(s.num_ddim_timesteps <= steps, "lcm.num_ddim_timesteps", s.num_ddim_timesteps, f"at most the teacher's {steps}")
    most, given = s.num_ddim_timesteps, s.num_inference_steps or 4
    require(given <= most, "lcm.num_inference_steps", given, f"at most --lcm.num-ddim-timesteps, {most}")


def encoders(cfg: Config) -> Encoders:
    """The text encoders: what they make of nothing too."""
    check_base(cfg)
    return distilled.encoders(cfg, student_config(cfg.lcm))


def student_config(s: Settings) -> dict[str, Any]:
    """The UNet's config, with a place for the guidance where all of it trains."""
    given = stable_diffusion.config(s, "unet")
    width = given.get("time_cond_proj_dim") or s.unet_time_cond_proj_dim
    return given | ({"time_cond_proj_dim": width} if s.trains == "all" else {})


def make_models(cfg: Config, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The teacher, and the student, which begins as it is whatever the guidance; without text encoders where `constants` has
    what is needed of them."""
    from torch import nn

    check_base(cfg)
    models = distilled.make(cfg, constants, student_config(cfg.lcm))
    if cfg.lcm.trains == "all" and models["teacher"].config.time_cond_proj_dim is None:
        nn.init.zeros_(models["unet"].time_embedding.cond_proj.weight)
    return models


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """Algorithm 1 of arXiv:2310.04378: the student at t against the target at a step of DDIM before it, both as functions f."""
    import torch

    s, predicts, xl = cfg.lcm, stable_diffusion.prediction_type(cfg.lcm), stable_diffusion.is_xl(cfg.lcm)
    x = stable_diffusion.draw(models["vae"], batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, w]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, w]
    alphas = stable_diffusion.alphas_cumprod(s, x.device)  # [T]
    stride = len(alphas) // s.num_ddim_timesteps
    t = stride * (rng.integers("timestep", s.num_ddim_timesteps) + 1) - 1  # [B]
    earlier = (t - stride).clamp(min=0)  # [B]
    w = s.w_min + (s.w_max - s.w_min) * rng.uniform("guidance")  # [B]
    given = stable_diffusion.conditions(batch, xl)
    width = unwrap(models["unet"]).config.time_cond_proj_dim
    told = given | ({} if width is None else {"timestep_cond": consistency.embedded(w, width)})

    answer = lambda net, x_t, t, told: net(x_t, t, **told, return_dict=False)[0].float()  # noqa: E731

    def f(net: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        start = diffusion.clean(predicts, answer(net, x_t, t, told), x_t, alphas[t])
        c_skip, c_out = consistency.boundary(t, s.timestep_scaling_factor)
        return diffusion.like(c_skip, x_t) * x_t + diffusion.like(c_out, x_t) * start

    x_t = diffusion.add_noise(x, noise, alphas[t])
    with torch.no_grad(), distilled.teacher(models, s) as net:
        guided = answer(net, x_t, t, given)  # [B, C, h, w]
        if s.w_max:
            null = batch | text_to_image.repeated(models["null"], batch["prompt_embeds"])
            guided = guided + diffusion.like(w, x) * (guided - answer(net, x_t, t, stable_diffusion.conditions(null, xl)))
        start, source = (part(predicts, guided, x_t, alphas[t]) for part in (diffusion.clean, diffusion.noise_in))
        goal = f(models["target"], diffusion.add_noise(start, source, alphas[earlier]), earlier)
    error = f(models["unet"], x_t, t) - goal
    yield Loss("lcm", mean(consistency.huber(error, s.huber_c) if s.loss_type == "huber" else error.square(), batch))


merged = distilled.merged

task = Task(
    config=Config,
    make_models=make_models,
    make_optim=adapted.make_optim,
    loss_fn=loss_fn,
    sample_fn=text_to_image.sample_fn,
    prompts=text_to_image.drawn_after,
    export_fn=distilled.export_fn,
    card=lambda cfg: text_to_image.card(cfg, "latent-consistency", "text-to-image"),
    encodings=text_to_image.ENCODINGS,
    encoders=encoders,
    follows={"target": Follow(of="unet", decay="lcm.target_decay")},
    float32=("vae",),
    columns=text_to_image.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=adapted.remarks,
)
