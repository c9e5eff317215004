"""Models that compute in bfloat16 throughout, as pipelines run them, where all their weights are (`--base.weights bf16`).

Autocast computes norms in float32 and casts around each of them, and around every weight that is float32: on a GPU nearly half
of what a step with adapters launches (`python benchmarks/launches.py`). Kernels of norms sum in float32 inside either way.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def narrow(module: torch.nn.Module) -> None:
    """Have a model's forward pass compute in bfloat16 without autocast. What it is given is cast once, but for what counts:
    timesteps, guidance and other values [B], integers, and what is called `..._ids`, such as sizes and positions."""
    own = module.forward
    forward = getattr(own, "__func__", lambda self, *args, **kwargs: own(*args, **kwargs))

    @functools.wraps(forward)
    def computes(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = next(self.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            return forward(self, *map(_cast, args), **{name: _cast(value, name) for name, value in kwargs.items()})

    computes.narrow = forward
    module.forward = MethodType(computes, module)


def widen(module: torch.nn.Module) -> None:
    """Undo that, for a copy whose weights are float32."""
    if forward := getattr(module.forward, "narrow", None):
        module.forward = MethodType(forward, module)


def _cast(value: Any, name: str = "") -> Any:
    if isinstance(value, Tensor):
        exact = value.ndim < 2 or name.endswith("_ids") or not value.is_floating_point()
        return value if exact else value.to(torch.bfloat16)
    if isinstance(value, dict):
        return {key: _cast(x, key) for key, x in value.items()}
    return type(value)(_cast(x, name) for x in value) if type(value) in (list, tuple) else value
