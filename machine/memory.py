"""Bytes: what lasts from step to step, the peak, and what to do when the memory does not suffice."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch

from oneloop import configs
from oneloop.tasks import Models
from oneloop.training.optimizers import remembered, state_bytes


def stored(p: torch.Tensor) -> int:
    """Bytes of a tensor and of the scales of a quantized one, which torchao has inside it and bitsandbytes beside it."""
    if hasattr(p, "__tensor_flatten__"):
        return sum(stored(getattr(p, name)) for name in p.__tensor_flatten__()[0])
    beside, state = 0, getattr(p, "quant_state", None)
    while state is not None:
        beside, state = beside + state.absmax.nbytes, state.state2
    return p.nbytes + beside


def bytes_of(models: Models, state: Any, device: torch.device, fused: bool) -> dict[str, int]:
    """Bytes on the device that last from step to step: weights, gradients, EMA and optimizer states. `fused`: of gradients the
    largest alone."""
    once = {id(p): p for m in models.values() for p in m.parameters()}  # a model that follows another shares what is frozen
    weights = sum(stored(p) for p in once.values() if p.device.type == device.type)
    sizes = [p.nbytes for o in state.optims.values() for group in o.param_groups for p in group["params"]]
    gradients = max(sizes, default=0) if fused else sum(sizes)
    return {
        "weights": weights,
        "gradients and optimizer": gradients + sum(map(remembered, state.optims.values())),
        "averages": sum(x.nbytes for x in (state.ema | state.kept).values() if x.device.type == device.type),
    }


def peak_host() -> float:
    """The most memory of the machine that this process had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def peak_memory(device: torch.device) -> str:
    """The most memory this process had so far: of the GPU where there is one, else of the machine."""
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    return f"peak memory {peak_host():.2f} GiB"


# ---------------------------------------------------------------------------------------------------------------------
# When the memory does not suffice.


class OutOfMemory(Exception):
    """The memory of the device did not suffice. Exit code 5."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a device's or the machine's complaint that it is full; torch has a class for it for GPUs alone."""
    full = "not enough memory|DefaultCPUAllocator|out of memory"
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and re.search(full, str(error)) is not None)


class Memory(contextlib.AbstractContextManager):
    """Knows what a run holds, and turns a device's complaint that it is full into what took it and what would help."""

    def __init__(self, cfg: Any, device: torch.device):
        self.cfg, self.device = cfg, device
        self.models: Models = {}
        self.state: Any = None

    def watch(self, models: Models, state: Any) -> None:
        """What there is from now on."""
        self.models, self.state = models, state

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and is_out_of_memory(error):
            raise OutOfMemory(self.explain(str(error))) from None

    def explain(self, complaint: str) -> str:
        """The line: what took the memory, and the three changes that would save most of it."""
        parts = bytes_of(self.models, self.state, self.device, self.cfg.base.fused_backward_pass) if self.state else {}
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else peak_host() * 2**30
        asked = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", complaint)
        asked = float(asked[1]) * {"b": 1, "K": 2**10, "M": 2**20, "G": 2**30}[asked[2][0]] if asked else 0.0
        rest = max(peak - sum(parts.values()), 0)
        took = [f"{name} {n / 2**30:.2f}" for name, n in (parts | {"activations and the rest": rest}).items()]
        where = f"{self.device}, after {self.state.step} steps" if self.state else f"{self.device}, before the first step"
        ways = sorted(self.ways(parts, rest + asked), key=lambda way: -way[1])[:3]
        helps = "; ".join(f"{flags} saves about {saved / 2**30:.2f}" for flags, saved in ways)
        return (
            f"out of memory on {where}: in GiB, {', '.join(took)}, and {asked / 2**30:.2f} more were asked for; "
            f"what would help most: {helps}; --base.dry-run measures it"
        )

    def ways(self, parts: dict[str, int], activations: float) -> Iterator[tuple[str, float]]:
        """(flags, the bytes that they save)."""
        base, size, side = self.cfg.base, self.cfg.data.train_batch_size, self.cfg.data.resolution
        trained = [p for m in self.models.values() for p in m.parameters() if p.requires_grad]
        frozen = [p for m in self.models.values() for p in m.parameters() if not p.requires_grad]
        another = "(another run, in another --base.output-dir)"
        if size > 1:
            accumulated = f"--base.gradient-accumulation-steps {base.gradient_accumulation_steps * 2}"
            yield f"--data.train-batch-size {size // 2} {accumulated}", activations * (1 - size // 2 / size)
        recomputes = any(hasattr(m, "enable_gradient_checkpointing") for m in self.models.values())
        if recomputes and not base.gradient_checkpointing:
            yield "--base.gradient-checkpointing", activations * 0.75  # of a UNet's: all but each block's input
        if base.mixed_precision == "no":
            yield "--base.mixed-precision bf16", (activations + sum(p.nbytes for p in frozen)) / 2
        group = configs.task_group(self.cfg)
        if getattr(getattr(self.cfg, group), "optimizer", None) == "adamw":
            less = lambda kind: sum(8 * p.numel() - state_bytes(kind, tuple(p.shape)) for p in trained)  # noqa: E731
            yield f"--{group.replace('_', '-')}.optimizer adamw8bit {another}", less("adamw8bit")
        if not base.fused_backward_pass and base.gradient_accumulation_steps == 1:
            yield "--base.fused-backward-pass --base.max-grad-norm 0", sum(p.nbytes for p in trained)
        if parts.get("averages") and self.device.type != "cpu":
            yield "--base.offload-ema", parts["averages"]
        elif parts.get("averages"):
            yield f"--base.no-use-ema {another}", parts["averages"]
        yield f"--data.resolution {side // 2} {another}", activations * 0.75
