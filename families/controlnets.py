"""ControlNets beside their bases: how each family's begins, and what both answer as one, as the pipeline has both.

Zhang, Rao, Agrawala 2023, Adding Conditional Control to Text-to-Image Diffusion Models (arXiv:2302.05543). A ControlNet begins
as a copy of blocks of its base, whose outputs, or whose view of the condition, go through layers of zeros: at first the base
answers as without it. Which is whose: controls.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oneloop.families.latents import pack
from oneloop.tasks import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion and SDXL.


def unet_start(unet: nn.Module, s: Any, factor: int) -> nn.Module:
    """The UNet's encoder; the condition goes through convolutions that shrink it to the latents' size."""
    from diffusers import ControlNetModel

    steps = factor.bit_length() - 1
    widths = ((16, 32, 96) + (256,) * steps)[: steps + 1]
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)


def unet_answer(unet: nn.Module, net: nn.Module, condition: Tensor, *args: Any, **more: Any) -> Any:
    """Added to each skip connection and to the middle."""
    down, middle = net(*args, **more, controlnet_cond=condition)
    return unet(*args, **more, down_block_additional_residuals=down, mid_block_additional_residual=middle)


# ---------------------------------------------------------------------------------------------------------------------
# Transformers.


def begun(kind: str, base: nn.Module, **config: Any) -> nn.Module:
    """A ControlNet of the base's config and these values, with the base's weights wherever both have one of a name and shape.

    diffusers' own `from_transformer` writes the number of layers into the base's config (SD3), and leaves out `txt_norm`
    (Qwen-Image), so that the copy would read another text than the base.
    """
    import diffusers

    made = getattr(diffusers, kind)
    known = inspect.signature(made.__init__).parameters
    net = made.from_config({k: v for k, v in base.config.items() if k in known} | config)
    own, state = base.state_dict(), net.state_dict()
    net.load_state_dict({k: own[k] for k, x in state.items() if k in own and own[k].shape == x.shape}, strict=False)
    return net.float()


def layers(base: nn.Module, asked: int | None, usual: int, key: str = "num_layers") -> dict[str, int]:
    """As many blocks as are asked for, or as are usual, but no more than the base has."""
    return {key: min(usual if asked is None else asked, base.config[key])}


def sd3_start(base: nn.Module, s: Any, factor: int, extra: int = 0) -> nn.Module:
    """Its config has the pipeline give it the pooled text and latents in the base's scale, as training does; with `extra`
    channels, that of the mask, it is given no pooled text. Of more than half as many blocks as the base has, the last would be
    unread: nothing is added in the base's last one."""
    more = {"force_zeros_for_pooled_projection": extra > 0, "extra_conditioning_channels": extra}
    count = layers(base, s.num_layers, 12)["num_layers"]
    return begun("SD3ControlNetModel", base, num_layers=min(count, max(base.config["num_layers"] // 2, 1)), **more)


def sd3_answer(base: nn.Module, net: nn.Module, condition: Tensor, **more: Any) -> Any:
    """Without pooled text where its config says so; a block of it serves several of the base's."""
    import torch

    pooled = more["pooled_projections"]
    zeros = {"pooled_projections": torch.zeros_like(pooled)} if pooled_is_zero(unwrap(net).config) else {}
    blocks = net(**more | zeros, controlnet_cond=condition)[0]
    return base(**more, block_controlnet_hidden_states=blocks)


def pooled_is_zero(config: Mapping[str, Any]) -> bool:
    """Whether an SD3 ControlNet of this config is given zeros for the pooled text, and, unless it fills in, latents without
    their shift; the default is True. The pipeline that fills in does not ask."""
    return config.get("force_zeros_for_pooled_projection", True) or config.get("extra_conditioning_channels", 0) > 0


def flux_start(base: nn.Module, s: Any, factor: int) -> nn.Module:
    """Four double and four single blocks are the official script's default."""
    single = layers(base, s.num_single_layers, 4, "num_single_layers")
    return begun("FluxControlNetModel", base, **layers(base, s.num_layers, 4), **single)


def flux_answer(base: nn.Module, net: nn.Module, condition: Tensor, **more: Any) -> Any:
    """Either may be distilled for guidance, at which training is 1."""
    guidance = more["hidden_states"].new_ones(len(condition)) if unwrap(net).config.guidance_embeds else None
    double, single = net(**more | {"guidance": guidance}, controlnet_cond=pack(condition))
    return base(**more, controlnet_block_samples=double, controlnet_single_block_samples=single)


def qwen_image_start(base: nn.Module, s: Any, factor: int, extra: int = 0) -> nn.Module:
    """Five blocks are diffusers' default; with `extra` channels of a token of the condition."""
    return begun("QwenImageControlNetModel", base, **layers(base, s.num_layers, 5), extra_condition_channels=extra)


def qwen_image_answer(base: nn.Module, net: nn.Module, condition: Tensor, **more: Any) -> Any:
    """It knows no guidance."""
    blocks = net(**{k: v for k, v in more.items() if k != "guidance"}, controlnet_cond=pack(condition))
    return base(**more, controlnet_block_samples=blocks)


def z_image_start(base: nn.Module, s: Any, factor: int) -> nn.Module:
    """Copies of some of the base's layers, evenly spread, of its refiner and of its embedding of images; what it has of its own
    begins as zeros."""
    c = base.config
    count = min(s.num_layers or 6, c["n_layers"])
    places = [i * c["n_layers"] // count for i in range(count)]
    net = begun("ZImageControlNetModel", base, control_layers_places=places, control_in_dim=c["in_channels"])
    copied = {"control_noise_refiner": base.noise_refiner, "control_all_x_embedder": base.all_x_embedder}
    copied |= {f"control_layers.{i}": base.layers[place] for i, place in enumerate(places)}
    for name, module in copied.items():
        net.get_submodule(name).load_state_dict(module.state_dict(), strict=False)
    return net


def z_image_answer(base: nn.Module, net: nn.Module, condition: Tensor, x: Any, t: Any, texts: Any, **more: Any) -> Any:
    """Takes lists, as the base does; what its config has room for beyond the latents is zeros."""
    import torch.nn.functional as F

    room = unwrap(net).config.control_in_dim - condition.shape[1]
    blocks = net(x, t, texts, [*F.pad(condition.unsqueeze(2), (0, 0, 0, 0, 0, 0, 0, room))])
    return base(x, t, texts, controlnet_block_samples=blocks, **more)


SHARED = ("t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner")
SHARED += ("x_pad_token", "cap_pad_token")


def z_image_settle(net: nn.Module, base: nn.Module) -> None:
    """It calls modules of the base, which are not its own: not in its state, nor in its export. Its pipeline registers them.
    (diffusers 0.42 forgets to set the attribute, and its forward pass asks for it where gradients are taken.)"""
    net.gradient_checkpointing = False
    for name in SHARED:
        delattr(net, name)
        object.__setattr__(net, name, getattr(base, name))  # past torch, which would register it
