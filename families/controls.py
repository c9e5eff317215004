"""What stands beside the frozen base of each family and sees an image condition: a table of functions and facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from oneloop.families import controlnets as nets
from oneloop.families import inpainting
from oneloop.families.settings import Pretrained
from oneloop.families.text_to_image import family
from oneloop.tasks import Models

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Control:
    """What stands beside the base of one family."""

    kind: str
    """Its class in diffusers."""
    pipeline: str
    """The pipeline's class."""
    start: Callable[[nn.Module, Any, int], nn.Module]
    """(base, settings, factor of the autoencoder) -> a new one, in float32."""
    answer: Callable[..., Any]
    """(base, it, condition, what the base is called with) -> what the base answers with it, as the pipeline has both."""
    same: tuple[str, ...]
    """Keys of its config in which one that is given, whatever its size, agrees with a new one for the same base."""
    layers: tuple[str, ...] = ("num_layers",)
    """Settings of its size that it has; that of a UNet's is the UNet's."""
    latent: bool = True
    """Whether the condition goes through the autoencoder. Else it is an image in [0, 1]."""
    part: str = "controlnet"
    """The pipeline's name for it."""
    image: str = "control_image"
    """The pipeline's name for the condition."""
    scale: str = "controlnet_conditioning_scale"
    """The pipeline's name for how much it counts."""
    together: bool = True
    """Whether the pipeline's draws for several images are those for each."""
    settle: Callable[[nn.Module, nn.Module], None] = lambda net, base: None
    """What remains to be done to it beside a base, in place, whenever a pipeline was made of both."""
    fills: Callable[[Tensor, Tensor], dict[str, Any]] | None = None
    """Where it fills in what is hidden: (images [B, 3, H, W] in [-1, 1], holes [B, 1, H, W]) -> the pipeline's arguments."""
    inpainting: Control | None = None
    """The same for that, where diffusers has a pipeline that tells it what is hidden."""


def filling(own: Control, pipeline: str, **more: Any) -> Control:
    """With the one that fills in what is hidden."""
    fills = inpainting.encoded if own.latent else inpainting.pixels
    return replace(own, inpainting=replace(own, pipeline=pipeline, fills=fills, **more))


RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
RESIDUALS += ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")
"""What bases call that which is added inside of them."""


def narrow(base: nn.Module, args: Any, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A pre-hook of the base: what is added inside of it comes in its own precision. Accelerate makes float32 of whatever a
    model that trains gives."""

    def cast(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: value.to(base.dtype) for k, value in x.items()}
        return [value.to(base.dtype) for value in x] if isinstance(x, (list, tuple)) else x.to(base.dtype)

    return args, more | {k: cast(more[k]) for k in RESIDUALS if more.get(k) is not None}


class Controlled:
    """A base and what stands beside it as one model: called as the base is."""

    def __init__(self, own: Control, base: nn.Module, net: nn.Module, condition: Tensor):
        self.own, self.base, self.net, self.condition = own, base, net, condition
        self.config = base.config

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.own.answer(self.base, self.net, self.condition, *args, **more)


def controlled(models: Models, own: Control, condition: Tensor, s: Pretrained) -> Models:
    """The models, with both in the base's place."""
    name = family(s).TRAINED
    return models | {name: Controlled(own, models[name], models[own.part], condition)}


UNET = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")
UNET += ("addition_embed_type", "projection_class_embeddings_input_dim", "transformer_layers_per_block")
UNET += ("conditioning_channels", "conditioning_embedding_out_channels")
SD = {"kind": "ControlNetModel", "start": nets.unet_start, "answer": nets.unet_answer, "same": UNET}
SD |= {"latent": False, "image": "image", "layers": ()}
INNER = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim", "in_channels")
CONTROLNETS: dict[str, Control] = {
    "StableDiffusionPipeline": filling(
        Control(pipeline="StableDiffusionControlNetPipeline", **SD), "StableDiffusionControlNetInpaintPipeline"
    ),
    "StableDiffusionXLPipeline": filling(
        Control(pipeline="StableDiffusionXLControlNetPipeline", **SD), "StableDiffusionXLControlNetInpaintPipeline"
    ),
    "StableDiffusion3Pipeline": filling(
        Control(
            kind="SD3ControlNetModel",
            pipeline="StableDiffusion3ControlNetPipeline",
            start=nets.sd3_start,
            answer=nets.sd3_answer,
            same=(*INNER, "patch_size", "qk_norm", "extra_conditioning_channels", "use_pos_embed"),
            together=False,  # it encodes conditions with noise of its own
        ),
        "StableDiffusion3ControlNetInpaintingPipeline",
        start=partial(nets.sd3_start, extra=1),
    ),
    "FluxPipeline": Control(
        kind="FluxControlNetModel",
        pipeline="FluxControlNetPipeline",
        start=nets.flux_start,
        answer=nets.flux_answer,
        same=(*INNER, "patch_size", "axes_dims_rope", "num_mode", "conditioning_embedding_channels"),
        layers=("num_layers", "num_single_layers"),
    ),
    "QwenImagePipeline": filling(
        Control(
            kind="QwenImageControlNetModel",
            pipeline="QwenImageControlNetPipeline",
            start=nets.qwen_image_start,
            answer=nets.qwen_image_answer,
            same=(*INNER, "patch_size", "axes_dims_rope", "extra_condition_channels"),
        ),
        "QwenImageControlNetInpaintPipeline",
        start=partial(nets.qwen_image_start, extra=4),  # one for each pixel of a token
        together=False,  # as of SD3
    ),
    "ZImagePipeline": Control(
        kind="ZImageControlNetModel",
        pipeline="ZImageControlNetPipeline",
        start=nets.z_image_start,
        answer=nets.z_image_answer,
        same=("dim", "n_heads", "n_kv_heads", "n_refiner_layers", "all_patch_size", "all_f_patch_size"),
        settle=nets.z_image_settle,
    ),
}
"""The base's pipeline -> its ControlNet."""
