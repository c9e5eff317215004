"""Weights held in bfloat16, with steps that are taken in float32 and rounded at random.

A bfloat16 has 8 bits of precision: rounded to the nearest, a step of less than 1/512 of a weight is lost. Rounded to either
neighbour, the nearer the likelier, a weight is right on average (Gupta et al. 2015, Deep Learning with Limited Numerical
Precision, section 3, arXiv:1502.02551; Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv:2010.06192). The draw is keyed
by the seed, the parameter and the number of its step, so that a resumed run, and every process, rounds alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oneloop.tasks import hash64

TOGETHER = 2**26
"""Numbers whose float32 copies are there at a time, unless one parameter has more."""


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 numbers -> one of the two bfloat16 beside each, the nearer the likelier; what is one, or not finite, stays.

    A bfloat16 is the upper half of a float32: a uniform number below 2^16 is added to the bits, and the lower half cut off.
    """
    draw = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    made = ((x.contiguous().view(torch.int32) + draw) & -(2**16)).view(torch.float32)
    return made.where(x.isfinite(), x).bfloat16()


def attach(optimizer: Optimizer, seed: int, name: str) -> None:
    """Have an optimizer step in float32, with state in float32, on parameters that are bfloat16; others it steps as before. Its
    name tells its draws from those of others."""
    for i, part in enumerate(getattr(optimizer, "parts", [optimizer])):
        seeds = [
            (p, hash64(seed, "rounding", name, i, n)) for n, p in enumerate(p for g in part.param_groups for p in g["params"])
        ]
        part.step = functools.partial(_step, part, part.step, dict(seeds))
    kept: dict[int, dict[str, Any]] = {}

    def before(optimizer: Optimizer, given: dict[str, Any]) -> None:
        kept.update(given["state"])

    def after(optimizer: Optimizer) -> None:
        """Loading casts state to its parameter's type: put what was saved in its place."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for number, state in kept.items():
            held = optimizer.state[params[number]]
            for key, value in state.items():
                if isinstance(value, Tensor) and isinstance(held[key], Tensor) and held[key].dtype != value.dtype:
                    held[key] = value.to(held[key].device, copy=True)
        kept.clear()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def _step(optimizer: Optimizer, step: Callable[[], Any], seeds: Mapping[Tensor, int], closure: Any = None) -> None:
    """One step: a few parameters at a time have float32 copies, to which their state belongs meanwhile."""
    assert closure is None
    groups = optimizer.param_groups
    lists = [group["params"] for group in groups]
    moving = [(i, p) for i, params in enumerate(lists) for p in params if p.grad is not None]
    try:
        for some in _chunks(moving):
            copies = [(i, p, _copy(p) if p.dtype == torch.bfloat16 else p) for i, p in some]
            for j, group in enumerate(groups):
                group["params"] = [q for i, _, q in copies if i == j]
            _hand_over(optimizer, ((p, q) for _, p, q in copies))
            step()
            _hand_over(optimizer, ((q, p) for _, p, q in copies))
            for _, p, q in copies:
                if q is not p:
                    state = optimizer.state[p]
                    state["rounded"] = state.get("rounded", 0) + 1  # how often this parameter was
                    generator = torch.Generator(p.device).manual_seed(hash64(seeds[p], state["rounded"]))
                    p.detach().copy_(rounded(q.detach(), generator))
    finally:
        for group, params in zip(groups, lists, strict=True):
            group["params"] = params


def _chunks(moving: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """The parameters in order, so many together as TOGETHER allows."""
    some, numbers = [], 0
    for i, p in moving:
        if some and numbers + p.numel() > TOGETHER:
            yield some
            some, numbers = [], 0
        some, numbers = [*some, (i, p)], numbers + p.numel()
    if some:
        yield some


def _copy(p: Tensor) -> Tensor:
    """A parameter and its gradient in float32."""
    made = torch.nn.Parameter(p.detach().float())
    made.grad = p.grad.float()
    return made


def _hand_over(optimizer: Optimizer, pairs: Any) -> None:
    """The state of the first of each pair to the second."""
    for old, new in pairs:
        if old is not new and old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
