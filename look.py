"""What can be said of a run before it is one: what every number became, and what it would take in time, memory and disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

import checkpoint
import configs
import data
from configs import BadInput
from processes import on_main
from report import clock
from tasks import Batch, Models, Task
from validate import Stratified

# ---------------------------------------------------------------------------------------------------------------------
# What every number became.


def introduce(accelerator: Accelerator, cfg: Any, found: str, models: Models, first: Batch, state: Any, total: int) -> str:
    """What every number became, in a few lines."""
    count = lambda wanted: sum(p.numel() for m in models.values() for p in m.parameters() if p.requires_grad is wanted)  # noqa: E731
    size, accumulated, processes = cfg.data.train_batch_size, cfg.base.gradient_accumulation_steps, accelerator.num_processes
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    update = size * processes * accumulated
    lasts = sum(held(models, state, accelerator.device).values())
    shapes = ", ".join(f"{k} {list(v.shape)} {str(v.dtype)[6:]}" if isinstance(v, Tensor) else k for k, v in first.items())
    return f"""data        {found}
first batch {shapes}
models      {", ".join(f"{k}: {describe(m)}" for k, m in models.items())}
            {count(True):,} trainable parameters, {count(False):,} frozen
device      {accelerator.device}{threads}, mixed precision {accelerator.mixed_precision}
step        {update} examples: {size} x {accumulated} accumulated x {processes} process{"es" * (processes > 1)}
length      {total:,} steps, {total * update:,} examples{f"; continuing after step {state.step:,}" if state.step else ""}
memory      {lasts / 2**30:.2f} GiB held from step to step; activations come on top
output      {cfg.base.output_dir}"""


def describe(module: torch.nn.Module) -> str:
    """A model in a line; two lives of a run must have the same."""
    config = dict(getattr(module, "config", {}) or {}) if hasattr(getattr(module, "config", None), "items") else {}
    own = {k: v for k, v in config.items() if not k.startswith("_")}
    shapes = [(n, list(p.shape), p.requires_grad) for n, p in module.named_parameters()]
    digest = hashlib.sha256(json.dumps([own, shapes], default=str, sort_keys=True).encode()).hexdigest()[:8]
    return f"{type(module).__name__} with {sum(p.numel() for p in module.parameters()):,} parameters ({digest})"


def held(models: Models, state: Any, device: torch.device) -> dict[str, int]:
    """Bytes on the device that last from step to step: weights, gradients, averages, and optimizer states, counted as AdamW's
    two numbers a weight, of one byte each in an 8-bit optimizer."""
    weights = sum(p.nbytes for m in models.values() for p in m.parameters() if p.device.type == device.type)
    each = {name: 2 if "8bit" in type(o).__name__ else 8 for name, o in state.optims.items()}
    trained = [(p, each[name]) for name, o in state.optims.items() for group in o.param_groups for p in group["params"]]
    return {
        "weights": weights,
        "gradients and optimizer": sum(p.nbytes + p.numel() * more for p, more in trained),
        "averages": sum(x.nbytes for x in state.ema.values()),
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

        def make_models(cfg: Any) -> Models:
            models = task.make_models(cfg)
            sizes = [(p.requires_grad, p.numel()) for m in models.values() for p in m.parameters()]
            self.counts = tuple(sum(n for trains, n in sizes if trains is wanted) for wanted in (True, False))
            return models

        def loss_fn(models: Models, batch: Batch, rng: Any, cfg: Any) -> Any:
            now = time.perf_counter()
            self.spans["validation" if isinstance(rng, Stratified) else "step"].append((now, now))
            dated = max(batch["step"] - warm, 0) * self.total // max(self.steps - warm, 1)
            return task.loss_fn(models, batch | {"step": dated}, rng, cfg)

        return replace(
            task,
            make_models=make_models,
            loss_fn=loss_fn,
            sample_fn=self.timed("samples", task.sample_fn),
            encodings={k: replace(e, fn=self.timed("encode", e.fn)) for k, e in task.encodings.items()},
        )


def shortened(cfg: Any, out: Path, steps: int, pictures: int) -> Any:
    """The settings of the short run: as many steps of as many pictures, at rates that rise to the peak, all of it in `out`."""
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
    return replace(cfg, base=base, data=replace(cfg.data, max_train_samples=pictures, example_cache=cache))


def estimate(run: Callable[[Task, Any], Any], task: Task, cfg: Any) -> None:
    """Print what `run(task, cfg)` would take, from a short real run; nothing is left behind.

    The short run has all that the long one has: a validation, a grid of samples and a checkpoint at its end, on the disk that
    the long run will write to. It reads and encodes a part of the pictures, and what that takes is multiplied.

    Raises:
        BadInput: as the run itself, or the temporary folder cannot be made.
    """
    base, source = cfg.base, data.open_source(cfg.data, task.needs)
    here = PartialState(cpu=not torch.accelerator.is_available())
    update = cfg.data.train_batch_size * here.num_processes * base.gradient_accumulation_steps
    total = base.max_train_steps or math.ceil(round(base.num_epochs * source.size / update, 6))
    steps, pictures = min(total, STEPS), min(source.size, max(STEPS * update, 256))
    place = Path(base.output_dir or f"runs/{configs.task_group(cfg)}").expanduser().absolute()
    place = next(parent for parent in place.parents if parent.exists())

    def temporary() -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix=".dry-run-", dir=place))
        except OSError as error:
            raise BadInput(f"--base.output-dir: {place} cannot be written: {error.strerror}") from None

    out = on_main(here, temporary)
    try:
        if here.is_main_process:
            print(f"a short run of {steps} of {total:,} steps, with samples and a checkpoint; it is removed", file=sys.stderr)
        short, watch = shortened(cfg, out, steps, pictures), Watch(total, steps)
        examples = watch.timed("read", data.Examples)(data.open_source(short.data, task.needs), short.data, base.seed)
        grows, examples = (source.size / pictures - 1) * examples.pictures.nbytes(short.data), None
        with contextlib.redirect_stderr(io.StringIO()):
            watch.timed("run", run)(watch.over(task), short)
        if here.is_main_process:
            room = cfg.data.memory_budget * 2**30  # for decoded pictures
            host = peak_host() + (grows / 2**30 if grows < room else 0)
            print(drawn_out(cfg, watch, out, source.size / pictures, host))
    finally:
        if here.is_main_process:
            shutil.rmtree(out, ignore_errors=True)


def drawn_out(cfg: Any, watch: Watch, out: Path, more: float, host: float) -> str:
    """What the short run in `out` says of the whole, which has `more` times its pictures; `host` GiB of memory at the peak."""
    base, spans, total = cfg.base, watch.spans, watch.total
    lines = [json.loads(line) for line in (out / "out" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "data_wait" in line]
    lines = lines[1:] or lines  # the first warmed up
    update = cfg.data.train_batch_size * base.gradient_accumulation_steps * PartialState().num_processes
    step = sum(update / line["pictures_per_second"] for line in lines) / len(lines)
    waiting = sum(line["data_wait"] for line in lines) / len(lines)

    ((began, ended),), ((_, last),), started = spans["run"], spans["samples"], spans["step"][0][0]
    showing = last - (spans["validation"] or spans["samples"])[0][0]
    times = lambda every: -(-total // every) if every else 1  # noqa: E731  and once at the end
    shows, saves = times(base.validation_steps), times(base.checkpointing_steps)
    parts = {
        "start": started - began + (watch.seconds("read") + watch.seconds("encode")) * (more - 1),
        f"{total:,} steps": total * step,
        f"{shows} times validation and samples": shows * showing,
        f"{saves} checkpoints": saves * (ended - last),
    }
    one, kept = checkpoint.size(out / "out" / f"checkpoint-{watch.steps}"), min(saves, base.checkpoints_total_limit or saves)
    pixels = sum(path.stat().st_size for path in out.glob("examples/*/pixels")) * more
    cache = checkpoint.size(out / "examples") * more - (pixels if pixels > cfg.data.memory_budget * 2**30 else 0)
    disk = kept * one + checkpoint.size(out / "out" / "export") + cache
    device = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU, " if torch.cuda.is_available() else ""
    return f"""parameters  {watch.counts[0]:,} trainable, {watch.counts[1]:,} frozen
