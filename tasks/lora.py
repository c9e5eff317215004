"""Fine-tune low-rank adapters of a text-to-image model on captioned images.

    python loop.py lora --data.train-data-dir photos --lora.pretrained-model-name-or-path stabilityai/sdxl-turbo

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685). Stable Diffusion 1.x, 2.x, SDXL and
every flow-matching family of families/flow.py: which one a checkpoint is, what it predicts and which layers get adapters, its
own files and that table say. The export is a `pytorch_lora_weights.safetensors` for a pipeline's `load_lora_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oneloop import configs
from oneloop.configs import Amount, BadInput, Base, Data, Live, Name, Range, ShareBelowOne, Words, check, require
from oneloop.families import adapters, flow, hub, latents, precision, stable_diffusion, transformer
from oneloop.maths import diffusion
from oneloop.maths import flow as rectified
from oneloop.tasks import Batch, Encoding, Images, Loss, Models, Optims, Rng, Task
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor


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
    """An AutoencoderKL to use in place of its own: a folder, such as the export of the task `vae`, or a name on the hub."""
    rank: Annotated[int, Range(1, 65_536)] = 16
    """Rank of the adapters: how much they can learn, and how large they are."""
    alpha: Annotated[float, Range(0, 3e38, without=0)] | None = None
    """The adapters' output is multiplied by alpha / rank, or alpha / sqrt(rank) with rsLoRA. None: the rank."""
    dropout: ShareBelowOne = 0.0
    """Dropout before the adapters."""
    target_modules: tuple[Name, ...] | None = None
    """Layers of the UNet or transformer that get an adapter, by the ends of their names, or all-linear. None: those that are
    usual for the family."""
    max_sequence_length: Annotated[int, Range(1, 65_536)] | None = None
    """Tokens that a caption is cut or filled to, in training and samples. None: the family's own, as at inference."""
    base_precision: precision.Precision = "auto"
    """How the frozen UNet or transformer is stored: as the run computes, or in bf16, float8, int8 or nf4 (docs/lora.md)."""
    use_dora: bool = False
    """Train the length of each weight apart from its direction (Liu et al. 2024, DoRA, arXiv:2402.09353)."""
    use_rslora: bool = False
    """Divide by the rank's square root (Kalajdzievski 2023, A Rank Stabilization Scaling Factor, arXiv:2312.03732)."""
    train_text_encoder: bool = False
    """Train adapters of the text encoders too (Stable Diffusion and SDXL); captions are then encoded in every step."""
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
    validation_prompts: Live[tuple[Words, ...]] = ()
    """What to draw samples of, in turn. None given: the first captions."""
    negative_prompt: Live[Words] = ""
    """What samples shall not look like."""
    guidance_scale: Live[Amount | None] = None
    """Strength of guidance in samples. None: the default of the model's pipeline."""
    num_inference_steps: Live[Annotated[int, Range(1, 1000)] | None] = None
    """Steps to draw a sample. None: the default of the model's pipeline."""
    kohya: Live[bool] = False
    """Export lora_kohya.safetensors too, the form that ComfyUI and other programs read."""

    def __post_init__(self):
        check(self, "lora")
        given = self.target_modules
        require(given is None or len(given) > 0, "lora.target_modules", given, "at least one name, or all-linear")
        alone = given is None or "all-linear" not in given or len(given) == 1
        require(alone, "lora.target_modules", given, "all-linear without other names")
        if self.kohya and self.use_dora:
            raise BadInput("--lora.kohya with --lora.use-dora: programs do not agree on DoRA in that form; leave one out")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for a few photographs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=100, num_samples=4, validation_steps=200))
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
        given, several = self.base.num_samples, len(self.lora.validation_prompts)
        require(given >= several, "base.num_samples", given, f"at least {several}, one for each of --lora.validation-prompts")


DIFFUSION = ("train_text_encoder", "text_encoder_learning_rate", "prediction_type", "rescale_betas_zero_snr", "snr_gamma")
DIFFUSION += ("noise_offset", "input_perturbation", "kohya")
"""Settings that only the families of Stable Diffusion have a use for."""
FLOW = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "flow_shift", "max_sequence_length")
"""Settings that only flow-matching families have a use for."""


def family(s: Settings) -> ModuleType:
    """The functions for the checkpoint's family, the same names in both modules: stable_diffusion or transformer."""
    return stable_diffusion if stable_diffusion.kind(s) in stable_diffusion.PIPELINES else transformer


def check_base(cfg: Config) -> None:
    """Refuse what cannot work, from the checkpoint's configs alone.

    Raises:
        BadInput: it is no diffusers model, or one of another kind, or the settings do not fit it.
    """
    s, known = cfg.lora, (*stable_diffusion.PIPELINES, *flow.FAMILIES)
    stable_diffusion.check_files(s, "lora", known)
    for name in FLOW if family(s) is stable_diffusion else DIFFUSION:
        if getattr(s, name) != getattr(Settings, name):
            flag = f"--lora.{name}".replace("_", "-")
            raise BadInput(f"{flag} is {getattr(s, name)!r}: a {stable_diffusion.kind(s)} has no use for it; leave it out")
    family(s).check(s, "lora", cfg.data.resolution)


