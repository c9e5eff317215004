"""Losses and gradients must be finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from oneloop.tasks import Loss


class NonFinite(Exception):
    """A loss or gradient that is not finite. Exit code 3."""


class Guard:
    """Watches that every loss and gradient is finite.

    Where reading costs nothing (a CPU), or updates may be skipped, it looks before the optimizer steps; elsewhere it keeps the
    values on the device and reads them before anything is logged, shown or saved.
    """

    def __init__(self, accelerator: Accelerator, state: Any, most: int, name: Callable[[int], str]):
        self.accelerator, self.state, self.most, self.name = accelerator, state, most, name
        self.now = accelerator.device.type == "cpu" or most > 0
        self.losses: dict[str, list[tuple[Tensor, Tensor]]] = {}  # optimizer -> (loss, rows) of this update's batches
        self.pending: list[tuple[int, str, list[Tensor]]] = []

    def watch(self, loss: Loss, rows: Tensor) -> None:
        """See the loss of a batch, made of these rows of the data set."""
        self.losses.setdefault(loss.name, []).append((loss.value.detach(), rows))

    def allows(self, name: str, norm: Tensor) -> bool:
        """Whether the optimizer may step, given the norm of its gradient."""
        seen = self.losses.pop(name)
        scaled = self.accelerator.scaler is not None  # fp16: its scaler finds overflows in gradients, and skips them
        values = [value for value, _ in seen] + ([] if scaled else [norm])
        if not self.now:
            self.pending.append((self.state.step + 1, name, values))
            return True
        if self.finite([values])[0]:
            return True
        self.state.skipped += 1
        if self.state.skipped > self.most:
            batches = gather_object([(bool(value.isfinite()), rows.tolist()) for value, rows in seen])  # of all processes
            what = "gradient" if all(fine for fine, _ in batches) else "loss"
            rows = [row for fine, rows in batches for row in rows if what == "gradient" or not fine]
            files = ", ".join(self.name(r) for r in rows[:4]) + (", ..." if len(rows) > 4 else "")
            self.refuse(self.state.step + 1, name, what, f" on a batch with {files}")
        return scaled  # the scaler must see the step that it will skip

    def finite(self, updates: list[list[Tensor]]) -> list[bool]:
        """Whether all values of each update are finite, on every process. This waits for the device."""
        fine = [torch.stack([v.to(values[0].device) for v in values]).isfinite().all() for values in updates]
        return [mean == 1 for mean in self.accelerator.reduce(torch.stack(fine).float(), "mean").tolist()]

    def read(self) -> None:
        """Settle what was left on the device."""
        pending, self.pending = self.pending, []
        for (step, name, _), fine in zip(pending, self.finite([v for *_, v in pending]) if pending else (), strict=True):
            if not fine:
                self.refuse(step, name, "loss or gradient", "")

    def refuse(self, step: int, name: str, what: str, where: str) -> None:
        skipped = f" after {self.most} skipped updates" if self.most else ""
        raise NonFinite(
            f"the {what} of {name!r} is not finite at step {step}{where}{skipped}; the last checkpoint stands; "
            "a lower learning rate, --base.mixed-precision no or --base.max-skipped-updates may help"
        )
