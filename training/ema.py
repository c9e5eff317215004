"""The exponential moving average (EMA) of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def decay_at(step: int, largest: float, power: float) -> float:
    """The decay of the update after optimizer step `step` (1, 2, ...): 1 - step^-power, at most `largest`; this is the warm-up
    of diffusers' EMAModel."""
    return min(largest, 1 - step**-power)


@torch.no_grad()
def update(ema: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) weights, in place, for every name in `ema`."""
    if ema:
        torch._foreach_lerp_(list(ema.values()), [weights[key] for key in ema], 1 - decay)
