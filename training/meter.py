"""The metrics of training between two readings, without waiting for the device."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.machine.processes import gather
from oneloop.tasks import Batch, Loss


class Meter:
    """Means of what was logged since the last reading, but for what was not finite: such an update is skipped, or the run
    stops. Everything stays on the device until it is read."""

    def __init__(self, accelerator: Accelerator, several: bool):
        self.accelerator, self.several = accelerator, several
        self.values: dict[str, list[Any]] = {}
        self.open: dict[str, Tensor] = {}  # optimizer -> the sum of its losses that have not stepped yet
        self.since, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def fetch(self, stream: Iterator[Batch], count: int) -> Iterator[Batch]:
        """The next batches of a stream; the time until each is there was spent waiting for data."""
        for _ in range(count):
            began = time.perf_counter()
            batch = next(stream)
            self.waited += time.perf_counter() - began
            yield batch

    def add(self, kind: str, name: str, value: Any) -> None:
        """One value of a kind (loss, grad_norm, ...); the optimizer's name is added where there are several."""
        key = f"{kind}/{name}" if self.several and name else kind
        self.values.setdefault(key, []).append(value.detach() if isinstance(value, Tensor) else value)

    def descended(self, loss: Loss) -> None:
        """A loss that was descended, and what it logs; one number for those whose gradients share a step, their sum."""
        value = self.open.pop(loss.name, 0) + loss.value.detach()
        if loss.step:
            self.add("loss", loss.name, value)
        else:
            self.open[loss.name] = value
        for key, logged in loss.logs.items():
            self.add(key, "", logged)

    def read(self, examples: int) -> dict[str, float]:
        """The means over processes, and the speed with `examples` an update. This waits for the device.

        Processes agree on the names first: one of them may have logged what others did not.
        """
        keys = sorted(set().union(*gather(self.accelerator, list(self.values))))
        made = functools.partial(torch.as_tensor, dtype=torch.float32, device=self.accelerator.device)
        columns = [torch.stack([made(value) for value in self.values.get(key, [math.nan])]) for key in keys]
        pairs = torch.stack([torch.stack([x.nan_to_num(0, 0, 0).sum(), x.isfinite().sum()]) for x in columns])
        totals = self.accelerator.reduce(pairs, "sum").tolist()
        values = {key: total / count for key, (total, count) in zip(keys, totals, strict=True) if count}
        now = time.perf_counter()
        speeds = {"images_per_second": examples * self.steps, "data_wait": self.waited}
        speeds = {key: amount / (now - self.since) for key, amount in speeds.items()}
        self.values, self.since, self.steps, self.waited = {}, now, 0, 0.0
        return values | speeds
