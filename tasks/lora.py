"""Fine-tune low-rank adapters of a text-to-image model on captioned images.

    python loop.py lora --data.train-data-dir photos --lora.pretrained-model-name-or-path stabilityai/sdxl-turbo

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685). Stable Diffusion 1.x, 2.x, SDXL and
every flow-matching family of families/flow.py: which one a checkpoint is, what it predicts and which layers get adapters, its
own files and that table say. The export is a `pytorch_lora_weights.safetensors` for a pipeline's `load_lora_weights`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oneloop import configs
from oneloop.configs import Amount, BadInput, Base, Data, Live, Name, Range, ShareBelowOne, Words, check, require
from oneloop.families import adapters, flow, hub, latents, precision, prompts, stable_diffusion, transformer
from oneloop.families.prompts import Prompt
from oneloop.maths import diffusion
from oneloop.maths import flow as rectified
from oneloop.tasks import (
    Batch,
    Column,
    Encoders,
    Encoding,
    Images,
    Loss,
    Models,
    Optims,
    Rng,
    Task,
    masked,
    mean,
    without_adapters,
)
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """The checkpoint, its adapters and their objective."""

    pretrained_model_name_or_path: Name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The model to adapt: a name on the hub, or a folder that diffusers wrote. It says itself which family it is of."""
    revision: Name | None = None
    """Branch, tag or commit of a model on the hub."""
    variant: Name | None = None
    """Variant of its weight files, such as fp16."""
    pretrained_vae_model_name_or_path: Name | None = None
    """An AutoencoderKL to use in place of its own: a folder, such as the export of the task `vae`, a name on the hub, or a
    .safetensors file."""
    single_file: Name | None = None
    """A .safetensors or .gguf file whose weights stand in the place of its UNet's or transformer's; text encoders, autoencoder
    and all configs are those of pretrained_model_name_or_path."""
    rank: Annotated[int, Range(1, 65_536)] = 16
    """Rank of the adapters: how much they can learn, and how large they are."""
    alpha: Annotated[float, Range(0, 3e38, without=0)] | None = None
    """The adapters' output is multiplied by alpha / rank, or alpha / sqrt(rank) with rsLoRA. None: the rank."""
    dropout: ShareBelowOne = 0.0
    """Dropout before the adapters."""
    target_modules: tuple[Name, ...] | None = None
    """Layers of the UNet or transformer that get an adapter: ends of their names, patterns (regular expressions for the whole
    name, such as `blocks\\.\\d+\\.attn\\..*`), or all-linear. None: those that are usual for the family."""
    rank_pattern: tuple[Words, ...] = ()
    """Other ranks by layer, TARGET=RANK each, such as `to_q=8`, with targets as in target_modules."""
    alpha_pattern: tuple[Words, ...] = ()
    """Other alphas by layer, TARGET=ALPHA each."""
    learning_rate_pattern: tuple[Words, ...] = ()
    """Other peak learning rates by layer, TARGET=RATE each; the first target that means a layer counts."""
    init_lora: Name | None = None
    """Start from the adapters of a file, or of a folder that an export wrote, in every form that diffusers reads. Layers, ranks
    and alphas are the file's."""
    training_adapter: Name | None = None
    """Adapters that are on while this LoRA trains, and off in samples and exports: what keeps a distilled checkpoint's few
    steps."""
    max_sequence_length: Annotated[int, Range(1, 65_536)] | None = None
    """Tokens that a caption is cut or filled to, in training and samples. None: the family's own, as at inference."""
    base_precision: precision.Precision = "auto"
    """How the frozen UNet or transformer is stored: as the run computes, or in bf16, float8, int8 or nf4 (docs/lora.md)."""
    use_dora: bool = False
    """Train the length of each weight apart from its direction (Liu et al. 2024, DoRA, arXiv:2402.09353)."""
    use_rslora: bool = False
    """Divide by the rank's square root (Kalajdzievski 2023, A Rank Stabilization Scaling Factor, arXiv:2312.03732)."""
    use_lokr: bool = False
    """Adapters as Kronecker products (Yeh et al. 2023, LyCORIS, arXiv:2309.14859): Z-Image and FLUX.2, whose pipelines read
    them."""
    lokr_factor: Annotated[int, Range(-1, 65_536, without=0)] = -1
    """Size of LoKr's first factor where it divides a layer's: the larger, the smaller the file. -1: the most even."""
    train_text_encoder: bool = False
    """Train adapters of the CLIP text encoders too (Stable Diffusion, SDXL, SD3, FLUX.1), as the official scripts do; captions
    are then encoded in every step."""
    optimizer: optimizers.Kind = "adamw"
    """What turns gradients into steps: adamw, adamw8bit, adafactor, prodigy, schedulefree or muon (docs/optimizers.md)."""
    learning_rate: Live[Amount] = 1e-4
    """Peak learning rate for the adapters of the UNet or transformer: of AdamW; about 1 with prodigy."""
    text_encoder_learning_rate: Live[Amount | None] = None
    """Peak learning rate for the text encoders' adapters. None: half of learning_rate."""
    use_8bit_adam: bool = False
    """The same as --lora.optimizer adamw8bit."""
    adam_beta1: Live[ShareBelowOne] = 0.9
    """AdamW's beta1."""
    adam_beta2: Live[ShareBelowOne] = 0.999
    """AdamW's beta2."""
    adam_weight_decay: Live[Amount] = 1e-2
    """AdamW's weight decay."""
    adam_epsilon: Live[Amount] = 1e-8
    """AdamW's epsilon."""
    weighting_scheme: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] | None = None
    """Flow matching: which noise levels count most, by the official scripts' names (Esser et al. 2024, arXiv:2403.03206, 3.1).
    logit_normal and mode draw them more often; sigma_sqrt and cosmap weigh their loss. None: the family's."""
    density: Literal["uniform", "logit_normal", "mode", "cosmap"] | None = None
    """Flow matching: how often each noise level is drawn, before the shift. None: as weighting_scheme says."""
    logit_mean: Annotated[float, Range(-100, 100)] = 0.0
    """Mean of logit_normal: above 0 is more noise."""
    logit_std: Annotated[float, Range(0, 100, without=0)] = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: Annotated[float, Range(-1, 1.75)] = 1.29
    """How far mode is from uniform."""
    flow_shift: Annotated[float, Range(0, 1e6, without=0)] | None = None
    """Flow matching: factor on the odds of noise, for larger images. None: the checkpoint's own at this resolution."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet predicts. None: what its checkpoint says, as it was trained."""
    rescale_betas_zero_snr: bool | None = None
    """Noise schedule that ends in pure noise. None: as the checkpoint says."""
    snr_gamma: Annotated[float, Range(0, 3e38, without=0)] | None = None
    """Clamp of the min-SNR loss weight (5 is usual). None: unweighted, and weighted by the SNR for `sample`."""
    noise_offset: Amount = 0.0
    """Share of noise that is the same all over an image, for very dark and very bright ones (0.05 to 0.1)."""
    input_perturbation: Amount = 0.0
    """More noise for the UNet's input alone (Ning et al. 2023, arXiv:2301.11706; 0.1)."""
    preservation_weight: Amount = 0.0
    """Weight of a second loss: under preservation_prompt the model shall answer as its base does, on the same noised images.
    What the images do not teach stays as it was, without images of it."""
    preservation_prompt: Words = ""
    """What that is said of, such as the subject's class: `a dog` beside captions of one dog."""
    validation_prompts: Live[tuple[Words, ...]] = ()
    """What to draw samples of, in turn: prompts, with settings of their own after ` --` (negative, width, height, seed, steps,
    guidance, strength), as in `a dog --seed 7 --strength 0.5`. None given: the first captions."""
    prompts_file: Live[Name | None] = None
    """A text file with such a prompt in each line, in the place of validation_prompts."""
    negative_prompt: Live[Words] = ""
    """What samples shall not look like."""
    guidance_scale: Live[Amount | None] = None
    """Strength of guidance in samples. None: the default of the model's pipeline."""
    num_inference_steps: Live[Annotated[int, Range(1, 1000)] | None] = None
    """Steps to draw a sample. None: the default of the model's pipeline."""
    save_dtype: Live[Literal["float32", "bfloat16", "float16"]] = "float32"
    """Precision of the exported adapters."""
    kohya: Live[bool] = False
    """Export lora_kohya.safetensors too, the form that ComfyUI and other programs read."""

    def __post_init__(self):
        check(self, "lora")
        given = self.target_modules
        require(given is None or len(given) > 0, "lora.target_modules", given, "at least one name, or all-linear")
        alone = given is None or "all-linear" not in given or len(given) == 1
        require(alone, "lora.target_modules", given, "all-linear without other names")
        numbers = {"rank_pattern": Range(1, 65_536), "alpha_pattern": Range(0.0, 3e38, without=0)}
        for name, limit in (numbers | {"learning_rate_pattern": Range(0.0, 3e38)}).items():
            adapters.check_pattern(f"lora.{name.replace('_', '-')}", getattr(self, name), limit)
        for one, others in APART.items():
            for other in others if getattr(self, one) else ():
                if getattr(self, other) != getattr(Settings, other):
                    one, other = (f"--lora.{name.replace('_', '-')}" for name in (one, other))
                    raise BadInput(f"{one} with {other}: they do not go together; leave one out")


