"""The exponential moving average (EMA) of weights: the one that is shown and exported, and those that a loss sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oneloop.tasks import Follow, Models


@dataclass(frozen=True)
class Ema:
    """Values that follow weights. Parameters that train alone: what is frozen does not move, buffers are not averaged."""

    values: dict[str, Tensor]
    """'model.parameter' -> its EMA."""
    weights: list[Tensor]
    """The parameter that each of them follows."""
    decay: Callable[[int, int], float]
    """(optimizer steps taken, the run's total) -> the decay of the update after that step."""
    offloaded: bool = False
    """Whether the values are in the machine's memory, wherever the weights are."""
    averaged: Callable[[], list[Tensor] | None] = lambda: None
    """What the optimizers average themselves, in the same order: then the values are that."""

    @functools.cached_property
    def apart(self) -> bool:
        """Whether values and weights are in other places, or of other types."""
        return self.offloaded or any(weight.dtype != torch.float32 for weight in self.weights)

    @torch.no_grad()
    def update(self, step: int, total: int) -> float:
        """values <- decay values + (1 - decay) weights, in place; returns the decay."""
        decay, values, averaged = self.decay(step, total), list(self.values.values()), self.averaged()
        if averaged is not None:
            torch._foreach_copy_(values, averaged)
            return 0.0
        if values and self.apart:  # one at a time to where the weights are: the same bits; nothing waits for it
            for value, weight in zip(values, self.weights, strict=True):
                there = value.to(weight.device, non_blocking=True)
                value.copy_(torch.lerp(there, weight.to(value.dtype), 1 - decay), non_blocking=True)
        elif values:
            torch._foreach_lerp_(values, self.weights, 1 - decay)
        return decay


def begin(weights: Mapping[str, Tensor], offload: bool) -> dict[str, Tensor]:
    """An average of one value: copies of the weights in float32, where they are or in the machine's memory, then pinned for a
    GPU."""
    copied = {key: p.detach().to("cpu" if offload else p.device, torch.float32, copy=True) for key, p in weights.items()}
    return {key: x.pin_memory() if weights[key].is_cuda and not x.is_cuda else x for key, x in copied.items()}


def decay_at(step: int, largest: float, power: float) -> float:
    """The decay of the update after optimizer step `step` (1, 2, ...): 1 - step^-power, at most `largest`; this is the warm-up
    of diffusers' EMAModel."""
    return min(largest, 1 - step**-power)


def following(models: Models, follows: Mapping[str, Follow], cfg: Any = None) -> list[Ema]:
    """The EMAs whose values are the parameters of the copies that placement.followers made; `cfg` has the settings that give
    decays."""

    def one(name: str, of: str, decay: float | str | Callable[[int, int], float]) -> Ema:
        decay = functools.reduce(getattr, decay.split("."), cfg) if isinstance(decay, str) else decay
        own = dict(models[name].named_parameters())
        trained = {n: p for n, p in models[of].named_parameters() if p.requires_grad}
        values = {f"{name}.{n}": own[n].data for n in trained}
        return Ema(values, list(trained.values()), decay if callable(decay) else lambda step, total: decay)

    return [one(name, follow.of, follow.decay) for name, follow in follows.items()]
