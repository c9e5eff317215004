"""A trace of a few steps (`--base.profile-steps`), by torch's own profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from oneloop.configs import Base
from oneloop.tasks import Batch

BEFORE = 2
"""Steps that are taken before the first that is traced: the first ones are slower, and so is the profiler's own first."""


def profiled(batches: Generator[Batch], base: Base, folder: Path | None, say: Callable[[str], None]) -> Generator[Batch]:
    """The same batches. Once the first steps are taken, `profile_steps` of them are traced, from the asking for a step's first
    batch to that of the next, and written to `folder`: a trace for chrome://tracing or ui.perfetto.dev, and a table of the
    operations that took most. Without a folder, or with no steps to trace, nothing is."""
    if folder is None or not base.profile_steps:
        yield from batches
        return

    written = []

    def write(profiler: profile) -> None:
        count = min(base.profile_steps, profiler.step_num - BEFORE + 1)  # fewer where the run ends before
        written.append(count)
        order = "self_device_time_total" if torch.accelerator.is_available() else "self_cpu_time_total"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / "trace.json.gz"))
            (folder / "operations.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=50), "utf-8")
        except OSError as error:
            say(f"warning: the trace of {count} steps is lost: {error}")
        else:
            say(f"{count} steps are traced in {folder}")

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    when = schedule(wait=BEFORE - 1, warmup=1, active=base.profile_steps, repeat=1)
    traced = profile(activities=kinds, schedule=when, on_trace_ready=write, acc_events=True)
    try:
        with contextlib.closing(batches), traced as profiler:
            for number, batch in enumerate(batches):
                if number and number % base.gradient_accumulation_steps == 0:
                    profiler.step()
                yield batch
    finally:
        if not written:
            say(f"warning: no step is traced: --base.profile-steps begins after {BEFORE}, and this start took no more")
