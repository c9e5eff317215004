"""The metrics of training between two readings, without waiting for the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.tasks import Batch


class Meter:
    """Means of what was logged since the last reading, but for what was not finite: such an update is skipped, or the run
    stops. Everything stays on the device until it is read."""

    def __init__(self, accelerator: Accelerator, several: bool):
        self.accelerator, self.several = accelerator, several
        self.values: dict[str, list[Any]] = {}
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

    def read(self, examples: int) -> dict[str, float]:
        """The means over processes, and the speed with `examples` an update. This waits for the device."""
        made = functools.partial(torch.as_tensor, dtype=torch.float32, device=self.accelerator.device)
        columns = [torch.stack([made(value) for value in self.values[key]]) for key in sorted(self.values)]
        pairs = torch.stack([torch.stack([x.nan_to_num(0, 0, 0).sum(), x.isfinite().sum()]) for x in columns])
        totals = self.accelerator.reduce(pairs, "sum").tolist()
        values = {key: total / count for key, (total, count) in zip(sorted(self.values), totals, strict=True) if count}
        now = time.perf_counter()
        speeds = {"pictures_per_second": examples * self.steps, "data_wait": self.waited}
        speeds = {key: amount / (now - self.since) for key, amount in speeds.items()}
        self.values, self.since, self.steps, self.waited = {}, now, 0, 0.0
        return values | speeds
