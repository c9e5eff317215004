"""accelerate's Accelerator, as a run wants it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from oneloop import configs
from oneloop.configs import BadInput
from oneloop.machine import compilation, internals

LAUNCHER = r"ACCELERATE_.+|FSDP_.+|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
"""Names of the variables by which a launcher tells accelerate and torch what to set up."""


def make_accelerator(base: configs.Base, out: Path) -> Accelerator:
    """accelerate, in the precision and with the trackers that the settings ask for.

    Raises:
        BadInput: this hardware, or what the environment asks for, cannot be had.
    """
    internals.forget_accelerator()  # a script may run twice, in two precisions
    precision = base.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_bf16() else "no"
    if precision == "fp16" and not torch.cuda.is_available():
        raise BadInput("--base.mixed-precision is 'fp16', which needs a GPU; expected auto, bf16 or no here")
    if base.compile:
        compilation.check(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, by the switches that every reader knows: after the newer ones the
        torch.backends.cudnn.allow_tf32 = True  # older cannot be read, which torch's own compiler does
    try:
        return Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes without a GPU do not meet
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                base.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=configs.trackers(base) or None,
            project_config=ProjectConfiguration(str(out), logging_dir=str(out / "logs")),
        )
    except (ValueError, LookupError, ImportError, OSError, RuntimeError) as error:
        asked = [f"{name}={value}" for name, value in sorted(os.environ.items()) if re.fullmatch(LAUNCHER, name)]
        if not asked:
            raise
        why = f"{type(error).__name__}: {error}"
        raise BadInput(f"the environment asks for what cannot be set up ({why}); of it count {', '.join(asked)}") from None


def prepare_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> Any:
    """An optimizer that the accelerator knows and saves. What steps is accelerate's wrapper where there is a loss scale, else
    the optimizer itself: the wrapper looks for a package twice, and at a signature, in each step."""
    prepared = accelerator.prepare(optimizer)
    return optimizer if accelerator.scaler is None else prepared


def computes_bf16() -> bool:
    """Whether this hardware multiplies bfloat16 faster than float32, by its own word."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return internals.cpu_computes_bf16()
