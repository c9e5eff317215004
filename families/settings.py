"""The settings that tasks on a pretrained text-to-image model share, and which the functions of this folder read as `s`.

A task's own settings are a dataclass of these and of its own fields: `class Settings(Pretrained)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from oneloop.configs import Amount, BadInput, Live, Name, Range, ShareBelowOne, Words
from oneloop.training import optimizers

Precision = Literal["auto", "bf16", "float8", "int8", "nf4"]


@dataclass(frozen=True)
class Checkpoint:
    """Which checkpoint, and which of its parts train beside the UNet or transformer."""

    pretrained_model_name_or_path: Name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The model to start from: a name on the hub, or a folder that diffusers wrote. It says itself which family it is of."""
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
    max_sequence_length: Annotated[int, Range(1, 65_536)] | None = None
    """Tokens that a caption is cut or filled to, in training and samples. None: the family's own, as at inference."""
    train_text_encoder: bool = False
    """Train the CLIP text encoders too (Stable Diffusion, SDXL, SD3, FLUX.1), as the official scripts do; captions are then
    encoded in every step."""


@dataclass(frozen=True)
class Tokens:
    """New tokens of the CLIP text encoders, beside what else trains (families/tokens.py)."""

    placeholder_tokens: tuple[Words, ...] = ()
    """New words that captions and prompts have, such as `<dog>`: their vectors train, and the text encoders' own stay as they
    are. Stable Diffusion, SDXL, FLUX.1."""
    initializer_tokens: tuple[Words, ...] = ()
    """Known words that they begin as, one for each, such as `dog`; "" for one at random. None given: all at random."""
    num_vectors: Annotated[int, Range(1, 1024)] = 1
    """Vectors of each: a prompt has room for 75 altogether."""
    token_learning_rate: Live[Amount | None] = None
    """Peak learning rate of their vectors. None: learning_rate."""


@dataclass(frozen=True)
class Adapters(Checkpoint):
    """Low-rank adapters, and how they are written."""

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
    base_precision: Precision = "auto"
    """How the frozen UNet or transformer is stored: as the run computes, or in bf16, float8, int8 or nf4 (docs/lora.md)."""
    group_offload: bool = False
    """Keep the frozen blocks of the transformer in the machine's memory, each on the GPU only while it computes: for a base
    that is larger than the GPU. Slower; with --base.gradient-checkpointing."""
    use_dora: bool = False
    """Train the length of each weight apart from its direction (Liu et al. 2024, DoRA, arXiv:2402.09353)."""
    use_rslora: bool = False
    """Divide by the rank's square root (Kalajdzievski 2023, A Rank Stabilization Scaling Factor, arXiv:2312.03732)."""
    use_lokr: bool = False
    """Adapters as Kronecker products (Yeh et al. 2023, LyCORIS, arXiv:2309.14859): Z-Image and FLUX.2, whose pipelines read
    them."""
    lokr_factor: Annotated[int, Range(-1, 65_536, without=0)] = -1
    """Size of LoKr's first factor where it divides a layer's: the larger, the smaller the file. -1: the most even."""
    save_dtype: Live[Literal["float32", "bfloat16", "float16"]] = "float32"
    """Precision of the exported adapters."""
    kohya: Live[bool] = False
    """Export lora_kohya.safetensors too, the form that ComfyUI and other programs read."""


@dataclass(frozen=True)
class Optimized:
    """The optimizer."""

    optimizer: optimizers.Kind = "adamw"
    """What turns gradients into steps: adamw, adamw8bit, adafactor, prodigy, schedulefree or muon (docs/optimizers.md)."""
    learning_rate: Live[Amount] = 1e-4
    """Peak learning rate of what trains: of AdamW; about 1 with prodigy."""
    text_encoder_learning_rate: Live[Amount | None] = None
    """Peak learning rate of the text encoders. None: half of learning_rate."""
    adam_beta1: Live[ShareBelowOne] = 0.9
    """AdamW's beta1."""
    adam_beta2: Live[ShareBelowOne] = 0.999
    """AdamW's beta2."""
    adam_weight_decay: Live[Amount] = 1e-2
    """AdamW's weight decay."""
    adam_epsilon: Live[Amount] = 1e-8
    """AdamW's epsilon."""


@dataclass(frozen=True)
class Objective:
    """What the loss asks for."""

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


@dataclass(frozen=True)
class Sampled:
    """How samples are drawn."""

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

    @property
    def sampler(self) -> Mapping[str, Any]:
        """The scheduler that samples of Stable Diffusion need: its `_class_name`, and what its config has beside the
        checkpoint's. Empty: the checkpoint's own."""
        return {}

    @property
    def guidance(self) -> float | None:
        """guidance_scale, or what the task has in the place of None."""
        return self.guidance_scale


@dataclass(frozen=True)
class Pretrained(Sampled, Objective, Optimized, Tokens, Checkpoint):
    """A checkpoint, what is learned on it, and how it is drawn from."""


TEXT = ("train_text_encoder", "text_encoder_learning_rate")
"""Settings for families whose official scripts train text encoders."""
OWN_TEXT = ("train_text_encoder", "text_encoder_learning_rate", *(f.name for f in fields(Tokens)))
"""Settings of what trains beside the UNet or transformer."""
DIFFUSION = ("prediction_type", "rescale_betas_zero_snr", "snr_gamma", "noise_offset", "input_perturbation")
"""Settings that only the families of Stable Diffusion have a use for."""
FLOW = ("weighting_scheme", "density", "logit_mean", "logit_std", "mode_scale", "flow_shift", "max_sequence_length")
"""Settings that only flow-matching families have a use for."""


def flag(group: str, name: str) -> str:
    """A setting as it is typed."""
    return f"--{group}.{name}".replace("_", "-")


def check_unused(s: object, group: str, names: Iterable[str], why: str) -> None:
    """Refuse settings that mean nothing, and say why.

    Raises:
        BadInput: one of them is given.
    """
    for name in names:
        if getattr(s, name) != getattr(type(s), name):
            raise BadInput(f"{flag(group, name)}: {why}; leave it out")


def check_apart(s: object, group: str, apart: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse settings that mean nothing beside others: `apart` has them by the name of one that is given.

    Raises:
        BadInput: with both.
    """
    for one, others in apart.items():
        for other in others if getattr(s, one) else ():
            if getattr(s, other) != getattr(type(s), other):
                raise BadInput(f"{flag(group, one)} with {flag(group, other)}: they do not go together; leave one out")
