"""Train a transformer of images or latents from scratch, by class, on the velocity of a flow.

    python loop.py dit
    python loop.py dit --dit.pretrained-vae-model-name-or-path runs/vae/export --data.resolution 64

Ma et al. 2024, SiT (arXiv:2401.08740), the linear path and its velocity, in the transformer of Peebles and Xie 2022, DiT
(arXiv:2212.09748). The export has a DiTTransformer2DModel, a flow scheduler and, of latents, their autoencoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oneloop.configs import Amount, Base, Data, Live, Name, Range, check, read_model_config, require
from oneloop.families import autoencoder, classes, dit, drawing, latents, scratch
from oneloop.families.scratch import New, named, shape
from oneloop.maths import diffusion
from oneloop.maths import flow as rectified
from oneloop.tasks import Batch, Encoding, Images, Loss, Models, Optims, Rng, Task, mean
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor

VAE = "--dit.pretrained-vae-model-name-or-path"


@dataclass(frozen=True)
class Settings(New):
    """The transformer, its noise levels and its sampler."""

    class_conditional: bool = True
    """Condition the model on the labels of the data; samples then show the classes in turn."""
    model_config: Live[Name | None] = None
    """A diffusers DiTTransformer2DModel config: a JSON file, or a folder with a config.json. None: a small one fit for 16x16 on
    a CPU. Channels, side and classes are those of the data."""
    learning_rate: Live[Amount] = 1e-3
    """Peak learning rate: of AdamW, 1e-4 for large models; about 1 with prodigy."""
    pretrained_vae_model_name_or_path: Name | None = None
    """Train on the latents of this autoencoder: a folder, such as the export of the task `vae`, or a name on the hub. None: on
    pixels."""
    vae_subfolder: Name | None = None
    """Its folder inside that place: `vae` where it is a whole pipeline."""
    density: Literal["uniform", "logit_normal"] = "uniform"
    """How often each noise level is drawn, before the shift: as published, or the middle more often."""
    flow_shift: Annotated[float, Range(0, 1e6, without=0)] = 1.0
    """Factor on the odds of noise, in training and samples, for larger images."""
    sampler: Live[Literal["heun", "euler"]] = "heun"
    """How samples are drawn: Heun's method, which calls the model twice a step, or Euler's."""
    num_inference_steps: Live[Annotated[int, Range(2, 1000)]] = 25
    """Steps to draw a sample."""

    def __post_init__(self):
        check(self, "dit")
        inside, place = self.vae_subfolder, self.pretrained_vae_model_name_or_path
        require(inside is None or bool(place), "dit.vae_subfolder", inside, f"nothing without {VAE}")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task."""

    base: Base = field(default_factory=scratch.base)
    data: Data = field(default_factory=lambda: Data(resolution=16, train_batch_size=16))
    dit: Settings = field(default_factory=Settings)

    def __post_init__(self):
        s = self.dit
        optimizers.check(s, "dit", self.base)
        classes.check(s, "dit")
        for name in ("buckets", "more_resolutions"):
            given = getattr(self.data, name)
            require(not given, f"data.{name}", given, "none: the transformer's positions are those of one size")
        if not s.pretrained_vae_model_name_or_path:
            side = dit.patch(model_config(s), named(s, "dit"))
            expected = f"a multiple of {side}, the patches of {named(s, 'dit')}"
            require(self.data.resolution % side == 0, "data.resolution", self.data.resolution, expected)


def model_config(s: Settings) -> dict[str, Any]:
    """The DiTTransformer2DModel config that the settings name."""
    if s.model_config is None:
        return dit.DEFAULT
    return read_model_config(s.model_config, "dit.model-config", "DiTTransformer2DModel")


def labelled(s: Settings) -> Settings:
    """The settings as they are with classes: without, all images are of one."""
    if s.class_conditional:
        return s
    return replace(s, class_conditional=True, num_classes=1, label_dropout=0.0, guidance_scale=1.0)


def scheduler(s: Settings) -> Any:
    """The diffusers scheduler that draws the samples, also from the export."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    kind = FlowMatchHeunDiscreteScheduler if s.sampler == "heun" else FlowMatchEulerDiscreteScheduler
    return kind(num_train_timesteps=1000, shift=s.flow_shift)


def make_models(cfg: Config) -> Models:
    s, place = cfg.dit, cfg.dit.pretrained_vae_model_name_or_path
    models, size = {}, shape(cfg)
    if place:
        models["vae"] = autoencoder.load(place, s.vae_subfolder, VAE)
        size = autoencoder.size(models["vae"], cfg.data.resolution, f"{VAE} {place}")
    models["transformer"] = dit.make(model_config(s), named(s, "dit"), size, labelled(s).num_classes)
    return models


def make_optim(models: Models, cfg: Config) -> Optims:
    return {"transformer": optimizers.make(models["transformer"].parameters(), cfg.dit)}


def encode_images(models: Models, images: Tensor, cfg: Config) -> dict[str, Tensor]:
    return autoencoder.encode(models["vae"], images)


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """Squared error of the velocity noise - x at (1 - sigma) x + sigma noise (Ma et al. 2024, section 2.1, the linear path)."""
    import torch

    s = cfg.dit
    if "latent_mean" in batch:
        x = latents.draw(batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, h]
    else:
        x = batch["pixel_values"]  # [B, 3, H, H] in [-1, 1]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, h]
    sigma = rectified.shift(rectified.density(s.density, rng.uniform("timestep")), s.flow_shift)  # [B]
    one = {} if s.class_conditional else {"label": torch.zeros(len(x), dtype=torch.long, device=x.device)}
    labels = classes.shown(batch | one, rng, labelled(s))  # [B]
    x_t = rectified.interpolate(x, noise, sigma)
    answer = models["transformer"](x_t, timestep=1000 * sigma, class_labels=labels, return_dict=False)[0]
    yield Loss("transformer", mean(diffusion.square_error(answer, rectified.velocity(x, noise)), batch))


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    s, transformer = labelled(cfg.dit), models["transformer"]
    size = (transformer.config.in_channels, *2 * (transformer.config.sample_size,))
    x = drawing.samples(transformer, scheduler(s), rng, size, s.num_inference_steps, s)
    return {"samples": autoencoder.decode(models["vae"], x) if "vae" in models else (x / 2 + 0.5).clamp(0, 1)}


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    s, transformer, made = labelled(cfg.dit), models["transformer"], scheduler(cfg.dit)
    transformer.save_pretrained(path / "transformer")
    made.save_pretrained(path / "scheduler")
    size = (transformer.config.in_channels, *2 * (transformer.config.sample_size,))
    load, decoded = "", "x / 2 + 0.5"
    if "vae" in models:
        place = cfg.dit.pretrained_vae_model_name_or_path
        load, decoded = autoencoder.export(models["vae"], place, cfg.dit.vae_subfolder, path)
    kinds = {"transformer": "DiTTransformer2DModel", "scheduler": type(made).__name__}
    call = f"transformer, scheduler, {drawing.arguments(size, s.num_inference_steps, s)}"
    return load + drawing.lines(kinds, call, decoded)


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    encodings={"pixel_values": Encoding(fn=encode_images, models=("vae",))},
    float32=("vae",),
    resolve=lambda cfg, facts: classes.resolve(cfg, facts, "dit"),
    card=lambda cfg: {"pipeline_tag": "unconditional-image-generation", "tags": ["dit", "sit"]},
)