memory      {device}{host:.2f} GiB of the machine, at the peak of each process
step        {step:.3f} s, {update / step:.1f} pictures/s, {waiting:.0%} of it waiting for data
time        {sum(parts.values()) / 3600:.2f} hours: {", ".join(f"{name} {clock(s)}" for name, s in parts.items())}
disk        {disk / 2**30:.2f} GiB of {shutil.disk_usage(out).free / 2**30:.2f} free: {kept} checkpoints of {one / 2**30:.3f}, \
what is made of the examples once {cache / 2**30:.3f}"""


# ---------------------------------------------------------------------------------------------------------------------
# When the memory does not suffice.


class OutOfMemory(Exception):
    """The memory of the device did not suffice. Exit code 5."""


class Memory(contextlib.AbstractContextManager):
    """Knows what a run holds, and turns a device's complaint that it is full into what took it and what would help."""

    def __init__(self, cfg: Any, device: torch.device):
        self.cfg, self.device = cfg, device
        self.models: Models = {}
        self.state: Any = None

    def holds(self, models: Models, state: Any) -> None:
        """What there is from now on."""
        self.models, self.state = models, state

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        full = "not enough memory|DefaultCPUAllocator|out of memory"  # torch names its error so for GPUs only
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(error, RuntimeError) and re.search(full, str(error))
        ):
            raise OutOfMemory(self.told(str(error))) from None

    def told(self, complaint: str) -> str:
        """The line: what took the memory, and the three changes that would save most of it."""
        parts = held(self.models, self.state, self.device) if self.state else {}
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
        if getattr(getattr(self.cfg, configs.task_group(self.cfg)), "use_8bit_adam", None) is False:
            yield f"--{configs.task_group(self.cfg)}.use-8bit-adam", 6 * sum(p.numel() for p in trained)
        if parts.get("averages"):
            yield f"--base.no-use-ema {another}", parts["averages"]
        yield f"--data.resolution {side // 2} {another}", activations * 0.75
