"""The cases that hold the promise 'a run can be killed at any instant and loses nothing'.

Each row is a generator of (name, case); a case is called with an empty folder, raises AssertionError where the promise is
broken, and may return a word to be counted. test_robust.py runs a sample of every row, campaign.py all of them.

Cases work on the program as it is: what they need inside of it (a slow loss, a broken gradient, a power cut in the middle of
a save) they patch into the fork that runs it. 'Equal' is the same sha256 of weights, averages, optimizer state and rate.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import warm
from warm import ROOT, UNET, Process, Result, checkpoints, cli, digest, distance, metrics, start, start_many, tiny

from oneloop import checkpoint
from oneloop.machine import files
from oneloop.tasks import Rng, ddpm
from oneloop.training.guard import Guard, NonFinite
from oneloop.views import publish

Case = Callable[[Path], str | None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    cases: Callable[[], Iterable[tuple[str, Case]]]
    sample: int
    """How many of the cases the CI share runs."""
    check: Callable[[collections.Counter, int], None]
    """What must hold of the words that the cases returned, given how many ran."""


ROWS: dict[str, Row] = {}


def row(name: str, sample: int, check: Callable[[collections.Counter, int], None] = lambda words, count: None) -> Callable:
    """Make a generator of cases a row of the table."""

    def register(cases: Callable[[], Iterable[tuple[str, Case]]]) -> Callable:
        ROWS[name] = Row(name, cases, sample, check)
        return cases

    return register


def chosen(found: Row, count: int | None) -> list[tuple[str, Case]]:
    """`count` of a row's cases, spread evenly over all of them; None: all."""
    cases = list(found.cases())
    if count is None or count >= len(cases):
        return cases
    return [cases[i * len(cases) // count] for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Tools: the undisturbed run to compare with, waiting for events, looking at what a run left.

STORE = Path(tempfile.mkdtemp(prefix="cases-"))
OWNER = os.getpid()
atexit.register(lambda: os.getpid() == OWNER and shutil.rmtree(STORE, ignore_errors=True))


def reference(count: int = 1, make: Callable[..., list[str]] = tiny, **settings: Any) -> Path:
    """The output of a run that nobody disturbed, made once for all cases that ask; `seconds` in it is how long it took."""
    key = hashlib.sha256(repr((count, make.__name__, sorted(settings.items()))).encode()).hexdigest()[:12]
    place = STORE / key
    place.mkdir(exist_ok=True)
    with open(STORE / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # cases may run in several processes
        if not (place / "seconds").exists():
            started = time.monotonic()
            ends(launch(place, count, *make(place, **settings)), 0)
            (place / "seconds").write_text(str(time.monotonic() - started))
    return place / "out"


def launch(folder: Path, count: int, *argv: str, **kwargs: Any) -> list[Process]:
    """A run on one or several processes."""
    return [start(folder, *argv, **kwargs)] if count == 1 else start_many(folder, count, *argv, **kwargs)


def ends(processes: list[Process], code: int, timeout: float = 180) -> list[Result]:
    """Wait for the processes of a run; all must end with this code and none with a traceback."""
    results = [process.wait(timeout) for process in processes]
    for result in results:
        assert result.code == code, f"exit code {result.code}, expected {code}:\n{result.err[-3000:]}"
        assert "Traceback" not in result.err, result.err[-3000:]
    return results


def one_line(result: Result, code: int, *words: str) -> None:
    """A run ended with this code and one line of error that has these words."""
    assert result.code == code, f"exit code {result.code}, expected {code}:\n{result.err[-3000:]}"
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.err.rstrip().endswith(errors[0]), result.err[-3000:]
    for word in words:
        assert word in errors[0], f"{word!r} is not in: {errors[0]}"


def alive(process: Process) -> bool:
    """Whether it still runs. Its result can still be waited for."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def until(condition: Callable[[], Any], process: Process | None = None, timeout: float = 120) -> bool:
    """Wait for an event; False where the process ended before it."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process is not None and not alive(process):
            return bool(condition())
        assert time.monotonic() < deadline, "the event did not come"
        time.sleep(0.002)
    return True


def kill(process: Process) -> Result:
    """kill -9."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    return process.wait()


def valid(out: Path) -> list[int]:
    """The steps of the checkpoints that verify, oldest first; none may be damaged."""
    return [checkpoint.verify(out / f"checkpoint-{step}")["step"] for step in checkpoint.steps(out)]


def litter(out: Path) -> list[str]:
    """Hidden files, staged or half removed, anywhere in an output folder."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*"))


def equal(out: Path, whole: Path) -> None:
    """A run that was disturbed ended as the one that was not, and left nothing behind."""
    assert digest(out) == digest(whole), "the end is not Equal"
    last, weights = out / f"checkpoint-{checkpoints(out)[-1]}", "unet/diffusion_pytorch_model.safetensors"
    assert (out / "export" / weights).read_bytes() == (last / weights).read_bytes(), "the export is not of the last update"
    assert not litter(out), litter(out)
    steps = [line["step"] for line in metrics(out)]
    assert steps == [line["step"] for line in metrics(whole)], f"metrics.jsonl has {steps}"


def task() -> Any:
    """The task ddpm as it is now."""
    return ddpm.task


def patched_task(**functions: Callable) -> None:
    """Replace functions of the task ddpm in this process."""
    ddpm.task = dataclasses.replace(task(), **functions)


def slow(seconds: float) -> Callable[[], None]:
    """Patch: every loss takes this long, so that a run is certainly still running."""

    def patch() -> None:
        inner = task().loss_fn

        def loss_fn(*args: Any) -> Iterator:
            time.sleep(seconds)
            yield from inner(*args)

        patched_task(loss_fn=loss_fn)

    return patch


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def spy(file: Path) -> Callable[[], None]:
    """Patch: one line in `file` for each example that a loss saw: its number, row, noise, timestep and pixels."""

    def patch() -> None:
        inner = task().loss_fn

        class Seen(Rng):
            def normal(self, purpose: str, *shape: int) -> torch.Tensor:
                drawn["noise"] = super().normal(purpose, *shape)
                return drawn["noise"]

            def integers(self, *args: Any) -> torch.Tensor:
                drawn["t"] = super().integers(*args)
                return drawn["t"]

        drawn: dict[str, torch.Tensor] = {}

        def loss_fn(models: Any, batch: Any, rng: Rng, cfg: Any) -> Iterator:
            for loss in inner(models, batch, Seen(rng.keys, rng.device), cfg):
                columns = (batch["n"], batch["index"], drawn["noise"], drawn["t"], batch["pixel_values"])
                lines = [[int(n), int(i), sha(noise), int(t), sha(x)] for n, i, noise, t, x in zip(*columns, strict=True)]
                with open(file, "a") as opened:  # one write for a batch: processes may share the file
                    opened.write("".join(json.dumps(line) + "\n" for line in lines))
                yield loss

        patched_task(loss_fn=loss_fn)

    return patch


def seen(file: Path) -> list[list]:
    """What `spy` wrote, in the order of the examples' numbers."""
    return sorted(json.loads(line) for line in file.read_text().splitlines())


# ---------------------------------------------------------------------------------------------------------------------
# Killed at random, and at every point.


def saving(folder: Path, out: str = "out", limit: int | None = 2, steps: int = 12, **more: Any) -> list[str]:
    """A run that saves after every update, with accumulation, dropout and averages."""
    settings = {
        "base__checkpointing_steps": 1,
        "base__checkpoints_total_limit": limit,
        "base__logging_steps": 1,
        "base__gradient_accumulation_steps": 2,
        "data__train_batch_size": 2,
    }
    return tiny(folder, out, steps, **(settings | more))


def enough_inside(words: collections.Counter, count: int) -> None:
    """A fifth of the kills must have hit a save or a prune, or the row says little."""
    kills = words["inside a save"] + words["elsewhere"]
    assert words["inside a save"] >= kills / 5, dict(words)


@row("kill at random", sample=25, check=enough_inside)
def kill_at_random() -> Iterator[tuple[str, Case]]:
    for seed in range(200):
        yield f"kill {seed}", functools.partial(killed_at_random, seed)


def killed_at_random(seed: int, folder: Path) -> str:
    """kill -9 at a random moment; the same command continues to the same end."""
    rng, whole = random.Random(seed), reference(make=saving, limit=None)
    flags, out = saving(folder, limit=(1, 2, None)[seed % 3]), folder / "out"
    process = start(folder, *flags)
    # A random moment after a random save, so that the moments are spread over the run however busy the machine is.
    first = rng.randrange(12)
    until(lambda: not first or any(step >= first for step in checkpoint.steps(out)), process)
    time.sleep(rng.uniform(0, 0.5 if first else 1.5))
    ended = kill(process).code != -signal.SIGKILL
    inside = bool(list(out.glob(".oneloop/checkpoint-*")))
    stood = valid(out)
    assert first == 0 or (stood and stood[-1] >= first), f"{stood} after step {first} was saved"
    [result] = ends([start(folder, *flags)], 0)
    assert "damaged" not in result.err, result.err
    assert ended or not stood or f"resuming after step {stood[-1]}" in result.err or stood[-1] == 12, result.err
    equal(out, whole)
    return "ended before" if ended else "inside a save" if inside else "elsewhere"


def power_cut(out: Path, point: int, record: Path, power: bool = True) -> Callable[[], None]:
    """Patch: the power fails at event number `point` after the first save began; without `power`, the process is killed there.

    An event is an open for writing, a flush, a rename, a new or a removed file or folder. At the cut, the worst that a file
    system may do is done: what was not flushed is cut to half, a rename whose folder was not flushed has not happened.
    The events are written to `record`.
    """

    def patch() -> None:
        state = {"began": False, "count": 0, "over": False}
        identity = lambda path: (lambda s: (s.st_dev, s.st_ino))(os.stat(path))  # noqa: E731
        flushed = {identity(path) for path in out.rglob("*") if path.is_file()}
        renames: list[tuple[str, str]] = []

        def cut() -> None:
            state["over"] = True
            for source, target in renames if power else ():
                if re.search(r"/\.oneloop/checkpoint-\d+$", source):
                    os.rename(target, source)
            for path in (*out.glob("checkpoint-*/**/*"), *out.glob(".oneloop/checkpoint-*/**/*")) if power else ():
                if path.is_file() and identity(path) not in flushed:
                    os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        def event(kind: str, path: str) -> None:
            state["began"] |= "/.oneloop/checkpoint-" in path
            if not state["began"] or state["over"] or not path.startswith(str(out)) or path.endswith("metrics.jsonl"):
                return
            if state["count"] == point:
                cut()
            state["count"] += 1
            fd = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, f"{kind} {os.path.relpath(path, out)}\n".encode())
            os.close(fd)

        def place(path: Any, fd: Any = -1) -> str:
            path = os.fsdecode(path)
            return os.path.abspath(path if fd in (-1, None) else os.path.join(os.readlink(f"/proc/self/fd/{fd}"), path))

        def audit(name: str, args: tuple) -> None:
            if name == "open" and not isinstance(args[0], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                event("open", place(args[0]))
            elif name == "os.mkdir":
                event("mkdir", place(args[0], args[2]))
            elif name in ("os.remove", "os.rmdir"):
                path = place(*args[:2])
                event(name[3:], path)
                with contextlib.suppress(OSError):
                    flushed.discard(identity(path))  # its number may be given to a new file
            elif name == "os.rename":
                source, target = place(args[0], args[2]), place(args[1], args[3])
                event("rename", source)
                renames.append((source, target))

        def fsync(fd: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            event("flush", path)
            really(fd)
            flushed.add(identity(path))
            if path == str(out):
                renames.clear()

        really, os.fsync = os.fsync, fsync
        sys.addaudithook(audit)

    return patch


def before(folder: Path, kept: int | None, steps: int) -> list[str]:
    """A run that stands before its last save with `kept` checkpoints; 0: before its first. Returns its command."""
    whole, out = reference(make=saving, limit=None, steps=steps), folder / "out"
    out.mkdir()
    for step in range(1, steps)[-kept if kept else 0 :] if kept != 0 else ():
        shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
        shutil.copy(whole / "metrics.jsonl", out)
    if kept is None:  # a run that is made longer: its shorter self was published
        shorter = reference(make=saving, limit=None, steps=steps - 1)
        shutil.copytree(shorter / "export", out / "export")
        shutil.copy(shorter / "export.json", out)
    return saving(folder, limit=kept or None, steps=steps)


@row("kill at every point", sample=11)
def kill_at_every_point() -> Iterator[tuple[str, Case]]:
    for kept, steps in ((0, 1), (1, 3), (2, 4), (None, 4)):
        folder = Path(tempfile.mkdtemp(dir=STORE))
        record = folder / "events"
        record.touch()
        ends([start(folder, *before(folder, kept, steps), patch=power_cut(folder / "out", -1, record))], 0)
        for point, event in enumerate(record.read_text().splitlines()):
            for power in (True, False):
                name = f"{'all' if kept is None else kept} kept, {point}: {event}, {'power cut' if power else 'killed'}"
                yield name, functools.partial(killed_at_point, kept, steps, point, power)


def killed_at_point(kept: int | None, steps: int, point: int, power: bool, folder: Path) -> str:
    """The power fails, or the process alone, at one point of a save, a prune or the publishing."""
    flags, out, record = before(folder, kept, steps), folder / "out", folder / "events"
    record.touch()
    process = start(folder, *flags, patch=power_cut(out, point, record, power))
    result = process.wait()
    assert result.code == -signal.SIGKILL, f"{result.code}: {result.err}"
    stood = valid(out)
    assert kept == 0 or (stood and stood[-1] >= steps - 1), f"valid after the cut: {stood}"
    [result] = ends([start(folder, *flags)], 0)
    assert "damaged" not in result.err, result.err
    equal(out, reference(make=saving, limit=None, steps=steps))
    return "new one stands" if stood and stood[-1] == steps else "older one stands" if stood else "before the first"


# ---------------------------------------------------------------------------------------------------------------------
# Resumed anywhere, on any layout.


def accumulating(folder: Path, out: str = "out", steps: int = 18, **more: Any) -> list[str]:
    """Three passes over 24 images in 18 updates of 2 x 2, with dropout and averages."""
    settings = {
        "base__gradient_accumulation_steps": 2,
        "base__logging_steps": 1,
        "base__checkpoints_total_limit": None,
        "data__train_batch_size": 2,
    }
    return tiny(folder, out, steps, **(settings | more))


def each_once(lines: list[list]) -> None:
    """Every example once, in order, and every image once an epoch of 24."""
    numbers = [line[0] for line in lines]
    assert numbers == list(range(len(lines))), numbers
    for first in range(0, len(lines), 24):
        rows = [line[1] for line in lines[first : first + 24]]
        assert len(set(rows)) == len(rows), rows


@row("resume at any update", sample=3)
def resume_at_any_update() -> Iterator[tuple[str, Case]]:
    for stop in range(1, 18):
        yield f"after update {stop}", functools.partial(resumed, stop)
    yield "no later for standing at step 1,000,000", resumed_far


def resumed(stop: int, folder: Path) -> None:
    """Stopped after any update: Equal, each image once an epoch, nothing decoded that is not trained on."""
    whole, out, decoded = reference(make=accumulating, base__checkpointing_steps=1), folder / "out", folder / "decoded"
    everything = STORE / "everything.jsonl"
    with open(STORE / "everything.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not everything.exists():
            file = folder / "file"
            ends([start(folder, *accumulating(folder, "watched"), patch=spy(file))], 0)
            os.rename(file, everything)

    def patch() -> None:
        from oneloop.inputs import store

        spy(folder / "seen")()
        fit = store.fit

        def counted(*args: Any) -> torch.Tensor:
            with open(decoded, "a") as file:
                file.write("1\n")
            return fit(*args)

        store.fit = counted

    shutil.copytree(whole / f"checkpoint-{stop}", out / f"checkpoint-{stop}")
    (out / "metrics.jsonl").write_text("".join((whole / "metrics.jsonl").read_text().splitlines(keepends=True)[:stop]))
    [result] = ends([start(folder, *accumulating(folder, data__memory_budget=0), patch=patch)], 0)
    assert f"resuming after step {stop}" in result.err
    equal(out, whole)
    assert metrics(out) != [] and [m["loss"] for m in metrics(out)] == [m["loss"] for m in metrics(whole)]
    assert seen(everything)[: 4 * stop] + seen(folder / "seen") == seen(everything)
    each_once(seen(everything))
    # All 24 are decoded once to check them, 2 for the batch that is introduced, then what is trained on: 4 an update.
    count = len(decoded.read_text().splitlines())
    assert count <= 24 + 2 + 4 * (18 - stop) + 2, f"{count} images decoded for {18 - stop} updates"


def sign(folder: Path, **changes: Any) -> None:
    """Change facts in a manifest and sign it again."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resumed_far(folder: Path) -> str:
    """A run that says it took a million updates continues with as few reads as one that took two."""
    whole, reads = reference(make=accumulating, base__checkpointing_steps=1), {}
    for step in (2, 1_000_000):
        out = folder / f"at-{step}"
        shutil.copytree(whole / "checkpoint-2", out / f"checkpoint-{step}")
        sign(out / f"checkpoint-{step}", step=step, examples=4 * step)
        file = folder / f"reads-{step}"

        def patch(file: Path = file) -> None:
            from oneloop import data

            inner, began = data.Examples.__getitem__, time.monotonic()

            def read(self: Any, numbers: range) -> Any:
                with open(file, "a") as opened:
                    opened.write(f"{time.monotonic() - began}\n")
                return inner(self, numbers)

            data.Examples.__getitem__ = read

        ends([start(folder, *accumulating(folder, out.name, steps=step + 1), patch=patch)], 0)
        reads[step] = [float(line) for line in file.read_text().splitlines()]
    assert len(reads[1_000_000]) == len(reads[2]) <= 4, reads
    times = {step: found[-1] for step, found in reads.items()}
    assert times[1_000_000] < 3 * times[2] + 2, times
    return f"first update after {times[2]:.1f}s at step 2, {times[1_000_000]:.1f}s at step 1,000,000"


LAYOUTS = {"1 x 4": (1, 1, 4), "2 accumulated x 2": (1, 2, 2), "2 processes x 2": (2, 1, 2), "2 x 2 x 1": (2, 2, 1)}
"""name -> processes, accumulation, batch; 4 examples an update each."""


def laid_out(folder: Path, out: str, layout: str, steps: int, **more: Any) -> tuple[int, list[str]]:
    """The processes and the command of a run without dropout in one of the layouts."""
    count, accumulated, size = LAYOUTS[layout]
    settings = {"base__gradient_accumulation_steps": accumulated, "data__train_batch_size": size, "base__logging_steps": 1}
    flags = tiny(folder, out, steps, ddpm__learning_rate=1e-4, **(settings | more))
    (folder / "unet.json").write_text(json.dumps(UNET | {"dropout": 0.0}))
    return count, flags


@row("another layout", sample=2)
def another_layout() -> Iterator[tuple[str, Case]]:
    yield "1 x accumulation 2 and 2 processes x 1", layouts_equal
    for first, second, third in (
        ("1 x 4", "2 processes x 2", "2 accumulated x 2"),
        ("2 processes x 2", "1 x 4", "2 processes x 2"),
        ("2 x 2 x 1", "2 accumulated x 2", "1 x 4"),
        ("2 accumulated x 2", "2 x 2 x 1", "2 processes x 2"),
    ):
        yield f"{first}, then {second}, then {third}", functools.partial(layouts_switched, (first, second, third))
    yield "accumulation 3, then 2, then 1", accumulation_changed
    yield "three processes, killed", three_processes


def layouts_equal(folder: Path) -> None:
    for out, count, accumulated in (("one", 1, 2), ("two", 2, 1)):
        settings = {"base__gradient_accumulation_steps": accumulated, "data__train_batch_size": 1}
        ends(launch(folder, count, *tiny(folder, out, 12, **settings)), 0)  # with dropout
    assert digest(folder / "one") == digest(folder / "two")


def layouts_switched(layouts: tuple[str, ...], folder: Path) -> str:
    """Three starts in three layouts: the examples, noise, timesteps and rates of one that had one layout."""
    count, flags = laid_out(folder, "whole", "1 x 4", 12)
    ends([start(folder, *flags, patch=spy(folder / "expected"))], 0)
    for i, layout in enumerate(layouts):
        # The length is 12 throughout, so that the rate is; a life ends at its third of it.
        count, flags = laid_out(folder, "out", layout, 12, base__checkpointing_steps=4)
        lasts, file = 4 * (i + 1), folder / f"seen-{i}"
        processes = launch(folder, count, *flags, patch=until_step(lasts, spy(file)) if lasts < 12 else spy(file))
        ends(processes, 0 if lasts == 12 else 143)
    got = sorted(line for i in range(3) for line in seen(folder / f"seen-{i}"))
    assert got == seen(folder / "expected"), "other examples, noise or timesteps"
    each_once(got)
    rates = [[m["lr"] for m in metrics(folder / out)] for out in ("whole", "out")]
    assert len(rates[0]) == len(rates[1]) == 12
    assert max(abs(a - b) for a, b in zip(*rates, strict=True)) < 1e-12, rates
    apart = distance(folder / "whole", folder / "out")
    assert apart < 1e-4, apart
    return "ok"


def until_step(step: int, also: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Patch: SIGTERM from within, once `step` updates are done, as a scheduler might send it to every process."""

    def patch() -> None:
        from oneloop.views import console

        also()
        inner = console.Report.log

        def log(self: Any, values: Any, now: int) -> None:
            inner(self, values, now)
            if now == step:
                os.kill(os.getpid(), signal.SIGTERM)

        console.Report.log = log

    return patch


def accumulation_changed(folder: Path) -> None:
    """The updates of a life hold the batches that it says, whatever the life before accumulated."""
    done, events = 0, folder / "events"
    for accumulated, steps in ((3, 3), (2, 2), (1, 2), (2, 2)):
        more = {"base__gradient_accumulation_steps": accumulated, "base__lr_scheduler": "constant", "base__logging_steps": 1}
        flags = tiny(folder, steps=done + steps, data__train_batch_size=1, **more)

        def patch() -> None:
            from accelerate import Accelerator

            clip = Accelerator.clip_grad_norm_

            def clipped(self: Any, parameters: Any, *args: Any) -> torch.Tensor:
                with open(events, "a") as file:
                    file.write('"an update"\n')
                return clip(self, parameters, *args)

            Accelerator.clip_grad_norm_ = clipped
            spy(events)()

        ends([start(folder, *flags, patch=patch)], 0)
        happened = ["update" if "update" in line else "batch" for line in events.read_text().splitlines()]
        assert happened == (["batch"] * accumulated + ["update"]) * steps, f"accumulation {accumulated}: {happened}"
        done += steps
        events.unlink()
        shutil.rmtree(folder / "out" / "export")


def three_processes(folder: Path) -> None:
    """Sums of three have an order: a killed and resumed run of three processes is still Equal."""
    settings = {"base__checkpointing_steps": 2, "data__train_batch_size": 2, "base__logging_steps": 1}
    ends(launch(folder, 3, *tiny(folder, "whole", 8, **settings)), 0)
    processes = launch(folder, 3, *tiny(folder, "out", 8, **settings))
    until(lambda: 4 in checkpoint.steps(folder / "out"), processes[0])
    for process in processes:
        kill(process)
    stood = valid(folder / "out")
    assert stood and stood[-1] < 8, stood
    ends(launch(folder, 3, *tiny(folder, "out", 8, **settings)), 0)
    equal(folder / "out", folder / "whole")


@row("no shared noise", sample=2)
def no_shared_noise() -> Iterator[tuple[str, Case]]:
    for layout in ("1 x 4", "2 accumulated x 2", "2 processes x 2", "2 x 2 x 1"):
        yield layout, functools.partial(noise, layout)


def noise(layout: str, folder: Path) -> None:
    """Over three epochs no two examples have the same noise; two seeds share none."""
    found = []
    for seed in (0, 1):
        count, flags = laid_out(folder, f"out-{seed}", layout, 18, base__seed=seed)
        ends(launch(folder, count, *flags, patch=spy(folder / f"seen-{seed}")), 0)
        lines = seen(folder / f"seen-{seed}")
        each_once(lines)
        assert len(lines) == 72
        found += [line[2] for line in lines]
    assert len(set(found)) == 144, f"{144 - len(set(found))} noises are drawn twice"


# ---------------------------------------------------------------------------------------------------------------------
# Signals, other runs, dying processes.

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}


@row("signals", sample=6)
def signals() -> Iterator[tuple[str, Case]]:
    moments = range(20)
    for i, count, name in itertools.product(moments, (1, 2), CODES):
        yield f"{name}, {count} processes, moment {i}", functools.partial(signalled, name, count, i)
    for name in CODES:
        yield f"{name} twice", functools.partial(signalled_twice, name)
        yield f"{name} before the first update", functools.partial(signalled_early, name)


def signalled(name: str, count: int, seed: int, folder: Path) -> str:
    """The last finished update is saved, the code says which signal it was, and the end is Equal."""
    whole, out, rng = reference(count, signalling), folder / "out", random.Random(f"{name} {count} {seed}")
    processes = launch(folder, count, *signalling(folder), patch=slow(0.02))  # on a quick machine too, most are still running
    update = rng.randrange(1, 20)
    until(lambda: lines(out) >= update, processes[0])
    time.sleep(rng.uniform(0, 0.2))
    done, asked = lines(out), time.monotonic()
    for process in (
        processes if rng.random() < 0.5 else rng.sample(processes, 1)
    ):  # a launcher tells all, a scheduler may tell one
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, getattr(signal, name))
    results = [process.wait() for process in processes]
    took = time.monotonic() - asked
    if all(result.code == 0 for result in results) or "done in" in results[0].err:  # it may reach an interpreter that ends
        equal(out, whole)
        return "done before"
    for result in results:
        assert result.code == CODES[name], f"exit code {result.code}, expected {CODES[name]}:\n{result.err[-3000:]}"
        assert "Traceback" not in result.err, result.err[-3000:]
    stood, logged = valid(out), lines(out)
    assert stood[-1] == logged and logged <= done + 2, f"saved {stood}, {logged} updates done, {done} when asked"
    assert f"saved {out}/checkpoint-{logged}" in results[0].err and took < 30, results[0].err
    ends(launch(folder, count, *signalling(folder)), 0)
    equal(out, whole)
    return "saved"


def signalling(folder: Path, out: str = "out", steps: int = 24, **more: Any) -> list[str]:
    """A run whose updates can be counted from outside."""
    settings = {"base__logging_steps": 1, "base__checkpointing_steps": 9, "data__train_batch_size": 2}
    return tiny(folder, out, steps, **(settings | more))


def lines(out: Path) -> int:
    """Updates that metrics.jsonl knows of."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def signalled_twice(name: str, folder: Path) -> None:
    """The second signal does not wait for the update."""
    process = start(folder, *signalling(folder), patch=slow(60))
    until(lambda: (folder / "out" / "metrics.jsonl").exists(), process)
    time.sleep(0.5)  # into the loss
    for _ in range(2):
        os.kill(process.pid, getattr(signal, name))
        time.sleep(0.5)
    started = time.monotonic()
    result = process.wait(45)
    assert result.code == CODES[name] and time.monotonic() - started < 10, result
    assert not checkpoint.steps(folder / "out")


def signalled_early(name: str, folder: Path) -> None:
    """Nothing was trained: the code at once, and no folder left behind."""

    def patch() -> None:
        def make_models(cfg: Any) -> Any:
            (folder / "building").touch()
            time.sleep(60)

        patched_task(make_models=make_models)

    process = start(folder, *signalling(folder), patch=patch)
    until((folder / "building").exists, process)
    os.kill(process.pid, getattr(signal, name))
    result = process.wait(45)
    assert result.code == CODES[name] and "Traceback" not in result.err, result
    assert not (folder / "out").exists()


@row("one writer", sample=4)
def one_writer() -> Iterator[tuple[str, Case]]:
    yield "a second run is refused", second_run
    yield "a second run of two processes is refused", functools.partial(second_run, count=2)
    yield "the lock of a dead process is taken over", dead_lock
    yield "a lock that is given back at the same moment", lock_race


def second_run(folder: Path, count: int = 1) -> None:
    holder = start(folder, *signalling(folder), patch=slow(60))
    try:
        until(lambda: (folder / "out" / "metrics.jsonl").exists(), holder)
        started = time.monotonic()
        results = [process.wait() for process in launch(folder, count, *signalling(folder))]
        assert time.monotonic() - started < 60
        one_line(results[0], 2, f"process {holder.pid} on {socket.gethostname()}", str(folder / "out"))
        assert [result.code for result in results] == [2] * count
        assert alive(holder)
    finally:
        kill(holder)


def dead_lock(folder: Path) -> None:
    holder = start(folder, *signalling(folder), patch=slow(60))
    until(lambda: (folder / "out" / "metrics.jsonl").exists(), holder)
    kill(holder)
    assert (folder / "out" / ".oneloop" / "lock").exists()
    ends([start(folder, *signalling(folder))], 0)
    equal(folder / "out", reference(make=signalling))


def lock_race(folder: Path) -> None:
    """The holder leaves, and removes the file, between another's opening and locking it; a third must still be kept out."""

    def patch() -> None:
        really = fcntl.lockf

        def lockf(file: Any, operation: int) -> None:
            checkpoint.fcntl.lockf = really
            (folder / "out" / ".oneloop" / "lock").unlink()
            really(file, operation)

        checkpoint.fcntl.lockf = lockf
        slow(60)()

    second = start(folder, *signalling(folder), patch=patch)
    try:
        until(lambda: (folder / "out" / "metrics.jsonl").exists(), second)
        one_line(cli(folder, *signalling(folder)), 2, f"process {second.pid}")
    finally:
        kill(second)


PHASES = ("models", "first loss", "loss", "export", "state", "sealing", "publishing")


@row("a process dies", sample=3)
def a_process_dies() -> Iterator[tuple[str, Case]]:
    for phase, rank in itertools.product(PHASES, (0, 1)):
        if rank == 0 or phase in ("models", "first loss", "loss", "state"):  # the others happen on the main process alone
            yield f"process {rank} in {phase}", functools.partial(process_dies, phase, rank)


def process_dies(phase: str, rank: int, folder: Path) -> None:
    """kill -9 one of two processes: the other ends within 30 s, with a code that is not 0; resumed Equal."""
    whole, out = reference(2, signalling), folder / "out"

    def here(count: int, function: Callable) -> Callable:
        calls = itertools.count(1)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == count and os.environ["RANK"] == str(rank):
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return dying

    def arm() -> None:
        import accelerate

        match phase:
            case "models":
                patched_task(make_models=here(1, task().make_models))
            case "first loss":
                patched_task(loss_fn=here(1, task().loss_fn))
            case "loss":
                patched_task(loss_fn=here(13, task().loss_fn))
            case "export":
                patched_task(export_fn=here(2, task().export_fn))
            case "state":
                accelerate.Accelerator.save_state = here(2, accelerate.Accelerator.save_state)
            case "sealing":
                checkpoint.listed = here(2, checkpoint.listed)
            case "publishing":
                publish.publish = here(1, publish.publish)

    processes = launch(folder, 2, *signalling(folder), patch=arm)
    until((folder / "died").exists, timeout=120)
    started = time.monotonic()
    survivor = processes[1 - rank].wait(45)
    took = time.monotonic() - started
    kill(processes[rank])
    assert survivor.code not in (0, -9) and took < 30, f"the other ended with {survivor.code} after {took:.0f}s: {survivor.err}"
    ends(launch(folder, 2, *signalling(folder)), 0)
    equal(out, whole)


# ---------------------------------------------------------------------------------------------------------------------
# Damage.


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def resign(folder: Path, name: str) -> None:
    """Have the manifest agree with a file as it is now, as somebody who means harm would."""
    content = (folder / name).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    sign(folder, files=manifest["files"] | {name: {"size": len(content), "xxh3": files.xxh3(folder / name)}})


def forget(folder: Path, name: str) -> None:
    """A manifest that does not mention a file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    sign(folder, files=manifest["files"])


def listing(folder: Path) -> dict[str, Any]:
    """The files that a manifest names."""
    return json.loads((folder / "manifest.json").read_text())["files"]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "one bit flipped": flip,
}
FILES = (
    "state/model.safetensors",
    "state/ema.safetensors",
    "state/optimizer.bin",
    "manifest.json",
)
EXPORTED = ("unet/diffusion_pytorch_model.safetensors", "model_index.json", "load.py")
CORRUPTIONS: dict[str, tuple[str, Callable[[Path, Path, Path], Any]]] = {  # name -> the file to be named, what is done to
    # (the newest checkpoint, the one before it, the same of another run)
    **{
        f"{file}: {how}": (file, lambda new, old, other, f=file, d=do: d(new / f))
        for file in FILES
        for how, do in DAMAGE.items()
    },
    "state/optimizer.bin of the step before": (
        "state/optimizer.bin",
        lambda new, old, other: shutil.copy(old / "state/optimizer.bin", new / "state/optimizer.bin"),
    ),
    "state/model.safetensors of the step before": (
        "state/model.safetensors",
        lambda new, old, other: shutil.copy(old / "state/model.safetensors", new / "state/model.safetensors"),
    ),
    "state/ema.safetensors of another run": (
        "state/ema.safetensors",
        lambda new, old, other: shutil.copy(other / "state/ema.safetensors", new / "state/ema.safetensors"),
    ),
    "manifest.json of the step before": (
        "manifest.json",
        lambda new, old, other: shutil.copy(old / "manifest.json", new / "manifest.json"),
    ),
    "manifest.json of another run": (
        "state/",
        lambda new, old, other: shutil.copy(other / "manifest.json", new / "manifest.json"),
    ),
    "a manifest that lies about its step": ("manifest.json", lambda new, old, other: sign(new, step=99)),
    "a manifest that lies about a setting, unsigned": (
        "manifest.json",
        lambda new, old, other: (new / "manifest.json").write_text(
            (new / "manifest.json").read_text().replace('"examples": ', '"examples": 1')
        ),
    ),
    "a manifest that leaves out a file": (
        "state/optimizer.bin",
        lambda new, old, other: forget(new, "state/optimizer.bin"),
    ),
    "a manifest that names a file elsewhere": (
        "manifest.json",
        lambda new, old, other: sign(new, files=listing(new) | {"../../out": {"size": 1, "xxh3": ""}}),
    ),
    "a manifest whose files are a list": ("manifest.json", lambda new, old, other: sign(new, files=[])),
    "a manifest whose file is a number": (
        "manifest.json",
        lambda new, old, other: sign(new, files=listing(new) | {"x": 1}),
    ),
    "a manifest whose step is a text": ("manifest.json", lambda new, old, other: sign(new, step="6")),
    "a manifest without examples": ("manifest.json", lambda new, old, other: sign(new, examples=None)),
    "a manifest whose settings are a list": ("manifest.json", lambda new, old, other: sign(new, settings=[1])),
    "a manifest whose settings are not in groups": ("manifest.json", lambda new, old, other: sign(new, settings={"base": 1})),
    "a manifest that names what no file is called": (
        "state/\0",
        lambda new, old, other: sign(new, files=listing(new) | {"state/\0": {"size": 1, "xxh3": ""}}),
    ),
    "a manifest of 100,000 brackets": (
        "manifest.json",
        lambda new, old, other: (new / "manifest.json").write_text("[" * 100_000),
    ),
    "a manifest that is a list": ("manifest.json", lambda new, old, other: (new / "manifest.json").write_text("[]")),
    "a folder in the place of a file": (
        "state/model.safetensors",
        lambda new, old, other: ((new / "state/model.safetensors").unlink(), (new / "state/model.safetensors").mkdir()),
    ),
}


def corrupted(folder: Path, name: str) -> Path:
    """A run of 8 updates that stands at 4 and 6, the latter damaged."""
    whole, out = reference(make=checkpointed), folder / "out"
    for step in (4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
    other = reference(make=checkpointed, base__seed=1) / "checkpoint-6"
    CORRUPTIONS[name][1](out / "checkpoint-6", out / "checkpoint-4", other)
    (out / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    return out


def checkpointed(folder: Path, out: str = "out", steps: int = 8, **more: Any) -> list[str]:
    return tiny(
        folder, out, steps, base__checkpointing_steps=2, base__checkpoints_total_limit=None, base__logging_steps=1, **more
    )


@row("corruption", sample=8)
def corruption() -> Iterator[tuple[str, Case]]:
    yield f"all {len(CORRUPTIONS)} kinds, found without a run", corruptions_found
    for name in CORRUPTIONS:
        yield f"{name}: passed over", functools.partial(passed_over, name)
        yield f"{name}: given by hand", functools.partial(given_by_hand, name)
    for file, how in itertools.product(EXPORTED, DAMAGE):
        yield f"{file}: {how}: named, and resumed from", functools.partial(export_damaged, file, how)
    yield "all checkpoints damaged", all_damaged
    yield "a file that is missing, and from the manifest too", conspiracy
    yield "metrics.jsonl ends in noise", metrics_damaged


def corruptions_found(folder: Path) -> None:
    """What looks for a checkpoint takes the one before, and names the file of the damaged one, in one warning."""
    assert len(CORRUPTIONS) >= 28
    for i, (name, (file, _)) in enumerate(CORRUPTIONS.items()):
        out, warnings = corrupted(folder / str(i), name) if (folder / str(i)).mkdir() is None else folder, []
        found = checkpoint.find(out, "latest", warnings.append)
        assert found and found[0].name == "checkpoint-4", f"{name}: took {found and found[0]}"
        assert len(warnings) == 1 and f"checkpoint-6/{file}" in warnings[0], f"{name}: {warnings}"
        shutil.rmtree(out)


def passed_over(name: str, folder: Path) -> None:
    """The run continues from the newest valid checkpoint, with one warning that names the file, and ends Equal."""
    out = corrupted(folder, name)
    [result] = ends([start(folder, *checkpointed(folder))], 0)
    warnings = [line for line in result.err.splitlines() if "damaged" in line]
    assert len(warnings) == 1 and f"checkpoint-6/{CORRUPTIONS[name][0]}" in warnings[0], result.err
    assert "resuming after step 4" in result.err
    equal(out, reference(make=checkpointed))
    assert valid(out) == [4, 6, 8]


def given_by_hand(name: str, folder: Path) -> None:
    """Exit code 2 and the file's name, before anything is made."""
    path = corrupted(folder, name) / "checkpoint-6"
    result = cli(folder, *checkpointed(folder, "new", base__resume_from_checkpoint=path))
    one_line(result, 2, str(path / CORRUPTIONS[name][0]).replace("\0", "\\x00"))
    assert not (folder / "new").exists()


def export_damaged(file: str, how: str, folder: Path) -> None:
    """What is damaged beside a state costs a line: the run resumes from that state, and ends Equal."""
    whole, out = reference(make=checkpointed), folder / "out"
    for step in (4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
    DAMAGE[how](out / "checkpoint-6" / file)
    (out / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    [result] = ends([start(folder, *checkpointed(folder))], 0)
    assert "resuming after step 6" in result.err and f"checkpoint-6/{file}" in result.err, result.err
    equal(out, whole)


def all_damaged(folder: Path) -> None:
    out = corrupted(folder, "state/optimizer.bin: one bit flipped")
    flip(out / "checkpoint-4" / "state" / "model.safetensors")
    before = sorted(map(str, out.rglob("*")))
    one_line(cli(folder, *checkpointed(folder)), 2, "checkpoint-6/state/optimizer.bin", "checkpoint-4/state/model.safetensors")
    assert sorted(map(str, out.rglob("*"))) == before


def conspiracy(folder: Path) -> None:
    """A checkpoint that agrees with its manifest and yet lacks a file is refused by the file's name."""
    out = corrupted(folder, "a manifest that leaves out a file")
    (out / "checkpoint-6" / "state" / "optimizer.bin").unlink()
    one_line(cli(folder, *checkpointed(folder)), 2, "checkpoint-6/state/optimizer.bin")


def metrics_damaged(folder: Path) -> None:
    """A record that a power cut filled with zeros costs its lines, not the run."""
    out = corrupted(folder, "manifest.json: missing")
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 100 + b"}\n" + b'{"step": 9, "lo')
    ends([start(folder, *checkpointed(folder))], 0)
    equal(out, reference(make=checkpointed))


# ---------------------------------------------------------------------------------------------------------------------
# Not finite.


def spoil(what: str, value: float, update: int, rank: str, more: int = 1) -> Callable[[], None]:
    """Patch: from `update` on, for `more` updates, the loss or one gradient of one process is not finite."""

    def patch() -> None:
        inner, calls = task().loss_fn, itertools.count(1)

        def loss_fn(models: Any, batch: Any, rng: Rng, cfg: Any) -> Iterator:
            bad = update <= next(calls) < update + more and os.environ.get("RANK", "0") == rank
            for loss in inner(models, batch, rng, cfg):
                if bad and what == "loss":
                    loss = dataclasses.replace(loss, value=loss.value * value)
                if bad and what == "gradient":
                    loss.value.register_hook(lambda gradient: gradient * value)
                yield loss

        patched_task(loss_fn=loss_fn)

    return patch


@row("non-finite", sample=6)
def non_finite() -> Iterator[tuple[str, Case]]:
    for update, value, what, count in itertools.product(range(1, 9), (math.nan, math.inf), ("loss", "gradient"), (1, 2)):
        rank = "1" if count == 2 and update % 2 else "0"
        yield (
            f"{value} in a {what}, update {update}, process {rank} of {count}: refused",
            functools.partial(not_finite_refused, what, value, update, count, rank),
        )
        if value != value or update == 4:
            yield (
                f"{value} in a {what}, update {update}, process {rank} of {count}: skipped",
                functools.partial(not_finite_skipped, what, value, update, count, rank),
            )
    yield "an image with NaN", functools.partial(broken_picture, math.nan)
    yield "an image with inf", functools.partial(broken_picture, math.inf)
    yield "more skipped than allowed", too_many_skipped
    yield "an overflow of the fp16 scaler", scaler_overflow


def finite_on_disk(out: Path) -> None:
    """No tensor and no number that was written is NaN or infinite."""
    from safetensors.torch import load_file

    for path in out.rglob("*.safetensors"):
        for key, value in load_file(path).items():
            assert not value.is_floating_point() or value.isfinite().all(), f"{path}: {key}"
    for step in checkpoint.steps(out):
        for key, value in warm.tensors(out, step).items():
            assert not value.is_floating_point() or value.isfinite().all(), f"checkpoint-{step}: {key}"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    for path in out.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)


def not_finite_refused(what: str, value: float, update: int, count: int, rank: str, folder: Path) -> None:
    """Exit code 3 naming the update and a file of the batch; what was saved before stands and continues to the same end."""
    out, expected = folder / "out", reference(count, checkpointed)
    watch = folder / "seen"

    def patch() -> None:
        spoil(what, value, update, rank)()
        spy(watch)()

    results = [process.wait() for process in launch(folder, count, *checkpointed(folder), patch=patch)]
    examples = [line for line in seen(watch) if line[0] // (4 * count) == update - 1]
    mine = [line for line in examples if line[0] // 4 % count == int(rank)] if what == "loss" else examples
    one_line(results[0], 3, f"step {update}", what)
    files = [f"shape {line[1]}" for line in mine]
    assert any(file in results[0].err for file in files), f"none of {files} in: {results[0].err}"
    assert all(result.code == 3 for result in results), [result.code for result in results]
    if what == "loss":
        strangers = [f"shape {line[1]}" for line in examples if line not in mine]
        assert not any(f"{file}," in results[0].err or f"{file};" in results[0].err for file in strangers), results[0].err
    if out.exists():
        finite_on_disk(out)
        assert not litter(out)
        assert valid(out) == [step for step in (2, 4, 6, 8) if step < update]
    ends(launch(folder, count, *checkpointed(folder)), 0)
    equal(out, expected)


def not_finite_skipped(what: str, value: float, update: int, count: int, rank: str, folder: Path) -> None:
    """One update is left out; nothing that is not finite is written."""
    flags = checkpointed(folder, base__max_skipped_updates=1)
    ends(launch(folder, count, *flags, patch=spoil(what, value, update, rank)), 0)
    finite_on_disk(folder / "out")
    manifest = checkpoint.verify(folder / "out" / "checkpoint-8")
    assert manifest["skipped"] == 1 and manifest["step"] == 8


def too_many_skipped(folder: Path) -> None:
    """Skips are counted over the starts of a run."""
    flags = checkpointed(folder, base__max_skipped_updates=2)
    result = cli(folder, *flags, patch=spoil("loss", math.nan, 3, "0", more=4))
    one_line(result, 3, "step 5", "2 skipped")
    result = cli(folder, *flags, patch=spoil("loss", math.nan, 1, "0"))
    one_line(result, 3, "step 5")
    finite_on_disk(folder / "out")


def broken_picture(value: float, folder: Path) -> None:
    """Refused with the others that cannot be read, by name, before anything is made."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir()
    for i in range(6):
        pixels = np.full((9, 9), 0.5, np.float32)
        pixels[3, 3] = value if i in (2, 4) else 0.1
        Image.fromarray(pixels).save(folder / "images" / f"{i}.tiff")
    settings = {"data__train_data_dir": folder / "images", "data__cache_dir": folder / "cache"}
    one_line(cli(folder, *tiny(folder, **settings)), 2, "2.tiff", "4.tiff", "not finite")
    assert not (folder / "out").exists()


def scaler_overflow(folder: Path) -> None:
    """A gradient that overflowed in fp16 is the scaler's to skip and no reason to stop; a loss that did is."""
    from oneloop import loop

    state = loop.TrainState({}, {})
    reduce = lambda value, how: value  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), scaler=object(), reduce=reduce, num_processes=1)
    guard = Guard(accelerator, state, 0, str)
    guard.watch(SimpleNamespace(name="unet", value=torch.tensor(1.0)), torch.tensor([7]))
    assert guard.allows("unet", torch.tensor(math.inf)) and state.skipped == 0
    guard.watch(SimpleNamespace(name="unet", value=torch.tensor(math.nan)), torch.tensor([7]))
    try:
        guard.allows("unet", torch.tensor(1.0))
    except NonFinite as error:
        assert "step 1" in str(error) and "7" in str(error)
    else:
        raise AssertionError("a loss of NaN went by")


# ---------------------------------------------------------------------------------------------------------------------
# No space.


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `place`, where this user may mount one."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@functools.cache
def may_mount() -> bool:
    folder = Path(tempfile.mkdtemp(dir=STORE))
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError), small_disk(folder / "disk", 1 << 20):
        return True
    return False


