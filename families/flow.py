"""What a trainer must know of each family of flow-matching checkpoints: a table of plain functions and facts.

`FAMILIES` maps the pipeline class that a checkpoint's model_index.json names to its `Family`. Whatever time a transformer is
conditioned on and whatever sign it predicts, `Family.velocity` takes sigma in [0, 1] and returns noise - x, so that loss,
density, validation and samples are written once. Captions are encoded by the pipeline's own `encode_prompt`; samples are the
pipeline's own.

tests/test_families.py compares every family with its pipeline: velocity, images, shift, adapters.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput
from oneloop.families.latents import pack, positions, sequence, unpack
from oneloop.tasks import on_host, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

Columns = Mapping[str, "Tensor"]
"""Encoded captions of B examples, [B, ...] each: `prompt_embeds` [B, T, C], and by family `prompt_mask` [B, T] bool (True: the
token is real), `pooled_prompt_embeds` [B, P], `prompt_embeds_2`, `prompt_mask_2`."""


def static_or_dynamic(scheduler: Any, tokens: int, index: Mapping[str, Any]) -> float:
    """alpha as the pipelines of FLUX.1, Qwen-Image and most others compute it from the scheduler's config."""
    c = scheduler.config
    if not c.get("use_dynamic_shifting"):
        return c.get("flow_shift") or c.get("shift", 1.0)  # DPM-Solver and UniPC call it flow_shift
    low, high = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    mu = c.base_shift + (c.max_shift - c.base_shift) * (tokens - low) / (high - low)
    return mu if c.get("time_shift_type") == "linear" else math.exp(mu)


def says_distilled(index: Mapping[str, Any], transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> bool:
    """`is_distilled` in model_index.json (FLUX.2 klein, Krea 2)."""
    return bool(index.get("is_distilled"))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: functions and facts, no state."""

    text: Callable[..., dict[str, Tensor]]
    """(pipeline, B captions, length T) -> `Columns`, or, of those that edit and show the source to their encoder, (pipeline, B
    captions, length, B images). The pipeline's transformer and autoencoder may be None."""
    velocity: Callable[[nn.Module, Tensor, Tensor, Columns, float], Tensor]
    """(transformer, x_t [B, C, h, w], sigma [B] float32 in [0, 1], columns, guidance) -> noise - x, [B, C, h, w]. Only
    guidance-distilled models read the guidance, and they train at 1. CogView4 reads the column `target_size` too."""
    targets: tuple[str, ...]
    """Layers that get adapters: ends of names, or regular expressions for whole names."""
    length: int
    """T, the default of inference."""
    encoders: int = 1
    """Text encoders that it cannot do without."""
    clips: int = 0
    """How many of them, from the first on, are CLIPs that the official script trains too."""
    inversion: bool = False
    """Whether the pipeline loads new tokens of its CLIPs, by `load_textual_inversion`."""
    patch: int = 2
    """Height and width of a token in latent pixels."""
    multiple: int = 16
    """What an image's height and width must be multiples of: the autoencoder's factor times the patch. An image has
    (H / multiple)(W / multiple) tokens."""
    sample: bool = True
    """Whether training takes a sample of the autoencoder's posterior, or its mode, as the official script does."""
    video: bool = False
    """Whether the autoencoder wants a frame axis, [B, 3, 1, H, W]."""
    eps: float | None = None
    """The batch-norm's epsilon where the pipeline has its own; None: the autoencoder's."""
    shift: Callable[[Any, int, Mapping[str, Any]], float] = static_or_dynamic
    """(scheduler, tokens, the pipeline's config) -> alpha of maths.flow.shift, as inference has it at this size."""
    weighting: str = "none"
    """The official script's default for which sigmas training draws; `none`: uniform."""
    distilled: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], bool] = says_distilled
    """(configs of pipeline, transformer, scheduler) -> whether training it unlearns a distillation to few steps."""
    few_steps: int = 8
    """Steps to draw a sample with a distilled checkpoint, without guidance."""
    guided_by: str = "guidance_scale"
    """The pipeline's argument for guidance; its default and that of num_inference_steps are the family's (`samples`)."""
    off: float = 1.0
    """The value of that argument at which samples are not guided."""
    negative: str | None = None
    """What samples shall not look like unless the user says; None: the pipeline's own. Pipelines take a list, one a prompt."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline, for samples that are what training saw."""
    together: bool = True
    """Whether the pipeline draws a batch of prompts as it draws each alone."""
    lokr: bool = False
    """Whether `load_lora_weights` reads LoKr."""
    comfyui: bool = True
    """Whether ComfyUI knows adapters of it by diffusers' names: SD3, FLUX.1, Chroma and AuraFlow by a run of its key maps,
    Qwen-Image, HiDream, Z-Image, FLUX.2, Krea 2 and ERNIE by reading comfy/lora.py alone."""
    load_lora: str = "pipeline.load_lora_weights({path})"
    """The line of Python that loads adapters from the folder whose name is the variable {path}."""
    prepare: Callable[[nn.Module], None] = lambda transformer: None
    """Mends a loaded transformer, in place, before it trains; its output at inference stays the same."""


