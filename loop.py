"""One training loop for every diffusion task.

    python loop.py                               the tasks
    python loop.py ddpm --base.num-epochs 10     train; the same command again continues
    accelerate launch loop.py ddpm               on every GPU

    import loop; from tasks import ddpm
    state = loop.run(ddpm.task, ddpm.Config())   the same from a script

The order of `run` is the order of events: the output folder, the data, the checkpoint to continue from, the models, the loop,
the end. It knows nothing of diffusion: a task's functions (tasks/__init__.py) say what is trained.
"""

from __future__ import annotations

import gc
import os
import sys

import configs

# OpenMP's threads wait for each other spinning, which on a busy CPU costs everything: let them sleep after a moment.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes in the settings answer at once
    gc.set_threshold(50_000, 10, 10)  # imports make half a million objects that stay: sifting them was a fifth of the start
    try:
        MODULE, CONFIG = configs.parse(sys.argv[1:])
        if hasattr(MODULE, "main"):  # one of configs.COMMANDS
            sys.exit(MODULE.main(CONFIG))
    except configs.BadInput as error:
        configs.fail(error, 2)

import contextlib
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

import checkpoint
import compiled
import data
import decode
import encode
import look
import survey
import validate
from configs import BadInput
from device import at_rest, draw, make_accelerator, make_models, moved, seed_layers, trained, trains
from processes import in_turns, largest, on_main
from report import Report, clock, publish
from tasks import Batch, Loss, Models, Optims, Rng, Task, hash64

EXPORT_EXAMPLES = 1024
"""Examples over which a checkpoint's export may measure something of the data; the last one has all of them."""


class NonFinite(Exception):
    """A loss or gradient that is not finite. Exit code 3."""


@dataclass
class TrainState:
    """Everything that training changes."""

    models: Models
    """Those that train, as the task made them."""
    optims: Optims
    ema: dict[str, Tensor] = field(default_factory=dict)
    """'model.parameter' -> its average, for what requires a gradient; empty without EMA."""
    step: int = 0
    """Optimizer steps taken."""
    examples: int = 0
    """Examples consumed: the number of the next one."""
    skipped: int = 0
    """Updates left out because they were not finite."""


