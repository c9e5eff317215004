"""Losses and gradients must be finite."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.machine.processes import gather
from oneloop.tasks import Loss


class NonFinite(Exception):
    """A loss, a gradient or a weight that is not finite. Exit code 3."""


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
            mine = [(bool(value.isfinite()), rows.tolist()) for value, rows in seen]
            batches = list(itertools.chain.from_iterable(gather(self.accelerator, mine)))
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

    def check_weights(self, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
        """Before anything is written or shown: weights and EMA must be finite, for a finite loss and gradient do not make them
        so (a learning rate may overflow). This waits for the device, and for what is on its way to an offloaded EMA."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        tensors = {f"the weights {k}": v for k, v in weights.items()} | {f"the EMA of {k}": v for k, v in ema.items()}
        fine = [x.detach().isfinite().all().to(self.accelerator.device) for x in tensors.values()]
        bad = [name for name, good in zip(tensors, torch.stack(fine).tolist() if fine else (), strict=True) if not good]
        if bad := next(filter(None, gather(self.accelerator, bad)), None):
            self.fail(
                f"{bad[0]} are not finite after step {self.state.step}" + f", nor are {len(bad) - 1} more" * (len(bad) > 1)
            )

    def refuse(self, step: int, name: str, what: str, where: str) -> None:
        skipped = f" after {self.most} skipped updates" if self.most else ""
        self.fail(f"the {what} of {name!r} is not finite at step {step}{where}{skipped}")

    def fail(self, what: str) -> None:
        raise NonFinite(
            f"{what}; checkpoints written before are good; a lower learning rate, --base.mixed-precision no or "
            "--base.max-skipped-updates may help"
        )