APART = {
    "kohya": ("use_dora", "use_lokr"),  # programs do not agree on DoRA in that form
    "train_text_encoder": ("use_dora",),  # transformers 5 loses the lengths when it loads them
    "use_lokr": ("use_dora", "use_rslora", "dropout", "training_adapter"),
    "preservation_weight": ("train_text_encoder",),
    "prompts_file": ("validation_prompts",),
    "init_lora": ("target_modules", "alpha", "rank_pattern", "alpha_pattern", "dropout", "use_dora", "use_rslora", "use_lokr"),
}
"""Settings -> those that mean nothing beside them."""


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for a few photographs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=100, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(
        default_factory=lambda: Data(resolution=512, center_crop=True, train_batch_size=1, interpolation="lanczos")
    )
    lora: Settings = field(default_factory=Settings)

    def __post_init__(self):
        s = self.lora
        optimizers.check(s, "lora", self.base)
        precision.check(s, "lora", self.base)
        if all(map(stable_diffusion.is_local, (s.pretrained_vae_model_name_or_path or ".", s.pretrained_model_name_or_path))):
            check_base(self)  # a name on the hub is looked up by make_models
        given, several, flag = self.base.num_samples, len(asked(s)), "prompts-file" if s.prompts_file else "validation-prompts"
        require(given >= several, "base.num_samples", given, f"at least {several}, one for each of --lora.{flag}")