def run(task: Task, cfg: Any) -> TrainState | None:
    """Train `task` as `cfg` says, from where its output folder stands; returns the final state, or None after a mere look.

    Raises:
        BadInput: the settings do not fit the data, the model or the run in the output folder; nothing was written.
        NonFinite: a loss or gradient was not finite. checkpoint.StorageError: a save was refused. look.OutOfMemory: it says
            what took the memory.
        SystemExit: code 75, 130 or 143 after SIGUSR1, SIGINT or SIGTERM, with everything saved.
    """
    if cfg.base.check:
        return survey.check(task, cfg)
    if cfg.base.dry_run:
        return look.estimate(run, task, cfg)
    started, name = time.perf_counter(), configs.task_group(cfg)
    out = Path(cfg.base.output_dir or f"runs/{name}").expanduser()
    cfg = replace(cfg, base=replace(cfg.base, output_dir=str(out)))
    base, size = cfg.base, cfg.data.train_batch_size
    accelerator = make_accelerator(base, out)
    device, report = accelerator.device, Report(accelerator, out, cfg)
    memory = look.Memory(cfg, device)
    stands = lambda saved: report.say(f"saved {saved}; {saved}/load.py loads it")  # noqa: E731
    saves = checkpoint.Saves(accelerator, out, base.checkpoints_total_limit, stands)
    with checkpoint.lock(out, accelerator), closing(report), saves, memory, Signals(accelerator) as signals:
        # The data set, the checkpoint to continue from, and how far there is to go.
        source = data.open_source(cfg.data, task.needs)
        found = on_main(accelerator, lambda: checkpoint.find(out, base.resume_from_checkpoint, report.say))
        saved, facts = found or (None, {"step": 0, "examples": 0, "skipped": 0})
        if found:
            refuse_changes(facts, {"task": name}, configs.changes(facts["settings"], cfg))
        block = size * accelerator.num_processes  # examples from one batch of a process to its next
        update = block * base.gradient_accumulation_steps  # examples in one optimizer step
        left = math.ceil(round(base.num_epochs * source.size - facts["examples"], 6) / update)
        total = base.max_train_steps or facts["step"] + max(left, 0)
        rate = schedule(base, total)
        finished = facts["step"] >= total and on_main(accelerator, lambda: checkpoint.holds(out / "export", facts))
        if finished:
            longer = "--base.num-epochs or --base.max-train-steps makes it longer"
            report.say(f"{out}: already done, {facts['step']} of {total} steps; {longer}")

        # The models, the optimizers and the averages. What requires a gradient trains; the rest is frozen.
        models = make_models(task, cfg, accelerator)
        state = TrainState({k: m for k, m in models.items() if trains(m)}, task.make_optim(models, cfg))
        state.step, state.examples, state.skipped = facts["step"], facts["examples"], facts["skipped"]
        weights = trained(models)
        if base.use_ema:
            state.ema = {key: p.detach().clone() for key, p in weights.items()}
        memory.holds(models, state)
        params = {k: [p for group in o.param_groups for p in group["params"]] for k, o in state.optims.items()}
        peaks = {
            k: [group["lr"] * (update if base.scale_lr else 1) for group in o.param_groups] for k, o in state.optims.items()
        }
        identity = {"task": name, "models": {k: look.describe(m) for k, m in models.items()}}
        refuse_changes(facts, identity)
        if accelerator.mixed_precision == "fp16" and len(state.optims) > 1:
            several = f"fp16's one loss scale cannot follow {len(state.optims)} optimizers ({', '.join(state.optims)})"
            raise BadInput(f"--base.mixed-precision is 'fp16'; expected auto, bf16 or no: {several}")
        if base.compile:
            compiled.compile_models(state.models, device, base.gradient_accumulation_steps)
        prepared = [accelerator.prepare(part) for part in (*state.models.values(), *state.optims.values())]
        wrapped = dict(zip(state.models, prepared, strict=False))
        optims = dict(zip(state.optims, prepared[len(wrapped) :], strict=True))
        checkpoint.attach(accelerator, state.models, state.ema)
        if found:
            checkpoint.load(accelerator, saved)
        if accelerator.is_main_process:
            checkpoint.tidy(out)
        if finished:
            return state

        # The pictures, decoded and checked; after the models, whose mistakes take seconds to find.
        examples, held_out = open_examples(accelerator, cfg, source, facts, report.say)

        # What every number became, said once. From here on there are files.
        report.open(state.step, total, source.found, identity["models"])
        settings = configs.to_dict(cfg)
        facts = identity | {"module": type(cfg).__module__, "data": examples.fingerprint, "settings": settings}
        if accelerator.is_main_process:
            checkpoint.write(out / "run.json", json.dumps(configs.run_file(cfg), indent=2) + "\n")
        encodings = {k: e for k, e in task.encodings.items() if not any(trains(models[m]) for m in e.models if m in models)}
        for text in (*survey.remarks(accelerator, examples, out), *encode.remarks(examples, task.encodings, cfg)):
            report.say(text)
        idle = encode.encode_once(examples, encodings, models, cfg, accelerator, report.say)
        moved(models, idle, "cpu")
        first = examples[range(size)]
        report.say(look.introduce(accelerator, cfg, source.found, models, first, state, total))
        if examples.reside(device):
            report.say(f"the decoded pictures stay on {device}")
        guard = Guard(accelerator, state, base.max_skipped_updates, examples.source.name)
        ready = lambda batch: encode.encode(encodings, models, examples.ready(batch, device), cfg)  # noqa: E731
        once = functools.partial(rehearse, accelerator, task, models | wrapped, first | {"step": total}, ready, cfg)
        # DDP orders its gradient buckets anew after its first backward pass, and the order of a sum of three or more changes
        # its last bits: after this pass every life of a run sums alike.
        if accelerator.num_processes > 2:
            once()
        if base.compile:
            report.say(compiled.price(accelerator, state.models, once, base.gradient_accumulation_steps))

        def export(folder: Path) -> None:
            seen = data.Fixed(examples, size, device, None if state.step == total else EXPORT_EXAMPLES)
            with at_rest(models, weights, state.ema):
                lines = task.export_fn(models, seen, folder, cfg)
            (folder / "load.py").write_text(lines + "\n")

        def save() -> Path:
            guard.read()
            now = {"examples": state.examples, "skipped": state.skipped}
            return saves.save(state.step, facts | now, export)

        def losses(batch: Batch, rng: Rng, models: Models = models) -> Iterator[Loss]:
            return autocast(accelerator, task.loss_fn(models, ready(batch) | {"step": state.step}, rng, cfg))

        def show() -> None:
            guard.read()
            moved(models, idle, device)
            if held_out:
                averages = {"loss": {}} | ({"loss_ema": state.ema} if state.ema else {})
                shown = {name: at_rest(models, weights, ema) for name, ema in averages.items()}
                report.log(validate.measure(held_out, accelerator, losses, shown), state.step)
            if accelerator.is_main_process:
                rng = Rng.of(base.seed, range(base.num_samples), "samples", device)
                fixed = data.Fixed(examples, base.num_samples, device)
                images = draw(task, models, weights, state.ema, fixed, rng, accelerator, cfg)
                report.images(images, state.step)
            moved(models, idle, "cpu")

        # The loop. Example n is the same whatever the layout: processes take turns, a batch each.
        stream = examples.stream(state.examples + accelerator.process_index * size, block)
        meter, seen, signals.armed = Meter(accelerator, len(optims) > 1), set(), True
        while state.step < total and not signals.agreed():
            factor = rate(state.step)
            for batch in meter.fetch(stream, base.gradient_accumulation_steps):
                numbers, rows = batch["n"].tolist(), batch["index"]
                rng = Rng.of(base.seed, numbers, device=device)
                seed_layers(device, hash64(base.seed, "layers", numbers[0]))
                with accelerator.accumulate(*wrapped.values()):
                    for loss in losses(batch, rng, models | wrapped):
                        accelerator.backward(loss.value)
                        no_leak(loss, params, seen)
                        guard.watch(loss, rows)
                        meter.add("loss", loss.name, loss.value)
                        for key, value in loss.logs.items():
                            meter.add(key, "", value)
                        if accelerator.sync_gradients:  # the batch of the step is complete
                            norm = accelerator.clip_grad_norm_(params[loss.name], base.max_grad_norm or math.inf)
                            meter.add("grad_norm", loss.name, norm)
                            for group, peak in zip(optims[loss.name].param_groups, peaks[loss.name], strict=True):
                                group["lr"] = peak * factor
                            if guard.allows(loss.name, norm):
                                optims[loss.name].step()
                            optims[loss.name].zero_grad()
            state.step, state.examples = state.step + 1, state.examples + update
            decay = average(state, weights, base)
            meter.updates += 1
            report.advance()
            due = state.step == total
            if due or state.step % base.logging_steps == 0:
                guard.read()
                rates = {f"lr/{k}" if len(peaks) > 1 else "lr": peak[0] * factor for k, peak in peaks.items()}
                report.log(meter.read(update) | rates | {"ema_decay": decay}, state.step)
            if due or (base.validation_steps and state.step % base.validation_steps == 0):
                show()
            if due or state.step % base.checkpointing_steps == 0:
                saved = save()
        saves.settle()
        if code := signals.agreed():
            if saved is None or saved.name != f"checkpoint-{state.step}":
                saved = save()
                saves.settle()
            report.say(f"stopped by a signal after step {state.step}; saved {saved}; the same command continues")
            raise SystemExit(code)

        # The end: the last checkpoint's export by itself, with its card.
        loads = on_main(accelerator, lambda: publish(saved, out, cfg, source.found, state.step))
        took = f"{clock(time.perf_counter() - started)}, {look.peak_memory(device)}"
        report.say(f"done in {took}; pictures are in {out}/samples, the result in {out}/export:\n\n{loads}")
        return state


