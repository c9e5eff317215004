"""What can be said of a run before it is one: what every number became, and what it would take in time, memory and disk."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from oneloop import checkpoint, configs, data
from oneloop.configs import BadInput
from oneloop.inputs import sources, streaming
from oneloop.machine.memory import peak_host
from oneloop.machine.processes import on_main
from oneloop.tasks import Batch, Models, Task
from oneloop.training.signals import Signals
from oneloop.training.validation import Stratified
from oneloop.views import fits
from oneloop.views.console import clock

# ---------------------------------------------------------------------------------------------------------------------
# The estimate: a short real run in a folder that is removed, and its measurements drawn out to the whole length.

STEPS = 40
"""Optimizer steps of the short run; the first quarter warms up."""


@dataclass
class Watch:
    """When a run called its task's functions."""

    total: int
    """Optimizer steps of the whole run."""
    steps: int
    """Of the short one."""
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """function -> (begin, end) of each call, in seconds."""
    counts: tuple[int, int] = (0, 0)
    """Parameters that train, and frozen ones."""
    held: fits.Held | None = None
    """What the first step kept."""

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, with its calls noted."""

        def call(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.spans[name].append((began, time.perf_counter()))
            return result

        return call

    def seconds(self, name: str) -> float:
        """All calls of a function together."""
        return sum(end - began for began, end in self.spans[name])

    def over(self, task: Task) -> Task:
        """The task, watched. Its measured steps are dated evenly over the whole run, so that a loss that sets in late has its
        share of them."""
        warm = self.steps // 4

        def make_models(*given: Any) -> Models:
            models = task.make_models(*given)
            sizes = [(p.requires_grad, p.numel()) for m in models.values() for p in m.parameters()]
            self.counts = tuple(sum(n for trains, n in sizes if trains is wanted) for wanted in (True, False))
            return models

        def loss_fn(models: Models, batch: Batch, rng: Any, cfg: Any) -> Any:
            now = time.perf_counter()
            self.spans["validation" if isinstance(rng, Stratified) else "step"].append((now, now))
            dated = max(batch["step"] - warm, 0) * self.total // max(self.steps - warm, 1)
            losses = task.loss_fn(models, batch | {"step": dated}, rng, cfg)
            if self.held is None and not isinstance(rng, Stratified):
                self.held, first = fits.watch(models, lambda: next(losses))
                yield first
            yield from losses

        return replace(
            task,
            make_models=make_models,
            loss_fn=loss_fn,
            sample_fn=self.timed("samples", task.sample_fn),
            encodings={k: replace(e, fn=self.timed("encode", e.fn)) for k, e in task.encodings.items()},
        )


def shortened(cfg: Any, out: Path, steps: int, rows: int) -> Any:
    """The settings of the short run: as many steps of as many images, at rates that rise to the peak, all of it in `out`."""
    base = replace(
        cfg.base,
        output_dir=str(out / "out"),
        dry_run=False,
        max_train_steps=steps,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=steps - 1,
        logging_steps=max(steps // 4, 1),
        validation_steps=0,
        checkpointing_steps=steps,
        logger=(),
        resume_from_checkpoint="latest",
        push_to_hub=False,
    )
    cache = cfg.data.example_cache if cfg.data.example_cache == "no" else str(out / "examples")
    part = None if cfg.data.stream else rows
    return replace(cfg, base=base, data=replace(cfg.data, max_train_samples=part, example_cache=cache))


def estimate(run: Callable[[Task, Any], Any], task: Task, cfg: Any) -> None:
    """Print what `run(task, cfg)` would take, from a short real run; nothing is left behind.

    The short run has all that the long one has: a validation, a grid of samples and a checkpoint at its end, on the disk that
    the long run will write to. It reads and encodes a part of the images, and what that takes is multiplied.

    Raises:
        BadInput: as the run itself, or the temporary folder cannot be made.
    """
    task.multiple(cfg), task.encoders(cfg)  # a checkpoint that cannot be read is refused first
    base, source = cfg.base, sources.open_for(task, cfg)
    here = PartialState(cpu=not torch.accelerator.is_available())
    update = cfg.data.train_batch_size * here.num_processes * base.gradient_accumulation_steps
    total = base.max_train_steps or math.ceil(round(base.num_epochs * source.pass_length() / update, 6))
    steps, rows = min(total, STEPS), min(source.size, max(STEPS * update, 256))
    more = source.size / rows
    if source.streams:  # of which captions may be encoded, in groups
        unit = streaming.GROUP * cfg.data.stream_lanes
        grown, now = (min(-(-n * update // unit) * unit, source.size) for n in (total, steps))
        more = grown / now
    folder = Path(base.output_dir or f"runs/{configs.task_group(cfg)}").expanduser().absolute()
    folder = next(parent for parent in folder.parents if parent.exists())

    def temporary() -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix=".dry-run-", dir=folder))
        except OSError as error:
            raise BadInput(f"--base.output-dir: {folder} cannot be written: {error.strerror}") from None

    with Signals(here), contextlib.ExitStack() as stack:  # from here on a signal leaves through what removes the folder
        out = on_main(here, temporary)
        try:
            stack.enter_context(checkpoint.lock(out, here))  # by which a later start knows whether it is abandoned
            if here.is_main_process:
                said = f"a short run of {steps} of {counted(total, 'step')}, with samples and a checkpoint; it is removed"
                print(said, file=sys.stderr)
            short, watch = shortened(cfg, out, steps, rows), Watch(total, steps)
            grows = 0
            if not source.streams:  # else nothing is read at the start
                examples = watch.timed("read", data.Examples)(sources.open_for(task, short), short.data, base.seed)
                grows, examples = (more - 1) * examples.images.nbytes(short.data), None
            with contextlib.redirect_stderr(io.StringIO()):
                watch.timed("run", run)(watch.over(task), short)
            if here.is_main_process:
                room = cfg.data.memory_budget * 2**30  # for decoded images
                host = peak_host() + (grows / 2**30 if grows < room else 0)
                print(drawn_out(task, cfg, watch, out, more, host))
        finally:
            stack.close()
            if here.is_main_process:
                shutil.rmtree(out, ignore_errors=True)


def counted(number: int, what: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def drawn_out(task: Task, cfg: Any, watch: Watch, out: Path, more: float, host: float) -> str:
    """What the short run in `out` says of the whole, which has `more` times its images; `host` GiB of memory at the peak."""
    base, spans, total = cfg.base, watch.spans, watch.total
    lines = [json.loads(line) for line in (out / "out" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "data_wait" in line]
    lines = lines[1:] or lines  # the first warmed up
    update = cfg.data.train_batch_size * base.gradient_accumulation_steps * PartialState().num_processes
    speeds = [value for line in lines for name, value in line.items() if name.endswith("_per_second")]
    step = sum(update / speed for speed in speeds) / len(speeds)
    waiting = sum(line["data_wait"] for line in lines) / len(lines)

    (began, ended), (_, last), started = spans["run"][0], spans["samples"][-1], spans["step"][0][0]  # drawn in several parts
    showing = last - (spans["validation"] or spans["samples"])[0][0]
    times = lambda every: -(-total // every) if every else 1  # noqa: E731  and once at the end
    shows, saves = times(base.validation_steps), times(base.checkpointing_steps)
    parts = {
        "start": started - began + (watch.seconds("read") + watch.seconds("encode")) * (more - 1),
        counted(total, "step"): total * step,
        f"{counted(shows, 'validation')} with samples": shows * showing,
        counted(saves, "checkpoint"): saves * (ended - last),
    }
    one, retained = (
        checkpoint.size(out / "out" / f"checkpoint-{watch.steps}"),
        min(saves, base.checkpoints_total_limit or saves),
    )
    pixels = sum(path.stat().st_size for path in out.glob("examples/*/pixels")) * more
    cache = checkpoint.size(out / "examples") * more - (pixels if pixels > cfg.data.memory_budget * 2**30 else 0)
    disk = retained * one + checkpoint.size(out / "out" / "export") + cache
    device = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU, " if torch.cuda.is_available() else ""
    return f"""parameters  {watch.counts[0]:,} trainable, {watch.counts[1]:,} frozen
memory      {device}{host:.2f} GiB of the machine, at the peak of each process
step        {step:.3f} s, {update / step:.1f} images/s, {waiting:.0%} of it waiting for data
time        {sum(parts.values()) / 3600:.2f} hours: {", ".join(f"{name} {clock(s)}" for name, s in parts.items())}
{fits.line(watch.held, task, cfg)}
disk        {disk / 2**30:.2f} GiB of {shutil.disk_usage(out).free / 2**30:.2f} free: \
{counted(retained, "checkpoint")} of {one / 2**30:.3f}, what is made of the examples once {cache / 2**30:.3f}"""
