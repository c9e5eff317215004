"""The exponential moving average (EMA) of weights: the one that is shown and exported, and those that a loss sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType

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

    @torch.no_grad()
    def update(self, step: int, total: int) -> float:
        """values <- decay values + (1 - decay) weights, in place; returns the decay."""
        decay = self.decay(step, total)
        if self.values:
            torch._foreach_lerp_(list(self.values.values()), self.weights, 1 - decay)
        return decay


def decay_at(step: int, largest: float, power: float) -> float:
    """The decay of the update after optimizer step `step` (1, 2, ...): 1 - step^-power, at most `largest`; this is the warm-up
    of diffusers' EMAModel."""
    return min(largest, 1 - step**-power)


def followers(models: Models, follows: Mapping[str, Follow]) -> Models:
    """The frozen copies that follow models, in eval(): parameters of their own where the model trains, the model's own frozen
    parameters and buffers elsewhere, so that the copy of a model with adapters takes no more than the adapters.

    Raises:
        ValueError: a name is taken, or the model that is followed is missing, trains nothing or cannot be copied.
    """
    made: Models = {}
    for name, follow in follows.items():
        model = models.get(follow.of)
        if name in models or model is None or not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"the task's {name!r} follows {follow.of!r}; expected a new name and one of its models that train")
        if any(isinstance(vars(m).get("forward"), FunctionType) for m in model.modules()):
            raise ValueError(f"the task's {name!r} cannot copy {follow.of!r}: its forward is a closure; make it a method")
        shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        made[name] = copy.deepcopy(model, {id(x): x for x in shared}).requires_grad_(False).eval()
        for own, other in zip(made[name].modules(), model.modules(), strict=True):
            own._buffers = other._buffers
    return made


def following(models: Models, follows: Mapping[str, Follow]) -> list[Ema]:
    """The EMAs whose values are the parameters of the copies that `followers` made."""

    def one(name: str, of: str, decay: float | Callable[[int, int], float]) -> Ema:
        own = dict(models[name].named_parameters())
        trained = {n: p for n, p in models[of].named_parameters() if p.requires_grad}
        values = {f"{name}.{n}": own[n].data for n in trained}
        return Ema(values, list(trained.values()), decay if callable(decay) else lambda step, total: decay)

    return [one(name, follow.of, follow.decay) for name, follow in follows.items()]
