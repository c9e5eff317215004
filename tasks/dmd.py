"""Distil a flow-matching text-to-image model into adapters with which it draws in four steps, from captions alone.

    python loop.py dmd --data.train-data-dir photos --dmd.pretrained-model-name-or-path Tongyi-MAI/Z-Image

Distribution matching (Yin et al. 2024, Improved Distribution Matching Distillation, arXiv:2405.14867, without its adversarial
loss): noised again, what the student draws moves from where a model of its own drawings would have it to where the teacher
would. It draws on its own deterministic trajectory, as a pipeline does (Luo et al. 2025, arXiv:2503.06674). Of the images their
sizes alone count. The export is a `pytorch_lora_weights.safetensors`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from oneloop.configs import Amount, BadInput, Base, Count, Data, Live, Name, Range, check
from oneloop.families import adapted, adapters, distilled, stable_diffusion, text_to_image, transformer
from oneloop.families.settings import OWN_TEXT, Adapters, Pretrained, check_unused
from oneloop.families.text_to_image import sample_fn
from oneloop.maths import flow
from oneloop.tasks import Batch, Encoders, Loss, Models, Optims, Rng, Task, mean, without_adapters
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = ("ZImagePipeline", "FluxPipeline", "ChromaPipeline", "Krea2Pipeline", "Lumina2Pipeline", "ErnieImagePipeline")
KINDS += ("HunyuanImagePipeline",)
"""Families whose pipelines draw at `levels`."""
OTHERS = (*OWN_TEXT, "training_adapter", "group_offload", "weighting_scheme")


@dataclass(frozen=True)
class Settings(Pretrained, Adapters):
    """The teacher, the student's adapters, and how they are distilled."""

    pretrained_model_name_or_path: Name = "Tongyi-MAI/Z-Image"
    """The teacher, a flow-matching model: a name on the hub, or a folder that diffusers wrote."""
    rank: Annotated[int, Range(1, 65_536)] = 64
    """Rank of the adapters, the student's and those of the model of what it draws."""
    teacher_guidance: Amount = 4.0
    """Guidance of the teacher, as pipelines count it; 1 is none."""
    fake_updates: Count = 5
    """Steps of the model of what the student draws, for one of the student."""
    fake_learning_rate: Live[Amount | None] = None
    """Its peak learning rate. None: learning_rate."""
    num_inference_steps: Annotated[int, Range(1, 64)] = 4
    """Steps in which the student draws."""

    def __post_init__(self):
        check(self, "dmd")
        check_unused(self, "dmd", OTHERS, "has no part in distillation")
        adapted.check_settings(self, "dmd")

    @property
    def guidance(self) -> float | None:
        return transformer.family(self).off if self.guidance_scale is None else self.guidance_scale


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for some thousand captions."""

    base: Base = field(default_factory=lambda: Base(num_epochs=10, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    dmd: Settings = field(default_factory=Settings)

    def __post_init__(self):
        adapted.check(self)


def check_base(cfg: Config) -> None:
    """Refuse a checkpoint that this cannot be done to, from its configs alone."""
    text_to_image.check_base(cfg)
    if (kind := stable_diffusion.kind(cfg.dmd)) not in KINDS:
        flag = f"--dmd.pretrained-model-name-or-path {cfg.dmd.pretrained_model_name_or_path}"
        raise BadInput(f"{flag} is a {kind}; expected one of {', '.join(KINDS)}; lcm distils Stable Diffusion")


def encoders(cfg: Config) -> Encoders | None:
    """The text encoders: what they make of nothing too."""
    check_base(cfg)
    return adapted.encoders(cfg, distilled.encode_constants)


def make_models(cfg: Config, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The teacher with the student's adapters, and once more with those of the model of what it draws: the same base."""
    check_base(cfg)
    models = adapted.make(cfg, constants, distilled.encode_constants, ("null", "prompts"))
    return models | {"fake": distilled.twin(models["transformer"])}


