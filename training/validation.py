"""The loss on examples that are never trained on: a number that moves only when the model does.

Every held-out example has its own noise, a function of its row and of no seed, so that runs can be compared. Noise levels are
stratified: of N examples, in an order drawn once, the one of rank i takes its level from the i-th of N equal parts of the
schedule, so that the mean over them is an integral rather than a lottery. A batch never mixes quarters of the schedule, so the
mean of each comes with it. The task is asked for its own loss, and nothing is descended.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.data import Examples
from oneloop.machine.processes import gather
from oneloop.tasks import Batch, Loss, Rng, hash64


@dataclass(frozen=True)
class Stratified(Rng):
    """Randomness whose draws called "timestep" are spread evenly over the examples."""

    ranks: Tensor = field(kw_only=True)
    """[B] float32: the place of each example in the order of noise levels."""
    count: int = field(kw_only=True)
    """How many places there are."""
    drawn: set[str] = field(kw_only=True, default_factory=set)
    """The purposes that were asked for."""

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        self.drawn.add(purpose)
        u = super().uniform(purpose, *shape)
        if purpose != "timestep":
            return u
        return ((self.ranks.view(-1, *[1] * len(shape)) + u) / self.count).clamp(max=1 - 2**-24)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        if purpose != "timestep":
            return super().normal(purpose, *shape)
        return torch.special.ndtri(self.uniform(purpose, *shape).clamp(min=2**-25))


def batches(sizes: Sequence[Any], most: int) -> Iterator[tuple[int, list[int]]]:
    """(quarter from 1 to 4, ranks) of every batch of at most `most`; `sizes`: of each rank's images; a batch has one."""
    for quarter in range(4):
        first, end = (len(sizes) * i // 4 for i in (quarter, quarter + 1))
        for size in dict.fromkeys(sizes[first:end]):
            ranks = [rank for rank in range(first, end) if sizes[rank] == size]
            for start in range(0, len(ranks), most):
                yield quarter + 1, ranks[start : start + most]


def measure(
    examples: Examples,
    accelerator: Accelerator,
    losses: Callable[[Batch, Rng], Iterator[Loss]],
    shown: dict[str, AbstractContextManager[Any]],
) -> dict[str, float]:
    """The task's losses on all the examples, as metrics; every process calls this.

    `shown` is `loss` and, where there are averages, `loss_ema` -> the context that puts those weights in place. The first is
    measured as a mean alone; the last, which is what is exported, by quarters of the schedule (q1 has the smallest draws) and
    with what else the task logs. With several optimizers each loss has its name. Batches and processes change nothing but the
    order of the sums.
    """
    metrics: dict[str, float] = {}
    for kind, weights in shown.items():
        with weights, torch.enable_grad():  # a loss may take gradients of its own
            means = mean_losses(examples, accelerator, losses)
        several = len({name for part, name in means if part == "loss"}) > 1
        for (part, name), mean in means.items():
            if part == "loss" or kind == list(shown)[-1]:
                metrics["/".join(["validation", kind if part == "loss" else part, *[name] * several * bool(name)])] = mean
    return metrics


def mean_losses(
    examples: Examples, accelerator: Accelerator, losses: Callable[[Batch, Rng], Iterator[Loss]]
) -> dict[tuple[str, str], float]:
    """(loss, q1 to q4, or the name of a log; the optimizer's name, or nothing for a log) -> its mean over the examples."""
    device = accelerator.device
    order = sorted(range(examples.size), key=lambda row: hash64("validation order", row))
    every = batches(examples.sizes(torch.tensor(order)), examples.cfg.train_batch_size)
    deal = itertools.islice(every, accelerator.process_index, None, accelerator.num_processes)
    parts: list[tuple[tuple[str, str], int, Any]] = []  # what, of how many examples, their mean
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for quarter, ranks in deal:
            rows = [order[rank] for rank in ranks]
            keys = Rng.of(0, rows, "validation", device).keys
            rng = Stratified(keys, device, ranks=torch.tensor(ranks, dtype=torch.float32, device=device), count=len(order))
            descended: dict[str, Tensor] = {}  # optimizer -> the sum of its losses
            for loss in losses(examples.at(torch.tensor(rows)), rng):
                descended[loss.name] = descended.get(loss.name, 0) + loss.value.detach()
                parts += [((key, ""), len(rows), torch.as_tensor(value).detach()) for key, value in loss.logs.items()]
            for name, value in descended.items():
                parts += [((part, name), len(rows), value) for part in ("loss", f"q{quarter}")[: 1 + ("timestep" in rng.drawn)]]
    values = torch.stack([value.float().to(device) for *_, value in parts]).tolist() if parts else []
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    measured = [(p, n, v) for (p, n, _), v in zip(parts, values, strict=True)]
    for part, count, value in itertools.chain.from_iterable(gather(accelerator, measured)):
        total = sums[part]
        total[0], total[1] = total[0] + count * value, total[1] + count
    return {part: total / count for part, (total, count) in sorted(sums.items())}