def of(kind: str) -> Family:
    """The family of a pipeline class.

    Raises:
        BadInput: it is none of the table's, which the message lists.
    """
    if kind not in FAMILIES | EDITS:
        raise BadInput(f"a {kind} cannot be trained; expected one of {', '.join(FAMILIES)}")
    return (FAMILIES | EDITS)[kind]


def assemble(kind: str, parts: Mapping[str, Any]) -> Any:
    """The pipeline of these very parts and settings; the parts that are not given are None. It costs milliseconds."""
    import diffusers

    made = getattr(diffusers, kind)
    wanted = list(inspect.signature(made.__init__).parameters.values())[1:]
    empty = {p.name: None if p.default is p.empty else p.default for p in wanted}
    pipeline = made(**{name: parts.get(name, default) for name, default in empty.items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(kind: str, family: Family) -> dict[str, Any]:
    """The pipeline's own defaults for a sample: its steps and its guidance."""
    import diffusers

    known = inspect.signature(getattr(diffusers, kind).__call__).parameters
    return {name: known[name].default for name in ("num_inference_steps", family.guided_by)}


def recompute(transformer: nn.Module) -> None:
    """Keep the input of each block alone and compute the block again in the backward pass: exact, for every family.

    diffusers' own `enable_gradient_checkpointing` is not: Chroma's single blocks are run without their mask, which changes
    output and gradient, and HunyuanImage's raises TypeError, for it hands keywords to a function that takes none.
    """
    from torch.utils.checkpoint import checkpoint

    for block in recomputable(transformer):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def recomputable(transformer: nn.Module) -> Iterator[nn.Module]:
    """The blocks that `recompute` computes again: those of its lists with attention (FLUX.2's `to_qkv_mlp_proj` too)."""
    for blocks in transformer.children():
        if type(blocks).__name__ == "ModuleList":
            yield from (block for block in blocks if any(".to_q" in name for name, _ in block.named_modules()))


# ---------------------------------------------------------------------------------------------------------------------
# Captions.


def pad(states: list[Tensor] | Tensor, length: int, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Text states of B captions, [t_i, ...] each or [B, t, ...] with a mask [B, t] -> `prompt_embeds` [B, length, ...], zero
    after a caption's end, and its `prompt_mask` [B, length]. A caption's columns do not depend on its neighbours."""
    import torch

    if mask is not None:
        states = [state[real.bool()] for state, real in zip(states, mask, strict=True)]
    first = states[0]
    embeds = first.new_zeros(len(states), length, *first.shape[1:])  # [B, T, C]
    real = torch.zeros(len(states), length, dtype=torch.bool, device=first.device)  # [B, T]
    for i, state in enumerate(states):
        embeds[i, : len(state)] = state[:length]
        real[i, : len(state)] = True
    real.host = torch.arange(length, device="cpu") < torch.tensor([[len(state)] for state in states], device="cpu")
    return {"prompt_embeds": embeds, "prompt_mask": real}


def trim(columns: Columns) -> tuple[Tensor, Tensor]:
    """States and mask, cut to the longest caption of the batch: what is masked for all costs nothing. It waits for the device
    where the mask was made there."""
    longest = int(on_host(columns["prompt_mask"]).sum(1).max())
    return columns["prompt_embeds"][:, :longest], columns["prompt_mask"][:, :longest]


def strength(transformer: nn.Module, guidance: float, x: Tensor, scale: float = 1.0) -> Tensor | None:
    """The guidance that a guidance-distilled transformer is conditioned on, [B]; None for the others."""
    import torch

    if not unwrap(transformer).config.get("guidance_embeds"):
        return None
    return torch.full((len(x),), guidance * scale, device=x.device)


# ---------------------------------------------------------------------------------------------------------------------
# Z-Image.


def z_image_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Chat template with thinking on, last but one state, as long as the caption is. The pipeline writes the template into the
    list it is given (Tongyi-MAI/Z-Image#99), so it gets a copy."""
    states, _ = pipeline.encode_prompt([*captions], do_classifier_free_guidance=False, max_sequence_length=length)
    return pad(states, length)


def z_image_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on the share of image, 1 - sigma; predicts x - noise. Takes lists of [C, 1, h, w] and of texts."""
    import torch

    lengths = on_host(columns["prompt_mask"]).sum(1).tolist()  # of captions that `pad` padded
    texts = [state[:length] for state, length in zip(columns["prompt_embeds"], lengths, strict=True)]
    answers = transformer([*x.unsqueeze(2)], (1000 - 1000 * sigma) / 1000, texts, return_dict=False)[0]
    return -torch.stack([*answers]).squeeze(2)


Z_IMAGE = Family(
    text=z_image_text,
    velocity=z_image_velocity,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    length=512,
    sample=False,
    off=0.0,  # it computes cond + g (cond - uncond)
    # Turbo and base differ in their shift alone, 3 and 6 (unslothai/unsloth#8270).
    distilled=lambda index, transformer, scheduler: scheduler.get("shift") == 3.0,
    few_steps=9,
    lokr=True,
)

# ---------------------------------------------------------------------------------------------------------------------
# FLUX.2 [klein] and [dev].


def flux2_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Three states of the encoder side by side, padding included: the transformer attends to it. The layers are the pipeline's
    own, 9, 18 and 27 for klein, 10, 20 and 30 for dev; the official klein script takes dev's (huggingface/diffusers#13445)."""
    embeds, _ = pipeline.encode_prompt([*captions], max_sequence_length=length)
    return {"prompt_embeds": embeds}


def flux2_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """One token a latent pixel; positions (t, row, column, l), of which text has l alone, and references t = 10, 20, .... The
    transformer multiplies sigma and the guidance by 1000 in the precision of x, and so it does at inference."""
    text = columns["prompt_embeds"]
    text_positions = positions(1, text.shape[1], 4, x.device).roll(1, 1)  # [T, 4], the last axis counts
    tokens, grid, _ = sequence(x, columns, 1, 4, place=10)
    answer = transformer(
        hidden_states=tokens,
        timestep=sigma,
        guidance=strength(transformer, guidance, x),
        encoder_hidden_states=text,
        txt_ids=text_positions,
        img_ids=grid,
        return_dict=False,
    )[0]
    return unpack(answer, x, 1)


def flux2_shift(scheduler: Any, tokens: int, index: Mapping[str, Any]) -> float:
    """FLUX.2's own mu by tokens and steps, at the steps that are its default."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return math.exp(compute_empirical_mu(tokens, 50))


FLUX2 = Family(
    text=flux2_text,
    velocity=flux2_velocity,
    # Without the single blocks' to_out the subject is not learned (unslothai/unsloth#8267); their number differs, so a pattern.
    targets=("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", r"single_transformer_blocks\.\d+\.attn\.to_out"),
    length=512,
    patch=1,
    sample=False,
    shift=flux2_shift,
    few_steps=4,
    lokr=True,
)

# ---------------------------------------------------------------------------------------------------------------------
# FLUX.1 [dev] and [schnell].


def flux_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """T5's last state, unmasked, and CLIP's pooled one."""
    embeds, pooled, _ = pipeline.encode_prompt([*captions], max_sequence_length=length)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def flux_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """2x2 tokens; positions without a batch axis, whose first is 1 for a reference. Guidance above 1 would train true guidance
    into the adapters (black-forest-labs/flux#79): 1 keeps what was distilled, though the official script says 3.5."""
    text, (tokens, grid, _) = columns["prompt_embeds"], sequence(x, columns)
    answer = transformer(
        hidden_states=tokens,
        timestep=sigma,
        guidance=strength(transformer, guidance, x),
        pooled_projections=columns["pooled_prompt_embeds"],
        encoder_hidden_states=text,
        txt_ids=text.new_zeros(text.shape[1], 3),
        img_ids=grid,
        return_dict=False,
    )[0]
    return unpack(answer, x)


JOINT = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
JOINT += ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

FLUX = Family(
    text=flux_text,
    velocity=flux_velocity,
    targets=(*JOINT, *FEED_FORWARD),
    length=512,
    encoders=2,
    clips=1,
    inversion=True,
    distilled=lambda index, transformer, scheduler: not transformer.get("guidance_embeds"),  # schnell
    few_steps=4,
)

# ---------------------------------------------------------------------------------------------------------------------
# Qwen-Image.


def qwen_image_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Last state behind the template's 34 tokens, as long as the caption is."""
    embeds, mask = pipeline.encode_prompt([*captions], max_sequence_length=length)
    return pad(embeds, length, embeds.new_ones(embeds.shape[:2]) if mask is None else mask)


def qwen_image_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """2x2 tokens, whose grid is a shape for each example; text is masked, so that padding moves nothing."""
    (text, mask), (tokens, _, grids) = trim(columns), sequence(x, columns)
    answer = transformer(
        hidden_states=tokens,
        timestep=sigma,
        guidance=strength(transformer, guidance, x),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[grids] * len(x),
        return_dict=False,
    )[0]
    return unpack(answer, x)


def qwen_edit_text(
    pipeline: Any, captions: list[str], length: int, images: Sequence[Any] | None = None, *, area: int
) -> dict[str, Tensor]:
    """Last state behind the template of a caption with its image, or list of images, one caption at a time: what a pipeline is
    given beside are further references of one. The encoder sees copies of about `area` pixels, of which each 28 x 28 are a
    token beside the caption's; without images, as is no text to train on, a black one."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
    from PIL import Image

    def scaled(image: Any) -> Any:
        width, height, _ = calculate_dimensions(area, image.size[0] / image.size[1])
        return pipeline.image_processor.resize(image, height, width)

    states, most = [], 0
    for i, caption in enumerate(captions):
        image: Any = images[i] if images else Image.new("RGB", (56, 56))  # the least that the processor takes
        if images:
            several = isinstance(image, list)
            image, most = ([*map(scaled, image)], len(image)) if several else (scaled(image), 1)
        states.append(pipeline.encode_prompt([caption], image=image)[0][0])
    return pad(states, length + area // 28**2 * 9 // 8 * most)


QWEN_IMAGE = Family(
    text=qwen_image_text,
    velocity=qwen_image_velocity,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    length=512,
    video=True,
    guided_by="true_cfg_scale",
    negative=" ",  # without one it does not guide
)

# ---------------------------------------------------------------------------------------------------------------------
# Krea 2.


def krea2_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Twelve states apart, [B, T, 12, C]. The pipeline's padding lies between a caption and the template's end; here it comes
    last, which changes nothing, for the transformer gives all text one position."""
    embeds, mask = pipeline.encode_prompt([*captions], max_sequence_length=length)
    return pad(embeds, length, mask)


def krea2_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """2x2 tokens behind the text, whose positions are all 0."""
    import torch

    text, mask = trim(columns)
    grid = positions(x.shape[-2] // 2, x.shape[-1] // 2, 3, x.device)
    answer = transformer(
        hidden_states=pack(x),
        timestep=sigma,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        position_ids=torch.cat([grid.new_zeros(text.shape[1], 3), grid]),
        return_dict=False,
    )[0]
    return unpack(answer, x)


def krea2_shift(scheduler: Any, tokens: int, index: Mapping[str, Any]) -> float:
    """By tokens; the distilled one has one shift for all sizes."""
    return math.exp(1.15) if index.get("is_distilled") else static_or_dynamic(scheduler, tokens, index)


KREA2 = Family(
    text=krea2_text,
    velocity=krea2_velocity,
    # The official script's 15 kinds of layers, its authors' advice; attention alone for long runs.
    targets=(
        *("to_q", "to_k", "to_v", "to_out.0", "to_gate", "ff.up", "ff.down", "img_in", "final_layer.linear"),
        *("text_fusion.projector", "txt_in.linear_1", "txt_in.linear_2"),
        *("time_embed.linear_1", "time_embed.linear_2", "time_mod_proj"),
    ),
    length=512,
    video=True,
    shift=krea2_shift,
    off=0.0,  # it computes cond + g (cond - uncond)
)

# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion 3 and 3.5.


def sd3_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Both CLIPs' states side by side, then T5's `length` states; no mask anywhere, so the length is part of the input: one for
    training and samples (huggingface/diffusers#8673). Without a T5 its states are zeros, whose width the pipeline reads in its
    transformer's config (a transformer on the meta device will do)."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        [*captions],
        None,
        None,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def sd3_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on 1000 sigma."""
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=columns["prompt_embeds"],
        pooled_projections=columns["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


SD3 = Family(text=sd3_text, velocity=sd3_velocity, targets=JOINT, length=256, encoders=2, clips=2, weighting="logit_normal")

# ---------------------------------------------------------------------------------------------------------------------
# Chroma.


def chroma_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """T5's last state; the mask has the real tokens and one of padding."""
    embeds, _, mask, *_ = pipeline.encode_prompt([*captions], do_classifier_free_guidance=False, max_sequence_length=length)
    return {"prompt_embeds": embeds, "prompt_mask": mask.bool()}


def chroma_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """As FLUX.1 with a mask, which is a float that attention adds, as the pipeline's is: padding is seen. A bool would hide it
    (huggingface/diffusers#13619), but then training would see other text than samples do."""
    import torch

    text, grid = columns["prompt_embeds"], positions(x.shape[-2] // 2, x.shape[-1] // 2, 3, x.device)
    answer = transformer(
        hidden_states=pack(x),
        timestep=sigma,
        encoder_hidden_states=text,
        txt_ids=grid.new_zeros(text.shape[1], 3),
        img_ids=grid,
        attention_mask=torch.cat([columns["prompt_mask"].to(text.dtype), text.new_ones(len(x), len(grid))], 1),
        return_dict=False,
    )[0]
    return unpack(answer, x)


CHROMA = Family(text=chroma_text, velocity=chroma_velocity, targets=(*JOINT, *FEED_FORWARD, "proj_mlp"), length=512)

# ---------------------------------------------------------------------------------------------------------------------
# Lumina 2.


def lumina2_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Behind the pipeline's system prompt, last but one state."""
    embeds, mask, *_ = pipeline.encode_prompt([*captions], do_classifier_free_guidance=False, max_sequence_length=length)
    return pad(embeds, length, mask)


def lumina2_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on the share of image, 1 - sigma; predicts x - noise. The density is shifted towards noise as everywhere; the
    official script shifts the share of image and trains where inference hardly goes (kohya-ss/sd-scripts#2201)."""
    text, mask = trim(columns)
    return -transformer(
        hidden_states=x, timestep=1 - sigma, encoder_hidden_states=text, encoder_attention_mask=mask, return_dict=False
    )[0]


LUMINA2 = Family(
    text=lumina2_text, velocity=lumina2_velocity, targets=("to_q", "to_k", "to_v", "to_out.0"), length=256, comfyui=False
)

# ---------------------------------------------------------------------------------------------------------------------
# Sana.


def sana_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Lower case behind the "complex human instruction" that inference puts before every prompt: the default of the pipeline's
    call, not of its encode_prompt. The official script leaves it out, and a string given to it is taken apart into letters."""
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    embeds, mask, *_ = pipeline.encode_prompt(
        [*captions],
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        complex_human_instruction=instruction,
    )
    return pad(embeds, length, mask)


def sana_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on 1000 sigma times a scale of its config. Where it predicts a variance too, that half is dropped."""
    text, mask = trim(columns)
    answer = transformer(
        hidden_states=x,
        timestep=1000 * sigma * unwrap(transformer).config.get("timestep_scale", 1.0),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    return answer[:, : x.shape[1]]


SANA = Family(
    text=sana_text,
    velocity=sana_velocity,
    targets=("to_q", "to_k", "to_v"),
    length=300,
    comfyui=False,
    patch=1,
    multiple=32,
    call={"use_resolution_binning": False},  # samples of the size that is asked for
)

# ---------------------------------------------------------------------------------------------------------------------
# ERNIE-Image.


def ernie_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """No template, last but one state, as long as the caption is; cut at `length`, which the pipeline does not."""
    return pad(pipeline.encode_prompt([*captions], pipeline.text_encoder.device), length)


def ernie_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on 1000 sigma; takes the length of each text for a mask."""
    text, mask = trim(columns)
    return transformer(hidden_states=x, timestep=1000 * sigma, text_bth=text, text_lens=mask.sum(1), return_dict=False)[0]


ERNIE = Family(
    text=ernie_text,
    velocity=ernie_velocity,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    length=512,
    patch=1,
    sample=False,
    eps=1e-5,  # the pipeline's own, while the autoencoder's config still says 1e-4
    call={"use_pe": False},  # the prompt as it is, not as the prompt enhancer rewrites it
)

# ---------------------------------------------------------------------------------------------------------------------
# AuraFlow.


def auraflow_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """UMT5's states, zero where a caption has ended; the transformer sees the zeros."""
    embeds, *_ = pipeline.encode_prompt([*captions], do_classifier_free_guidance=False, max_sequence_length=length)
    return {"prompt_embeds": embeds}


def auraflow_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on sigma."""
    return transformer(hidden_states=x, timestep=sigma, encoder_hidden_states=columns["prompt_embeds"], return_dict=False)[0]


AURAFLOW = Family(text=auraflow_text, velocity=auraflow_velocity, targets=JOINT, length=256)

# ---------------------------------------------------------------------------------------------------------------------
# HunyuanImage 2.1.


def hunyuan_image_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """Qwen-Image's template with the third state from the end, and ByT5's of what is in quotes (masked zeros if nothing is)."""
    embeds, mask, glyphs, glyph_mask = pipeline.encode_prompt([*captions], batch_size=len(captions))
    return pad(embeds, length, mask) | {"prompt_embeds_2": glyphs, "prompt_mask_2": glyph_mask.bool()}


def hunyuan_image_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on 1000 sigma, and on 1000 times the guidance where it is distilled."""
    text, mask = trim(columns)
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        guidance=strength(transformer, guidance, x, 1000),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        encoder_hidden_states_2=columns["prompt_embeds_2"],
        encoder_attention_mask_2=columns["prompt_mask_2"],
        return_dict=False,
    )[0]


def hunyuan_image_prepare(transformer: nn.Module) -> None:
    """Embeddings of time in the type of the weights: the model gives them that of the timestep, which stays float32."""
    for embedding in transformer.time_guidance_embed.children():
        embedding.register_forward_pre_hook(_as_weights)


def _as_weights(embedding: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = next(embedding.parameters(), None)  # sinusoids have none
    return given if weights is None else tuple(x.to(weights.dtype) for x in given)


HUNYUAN_IMAGE = Family(
    text=hunyuan_image_text,
    velocity=hunyuan_image_velocity,
    prepare=hunyuan_image_prepare,
    targets=(*JOINT, *FEED_FORWARD, "proj_mlp"),
    length=1000,
    encoders=2,
    patch=1,
    multiple=32,
    distilled=lambda index, transformer, scheduler: bool(transformer.get("guidance_embeds")),
    comfyui=False,
    guided_by="distilled_guidance_scale",  # true guidance is a component of its own
    # The pipeline has no load_lora_weights.
    load_lora=(
        'pipeline.transformer.load_lora_adapter({path}, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")'
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# CogView4.


def cogview4_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """GLM's last but one state, filled on the left to a multiple of 16 tokens, one caption at a time: the pipeline fills to the
    longest of its batch and masks nothing, so that a caption's encoding would depend on its neighbours."""
    states = [
        pipeline.encode_prompt([c], do_classifier_free_guidance=False, max_sequence_length=length)[0][0] for c in captions
    ]
    return pad(states, length)


def cogview4_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on the time t whose shift is sigma, 1000 t, and on the image's size, `target_size` [B, 2] in pixels."""
    import torch
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

    text, mask = trim(columns)
    alpha = calculate_shift(x.shape[-2] * x.shape[-1] // unwrap(transformer).config.patch_size ** 2)
    size = columns["target_size"].to(text.dtype)
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma / (alpha - (alpha - 1) * sigma),
        encoder_hidden_states=text,
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros_like(size),
        attention_kwargs={"text_attn_mask": mask.int()},
        return_dict=False,
    )[0]


def cogview4_shift(scheduler: Any, tokens: int, index: Mapping[str, Any]) -> float:
    """Linear in the image's side."""
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

    c = scheduler.config
    return calculate_shift(tokens, c.base_image_seq_len, c.base_shift, c.max_shift)


def cogview4_prepare(transformer: nn.Module) -> None:
    """Attention that takes a mask of text: the ordinary one makes it a float and adds it."""
    from diffusers.models.transformers.transformer_cogview4 import CogView4TrainingAttnProcessor

    for block in transformer.transformer_blocks:
        block.attn1.set_processor(CogView4TrainingAttnProcessor())


COGVIEW4 = Family(
    text=cogview4_text,
    velocity=cogview4_velocity,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    length=1024,
    together=False,
    comfyui=False,
    shift=cogview4_shift,
    prepare=cogview4_prepare,
)

# ---------------------------------------------------------------------------------------------------------------------
# HiDream-I1.


def hidream_text(pipeline: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """T5's states [B, T, C], all of Llama's but the first [B, layers, T, C], and the pooled ones of both CLIPs; no mask."""
    first, _, llama, _, pooled, _ = pipeline.encode_prompt(
        [*captions], do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"prompt_embeds": first, "prompt_embeds_2": llama.transpose(0, 1), "pooled_prompt_embeds": pooled}


def hidream_velocity(transformer: nn.Module, x: Tensor, sigma: Tensor, columns: Columns, guidance: float) -> Tensor:
    """Conditioned on 1000 sigma; predicts x - noise. An image that is not square is padded to the largest number of tokens."""
    return -transformer(
        hidden_states=x,
        timesteps=1000 * sigma,
        encoder_hidden_states_t5=columns["prompt_embeds"],
        encoder_hidden_states_llama3=columns["prompt_embeds_2"].transpose(0, 1),
        pooled_embeds=columns["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


def routed(experts: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts, with gradients. x [N, C]; chosen [N k]; weights [N k, 1]."""
    import torch

    out, k = torch.zeros_like(x), len(chosen) // len(x)
    for i, expert in enumerate(experts.experts):
        pairs = (chosen == i).nonzero()[:, 0]
        answer = expert(x[pairs // k]) * weights[pairs]
        out = out.to(answer.dtype).index_add(0, pairs // k, answer)
    return out


def hidream_prepare(transformer: nn.Module) -> None:
    """The same output in training as at inference, with gradients through the experts. Without `force_inference_output` the
    output has another shape in training; with it diffusers runs the experts under no_grad, so that their layers get no
    gradient and those before them miss a path (what people met: huggingface/diffusers#11281, #11673)."""
    transformer.register_to_config(force_inference_output=True)
    for module in transformer.modules():
        if hasattr(module, "_force_inference_output"):
            module._force_inference_output = True
        if hasattr(module, "moe_infer"):
            module.moe_infer = functools.partial(routed, module)


HIDREAM = Family(
    text=hidream_text,
    velocity=hidream_velocity,
    targets=("to_q", "to_k", "to_v", "to_out"),
    length=128,
    encoders=4,
    prepare=hidream_prepare,
)

FAMILIES: dict[str, Family] = {
    "ZImagePipeline": Z_IMAGE,
    "Flux2KleinPipeline": FLUX2,
    "FluxPipeline": FLUX,
    "QwenImagePipeline": QWEN_IMAGE,
    "Krea2Pipeline": KREA2,
    "Flux2Pipeline": FLUX2,
    "StableDiffusion3Pipeline": SD3,
    "ChromaPipeline": CHROMA,
    "Lumina2Pipeline": LUMINA2,
    "SanaPipeline": SANA,
    "ErnieImagePipeline": ERNIE,
    "AuraFlowPipeline": AURAFLOW,
    "HunyuanImagePipeline": HUNYUAN_IMAGE,
    "CogView4Pipeline": COGVIEW4,
    "HiDreamImagePipeline": HIDREAM,
}
"""Pipeline class -> family."""

EDITS: dict[str, Family] = {
    # Kontext's script takes the mode of both images; its layers are FLUX.1's and the single blocks' proj_mlp.
    "FluxKontextPipeline": replace(FLUX, targets=(*FLUX.targets, "proj_mlp"), sample=False, distilled=says_distilled),
    "QwenImageEditPipeline": replace(QWEN_IMAGE, text=functools.partial(qwen_edit_text, area=1024**2)),
    "QwenImageEditPlusPipeline": replace(QWEN_IMAGE, text=functools.partial(qwen_edit_text, area=384**2)),
}
"""Pipeline class -> family, of those that draw after a reference alone."""