TEXT = ("train_text_encoder", "text_encoder_learning_rate")
"""Settings for families whose official scripts train text encoders."""
DIFFUSION = ("prediction_type", "rescale_betas_zero_snr", "snr_gamma", "noise_offset", "input_perturbation")
"""Settings that only the families of Stable Diffusion have a use for."""
FLOW = ("weighting_scheme", "density", "logit_mean", "logit_std", "mode_scale", "flow_shift", "max_sequence_length")
"""Settings that only flow-matching families have a use for."""


def family(s: Settings) -> ModuleType:
    """The functions for the checkpoint's family, the same names in both modules: stable_diffusion or transformer."""
    return stable_diffusion if stable_diffusion.kind(s) in stable_diffusion.PIPELINES else transformer


def multiple(cfg: Config) -> int:
    """What the images' sides are multiples of."""
    check_base(cfg)
    return family(cfg.lora).multiple(cfg.lora)


def check_base(cfg: Config) -> None:
    """Refuse what cannot work, from the checkpoint's configs alone.

    Raises:
        BadInput: it is no diffusers model, or one of another kind, or the settings do not fit it.
    """
    s, known = cfg.lora, (*stable_diffusion.PIPELINES, *flow.FAMILIES)
    stable_diffusion.check_files(s, "lora", known)
    for name in (FLOW if family(s) is stable_diffusion else DIFFUSION) + (() if family(s).trainable(s) else TEXT):
        if getattr(s, name) != getattr(Settings, name):
            flag = f"--lora.{name}".replace("_", "-")
            raise BadInput(f"{flag} is {getattr(s, name)!r}: a {stable_diffusion.kind(s)} has no use for it; leave it out")
    if s.kohya and family(s) is transformer and not transformer.family(s).comfyui:
        raise BadInput(f"--lora.kohya: other programs have no names known here for a {stable_diffusion.kind(s)}; leave it out")
    if s.use_lokr and not (family(s) is transformer and transformer.family(s).lokr):
        readers = ", ".join(name for name, own in flow.FAMILIES.items() if own.lokr)
        raise BadInput(f"--lora.use-lokr: the loader of a {stable_diffusion.kind(s)} reads no LoKr; expected one of {readers}")
    family(s).check(s, "lora", cfg.data.resolution)
    asked(s, family(s).multiple(s))


