"""Fine-tune low-rank adapters of Stable Diffusion or SDXL on captioned pictures.

    python loop.py lora --data.train-data-dir photos --lora.pretrained-model-name-or-path stabilityai/sdxl-turbo

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685), on the UNet's attention, and on the text
encoders if asked. The export is a `pytorch_lora_weights.safetensors` for a pipeline's `load_lora_weights`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oneloop import configs
from oneloop.configs import BadInput, Base, Data, Live, require
from oneloop.families import adapters, hub, stable_diffusion
from oneloop.maths import diffusion
from oneloop.tasks import Batch, Encoding, Images, Loss, Models, Optims, Rng, Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """The checkpoint, its adapters and their objective."""

    pretrained_model_name_or_path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """A Stable Diffusion 1.x, 2.x or SDXL: a name on the hub, or a folder that diffusers wrote. It says itself which."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    variant: str | None = None
    """Variant of its weight files, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """An AutoencoderKL to use in place of its own: a folder, such as the export of the task `vae`, or a name on the hub."""
    rank: int = 16
    """Rank of the adapters: how much they can learn, and how large they are."""
    alpha: float | None = None
    """The adapters' output is multiplied by alpha / rank, or alpha / sqrt(rank) with rsLoRA. None: the rank."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers of the UNet that get an adapter, by the ends of their names."""
    use_dora: bool = False
    """Train the length of each weight apart from its direction (Liu et al. 2024, DoRA, arXiv:2402.09353)."""
    use_rslora: bool = False
    """Divide by the rank's square root (Kalajdzievski 2023, A Rank Stabilization Scaling Factor, arXiv:2312.03732)."""
    train_text_encoder: bool = False
    """Train adapters of the text encoders too; captions are then encoded in every step."""
    learning_rate: Live[float] = 1e-4
    """Peak learning rate of AdamW for the UNet's adapters."""
    text_encoder_learning_rate: Live[float | None] = None
    """Peak learning rate for the text encoders' adapters. None: half of learning_rate."""
    use_8bit_adam: bool = False
    """AdamW with one byte for each of its numbers; needs the package bitsandbytes."""
    adam_beta1: Live[float] = 0.9
    """AdamW's beta1."""
    adam_beta2: Live[float] = 0.999
    """AdamW's beta2."""
    adam_weight_decay: Live[float] = 1e-2
    """AdamW's weight decay."""
    adam_epsilon: Live[float] = 1e-8
    """AdamW's epsilon."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet predicts. None: what its checkpoint says, as it was trained."""
    rescale_betas_zero_snr: bool | None = None
    """Noise schedule that ends in pure noise. None: as the checkpoint says."""
    snr_gamma: float | None = None
    """Clamp of the min-SNR loss weight (5 is usual). None: unweighted, and weighted by the SNR for `sample`."""
    noise_offset: float = 0.0
    """Share of noise that is the same all over a picture, for very dark and very bright ones (0.05 to 0.1)."""
    input_perturbation: float = 0.0
    """More noise for the UNet's input alone (Ning et al. 2023, arXiv:2301.11706; 0.1)."""
    validation_prompts: Live[tuple[str, ...]] = ()
    """What to draw samples of, in turn. None given: the first captions."""
    negative_prompt: Live[str] = ""
    """What samples shall not look like."""
    guidance_scale: Live[float] = 7.5
    """Strength of classifier-free guidance in samples; 1 is none."""
    num_inference_steps: Live[int] = 30
    """Steps to draw a sample."""
    kohya: Live[bool] = False
    """Export lora_kohya.safetensors too, the form that ComfyUI and other programs read."""

    def __post_init__(self):
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "more than 0, or None")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")
        require(len(self.target_modules) > 0, "lora.target_modules", self.target_modules, "at least one name")
        require(self.snr_gamma is None or self.snr_gamma > 0, "lora.snr_gamma", self.snr_gamma, "more than 0, or None")
        require(self.num_inference_steps >= 1, "lora.num_inference_steps", self.num_inference_steps, "at least 1")
        for name in ("learning_rate", "noise_offset", "input_perturbation", "guidance_scale"):
            require(getattr(self, name) >= 0, f"lora.{name}", getattr(self, name), "at least 0")
        rate = self.text_encoder_learning_rate
        require(rate is None or rate >= 0, "lora.text_encoder_learning_rate", rate, "at least 0, or None")
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise BadInput("--lora.use-8bit-adam needs the package bitsandbytes; install it, or leave the flag out")
        if self.kohya and self.use_dora:
            raise BadInput("--lora.kohya with --lora.use-dora: programs do not agree on DoRA in that form; leave one out")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for a few photographs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=100, num_samples=4, validation_steps=200))
    data: Data = field(default_factory=lambda: Data(resolution=512, center_crop=True, train_batch_size=1))
    lora: Settings = field(default_factory=Settings)

    def __post_init__(self):
        if stable_diffusion.is_local(self.lora.pretrained_vae_model_name_or_path or "."):
            stable_diffusion.check_vae(self.lora, "lora")
        if stable_diffusion.is_local(self.lora.pretrained_model_name_or_path):  # a name on the hub is looked up by make_models
            stable_diffusion.check(self.lora, "lora", self.data.resolution)
        given, several = self.base.num_samples, len(self.lora.validation_prompts)
        require(given >= several, "base.num_samples", given, f"at least {several}, one for each of --lora.validation-prompts")