def on_disk(folder: Path) -> int:
    """Bytes that a folder takes on a file system of 4 KiB pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@row("disk full", sample=4)
def disk_full() -> Iterator[tuple[str, Case]]:
    for i in range(20):
        yield f"size {i}", functools.partial(full_disk, i, 1)
    for i in (3, 9, 15):
        yield f"size {i}, 2 processes", functools.partial(full_disk, i, 2)


def full_disk(i: int, count: int, folder: Path) -> str:
    """Exit code 4 and one line with needed and free bytes; earlier checkpoints stand, nothing else is left; then, with space,
    the same command ends Equal."""
    if not may_mount():
        return "not run: needs the right to mount"
    whole, disk = reference(count, checkpointed), folder / "disk"
    one = on_disk(whole / "checkpoint-4")
    size = int(one * (0.15 + 5 * i / 20))  # the whole run takes four checkpoints, an export and some small files
    with small_disk(disk, size):
        results = [process.wait() for process in launch(folder, count, *checkpointed(folder, "disk/out"))]
        if i == 0 and all(result.code == 2 for result in results):
            return "no room to begin"
        if all(result.code == 0 for result in results):
            return "it fitted"
        one_line(results[0], 4, " are free", "it needs more than ")
        assert all(result.code == 4 for result in results), [(result.code, result.err) for result in results]
        stood = valid(disk / "out")
        assert not litter(disk), litter(disk)
        room = (size - 8192) // one  # checkpoints that certainly fit
        assert len(stood) >= min(room, 4) - 1, f"{stood} of {room}"
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        ends(launch(folder, count, *checkpointed(folder, "disk/out")), 0)
        equal(disk / "out", whole)
    return f"{len(stood)} checkpoints stood"


# ---------------------------------------------------------------------------------------------------------------------
# Settings that changed between two starts.

HONOURED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what -> settings of the first life, of the second
    "batch": ({}, {"data__train_batch_size": 8}),
    "accumulation": ({}, {"base__gradient_accumulation_steps": 2}),
    "learning rate": ({}, {"ddpm__learning_rate": 5e-4}),
    "schedule": ({}, {"base__lr_scheduler": "cosine"}),
    "warm-up": ({}, {"base__lr_warmup_steps": 3}),
    "steps": ({}, {"base__max_train_steps": 16}),
    "epochs": ({"base__max_train_steps": None, "base__num_epochs": 1}, {"base__num_epochs": 2}),
    "precision": ({"base__mixed_precision": "no"}, {"base__mixed_precision": "bf16"}),
    "processes": ({}, {}),
}
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # what -> settings of the second life, words of the refusal
    "seed": ({"base__seed": 7}, ("--base.seed was 0 and is now 7",)),
    "resolution": ({"data__resolution": 16}, ("--data.resolution was 8 and is now 16",)),
    "objective": ({"ddpm__prediction_type": "epsilon"}, ("was 'sample' and is now 'epsilon'",)),
    "loss weight": ({"ddpm__snr_gamma": 5.0}, ("--ddpm.snr-gamma was 1.0 and is now 5.0",)),
    "noise schedule": ({"ddpm__ddpm_beta_schedule": "linear"}, ("was 'squaredcos_cap_v2' and is now 'linear'",)),
    "averages": ({"base__use_ema": False}, ("--base.use-ema was True and is now False",)),
    "crop": ({"data__center_crop": True}, ("--data.center-crop was False and is now True",)),
    "number of shapes": ({"data__num_shapes": 25}, ("--data.num-shapes was 24 and is now 25",)),
}


@row("changed settings", sample=6)
def changed_settings() -> Iterator[tuple[str, Case]]:
    for what in HONOURED:
        yield f"{what}: honoured", functools.partial(honoured, what)
    for what in REFUSED:
        yield f"{what}: refused", functools.partial(refused, what)
    yield "images: refused", pictures_changed
    yield "model: refused", model_changed
    yield "task: refused", task_changed
    yield "nothing, and finished: said so", finished_says_so
    yield "a shorter length: finished, and said so", shortened


def stopped(folder: Path, **settings: Any) -> Path:
    """A run that was stopped after 4 of 8 updates."""
    ends([start(folder, *checkpointed(folder, **settings), patch=until_step(4))], 143)
    return folder / "out"


def honoured(what: str, folder: Path) -> None:
    """The second life trains as it was told, on the examples that come next."""
    first, second = HONOURED[what]
    steps = first.get("base__max_train_steps", 8)
    begun = {k: v for k, v in first.items() if k != "base__max_train_steps"}
    flags = lambda more: checkpointed(folder, steps=more.pop("base__max_train_steps", steps), **more)  # noqa: E731
    ends([start(folder, *flags(dict(begun)), patch=until_step(4))], 143)
    out, count, more = folder / "out", 2 if what == "processes" else 1, begun | second
    results = ends(launch(folder, count, *flags(dict(more)), patch=spy(folder / "seen")), 0)
    size, accumulated = more.get("data__train_batch_size", 4), more.get("base__gradient_accumulation_steps", 1)
    records, update = metrics(out), size * accumulated * count
    last = {"steps": 16, "epochs": 12}.get(what, 8)
    assert [m["step"] for m in records] == list(range(1, last + 1)), records
    assert f"step        {update} examples" in results[0].err and "resuming after step 4" in results[0].err
    numbers = [line[0] for line in seen(folder / "seen")]
    assert numbers == list(range(16, 16 + update * (last - 4))), numbers
    rates, peak = [m["lr"] for m in records[4:]], more.get("ddpm__learning_rate", ddpm.Settings().learning_rate)
    warmup = more.get("base__lr_warmup_steps", last // 20)
    progress = [(step - warmup) / (last - warmup) for step in range(4, last)]
    shape = (lambda p: 0.5 * (1 + math.cos(math.pi * p))) if what == "schedule" else lambda p: 1 - p
    assert all(abs(a - peak * shape(p)) < 1e-12 for a, p in zip(rates, progress, strict=True)), rates
    assert (
        f"mixed precision {more.get('base__mixed_precision', 'no')}" in results[0].err
    ) or "base__mixed_precision" not in more
    stood = json.loads((out / "run.json").read_text())
    for name, value in second.items():
        group, _, leaf = name.partition("__")
        assert stood[group][leaf] == value, stood[group]


def is_refused(folder: Path, result: Result, *words: str) -> None:
    one_line(result, 2, "holds another run", *words)
    assert checkpoints(folder / "out") == [2, 4] and not (folder / "out" / "export").exists()


def refused(what: str, folder: Path) -> None:
    """Exit code 2 with both values; the run that stands there is untouched and continues."""
    settings, words = REFUSED[what]
    stopped(folder)
    is_refused(folder, cli(folder, *checkpointed(folder, **settings)), *words)
    ends([start(folder, *checkpointed(folder))], 0)
    equal(folder / "out", reference(make=checkpointed))


def pictures_changed(folder: Path) -> None:
    """The same folder with one image changed is another data set: both fingerprints are told."""
    from PIL import Image

    (folder / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "images" / f"{i}.png")
    settings = {"data__train_data_dir": folder / "images", "data__cache_dir": folder / "cache"}
    out = stopped(folder, **settings)
    was = checkpoint.verify(out / "checkpoint-4")["data"]
    Image.new("RGB", (8, 8), (0, 0, 9)).save(folder / "images" / "3.png")
    is_refused(folder, cli(folder, *checkpointed(folder, **settings)), f"data was {was} and is now ")


def model_changed(folder: Path) -> None:
    stopped(folder)
    flags = checkpointed(folder)
    (folder / "unet.json").write_text(json.dumps(UNET | {"block_out_channels": [8, 16]}))
    is_refused(folder, cli(folder, *flags), "unet's block_out_channels was [8, 8] and is now [8, 16]")


def task_changed(folder: Path) -> None:
    """Another task, by its import path."""
    stopped(folder)
    source = (ROOT / "tasks" / "ddpm.py").read_text()
    for old, new in (("class Settings", "class Settings"), ("ddpm: Settings", "other: Settings"), ("cfg.ddpm.", "cfg.other.")):
        source = source.replace(old, new)
    source = source.replace("self.ddpm.", "self.other.").replace("cfg.ddpm)", "cfg.other)").replace("--ddpm.", "--other.")
    (folder / "other_task.py").write_text(source)
    flags = [flag.replace("--ddpm.", "--other.") for flag in checkpointed(folder)]
    is_refused(folder, cli(folder, "other_task", *flags[1:]), "task was ddpm and is now other")


def finished_says_so(folder: Path) -> None:
    """Zero updates and exit code 0: only because there is nothing left to do, which it says, writing nothing."""
    shutil.copytree(reference(make=checkpointed), folder / "out")
    times = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
    [result] = ends([start(folder, *checkpointed(folder))], 0)
    assert "already done, 8 of 8 steps" in result.err, result.err
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}


def shortened(folder: Path) -> None:
    """Told to be shorter than it already is, a stopped run is finished: it is published as it stands, and says so."""
    stopped(folder)
    [result] = ends([start(folder, *checkpointed(folder, steps=3))], 0)
    assert "resuming after step 4" in result.err and "done in" in result.err
    assert checkpoints(folder / "out") == [2, 4] and (folder / "out" / "export").exists()
    [result] = ends([start(folder, *checkpointed(folder, steps=3))], 0)
    assert "already done, 4 of 3 steps" in result.err


# ---------------------------------------------------------------------------------------------------------------------
# Nothing runs from a file, nothing secret gets into one, and their modes.


class Trap:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def trap_checkpoint(folder: Path, file: str, how: str) -> list[str]:
    """A file of a checkpoint becomes a trap, and its manifest vouches for it."""
    whole, out = reference(make=checkpointed), folder / "out"
    shutil.copytree(whole / "checkpoint-6", out / "checkpoint-6")
    path, trap = out / "checkpoint-6" / file, {"state": Trap(folder / "executed"), "step": 1}
    path.write_bytes(pickle.dumps(trap)) if how == "pickle" else torch.save(trap, path)
    resign(out / "checkpoint-6", file)
    return checkpointed(folder)


def trap_settings(folder: Path, name: str, text: str) -> list[str]:
    (folder / name).write_text(text.replace("MARKER", str(folder / "executed")))
    return ["ddpm", name, *tiny(folder)[1:]]


def trap_data(folder: Path, name: str, content: bytes | str, flag: str) -> list[str]:
    """A data set's folder with one file that would like to run."""
    from PIL import Image

    (folder / "set").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "set" / f"{i}.png")
    content = content if isinstance(content, bytes) else content.replace("MARKER", str(folder / "executed")).encode()
    (folder / "set" / name).write_bytes(content)
    settings = {f"data__{flag}": folder / "set", "data__cache_dir": folder / "cache"}
    return tiny(folder, data__train_batch_size=2, **settings)


