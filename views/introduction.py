"""What every number of a run became, said once before its first step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.inputs.sources import Source
from oneloop.machine.memory import bytes_of
from oneloop.machine.placement import describe
from oneloop.tasks import Batch, Models


def introduce(accelerator: Accelerator, cfg: Any, source: Source, models: Models, first: Batch, state: Any, total: int) -> str:
    """What every number became, in a few lines; the first batch as the loss sees it."""
    count = lambda wanted: sum(p.numel() for m in models.values() for p in m.parameters() if p.requires_grad is wanted)  # noqa: E731
    size, accumulated, processes = cfg.data.train_batch_size, cfg.base.gradient_accumulation_steps, accelerator.num_processes
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    update = size * processes * accumulated
    lasts = sum(bytes_of(models, state, accelerator.device, cfg.base.fused_backward_pass).values())
    ranges, columns = {"image": "float32 in [-1, 1]", "mask": "float32 in [0, 1]"}, source.columns  # as the loss sees them
    kind = lambda k, v: ranges.get(columns[k].kind if k in columns else "", str(v.dtype)[6:])  # noqa: E731
    shapes = ", ".join(f"{k} {list(v.shape)} {kind(k, v)}" if isinstance(v, Tensor) else k for k, v in first.items())
    return f"""data        {source.summary}
first batch {shapes}
models      {", ".join(f"{k}: {describe(m)}" for k, m in models.items())}
            {count(True):,} trainable parameters, {count(False):,} frozen
device      {accelerator.device}{threads}, mixed precision {accelerator.mixed_precision}
step        {update} examples: {size} x {accumulated} accumulated x {processes} process{"es" * (processes > 1)}
length      {total:,} steps, {total * update:,} examples{f"; resuming after step {state.step:,}" if state.step else ""}
memory      {lasts / 2**30:.2f} GiB lasts from step to step; activations come on top
output      {cfg.base.output_dir}"""