def make_models(cfg: Config) -> Models:
    s = cfg.lora
    stable_diffusion.check(s, "lora", cfg.data.resolution)
    adapters.check_targets(s, "lora")
    models = stable_diffusion.load(s, "lora", ("vae", *stable_diffusion.ENCODERS, "unet"))
    adapters.adapt(models["unet"], s, target_modules=list(s.target_modules))
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
        ("unet", s.learning_rate),
        *((encoder, text_rate) for encoder in stable_diffusion.ENCODERS if encoder in models),
    ):
        params = [p for p in models[name].parameters() if p.requires_grad]
        groups += [{"params": params, "lr": rate}] if params else []
    return {"lora": diffusion.adamw(groups, s, s.use_8bit_adam)}


def encode_pictures(models: Models, x: Tensor, cfg: Config) -> dict[str, Tensor]:
    return stable_diffusion.encode_pictures(models["vae"], x)


def encode_captions(models: Models, captions: list[str], cfg: Config) -> dict[str, Tensor]:
    return stable_diffusion.encode_captions(models, captions, cfg.lora)


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    s = cfg.lora
    if "prompt_embeds" not in batch:  # the text encoders train
        batch = batch | encode_captions(models, batch["caption"], cfg)
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
    yield Loss("lora", (diffusion.loss_weight(predicts, a, s.snr_gamma) * error).mean())


def prompts(examples: Iterable[Batch], cfg: Config) -> list[str]:
    """What to draw samples of."""
    return list(cfg.lora.validation_prompts) or next(iter(examples))["caption"]


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    s, texts = cfg.lora, cfg.lora.validation_prompts
    wanted = [texts[i % len(texts)] for i in rng.numbers] if texts else next(iter(examples))["caption"]
    latents = stable_diffusion.pipeline(models, s)(
        wanted,
        negative_prompt=[s.negative_prompt] * len(rng) if s.negative_prompt else None,
        height=cfg.data.resolution,
        width=cfg.data.resolution,
        num_inference_steps=s.num_inference_steps,
        guidance_scale=s.guidance_scale,
        generator=rng.generators("sample"),
        output_type="latent",
    ).images
    return {"samples": stable_diffusion.decode(models["vae"], latents)}  # [B, 3, H, W] in [0, 1]


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    s, settings = cfg.lora, configs.portable(configs.to_dict(cfg), cfg)
    settings["base"]["output_dir"] = None
    adapters.save(models, path, s, json.dumps(settings))
    how = f"num_inference_steps={s.num_inference_steps}, guidance_scale={s.guidance_scale}"
    return (
        stable_diffusion.load_lines(s)
        + "pipeline.load_lora_weights({path})\n"
        + f'pipeline({stable_diffusion.quoted(prompts(examples, cfg)[0])}, {how}).images[0].save("sample.png")'
    )


def card(cfg: Config) -> dict[str, Any]:
    """What the hub's page of adapters needs. `base_model` is a name on the hub; for a folder there is none."""
    s, trigger = cfg.lora, cfg.data.trigger
    base = hub.card(s.pretrained_model_name_or_path, s.revision)
    family = "stable-diffusion-xl" if stable_diffusion.is_xl(s) else "stable-diffusion"
    prompt = {"instance_prompt": trigger} if trigger else {}
    return base | {"pipeline_tag": "text-to-image", "tags": ["lora", "text-to-image", "template:sd-lora", family]} | prompt


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    card=card,
    encodings={
        "pixel_values": Encoding(fn=encode_pictures, models=("vae",)),
        "caption": Encoding(
            fn=encode_captions,
            models=stable_diffusion.ENCODERS,
            key=lambda cfg: stable_diffusion.caption_key(cfg.lora),
            remark=lambda captions, cfg: stable_diffusion.too_long(captions, cfg.lora),
        ),
    },
    float32=("vae",),
    needs=("caption",),
)