SCRIPT = "import os, datasets\nos.system('touch MARKER')\nclass D(datasets.GeneratorBasedBuilder): pass\n"
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
TRAPS: dict[str, Callable[[Path], list[str]]] = {
    **{
        f"a {how} as {file}": functools.partial(trap_checkpoint, file=file, how=how)
        for file in ("state/optimizer.bin", "state/random_states_0.pkl", "state/model.safetensors", "state/ema.safetensors")
        for how in ("pickle", "torch file")
    },
    "a pickle as the manifest": lambda folder: trap_manifest(folder),
    "a pickle beside the states": lambda folder: trap_beside(folder, "state/pytorch_model.bin"),
    "a module in the checkpoint": lambda folder: trap_beside(folder, "model_index.py"),
    "YAML that calls a function": functools.partial(
        trap_settings, name="run.yaml", text='base: !!python/object/apply:os.system ["touch MARKER"]\n'
    ),
    "YAML that makes an object": functools.partial(
        trap_settings, name="run.yaml", text="base: {seed: !!python/object/new:os.system [touch MARKER]}\n"
    ),
    "YAML that imports": functools.partial(
        trap_settings, name="run.yml", text="base: {seed: !!python/name:os.system }\nx: !!python/module:antigravity {}\n"
    ),
    "YAML in the name of JSON": functools.partial(
        trap_settings, name="run.json", text='base: !!python/object/apply:os.system ["touch MARKER"]\n'
    ),
    "a pickle as settings": lambda folder: trap_pickled_settings(folder),
    "a script named like the data set": functools.partial(trap_data, name="set.py", content=SCRIPT, flag="dataset_name"),
    "a script among the images": functools.partial(trap_data, name="images.py", content=SCRIPT, flag="train_data_dir"),
    "a data card that wants a script": lambda folder: trap_card(folder),
    "a pickled table": lambda folder: trap_table(folder, "data.pkl"),
    "a pickle in a tar": lambda folder: trap_tar(folder),
    "a pickle as an image": lambda folder: trap_table(folder, "4.png", "train_data_dir"),
    "PostScript among the images": lambda folder: trap_data(folder, "4.eps", POSTSCRIPT, "train_data_dir"),
    "PostScript in the name of PNG": lambda folder: trap_data(folder, "4.png", POSTSCRIPT, "train_data_dir"),
    "a model's config that names code": lambda folder: trap_model(folder),
}


