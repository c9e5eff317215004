"""What a pipeline's text encoders make of the prompts of its samples, as named tensors: recorded once from the pipeline's own
calls of `encode_prompt`, and looked up when samples are drawn without text encoders.

To record, the pipeline is called as it is for a sample, with a `StandIn` for its UNet or transformer, at whose first call all
prompts have been encoded. A call is named by a hash of its arguments, so that whatever a pipeline asks of its encoders is
answered with the very tensors that they gave, or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SPEC = "spec"


class Encoded(Exception):
    """A pipeline has encoded its prompts."""


def end(*args: Any, **more: Any) -> NoReturn:
    """What is called in place of a model."""
    raise Encoded


class StandIn:
    """A model without weights: it has a config and attributes, and a call of it, or to encode an image, ends the pipeline's."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **more: Any) -> Any:
        end()

    encode = __call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@functools.lru_cache(maxsize=4)
def _on_meta(kind: str, config: str, dtype: torch.dtype) -> nn.Module:
    import diffusers
    import torch

    with torch.device("meta"):
        made = getattr(diffusers, kind).from_config(json.loads(config)).eval()
        return torch.nn.Module.to(made, dtype)  # diffusers' own warns of weights, of which this has none


def stand_in(config: dict[str, Any], dtype: torch.dtype) -> StandIn:
    """One for the diffusers model of this config, which answers for this precision."""
    return StandIn(_on_meta(config["_class_name"], json.dumps(config), dtype))


ended = functools.partial(contextlib.suppress, Encoded)
"""The context in which a pipeline may end because its prompts are encoded."""


def attach(pipeline: Any, prompts: nn.Module | dict[str, Tensor]) -> None:
    """Have the pipeline's calls of `encode_prompt` recorded in a dict, or answered from a module's buffers."""
    encode, method = getattr(pipeline, _method(pipeline)), _method(pipeline)

    def record(*args: Any, **more: Any) -> Any:
        name = _name(pipeline, args, more)  # before the call: a pipeline may write into its arguments
        made = encode(*args, **more)
        tensors: list[Tensor] = []
        spec = json.dumps(_flatten(made, tensors)).encode()
        prompts.update({f"{name}_{i}": x.detach().clone() for i, x in enumerate(tensors)})
        prompts[f"{name}_{SPEC}"] = _bytes(spec)
        return made

    def look_up(*args: Any, **more: Any) -> Any:
        name, known = _name(pipeline, args, more), dict(prompts.named_buffers())
        if f"{name}_{SPEC}" not in known:
            raise LookupError("these prompts were not encoded at the start of the run; the same command encodes them")
        spec = json.loads(bytes(known[f"{name}_{SPEC}"].tolist()))
        return _unflatten(spec, lambda i: known[f"{name}_{i}"].clone())

    setattr(pipeline, method, record if isinstance(prompts, dict) else look_up)


def _method(pipeline: Any) -> str:
    """What the pipeline calls its encoding of prompts."""
    return "encode_prompt" if hasattr(pipeline, "encode_prompt") else "_encode_prompt"


def _name(pipeline: Any, args: tuple[Any, ...], more: dict[str, Any]) -> str:
    """A hash of all that a call of `encode_prompt` is given but the device and the precision, which are the run's."""
    given = inspect.signature(getattr(type(pipeline), _method(pipeline))).bind(pipeline, *args, **more)
    given.apply_defaults()
    told = sorted((key, repr(_told(x))) for key, x in given.arguments.items() if key not in ("self", "device", "dtype"))
    return "prompt" + hashlib.sha256(repr((type(pipeline).__name__, told)).encode()).hexdigest()[:32]


def _told(value: Any) -> Any:
    """A value by what it holds: an image by its pixels."""
    if isinstance(value, (list, tuple)):
        return [_told(x) for x in value]
    return (value.size, hashlib.sha256(value.tobytes()).hexdigest()) if hasattr(value, "tobytes") else value


def _bytes(content: bytes) -> Tensor:
    import torch

    return torch.tensor(list(content), dtype=torch.uint8)


def _flatten(value: Any, tensors: list[Tensor]) -> Any:
    """The structure of nested lists and tuples as JSON has it; their tensors are appended in order."""
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_flatten(x, tensors) for x in value)]
    if value is None:
        return None
    tensors.append(value)
    return len(tensors) - 1


def _unflatten(spec: Any, tensor: Any) -> Any:
    if isinstance(spec, list):
        return {"list": list, "tuple": tuple}[spec[0]](_unflatten(x, tensor) for x in spec[1:])
    return None if spec is None else tensor(spec)