def load(s: Settings, precision: str, encoders: bool = True) -> Models:
    """The checkpoint's parts, frozen, with its text encoders or without."""
    if family(s) is transformer:
        return transformer.load(s, "lora", precision, encoders)
    return stable_diffusion.load(s, "lora", ("vae", *(stable_diffusion.ENCODERS if encoders else ()), "unet"))


def encoders(cfg: Config) -> Encoders | None:
    """The text encoders, unless they train."""
    s = cfg.lora
    check_base(cfg)
    adapters.check_targets(s, "lora", family(s).TRAINED)
    if s.train_text_encoder:
        return None
    family(s).check_small(s, "lora")
    stable_diffusion.check_weights(s, "lora", ("vae", *family(s).ENCODERS, family(s).TRAINED))
    return Encoders(
        models=transformer.ENCODERS,
        load=lambda cfg: stable_diffusion.load_parts(cfg.lora, "lora", family(cfg.lora).ENCODERS),
        files=encoder_files,
        constants=encode_constants,
        prompts=encode_prompts,
        key=lambda cfg: (
            *(caption_key(cfg), version("diffusers"), version("transformers")),
            *(asked(s), s.negative_prompt, s.guidance_scale, s.num_inference_steps, cfg.data.resolution),
            bool(s.preservation_weight) and s.preservation_prompt,
        ),
    )


def encoder_files(cfg: Config) -> list[Any]:
    s = cfg.lora
    name, parts = (
        s.pretrained_model_name_or_path,
        [part for part in family(s).ENCODERS if part in stable_diffusion.config(s, "")],
    )
    return [s.variant, *((part, hub.stamp(name, s.revision, part)) for part in parts)]


def encode_constants(models: Models, cfg: Config) -> dict[str, Tensor]:
    """A caption to find layers without gradient with, and the preservation prompt, under `rehearsal/` and `preservation/`."""
    s, made = cfg.lora, {}
    if family(s) is transformer:
        made["rehearsal"] = transformer.rehearsed(models, s)
    if s.preservation_weight:
        made["preservation"] = encode_captions(models, [s.preservation_prompt], cfg)
    return {f"{name}/{key}": x for name, columns in made.items() for key, x in columns.items()}


