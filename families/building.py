"""A new model from its config, tried without memory first: whatever is wrong with the config is a line that names the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn


def build(
    kind: str, config: Mapping[str, Any], what: str, shape: tuple[int, ...], call: Callable[[Any, Tensor], Tensor]
) -> nn.Module:
    """A diffusers model of this class. On the meta device, where tensors have shapes and no memory, it is made and called once.

    Args:
        what: the flag and the file, as messages begin.
        shape: of the images that it is called with, [B, 3, H, W].
        call: (model, images) -> what comes out, which has the same shape.

    Raises:
        BadInput: with the key at fault, where it is one alone.
    """
    import diffusers

    made, lists = getattr(diffusers, kind), ("block_out_channels", "down_block_types", "up_block_types")
    lengths = {key: len(config[key]) for key in lists if isinstance(config.get(key), list)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise BadInput(f"{what}: {counts}; expected lists of one length, an entry for each level")
    if (error := fault(made, config, shape, call)) is not None:
        culprit = next((key for key in config if fault(made, usual(kind, config, key), shape, call) is None), None)
        key = f" with {culprit} = {config[culprit]!r}" if culprit else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"{what}: no {kind} can be made of it{key}: {reason}") from None
    return made.from_config(dict(config))


def usual(kind: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The config with one key as it works beside most others: at a plain value, or else at its default."""
    levels = len(config["block_out_channels"]) if isinstance(config.get("block_out_channels"), list) else 4
    middle = {"UNet2DModel": "", "AutoencoderKL": "Encoder"}[kind]
    plain = {
        "norm_num_groups": 1,
        "block_out_channels": [32] * levels,
        "down_block_types": [f"Down{middle}Block2D"] * levels,
        "up_block_types": [f"Up{middle.replace('En', 'De')}Block2D"] * levels,
    }
    return {k: plain.get(k) if k == key else v for k, v in config.items() if k != key or k in plain}


def fault(
    made: Any, config: Mapping[str, Any], shape: tuple[int, ...], call: Callable[[Any, Tensor], Tensor]
) -> Exception | None:
    """What goes wrong with a model of this config, or None."""
    import torch

    try:
        with torch.device("meta"), torch.no_grad():
            came = call(made.from_config(dict(config)).eval(), torch.zeros(shape))
        if tuple(came.shape) != shape:
            raise ValueError(f"images of {list(shape)} come out as {list(came.shape)}")
    except Exception as error:  # a config is anyone's: everything that can be asked of a library is asked
        return error
    return None