def make_optim(models: Models, cfg: Config) -> Optims:
    s = cfg.dmd
    rate = s.learning_rate if s.fake_learning_rate is None else s.fake_learning_rate
    return adapted.make_optim(models, cfg) | {"fake": optimizers.make(adapters.groups(models["fake"], rate, s), s)}


def levels(s: Settings, shape: tuple[int, ...]) -> list[float]:
    """The noise levels of a drawing, from 1 to 0: even ones, shifted as inference shifts them for latents of this shape."""
    import torch

    own, tokens = transformer.family(s), shape[-2] * shape[-1] // transformer.family(s).patch ** 2
    alpha = own.shift(transformer.parts(s)["scheduler"], tokens, stable_diffusion.config(s, ""))
    even = torch.linspace(1, 0, s.num_inference_steps + 1, dtype=torch.float64)
    return flow.shift(even, alpha).tolist()


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """The student's loss, in one step of `fake_updates`, and that of the model of what it draws: flow matching on its drawing,
    as it is before the student's step."""
    import torch

    s, shape = cfg.dmd, batch["latent_mean"].shape[1:]
    step, sigmas = batch["step"] // s.fake_updates, levels(s, shape)
    like = lambda sigma: torch.full((len(rng),), sigma, device=batch["latent_mean"].device)  # noqa: E731
    velocity = transformer.family(s).velocity
    answer = lambda net, x, sigma, text=batch: velocity(net, x, sigma, text, 1.0).float()  # noqa: E731
    taken = batch["phase"] != "train" or batch["step"] % s.fake_updates == 0
    last = (step + batch["step"] % s.fake_updates * (not taken)) % s.num_inference_steps  # of its steps the one that is trained
    x = rng.normal("start", *shape)  # [B, C, h, w]
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas[: last + 1]):
            x = x + (after - now) * answer(models["transformer"], x, like(now))
    with torch.set_grad_enabled(taken):
        drawn = flow.clean(x, answer(models["transformer"], x, like(sigmas[last])), like(sigmas[last]))  # [B, C, h, w]
    if taken:
        with torch.no_grad():
            sigma = transformer.noise_level(s, rng.uniform("timestep"), drawn.shape).clamp(0.02, 0.98)  # [B]
            noised = flow.interpolate(drawn, rng.normal("noise", *shape), sigma)
            with without_adapters(models["transformer"]) as teacher:
                real = guided(teacher, noised, sigma, models, batch, answer, s)
            real, fake = (flow.clean(noised, v, sigma) for v in (real, answer(models["fake"], noised, sigma)))
            scale = (drawn - real).abs().flatten(1).mean(1).clamp(min=1e-5)  # [B]
            goal = drawn - (fake - real) / scale[:, None, None, None]
        yield Loss("dmd", mean((drawn - goal).square() / 2, batch))
    drawn = drawn.detach()
    sigma = transformer.noise_level(s, rng.uniform("fake timestep"), drawn.shape)  # [B]
    noise = rng.normal("fake noise", *shape)
    error = answer(models["fake"], flow.interpolate(drawn, noise, sigma), sigma) - flow.velocity(drawn, noise)
    yield Loss("fake", mean(error.square(), batch))


def guided(
    net: nn.Module, x: Tensor, sigma: Tensor, models: Models, batch: Batch, answer: Callable[..., Tensor], s: Settings
) -> Tensor:
    """The teacher's velocity, away from what it answers to no caption."""
    with_text = answer(net, x, sigma)
    if s.teacher_guidance == 1:
        return with_text
    without = answer(net, x, sigma, batch | text_to_image.repeated(models["null"], batch["prompt_embeds"]))
    return without + s.teacher_guidance * (with_text - without)


merged = adapted.merged

task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    prompts=text_to_image.drawn_after,
    export_fn=adapted.export_fn,
    card=lambda cfg: text_to_image.card(cfg, "lora", "dmd", "text-to-image", "template:sd-lora"),
    encodings=text_to_image.ENCODINGS,
    encoders=encoders,
    float32=("vae",),
    columns=text_to_image.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=adapted.remarks,
)