def encode_prompts(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> dict[str, Tensor]:
    """The prompts of samples, under `prompts/`: what their pipelines ask of the text encoders."""
    prompts: dict[str, Tensor] = {}
    sample_fn(models | {"prompts": prompts}, examples, rng, cfg)
    return {f"prompts/{key}": x for key, x in prompts.items()}


def make_models(cfg: Config, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The parts with adapters; without text encoders where `constants` has what is needed of them."""
    import torch

    s = cfg.lora
    check_base(cfg)
    own = family(s)
    adapters.check_targets(s, "lora", own.TRAINED)
    models = load(s, cfg.base.mixed_precision, constants is None)
    if constants is None:
        with torch.no_grad():
            given = encode_constants(models, cfg)
    else:
        given = constants
        for path, flag in ((s.init_lora, "--lora.init-lora"), (s.training_adapter, "--lora.training-adapter")):
            if path and adapters.has_text(path):
                raise BadInput(f"{flag} {path}: has adapters of a text encoder; add --lora.train-text-encoder")
    if s.init_lora:
        adapters.read(own.pipeline(models, s), s.init_lora, "--lora.init-lora")
    if own is transformer:
        transformer.adapt(models, s, under("rehearsal", given))
    elif not s.init_lora:
        adapters.adapt(models["unet"], s, s.target_modules or stable_diffusion.TARGETS)
    for name in own.ENCODERS:
        if name not in models:
            continue
        if s.train_text_encoder and name in own.trainable(s) and not adapters.tuned(models[name]):
            # SDXL reads the last but one state of its first encoder: an adapter of the last layer would learn nothing.
            layers = stable_diffusion.config(s, name)["num_hidden_layers"] - (
                stable_diffusion.is_xl(s) and name == "text_encoder"
            )
            adapters.adapt(models[name], s, (adapters.text_target(range(layers)),))
        elif adapters.tuned(models[name]) and not s.train_text_encoder:
            raise BadInput(f"--lora.init-lora {s.init_lora}: has adapters of the {name}; add --lora.train-text-encoder")
    if s.training_adapter:
        adapters.read(own.pipeline(models, s), s.training_adapter, "--lora.training-adapter", "assistant")
    for name in (own.TRAINED, *own.ENCODERS):
        adapters.activate(models[name]) if name in models else None
    for name in ("preservation", "prompts"):
        if columns := under(name, given):
            models[name] = torch.nn.Module()
            for key, x in columns.items():  # [1, ...] of the preservation prompt
                models[name].register_buffer(key, x, persistent=False)
    return models


def under(name: str, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constants with this name before the slash."""
    return {key.partition("/")[2]: x for key, x in constants.items() if key.startswith(f"{name}/")}


def make_optim(models: Models, cfg: Config) -> Optims:
    s, groups = cfg.lora, []
    text_rate = s.learning_rate / 2 if s.text_encoder_learning_rate is None else s.text_encoder_learning_rate
    for name, rate in (
        (family(s).TRAINED, s.learning_rate),
        *((encoder, text_rate) for encoder in stable_diffusion.ENCODERS if encoder in models),
    ):
        groups += adapters.groups(models[name], rate, s)
    return {"lora": optimizers.make(groups, s)}


def encode_images(models: Models, x: Tensor, cfg: Config) -> dict[str, Tensor]:
    return family(cfg.lora).encode_images(models, x, cfg.lora)


def encode_captions(models: Models, captions: list[str], cfg: Config) -> dict[str, Tensor]:
    return family(cfg.lora).encode_captions(models, captions, cfg.lora)


def caption_key(cfg: Config) -> Any:
    return family(cfg.lora).caption_key(cfg.lora)


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """The objective; before it, where asked, the loss that keeps the base's answers, whose gradient is added to its own."""
    s = cfg.lora
    if "prompt_embeds" not in batch:  # the text encoders train
        batch = batch | encode_captions(models, batch["caption"], cfg)
    objective = diffusion_loss if family(s) is stable_diffusion else flow_loss
    if s.preservation_weight:
        like = batch["prompt_embeds"]
        same = {
            key: x.to(like.dtype if x.is_floating_point() else x.dtype).expand(len(like), *x.shape[1:])
            for key, x in models["preservation"].named_buffers()
        }
        with without_adapters(models[family(s).TRAINED]) as base:
            kept = mean(objective(models, batch | same, rng, cfg, base), batch)
        yield Loss("lora", s.preservation_weight * kept, {"preservation": kept.detach()}, step=False)
    yield Loss("lora", mean(objective(models, batch, rng, cfg), batch))


def flow_loss(models: Models, batch: Batch, rng: Rng, cfg: Config, base: nn.Module | None = None) -> Tensor:
    """Weighted squared error of the velocity noise - x at (1 - sigma) x + sigma noise, [B] (Esser et al. 2024, eq. 13,
    arXiv:2403.03206); with a `base`, of its difference from what that answers."""
    import torch

    s, family = cfg.lora, transformer.family(cfg.lora)
    x = latents.draw(batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, w]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, w]
    sigma = transformer.noise_level(s, rng.uniform("timestep"), x.shape)  # [B]
    answer = lambda net: family.velocity(net, rectified.interpolate(x, noise, sigma), sigma, batch, 1.0)  # noqa: E731
    target = rectified.velocity(x, noise)  # [B, C, h, w]
    if base is not None:
        with torch.no_grad():
            target = answer(base)
    return transformer.weight(s, sigma) * masked(diffusion.square_error(answer(models["transformer"]), target), batch)


def diffusion_loss(models: Models, batch: Batch, rng: Rng, cfg: Config, base: nn.Module | None = None) -> Tensor:
    """Weighted squared error of what the UNet predicts, [B] (Ho et al. 2020, arXiv:2006.11239); with a `base`, of its
    difference from what that predicts."""
    import torch

    s = cfg.lora
    x = stable_diffusion.draw(models["vae"], batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, w]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, w]
    if s.noise_offset:
        noise = noise + s.noise_offset * rng.normal("noise offset", x.shape[1], 1, 1)
    seen = noise + s.input_perturbation * rng.normal("input perturbation", *x.shape[1:]) if s.input_perturbation else noise
    alphas = stable_diffusion.alphas_cumprod(s, x.device)  # [T]
    t = rng.integers("timestep", len(alphas))  # [B]
    a, predicts = alphas[t], stable_diffusion.prediction_type(s)  # [B]
    given = stable_diffusion.conditions(batch, stable_diffusion.is_xl(s))
    answer = lambda net: net(diffusion.add_noise(x, seen, a), t, **given, return_dict=False)[0]  # noqa: E731
    target = diffusion.target(predicts, x, noise, a)  # [B, C, h, w]
    if base is not None:
        with torch.no_grad():
            target = answer(base)
    error = masked(diffusion.square_error(answer(models["unet"]), target), batch)  # [B]
    return diffusion.loss_weight(predicts, a, s.snr_gamma) * error


