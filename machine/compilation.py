"""What trains, compiled (`--base.compile`): how, what it costs at the start, and after how many steps that is repaid.

`module.compile()` leaves the names of the weights alone, so checkpoints and exports know nothing of it. Fused kernels sum in
another order: a run with it ends close to one without, not in the same bits (docs/performance.md has the distance). Samples,
validation and exports run plain: their shapes would each be compiled anew.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from oneloop.configs import BadInput
from oneloop.tasks import Models

SMALL = 100_000_000
"""Parameters that train below which a step on a GPU may be mostly the launching of kernels, which CUDA graphs save. A frozen
base is not counted: adapters on a large one launch more for each number that they compute, not less."""
COMPILERS = {"cpu": ("CXX", "a C++ compiler", ("g++", "clang++", "c++")), "cuda": ("CC", "a C compiler", ("gcc", "clang"))}
"""Kind of device -> the variable that names the compiler, what it is, and where it is looked for without the variable."""


def check(device: torch.device) -> None:
    """Refuse what cannot be compiled, before anything slow.

    Raises:
        BadInput: a compiler, Python's headers or, on a GPU, Triton is missing.
    """
    if device.type not in COMPILERS:
        return
    variable, what, usual = COMPILERS[device.type]
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        raise BadInput(f"--base.compile needs {what}; found none of {', '.join(names)} ({variable} names another)")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise BadInput(f"--base.compile needs Python's headers; found no {header} (the system's package python3-dev has it)")
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise BadInput("--base.compile needs Triton on a GPU; found no package triton")


def options(models: Models, device: torch.device, accumulated: int) -> dict[str, Any]:
    """How to compile: with CUDA graphs where one model trains, in few parameters, nothing of a pass has to outlive the next,
    and none of it is computed again."""
    size = sum(p.numel() for m in models.values() for p in m.parameters() if p.requires_grad)
    again = any(getattr(part, "gradient_checkpointing", False) for m in models.values() for part in m.modules())
    graphs = device.type == "cuda" and len(models) == 1 and size < SMALL and accumulated == 1 and not again
    return {"mode": "reduce-overhead"} if graphs else {}


def compile_models(models: Models, device: torch.device, accumulated: int) -> None:
    """Have these compiled when they are first called: their repeated blocks, once for all, where their class names them."""
    how = options(models, device, accumulated)
    for module in models.values():
        blocks = getattr(module, "_repeated_blocks", None) or ()
        regions = any(type(part).__name__ in blocks for part in module.modules())
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