def trap_manifest(folder: Path) -> list[str]:
    shutil.copytree(reference(make=checkpointed) / "checkpoint-6", folder / "out" / "checkpoint-6")
    (folder / "out" / "checkpoint-6" / "manifest.json").write_bytes(pickle.dumps(Trap(folder / "executed")))
    return checkpointed(folder)


def trap_beside(folder: Path, file: str) -> list[str]:
    shutil.copytree(reference(make=checkpointed) / "checkpoint-6", folder / "out" / "checkpoint-6")
    path = folder / "out" / "checkpoint-6" / file
    path.write_bytes(
        SCRIPT.replace("MARKER", str(folder / "executed")).encode()
        if file.endswith("py")
        else pickle.dumps(Trap(folder / "executed"))
    )
    resign(folder / "out" / "checkpoint-6", file)
    return checkpointed(folder)


def trap_pickled_settings(folder: Path) -> list[str]:
    (folder / "run.yaml").write_bytes(pickle.dumps(Trap(folder / "executed"), 0))
    return ["ddpm", "run.yaml", *tiny(folder)[1:]]


def trap_table(folder: Path, name: str, flag: str = "dataset_name") -> list[str]:
    return trap_data(folder, name, pickle.dumps(Trap(folder / "executed")), flag)


def trap_tar(folder: Path) -> list[str]:
    import io
    import tarfile

    flags = trap_data(folder, "x.txt", "", "dataset_name")
    with tarfile.open(folder / "set" / "a.tar", "w") as tar:
        for name, content in (
            ("0.png", (folder / "set" / "0.png").read_bytes()),
            ("0.pickle", pickle.dumps(Trap(folder / "executed"))),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for path in folder.glob("set/*.*"):
        if path.suffix != ".tar":
            path.unlink()
    return flags


def trap_card(folder: Path) -> list[str]:
    card = "---\nconfigs:\n- config_name: default\n  data_files: data.pkl\n  builder_name: pandas\n---\n"
    flags = trap_data(folder, "README.md", card, "dataset_name")
    (folder / "set" / "data.pkl").write_bytes(pickle.dumps(Trap(folder / "executed")))
    (folder / "set" / "set.py").write_text(SCRIPT.replace("MARKER", str(folder / "executed")))
    return flags


def trap_model(folder: Path) -> list[str]:
    flags = tiny(folder)
    config = UNET | {"auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": str(folder)}
    (folder / "unet.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(SCRIPT.replace("MARKER", str(folder / "executed")))
    return flags


@row("nothing runs from a file", sample=9)
def nothing_runs() -> Iterator[tuple[str, Case]]:
    assert len(TRAPS) >= 20
    for name in TRAPS:
        yield name, functools.partial(trapped, name)


def trapped(name: str, folder: Path) -> str:
    """Whatever becomes of the run, nothing of the file was executed; and what becomes of it is no traceback."""
    flags = TRAPS[name](folder)
    (folder / "bin").mkdir()
    for program in ("gs", "gswin32c", "gswin64c"):  # what would interpret PostScript
        (folder / "bin" / program).write_text(f"#!/bin/sh\ntouch {folder}/executed\n")
        (folder / "bin" / program).chmod(0o755)
    result = cli(folder, *flags, env={"PATH": f"{folder}/bin:{os.environ['PATH']}", "HF_HOME": str(folder / "hf")})
    assert not (folder / "executed").exists(), "it was executed"
    assert "Traceback" not in result.err and result.code in (0, 2), f"{result.code}: {result.err[-3000:]}"
    if result.code == 2:
        one_line(result, 2)
    return "refused" if result.code else "left unread"


CANARY = "canary-4f1b9c7e2d"


@row("secrets", sample=2)
def secrets() -> Iterator[tuple[str, Case]]:
    nothing, offline = (lambda: None), {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    yield "tensorboard", functools.partial(secret, {"base__logger": "tensorboard"}, {}, nothing, 0)
    yield "a run that fails", functools.partial(secret, {}, {}, spoil("loss", math.nan, 3, "0"), 3)
    yield "wandb, offline", functools.partial(secret, {"base__logger": "wandb"}, offline, nothing, 0)


def secret(settings: dict[str, Any], env: dict[str, str], patch: Callable[[], None], code: int, folder: Path) -> None:
    """A token in the environment is in nothing that the run writes or says."""
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "CANARY")
    tokens = {name: f"{CANARY}-{name}-0123456789abcdef0123456789" for name in names}
    result = cli(folder, *checkpointed(folder, **settings), env=tokens | env, patch=patch)
    assert result.code == code, f"{result.code}: {result.err}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    for path in files:  # with what it said, which is in the folder too
        assert CANARY.encode() not in path.read_bytes(), path


@row("modes", sample=5)
def modes() -> Iterator[tuple[str, Case]]:
    for umask in (0o027, 0o002, 0o077):
        yield f"umask {umask:03o}", functools.partial(masked, umask)
    for name in UNWRITABLE:
        yield f"an output folder that is {name}", functools.partial(unwritable, name)
    yield "an output folder that vanishes", vanished


def masked(umask: int, folder: Path) -> None:
    """Files and folders have the modes that the umask leaves."""
    ends([start(folder, *checkpointed(folder, base__logger="tensorboard"), patch=lambda: os.umask(umask) and None)], 0)
    for path in (folder / "out", *(folder / "out").rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        got = stat.S_IMODE(path.stat().st_mode)
        assert got == expected, f"{path.relative_to(folder)} has mode {got:o}, expected {expected:o}"


@contextlib.contextmanager
def under_a_file(folder: Path) -> Iterator[str]:
    (folder / "file").touch()
    yield "file/out"


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[str]:
    with small_disk(folder / "disk", 1 << 20):
        (folder / "disk" / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(folder / "disk")], check=True)
        yield "disk/out"


@contextlib.contextmanager
def gone(folder: Path) -> Iterator[str]:
    (folder / "out").symlink_to(folder / "unplugged" / "out")
    yield "out"


@contextlib.contextmanager
def a_file(folder: Path) -> Iterator[str]:
    (folder / "out").touch()
    yield "out"


UNWRITABLE = {"under a file": under_a_file, "read-only": read_only, "a link to nowhere": gone, "a file": a_file}


def unwritable(name: str, folder: Path) -> str:
    """One line and exit code 2, before the model is built."""
    if name == "read-only" and not may_mount():
        return "not run: needs the right to mount"

    def patch() -> None:
        def make_models(cfg: Any) -> Any:
            (folder / "built").touch()
            raise AssertionError

        patched_task(make_models=make_models)

    with UNWRITABLE[name](folder) as out:
        says = "expected the path of a folder" if (folder / out).is_file() else "cannot be written"
        one_line(cli(folder, *tiny(folder, out), patch=patch), 2, str(folder / out), says)
    assert not (folder / "built").exists()
    return ""


def vanished(folder: Path) -> None:
    """Removed while the run goes on: what is in memory is saved anew, or it is one line and exit code 4."""

    def patch() -> None:
        inner = task().loss_fn

        def loss_fn(*args: Any) -> Iterator:
            if (folder / "out" / "checkpoint-4").exists():
                shutil.rmtree(folder / "out")
            yield from inner(*args)

        patched_task(loss_fn=loss_fn)

    result = cli(folder, *checkpointed(folder), patch=patch)
    if result.code:
        one_line(result, 4, str(folder / "out"))
    else:
        assert digest(folder / "out") == digest(reference(make=checkpointed))


# ---------------------------------------------------------------------------------------------------------------------
# What it costs.


@row("price", sample=1)
def price() -> Iterator[tuple[str, Case]]:
    yield "an adapter's state holds no frozen weights", adapter_only
    yield "flush, hash and rename", priced


def adapter_only(folder: Path) -> str:
    """Where little trains, little is saved in a state."""

    def patch() -> None:
        inner = task().make_models

        def make_models(cfg: Any) -> Any:
            models = inner(cfg)
            models["unet"].requires_grad_(False)
            models["unet"].conv_in.requires_grad_(True)
            return models

        def make_optim(models: Any, cfg: Any) -> Any:
            return {"unet": torch.optim.AdamW([p for p in models["unet"].parameters() if p.requires_grad])}

        patched_task(make_models=make_models, make_optim=make_optim)

    ends([start(folder, *checkpointed(folder), patch=patch)], 0)
    names = {name for name in warm.tensors(folder / "out") if name.startswith(("model", "ema"))}
    assert names == {"model/conv_in.weight", "model/conv_in.bias", "ema/unet.conv_in.weight", "ema/unet.conv_in.bias"}, names
    return ""


def priced(folder: Path) -> str:
    """The benchmark runs; what it measures stands in the campaign's table."""
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint_price.py"), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@row("endurance", sample=1)
def endurance() -> Iterator[tuple[str, Case]]:
    yield "300 updates, 30 saves", functools.partial(endured, 300, 10)
    yield "5,000 updates, 100 saves", functools.partial(endured, 5000, 50)


def endured(updates: int, every: int, folder: Path) -> str:
    """Resident memory grows by at most 5 % and open files stay constant, from a tenth of the run on."""
    out = folder / "out"
    settings = {"base__checkpointing_steps": every, "base__checkpoints_total_limit": 2, "base__logger": "tensorboard"}
    process = start(folder, *tiny(folder, "out", updates, **settings))
    proc, found = Path(f"/proc/{process.pid}"), {}

    def look() -> bool:
        stood = checkpoint.steps(out)
        if stood and stood[-1] not in found and stood[-1] < updates:
            with contextlib.suppress(OSError):
                pages = int((proc / "statm").read_text().split()[1])
                names = [os.readlink(fd) for fd in (proc / "fd").iterdir()]
                found[stood[-1]] = (pages * resource.getpagesize(), sum("checkpoint-" not in name for name in names))
        time.sleep(0.01)
        return not alive(process)

    until(look, timeout=3600)
    assert process.wait().code == 0
    after = [value for step, value in sorted(found.items()) if step > updates / 10]
    memory, files = [m for m, _ in after], [f for _, f in after]
    growth = statistics.median(memory[-5:]) / statistics.median(memory[:5]) - 1
    assert growth <= 0.05, f"resident memory grew by {growth:.1%}: {memory}"
    assert statistics.median(files[-5:]) <= statistics.median(files[:5]), files
    return f"memory {growth:+.1%} over {len(found)} saves, {int(statistics.median(files))} open files"


# ---------------------------------------------------------------------------------------------------------------------
# All of a row, several at a time.


def run(found: Row, count: int | None, folder: Path, jobs: int = 1) -> tuple[int, collections.Counter, list[str]]:
    """Run `count` cases of a row, each in a fork of its own and a folder of its own: how many, their words, their failures."""
    waiting, running = list(enumerate(chosen(found, count))), []
    ran, words, failures = len(waiting), collections.Counter(), []
    while waiting or running:
        while waiting and len(running) < jobs:
            i, (name, case) = waiting.pop(0)
            place = folder / f"{i}"
            place.mkdir(parents=True)

            def whole(place: Path = place, case: Case = case) -> None:
                (place / "word").write_text(case(place) or "")

            running.append((name, place, warm.fork(whole, place)))
        time.sleep(0.01)
        for item in [item for item in running if not alive(item[2])]:
            running.remove(item)
            name, place, process = item
            result = process.wait()
            if result.code:
                failures.append(f"{name} (left in {place}):\n{result.err[-3000:]}")
            else:
                words[(place / "word").read_text()] += 1
                shutil.rmtree(place)
    try:
        found.check(words, ran)
    except AssertionError:
        failures.append(f"the cases together: {dict(words)}")
    return ran, words, failures