def asked(s: Settings, multiple: int = 1) -> list[Prompt]:
    """The sample prompts that the settings give, whose sizes must be multiples of `multiple`."""
    flag = "--lora.prompts-file" if s.prompts_file else "--lora.validation-prompts"
    return prompts.read(prompts.read_file(s.prompts_file, flag) if s.prompts_file else s.validation_prompts, flag, multiple)


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    """The prompts of the settings in turn, or of the first captions; images of several sizes on white, in the largest."""
    import torch

    s, side, own = cfg.lora, cfg.data.resolution, family(cfg.lora)
    entries = asked(s)
    wanted = [entries[i % len(entries)] for i in rng.numbers] if entries else map(Prompt, next(iter(examples))["caption"])
    sizes = [(entry.height or side, entry.width or side) for entry in entries] or [(side, side)]
    canvas = torch.ones(len(rng), 3, *map(max, zip(*sizes, strict=True)))  # [B, 3, H, W]
    alike = lambda pair: replace(pair[0], prompt="", seed=None)  # noqa: E731
    first = 0
    for how, pairs in itertools.groupby(zip(wanted, rng.generators("sample"), strict=True), alike):
        some, generators = zip(*pairs, strict=True)
        for entry, generator in zip(some, generators, strict=True):
            generator.manual_seed(entry.seed) if entry.seed is not None else None
        told = {"negative_prompt": how.negative, "num_inference_steps": how.steps, "guidance_scale": how.guidance}
        settings = replace(s, **{key: value for key, value in told.items() if value is not None})
        height, width = how.height or side, how.width or side
        with contextlib.ExitStack() as stack:
            for name in (own.TRAINED, *own.ENCODERS):
                if name in models:
                    stack.enter_context(adapters.scaled(models[name], {"default": how.strength, "assistant": 0.0}))
            images = own.sample(models, settings, [entry.prompt for entry in some], [*generators], height, width)
        canvas[first : first + len(some), :, :height, :width] = images.cpu()
        first += len(some)
    return {"samples": canvas}  # in [0, 1]


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    s, settings, side = cfg.lora, configs.portable(configs.to_dict(cfg), cfg), cfg.data.resolution
    settings["base"]["output_dir"] = None
    adapters.save(models, path, s, {"oneloop": json.dumps(settings)} | model_spec(cfg))
    prompt = next((entry.prompt for entry in asked(s)), None) or next(iter(examples))["caption"][0]
    how = "".join(f", {key}={value!r}" for key, value in family(s).arguments(s, side, side).items())
    how = "prompt=" + stable_diffusion.quoted(prompt) + how.replace("{", "{{").replace("}", "}}")
    return family(s).load_lines(s) + f'pipeline({how}).images[0].save("sample.png")'


