"""The exponential moving average (EMA) of weights: the one that is shown and exported, and those that a loss sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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


def exponent(length: float) -> float:
    """gamma of the average that weighs time by t^gamma and is this long: the standard deviation of that density, as a share of
    the time so far (Karras, Aittala, Lehtinen, Hellsten, Aila, Laine 2024, Analyzing and Improving the Training Dynamics of
    Diffusion Models, arXiv:2312.02696, section 3). length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def of_lengths(weights: Mapping[str, Tensor], base: Any) -> list[Ema]:
    """The averages of `--base.ema-lengths`, whose values are called 'length/model.parameter'. The weights after step k count as
    k^(gamma + 1) - (k - 1)^(gamma + 1), so that what they were at the start counts for nothing."""

    def one(length: float) -> Ema:
        values = {f"{length}/{key}": x for key, x in begin(weights, base.offload_ema).items()}
        power = exponent(length) + 1
        return Ema(values, list(weights.values()), lambda step, total: (1 - 1 / step) ** power, base.offload_ema)

    return [one(length) for length in base.ema_lengths]


def coefficients(stored: Sequence[tuple[int, float]], step: int, length: float) -> tuple[list[float], float]:
    """The factors on averages, stored at these steps with these lengths, whose sum is nearest to the average of another length
    at a step: least squares over the weight that each instant has in them, as if they were integrals over time (appendix C of
    the paper), among factors that add up to 1. And how far the sum is from it, as a share of its own norm: 0 is exact."""

    def product(t: Any, a: Any, u: Any, b: Any) -> np.ndarray:
        """Of the averages with exponents a and b at t and u: the integral of (a + 1) s^a / t^(a + 1) times the other's."""
        ratio, last = np.where(t < u, t / u, u / t), np.where(t < u, b, a)
        return (a + 1) * (b + 1) * ratio**last / ((a + b + 1) * np.maximum(t, u))

    t, a = np.array([float(t) for t, _ in stored]), np.array([exponent(x) for _, x in stored])
    to, by, n = float(step), exponent(length), len(stored)
    own = product(to, by, to, by)
    alike, wanted = product(t[:, None], a[:, None], t, a) / own, product(t, a, to, by) / own
    system = np.block([[alike, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=1e-9)[0][:n]  # lengths that are nearly one have no difference
    return found.tolist(), float(np.sqrt(max(1 - 2 * found @ wanted + found @ alike @ found, 0.0)))


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