# ---------------------------------------------------------------------------------------------------------------------
# Setting up.


def schedule(base: configs.Base, total: int) -> Callable[[int], float]:
    """Optimizer step -> the factor on the peak learning rate for the update that follows: diffusers' own schedules, read as
    functions, so that nothing has to be stepped or saved."""
    from diffusers.optimization import get_scheduler

    warmup = min(total // 20, 500) if base.lr_warmup_steps is None else base.lr_warmup_steps
    if warmup >= total and base.lr_scheduler != "constant":
        raise BadInput(f"--base.lr-warmup-steps is {warmup}; expected fewer than the run's {total} optimizer steps")
    probe = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cycles = {"num_cycles": base.lr_num_cycles, "power": base.lr_power}
    made = get_scheduler(base.lr_scheduler, probe, num_warmup_steps=warmup, num_training_steps=total, **cycles)
    return made.lr_lambdas[0]


def refuse_changes(facts: dict[str, Any], now: dict[str, Any], settings: Iterable[str] = ()) -> None:
    """Refuse to continue another run: what the checkpoint's manifest says of it, against what this one is.

    Raises:
        BadInput: with both values of everything that differs.
    """
    differ = [f"{k} was {facts[k]} and is now {v}" for k, v in now.items() if k in facts and facts[k] != v] + list(settings)
    if differ:
        raise BadInput(f"the output folder holds another run: {'; '.join(differ)}; give another --base.output-dir")


def open_examples(
    accelerator: Accelerator, cfg: Any, source: data.Source, facts: dict[str, Any], say: Callable[[str], None]
) -> tuple[data.Examples, data.Examples | None]:
    """What is trained on and what is held out, decoded once on each machine, and kept unless `facts` are of other pictures."""
    shelf = configs.example_cache(cfg)

    def opened() -> list[data.Examples]:
        sets = [data.opened(s, cfg.data, cfg.base.seed, shelf) for s in (source, source.held_out) if s]
        refuse_changes(facts, {"data": sets[0].fingerprint})
        for examples in sets if accelerator.is_local_main_process else ():
            examples.keep(say)
        if accelerator.is_main_process and shelf == Path(cfg.base.output_dir) / "examples":
            decode.tidy(shelf, {examples.place for examples in sets})
        return sets

    examples, *rest = in_turns(accelerator, opened) if shelf else opened()
    return examples, (rest[0] if rest else None)


def rehearse(
    accelerator: Accelerator, task: Task, models: Models, first: Batch, ready: Callable[[Batch], Batch], cfg: Any
) -> None:
    """One pass whose gradients are thrown away. The batch is dated at the run's end, for losses that start late."""
    rng = Rng.of(cfg.base.seed, first["n"].tolist(), device=accelerator.device)
    for loss in autocast(accelerator, task.loss_fn(models, ready(first), rng, cfg)):
        accelerator.backward(loss.value)
    for module in models.values():
        module.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Inside the loop.


def autocast(accelerator: Accelerator, losses: Iterator[Loss]) -> Iterator[Loss]:
    """The same losses, computed in the precision of the run; what happens between them is not."""
    while True:
        with accelerator.autocast():
            loss = next(losses, None)
        if loss is None:
            return
        yield loss


def no_leak(loss: Loss, params: dict[str, list[Tensor]], seen: set[str]) -> None:
    """Refuse a loss whose gradient lands on another optimizer's parameters. Each loss is looked at once, when it is first seen.

    Raises:
        ValueError: it does, or no optimizer has its name.
    """
    if loss.name in seen:
        return
    if loss.name not in params:
        raise ValueError(f"the task yields a loss {loss.name!r}, and its optimizers are: {', '.join(params)}")
    seen.add(loss.name)
    for other in params.keys() - seen:
        if any(p.grad is not None for p in params[other]):
            raise ValueError(
                f"the loss {loss.name!r} put gradients on the parameters of {other!r}, which are not its own; "
                f"look at that model through tasks.frozen(...)"
            )


@torch.no_grad()
def average(state: TrainState, weights: dict[str, Tensor], base: configs.Base) -> float:
    """Move the averages toward the weights after an update; returns the decay.

    With the warm-up of diffusers' EMAModel: 1 - (1 + k)^-power after k updates, up to the largest decay.
    """
    decay = min(base.ema_decay, 1 - state.step**-base.ema_power)
    if state.ema:
        torch._foreach_lerp_(list(state.ema.values()), [weights[key] for key in state.ema], 1 - decay)
    return decay


class Meter:
    """Means of what was logged since the last reading, but for what was not finite: such an update is skipped, or the run
    stops. Everything stays on the device until it is read."""

    def __init__(self, accelerator: Accelerator, several: bool):
        self.accelerator, self.several = accelerator, several
        self.values: dict[str, list[Any]] = {}
        self.since, self.updates, self.waited = time.perf_counter(), 0, 0.0

    def fetch(self, stream: Iterator[Batch], count: int) -> Iterator[Batch]:
        """The next batches of a stream; the time until each is there was spent waiting for data."""
        for _ in range(count):
            began = time.perf_counter()
            batch = next(stream)
            self.waited += time.perf_counter() - began
            yield batch

    def add(self, kind: str, name: str, value: Any) -> None:
        """One value of a kind (loss, grad_norm, ...); the optimizer's name is added where there are several."""
        key = f"{kind}/{name}" if self.several and name else kind
        self.values.setdefault(key, []).append(value.detach() if isinstance(value, Tensor) else value)

    def read(self, examples: int) -> dict[str, float]:
        """The means over processes, and the speed with `examples` an update. This waits for the device."""
        made = functools.partial(torch.as_tensor, dtype=torch.float32, device=self.accelerator.device)
        columns = [torch.stack([made(value) for value in self.values[key]]) for key in sorted(self.values)]
        pairs = torch.stack([torch.stack([x.nan_to_num(0, 0, 0).sum(), x.isfinite().sum()]) for x in columns])
        totals = self.accelerator.reduce(pairs, "sum").tolist()
        values = {key: total / count for key, (total, count) in zip(sorted(self.values), totals, strict=True) if count}
        now = time.perf_counter()
        speeds = {"pictures_per_second": examples * self.updates, "data_wait": self.waited}
        speeds = {key: amount / (now - self.since) for key, amount in speeds.items()}
        self.values, self.since, self.updates, self.waited = {}, now, 0, 0.0
        return values | speeds


class Guard:
    """Watches that every loss and gradient is finite.

    Where reading costs nothing (a CPU), or updates may be skipped, it looks before the optimizer steps; elsewhere it keeps the
    values on the device and reads them before anything is logged, shown or saved.
    """

    def __init__(self, accelerator: Accelerator, state: TrainState, most: int, name: Callable[[int], str]):
        self.accelerator, self.state, self.most, self.name = accelerator, state, most, name
        self.now = accelerator.device.type == "cpu" or most > 0
        self.losses: dict[str, list[tuple[Tensor, Tensor]]] = {}  # optimizer -> (loss, rows) of this update's batches
        self.pending: list[tuple[int, str, list[Tensor]]] = []

    def watch(self, loss: Loss, rows: Tensor) -> None:
        """See the loss of a batch, made of these rows of the data set."""
        self.losses.setdefault(loss.name, []).append((loss.value.detach(), rows))

    def allows(self, name: str, norm: Tensor) -> bool:
        """Whether the optimizer may step, given the norm of its gradient."""
        seen = self.losses.pop(name)
        scaled = self.accelerator.scaler is not None  # fp16: its scaler finds overflows in gradients, and skips them
        values = [value for value, _ in seen] + ([] if scaled else [norm])
        if not self.now:
            self.pending.append((self.state.step + 1, name, values))
            return True
        if self.finite([values])[0]:
            return True
        self.state.skipped += 1
        if self.state.skipped > self.most:
            batches = gather_object([(bool(value.isfinite()), rows.tolist()) for value, rows in seen])  # of all processes
            what = "gradient" if all(fine for fine, _ in batches) else "loss"
            rows = [row for fine, rows in batches for row in rows if what == "gradient" or not fine]
            files = ", ".join(self.name(r) for r in rows[:4]) + (", ..." if len(rows) > 4 else "")
            self.refuse(self.state.step + 1, name, what, f" on a batch with {files}")
        return scaled  # the scaler must see the step that it will skip

    def finite(self, updates: list[list[Tensor]]) -> list[bool]:
        """Whether all values of each update are finite, on every process. This waits for the device."""
        fine = [torch.stack([v.to(values[0].device) for v in values]).isfinite().all() for values in updates]
        return [mean == 1 for mean in self.accelerator.reduce(torch.stack(fine).float(), "mean").tolist()]

    def read(self) -> None:
        """Settle what was left on the device."""
        pending, self.pending = self.pending, []
        for (step, name, _), fine in zip(pending, self.finite([v for *_, v in pending]) if pending else (), strict=True):
            if not fine:
                self.refuse(step, name, "loss or gradient", "")

    def refuse(self, step: int, name: str, what: str, where: str) -> None:
        skipped = f" after {self.most} skipped updates" if self.most else ""
        raise NonFinite(
            f"the {what} of {name!r} is not finite at step {step}{where}{skipped}; the last checkpoint stands; "
            "a lower learning rate, --base.mixed-precision no or --base.max-skipped-updates may help"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Around the loop.


class Signals(contextlib.AbstractContextManager):
    """SIGINT, SIGTERM and SIGUSR1 ask the loop to save after its update and leave; a second one leaves at once."""

    CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}  # 75: saved, wants to be run again

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.code, self.armed, self.before = accelerator, 0, False, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.receive) for number in self.CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        if self.code:
            os._exit(self.CODES[number])
        self.code = self.CODES[number]
        if not self.armed:  # nothing was trained yet: nothing to save
            raise SystemExit(self.code)

    def agreed(self) -> int:
        """The exit code that some process was asked for, on all processes; 0 for none."""
        return largest(self.accelerator, self.code)


@contextlib.contextmanager
def closing(report: Report) -> Iterator[None]:
    """Let go of the console, files and trackers, whatever happened."""
    try:
        yield
    finally:
        report.close()


def main() -> None:
    """The command line: run, and turn what went wrong into a line and an exit code."""
    try:
        run(MODULE.task, CONFIG)
    except BadInput as error:
        configs.fail(error, 2)
    except NonFinite as error:
        configs.fail(error, 3)
    except checkpoint.StorageError as error:
        configs.fail(error, 4)
    except look.OutOfMemory as error:
        configs.fail(error, 5)


if __name__ == "__main__":
    main()