def make_models(cfg: Config) -> Models:
    s = cfg.lora
    check_base(cfg)
    adapters.check_targets(s, "lora", family(s).TRAINED)
    if family(s) is transformer:
        models = transformer.load(s, "lora", cfg.base.mixed_precision)
        transformer.adapt(models, s)
        return models
    models = stable_diffusion.load(s, "lora", ("vae", *stable_diffusion.ENCODERS, "unet"))
    targets = s.target_modules or stable_diffusion.TARGETS
    targets = adapters.layers(models["unet"], targets) if targets == ("all-linear",) else list(targets)
    adapters.adapt(models["unet"], s, target_modules=targets)
    if s.train_text_encoder:
        for name in stable_diffusion.ENCODERS:
            if name in models:
                # SDXL reads the last but one state of its first encoder: an adapter of the last layer would learn nothing.
                layers = stable_diffusion.config(s, name)["num_hidden_layers"] - (
                    stable_diffusion.is_xl(s) and name == "text_encoder"
                )
                adapters.adapt(
                    models[name], s, target_modules=list(adapters.TEXT_TARGETS), layers_to_transform=list(range(layers))
                )
    return models


def make_optim(models: Models, cfg: Config) -> Optims:
    s, groups = cfg.lora, []
    text_rate = s.learning_rate / 2 if s.text_encoder_learning_rate is None else s.text_encoder_learning_rate
    for name, rate in (
        (family(s).TRAINED, s.learning_rate),
        *((encoder, text_rate) for encoder in stable_diffusion.ENCODERS if encoder in models),
    ):
        params = [p for p in models[name].parameters() if p.requires_grad]
        groups += [{"params": params, "lr": rate}] if params else []
    return {"lora": optimizers.make(groups, s)}


def encode_images(models: Models, x: Tensor, cfg: Config) -> dict[str, Tensor]:
    return family(cfg.lora).encode_images(models, x, cfg.lora)


def encode_captions(models: Models, captions: list[str], cfg: Config) -> dict[str, Tensor]:
    return family(cfg.lora).encode_captions(models, captions, cfg.lora)


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    if "prompt_embeds" not in batch:  # the text encoders train
        batch = batch | encode_captions(models, batch["caption"], cfg)
    objective = diffusion_loss if family(cfg.lora) is stable_diffusion else flow_loss
    yield Loss("lora", objective(models, batch, rng, cfg).mean())


def flow_loss(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Tensor:
    """Weighted squared error of the velocity noise - x at (1 - sigma) x + sigma noise, [B] (Esser et al. 2024, eq. 13,
    arXiv:2403.03206)."""
    s, family = cfg.lora, transformer.family(cfg.lora)
    x = latents.draw(batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, w]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, w]
    sigma = transformer.noise_level(s, rng.uniform("timestep"), x.shape)  # [B]
    columns = batch | {"target_size": sigma.new_full((len(x), 2), cfg.data.resolution)}
    v = family.velocity(models["transformer"], rectified.interpolate(x, noise, sigma), sigma, columns, 1.0)  # [B, C, h, w]
    return transformer.weight(s, sigma) * diffusion.mse(v, rectified.velocity(x, noise))


def diffusion_loss(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Tensor:
    """Weighted squared error of what the UNet predicts, [B] (Ho et al. 2020, arXiv:2006.11239)."""
    s = cfg.lora
    x = stable_diffusion.draw(models["vae"], batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, w]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, w]
    if s.noise_offset:
        noise = noise + s.noise_offset * rng.normal("noise offset", x.shape[1], 1, 1)
    seen = noise + s.input_perturbation * rng.normal("input perturbation", *x.shape[1:]) if s.input_perturbation else noise
    alphas = stable_diffusion.alphas_cumprod(s, x.device)  # [T]
    t = rng.integers("timestep", len(alphas))  # [B]
    a, predicts = alphas[t], stable_diffusion.prediction_type(s)  # [B]
    given = stable_diffusion.conditions(batch, cfg.data.resolution, stable_diffusion.is_xl(s))
    prediction = models["unet"](diffusion.add_noise(x, seen, a), t, **given, return_dict=False)[0]  # [B, C, h, w]
    error = diffusion.mse(prediction, diffusion.target(predicts, x, noise, a))  # [B]
    return diffusion.loss_weight(predicts, a, s.snr_gamma) * error


def prompts(examples: Iterable[Batch], cfg: Config) -> list[str]:
    """What to draw samples of."""
    return list(cfg.lora.validation_prompts) or next(iter(examples))["caption"]


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    s, texts = cfg.lora, cfg.lora.validation_prompts
    wanted = [texts[i % len(texts)] for i in rng.numbers] if texts else next(iter(examples))["caption"]
    images = family(s).sample(models, s, wanted, rng.generators("sample"), cfg.data.resolution)
    return {"samples": images}  # [B, 3, H, W] in [0, 1]


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    s, settings = cfg.lora, configs.portable(configs.to_dict(cfg), cfg)
    settings["base"]["output_dir"] = None
    adapters.save(models, path, s, json.dumps(settings))
    how = "".join(f", {key}={value!r}" for key, value in family(s).arguments(s, cfg.data.resolution).items())
    how = "prompt=" + stable_diffusion.quoted(prompts(examples, cfg)[0]) + how.replace("{", "{{").replace("}", "}}")
    return family(s).load_lines(s) + f'pipeline({how}).images[0].save("sample.png")'


def remarks(models: Models, cfg: Config) -> Iterator[str]:
    yield from filter(None, [precision.remark(cfg.lora, cfg.base)])
    yield from family(cfg.lora).remarks(models, cfg.lora)


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
            key=lambda cfg: family(cfg.lora).caption_key(cfg.lora),
            remark=lambda captions, cfg: family(cfg.lora).too_long(captions, cfg.lora),
        ),
    },
    float32=("vae",),
    needs=("caption",),
    remarks=remarks,
)
