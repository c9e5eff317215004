"""The mathematics of a task with nothing around it: a bare PyTorch loop, which the project's is measured against.

    python benchmarks/bare.py ddpm --base.max-train-steps 20

The arguments are those of loop.py. It has the same model, loss, precision, optimizer, clipping, learning rates and EMA, and
nothing else: it trains on the same few batches, ready in memory, draws its noise from the global generator, and has no order
of the data, no logging and no checks.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from oneloop.inputs import sources
from oneloop.settings import command_line

if __name__ == "__main__":
    MODULE, CONFIG = command_line.parse(sys.argv[1:])

import torch
from torch import Tensor

from oneloop import data, loop
from oneloop.inputs import encodings
from oneloop.machine.accelerator import computes_bf16
from oneloop.machine.placement import place
from oneloop.tasks import Task

BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Noise:
    """Draws like `tasks.Rng`, from the device's global generator."""

    size: int
    device: str

    def __len__(self) -> int:
        return self.size

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """[B, *shape]"""
        return torch.randn(self.size, *shape, device=self.device)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """[B, *shape]"""
        return torch.rand(self.size, *shape, device=self.device)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        """[B, *shape]"""
        return torch.randint(high, (self.size, *shape), device=self.device)


def precision(cfg: Any) -> str:
    """What `auto` becomes here."""
    chosen = cfg.base.mixed_precision
    return ("bf16" if computes_bf16() else "no") if chosen == "auto" else chosen


def bare_loop(cfg: Any, task: Task, total: int, update: bool = True) -> Iterator[None]:
    """One optimizer step for each `next`; without `update` the model's forward and backward pass alone."""
    device, size, chosen = "cuda" if torch.cuda.is_available() else "cpu", cfg.data.train_batch_size, precision(cfg)
    models = task.make_models(cfg)
    place(models, SimpleNamespace(mixed_precision=chosen, device=torch.device(device)), False, task.float32)
    optims = task.make_optim(models, cfg)
    params = {k: [p for group in o.param_groups for p in group["params"]] for k, o in optims.items()}
    peaks = {k: [group["lr"] for group in o.param_groups] for k, o in optims.items()}
    weights = [p for own in params.values() for p in own]
    average = [p.detach().clone() for p in weights]
    examples = data.Examples(sources.open_for(task, cfg), cfg.data, 0)
    numbers = (range(n * size, (n + 1) * size) for n in range(BATCHES))
    batches = [encodings.encode(task.encodings, models, data.to_device(examples[n], device), cfg) for n in numbers]
    rate, noise = loop.schedule(cfg.base, total), Noise(size, device)
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), total)):
        losses = task.loss_fn(models, batch | {"step": step}, noise, cfg)
        while True:
            with torch.autocast(device, torch.bfloat16, enabled=chosen == "bf16"):
                loss = next(losses, None)
            if loss is None:
                break
            loss.value.backward()
            if update:
                torch.nn.utils.clip_grad_norm_(params[loss.name], cfg.base.max_grad_norm)
                for group, peak in zip(optims[loss.name].param_groups, peaks[loss.name], strict=True):
                    group["lr"] = peak * rate(step)
                optims[loss.name].step()
            optims[loss.name].zero_grad()
        if update and cfg.base.use_ema:
            decay = min(cfg.base.ema_decay, 1 - (1 + step) ** -cfg.base.ema_power)
            torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - decay)
        yield


def main() -> None:
    if torch.cuda.is_available():  # as the loop has it
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.fp32_precision = "tf32"
    total = CONFIG.base.max_train_steps or 20
    for step, _ in enumerate(bare_loop(CONFIG, MODULE.task, total), 1):
        if step in (1, total):
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            print(f"{step}/{total}", file=sys.stderr, flush=True)
    if torch.cuda.is_available():
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", file=sys.stderr)


if __name__ == "__main__":
    main()
