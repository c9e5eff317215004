"""What trains, compiled (`--base.compile`): how, what it costs at the start, and after how many steps that is repaid.

`module.compile()` leaves the names of the weights alone, so checkpoints and exports know nothing of it. Fused kernels sum in
another order: a run with it ends close to one without, not in the same bits (docs/performance.md has the distance). Samples,
validation and exports run plain: their shapes would each be compiled anew.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from oneloop.configs import BadInput
from oneloop.tasks import Models

SMALL = 100_000_000
"""Parameters below which a step on a GPU is mostly the launching of kernels, which CUDA graphs save."""


def check(device: torch.device) -> None:
    """Refuse what cannot be compiled, before anything slow.

    Raises:
        BadInput: a CPU's kernels need a C++ compiler, and there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if device.type == "cpu" and not any(map(shutil.which, names)):
        raise BadInput(f"--base.compile needs a C++ compiler on a CPU; found none of {', '.join(names)} (CXX names another)")


def options(models: Models, device: torch.device, accumulated: int) -> dict[str, Any]:
    """How to compile: with CUDA graphs where one small model trains and nothing of a pass has to outlive the next."""
    size = sum(p.numel() for m in models.values() for p in m.parameters())
    graphs = device.type == "cuda" and len(models) == 1 and size < SMALL and accumulated == 1
    return {"mode": "reduce-overhead"} if graphs else {}


def compile_models(models: Models, device: torch.device, accumulated: int) -> None:
    """Have these compiled when they are first called: their repeated blocks, once for all, where their class names them."""
    how = options(models, device, accumulated)
    for module in models.values():
        regions = getattr(module, "_repeated_blocks", None)
        module.compile_repeated_blocks(**how) if regions else module.compile(**how)


def price(accelerator: Accelerator, rehearse: Callable[[], None], accumulated: int) -> str:
    """Compile now, by passes that leave nothing behind, and say what it cost and when it is repaid."""

    def seconds() -> float:
        began = time.perf_counter()
        rehearse()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with torch.compiler.set_stance("force_eager"):
        plain = min(seconds() for _ in range(3))
    first = [seconds() for _ in range(3)]  # the first compiles; CUDA graphs are recorded in those after it
    quick = min(seconds() for _ in range(3))
    cost, gain = sum(first) - 3 * quick, (plain - quick) * accumulated
    repaid = f"repaid after {math.ceil(cost / gain):,} steps" if gain > 0 else "not repaid here; --base.no-compile is quicker"
    return f"compiled in {cost:.1f} s: a pass takes {quick:.3g} s rather than {plain:.3g} s, {repaid}"