def remarks(models: Models, cfg: Config) -> Iterator[str]:
    yield from filter(None, [precision.remark(cfg.lora, cfg.base)])
    yield from family(cfg.lora).remarks(models, cfg.lora)


def model_spec(cfg: Config) -> dict[str, str]:
    """What the file says of itself, by the keys of Stability AI's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec). Without
    a date, so that equal runs write equal files."""
    s, trigger = cfg.lora, cfg.data.trigger
    said = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family(s).architecture(s)}/lora",
        "implementation": "diffusers",
        "title": Path(cfg.base.output_dir or "lora").name,
        "description": f"Adapters of {Path(s.pretrained_model_name_or_path).name}, trained with oneloop.",
        "resolution": f"{cfg.data.resolution}x{cfg.data.resolution}",
    }
    if trigger:
        said |= {"trigger_phrase": trigger, "usage_hint": f"Trigger: {trigger}"}
    if family(s) is stable_diffusion:
        said["prediction_type"] = {"v_prediction": "v"}.get(kind := stable_diffusion.prediction_type(s), kind)
    return {f"modelspec.{key}": value for key, value in said.items()}


def merged(cfg: Config, folder: Path, strength: float, precision: str) -> tuple[Any, str]:
    """The checkpoint's pipeline with the adapters of an export added to its weights, times a strength, and the name of the part
    that trained; `precision` is what a transformer is read in: bf16, or no."""
    s, own = cfg.lora, family(cfg.lora)
    models = load(s, precision)
    pipeline = own.pipeline(models, s)
    adapters.read(pipeline, str(folder), "the folder")
    for name in (own.TRAINED, *own.ENCODERS):
        adapters.merge(models[name], strength) if name in models else None
    return pipeline, own.TRAINED


def card(cfg: Config) -> dict[str, Any]:
    """What the hub's page of adapters needs. `base_model` is a name on the hub; for a folder there is none."""
    s, trigger = cfg.lora, cfg.data.trigger
    base = hub.card(s.pretrained_model_name_or_path, s.revision)
    prompt = {"instance_prompt": trigger} if trigger else {}
    return (
        base
        | {"pipeline_tag": "text-to-image", "tags": ["lora", "text-to-image", "template:sd-lora", family(s).tag(s)]}
        | prompt
    )


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    card=card,
    encodings={
        "pixel_values": Encoding(fn=encode_images, models=("vae",), key=lambda cfg: stable_diffusion.kind(cfg.lora)),
        "caption": Encoding(
            fn=encode_captions,
            models=transformer.ENCODERS,
            key=caption_key,
            remark=lambda captions, cfg: family(cfg.lora).too_long(captions, cfg.lora),
        ),
    },
    encoders=encoders,
    float32=("vae",),
    columns={"caption": Column("text", setting="data.caption_column")},
    multiple=multiple,
    remarks=remarks,
)
