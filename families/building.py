"""A new model from its config, tried without memory first: whatever is wrong with the config is a line that names the key."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from oneloop.configs import BadInput, require

if TYPE_CHECKING:
    from torch import Tensor, nn

LEVELS = 16
"""Most levels of a model, each of which halves the image but the first."""
LAYERS = 1000
"""Most layers of a level, or of a transformer."""
NUMBER = 10**6
"""The largest integer in a config."""


def check_config(config: Mapping[str, Any], what: str, side: int, levels: int) -> None:
    """Refuse a model that does not take RGB images of this side; it has `levels` where its config does not say.

    Raises:
        BadInput: it does not. `what`: the flag and the file, as messages begin.
    """
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise BadInput(f"{what}: {key} is {_shown(config[key])}; expected 3, for RGB images")
    blocks = config.get("block_out_channels", [0] * levels)
    if not isinstance(blocks, list) or not 0 < len(blocks) <= LEVELS:
        raise BadInput(f"{what}: block_out_channels is {_shown(blocks)}; expected a list of 1 to {LEVELS} numbers of channels")
    halvings = len(blocks) - 1
    expected = f"a multiple of {2**halvings}, since {what} halves it {halvings} times"
    require(side % 2**halvings == 0, "data.resolution", side, expected)


def check_types(kind: type, config: Mapping[str, Any], what: str) -> None:
    """Refuse a value that is not of the type that the model's class declares, or a number with which building it may not end.

    Raises:
        BadInput: with the key.
    """
    for name, hint in get_type_hints(inspect.unwrap(kind.__init__)).items():
        most = LAYERS if name in ("layers_per_block", "num_layers") else NUMBER
        if name in config and not _fits(config[name], hint, most):
            words = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("tuple", "list")
            raise BadInput(f"{what}: {name} is {_shown(config[name])}; expected {words}, integers up to {most:,}")


def _fits(value: Any, hint: Any, most: int) -> bool:
    """Whether a value from a JSON file is of a type; None always is, and whatever Python alone can check."""
    if get_origin(hint) is tuple:
        return value is None or (isinstance(value, list) and all(_fits(x, get_args(hint)[0], most) for x in value))
    if parts := get_args(hint):
        return any(_fits(value, part, most) for part in parts)
    if hint in (int, float) and type(value) in (int, hint):
        return abs(value) <= (most if type(value) is int else sys.float_info.max)
    return value is None or hint not in (int, float, bool, str, type(None)) or type(value) is hint


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


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
    check_types(made, config, what)
    lengths = {key: len(config[key]) for key in lists if isinstance(config.get(key), list)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise BadInput(f"{what}: {counts}; expected lists of one length, an entry for each level")
    if (error := fault(made, config, shape, call)) is not None:
        culprit = next((key for key in config if fault(made, usual(kind, config, key), shape, call) is None), None)
        key = f" with {culprit} = {_shown(config[culprit])}" if culprit else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"{what}: no {kind} can be made of it{key}: {reason}") from None
    return made.from_config(dict(config))


def usual(kind: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The config with one key as it works beside most others: at a plain value, or else at its default."""
    levels = len(config["block_out_channels"]) if isinstance(config.get("block_out_channels"), list) else 4
    middle = {"AutoencoderKL": "Encoder"}.get(kind, "")
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
