"""One training loop for every diffusion task.

    python loop.py                               the tasks
    python loop.py ddpm --base.num-epochs 10     train; the same command again resumes
    accelerate launch loop.py ddpm               on every GPU

    from oneloop import loop; from oneloop.tasks import ddpm
    state = loop.run(ddpm.task, ddpm.Config())   the same from a script

`run` is the order of events: the output folder, the data, the checkpoint to resume from, the models, the examples, the loop,
the end. It knows nothing of diffusion: a task's functions (tasks/__init__.py) say what is trained.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

if not __package__:  # run as a file: its folder is the package `oneloop`, installed or not, and no place to import from
    folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != folder]
    sys.modules.setdefault("oneloop", ModuleType("oneloop")).__path__ = [folder]
if __name__ == "__main__":
    from oneloop.__main__ import main

    sys.exit(main())

# OpenMP's threads wait for each other spinning, which on a busy CPU costs everything: let them sleep after a moment.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop import checkpoint, configs, data
from oneloop.configs import BadInput
from oneloop.inputs import encodings, listing, sources, store
from oneloop.machine import compilation, internals, placement
from oneloop.machine.accelerator import make_accelerator, prepare_optimizer
from oneloop.machine.files import flaws
from oneloop.machine.kernels import kernels
from oneloop.machine.memory import Memory, peak_memory
from oneloop.machine.placement import (
    altered,
    at_rest,
    identity,
    make_models,
    move,
    same_buffers,
    seed_layers,
    trained,
    trains,
)
from oneloop.machine.processes import company, in_turns, on_main, share
from oneloop.tasks import Batch, Encoding, Loss, Models, Optims, Rng, Task, hash64, of_settings
from oneloop.training import ema, fused, optimizers, prior, rounding, validation
from oneloop.training.guard import Guard
from oneloop.training.losses import in_order, no_leak, same_gradients
from oneloop.training.meter import Meter
from oneloop.training.profiling import profiled
from oneloop.training.signals import Signals
from oneloop.views import data_report, estimate, showing
from oneloop.views.console import Report, clock
from oneloop.views.introduction import introduce
from oneloop.views.loading import load_file
from oneloop.views.publish import owed, publish
from oneloop.views.trackers import check_trackers

EXPORT_EXAMPLES = 1024
"""Examples over which a checkpoint's export may measure something of the data; the last one has all of them."""


@dataclass
class TrainState:
    """Everything that training changes."""

    models: Models
    """Those that train or that the task keeps, as the task made them."""
    optims: Optims
    ema: dict[str, Tensor] = field(default_factory=dict)
    """'model.parameter' -> its EMA, for what requires a gradient; empty without EMA."""
    follows: dict[str, Tensor] = field(default_factory=dict)
    """'model.parameter' of the models that follow others -> the parameter itself, which is an EMA."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """'length/model.parameter' -> its EMA of one of `--base.ema-lengths`."""
    step: int = 0
    """Optimizer steps taken."""
    examples: int = 0
    """Examples trained on: the number of the next one."""
    skipped: int = 0
    """Optimizer steps left out because a loss or gradient was not finite."""

    @property
    def averages(self) -> dict[str, Tensor]:
        """All that is averaged."""
        return self.ema | self.follows | self.kept

    def __repr__(self) -> str:
        return f"TrainState(step {self.step}, {self.examples} examples, models {', '.join(self.models)})"


@dataclass(frozen=True)
class Learner:
    """The models and optimizers of a run, and views of them; of all this, training changes `state` alone."""

    state: TrainState
    models: Models
    """All, as the task made them."""
    called: Models
    """All, as losses call them: those that train behind the wrapper that reduces gradients across processes."""
    optims: Optims
    """As they are stepped."""
    weights: dict[str, Tensor]
    """'model.parameter' -> the parameter, for what requires a gradient."""
    averages: list[ema.Ema]
    """What fills `state.averages`; the first is what is exported."""
    shared: list[torch.nn.Module]
    """Modules whose buffers every process takes from the main one after each step."""
    params: dict[str, list[Tensor]]
    """Optimizer -> its parameters."""
    peaks: dict[str, list[float]]
    """Optimizer -> the peak learning rate of each of its groups."""
    fused: dict[str, fused.Fused]
    """Optimizer -> what steps it in the backward pass, where that is asked for."""


@dataclass(frozen=True)
class Run:
    """What a run consists of once it is set up."""

    task: Task
    cfg: Any
    accelerator: Accelerator
    report: Report
    saves: checkpoint.Saves
    learner: Learner
    guard: Guard
    examples: data.Examples
    held_out: data.Examples | None
    encodings: Mapping[str, Encoding]
    """Those that are left to the step, or to the models beside what trains; frozen all."""
    idle: set[str]
    """Models that only encode what is cached: off the device but for samples."""
    manifest: dict[str, Any]
    """What a checkpoint's manifest says of the run."""
    total: int
    """Optimizer steps of the whole run."""
    factor_at: Callable[[int], float]
    """Optimizer step -> the factor on the peak learning rates."""
    judge: Callable[[], Callable[..., dict[str, float]]]
    """What judges samples while it trains (views/evaluate.py), made once, on the main process."""


def run(task: Task, cfg: Any) -> TrainState | None:
    """Train `task` as `cfg` says, from the last checkpoint in its output folder; returns the final state, or None where the
    settings ask for a check or an estimate alone.

    Raises:
        BadInput: the settings do not fit the data, the model or the run in the output folder; nothing was written.
        NonFinite: a loss or gradient was not finite. checkpoint.StorageError: a save failed. memory.OutOfMemory: it says what
            took the memory.
        SystemExit: code 75, 130 or 143 after SIGUSR1, SIGINT or SIGTERM, with everything saved.
    """
    task = replace(task, encodings=of_settings(task.encodings, cfg))
    with prior.planned(task, cfg) as planned:
        showing.check_judged(task, cfg)
        if cfg.base.check:
            return data_report.check(task, planned)
        if cfg.base.dry_run:
            return estimate.estimate(run, task, planned)
    started, name = time.perf_counter(), configs.task_group(cfg)
    out = Path(cfg.base.output_dir or f"runs/{name}").expanduser()
    cfg = replace(cfg, base=replace(cfg.base, output_dir=str(out)))
    check_trackers(cfg.base)
    accelerator = make_accelerator(cfg.base, out)
    report, memory = Report(accelerator, out, cfg), Memory(cfg, accelerator.device)
    saves = checkpoint.Saves(accelerator, out, cfg.base.checkpoints_total_limit, report.say)
    with (
        company(accelerator),
        checkpoint.lock(out, accelerator),
        closing(report),
        saves,
        memory,
        kernels(cfg.base),
        Signals(accelerator) as signals,
    ):
        # The data set, with class images that are drawn first, the checkpoint to resume from, and how far there is to go.
        prior.draw(task, cfg, accelerator, report.say)
        source = in_turns(accelerator, functools.partial(sources.open_for, task, cfg))  # what one asks of a far set is cached
        cfg = task.resolve(cfg, sources.facts(source))
        resumed = on_main(accelerator, lambda: checkpoint.find(out, cfg.base.resume_from_checkpoint, report.say))
        saved, manifest = resumed or (None, {"step": 0, "examples": 0, "skipped": 0})
        own = {"task": name, "stream": internals.stream()}
        refuse_changes(manifest, own, configs.changes(manifest["settings"], cfg) if resumed else ())
        total = length(cfg, source.pass_length(), manifest, accelerator.num_processes)
        source = replace(source, asked=listing.asked(cfg, accelerator.num_processes, total, manifest))
        factor_at = schedule(cfg.base, total)
        complete = manifest["step"] >= total
        finished = not on_main(accelerator, lambda: owed(out, cfg, manifest, complete))
        if finished:
            longer = "--base.num-epochs or --base.max-train-steps makes it longer"
            report.say(f"{out}: already done, {manifest['step']} of {total} steps; {longer}")

        # The images, decoded and checked; and what frozen encoders make of them, which are gone before the large models come.
        encoders = task.encoders(cfg)
        opened = functools.cache(lambda: open_examples(accelerator, cfg, source, manifest, report.say))
        constants = encodings.encode_first(encoders, task, cfg, accelerator, opened, showing.grids(cfg), report.say)

        # The models, their optimizers and their EMA, as the checkpoint has them.
        learner = make_learner(task, cfg, accelerator, manifest, memory, constants)
        facts = own | identity(learner.models, encoders)
        refuse_changes(manifest, own, altered(manifest, learner.models, encoders) if resumed else ())
        checkpoint.attach(accelerator, learner.state.models, learner.state.averages)
        if resumed:
            checkpoint.load(accelerator, saved, report.say)
        if accelerator.is_main_process:
            saves.tidy(learner.state.step)
        if finished:
            return learner.state
        if complete and on_main(accelerator, lambda: flaws(saved, checkpoint.part(manifest, False))):
            saved = None  # its export is made anew

        # Without encoders the images are opened here, after mistakes of the models were found. From here on there are files.
        examples, held_out = opened()
        judge = showing.judge_of(task, cfg, accelerator)
        report.open(learner.state.step, total, source.summary, facts["models"])
        if accelerator.is_main_process:
            checkpoint.write(out / "run.json", json.dumps(configs.run_file(cfg), indent=2) + "\n")
        remarks = (data_report.remarks(accelerator, examples, out), encodings.remarks(examples, task.encodings, cfg))
        for text in itertools.chain(*remarks, task.remarks(learner.models, cfg)):
            report.say(text)
        left = {k: e for k, e in task.encodings.items() if k not in examples.encoded}
        frozen = {k: e for k, e in left.items() if (m := named(learner.models, e.models)) and not any(map(trains, m))}
        idle = encodings.encode_once(examples, frozen, learner.models, cfg, accelerator, report.say)
        move(learner.models, idle, "cpu")
        manifest = facts | {
            "module": type(cfg).__module__,
            "data": examples.fingerprint,
            "block": examples.plan.block,
            "settings": configs.to_dict(cfg),
        }
        guard = Guard(accelerator, learner.state, cfg.base.max_skipped_updates, examples.source.name)
        made = (task, cfg, accelerator, report, saves, learner, guard, examples, held_out, frozen, idle, manifest)
        this = Run(*made, total, factor_at, judge)

        # What every number became, said once; then the loop, and its end.
        first = examples[range(cfg.data.train_batch_size)]
        report.say(introduce(accelerator, cfg, source, learner.models, first, learner.state, total))
        if examples.reside(accelerator.device):
            report.say(f"the decoded images stay on {accelerator.device}")
        warm_up(this, first)
        traces = out / "profile" if accelerator.is_main_process else None
        with contextlib.closing(profiled(stream(this), cfg.base, traces, report.say)) as batches:
            saved = train(this, batches, signals, saved)
        if code := signals.agreed():
            report.say(f"stopped by a signal after step {learner.state.step}; saved {saved}; the same command resumes")
            raise SystemExit(code)
        lines = on_main(accelerator, lambda: publish(saved, out, cfg, source.summary, learner.state.step, task.card(cfg)))
        took = f"{clock(time.perf_counter() - started)}, {peak_memory(accelerator.device)}"
        report.say(f"done in {took}; images are in {out}/samples, the result in {out}/export:\n\n{lines}")
        return learner.state


# ---------------------------------------------------------------------------------------------------------------------
# Setting up.


def refuse_changes(before: dict[str, Any], now: dict[str, Any], settings: Iterable[str] = ()) -> None:
    """Refuse to resume another run: what the checkpoint's manifest says of it, against what this one is.

    Raises:
        BadInput: with both values of everything that differs.
    """
    differ = [f"{k} was {before[k]} and is now {v}" for k, v in now.items() if k in before and before[k] != v] + list(settings)
    if differ:
        raise BadInput(f"the output folder holds another run: {'; '.join(differ)}; give another --base.output-dir")


def examples_per_step(cfg: Any, processes: int) -> int:
    """Examples in one optimizer step, of all processes and accumulated batches."""
    return cfg.data.train_batch_size * processes * cfg.base.gradient_accumulation_steps


def length(cfg: Any, rows: float, manifest: dict[str, Any], processes: int) -> int:
    """Optimizer steps of the whole run, with those that the checkpoint has: as many as settings ask for, or as are needed for
    the rest of `num_epochs` passes of `rows` examples with this number of examples per step."""
    left = math.ceil(round(cfg.base.num_epochs * rows - manifest["examples"], 6) / examples_per_step(cfg, processes))
    return cfg.base.max_train_steps or manifest["step"] + max(left, 0)


def schedule(base: configs.Base, total: int) -> Callable[[int], float]:
    """Optimizer step -> the factor on the peak learning rate for the step that follows: diffusers' own schedules, read as
    functions, so that nothing has to be stepped or saved."""
    from diffusers.optimization import get_scheduler

    warmup = min(total // 20, 500) if base.lr_warmup_steps is None else base.lr_warmup_steps
    if warmup >= total and base.lr_scheduler != "constant":
        raise BadInput(f"--base.lr-warmup-steps is {warmup}; expected fewer than the run's {total} optimizer steps")
    probe = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cycles = {"num_cycles": base.lr_num_cycles, "power": base.lr_power}
    made = get_scheduler(base.lr_scheduler, probe, num_warmup_steps=warmup, num_training_steps=total, **cycles)
    return made.lr_lambdas[0]


def make_learner(
    task: Task,
    cfg: Any,
    accelerator: Accelerator,
    manifest: dict[str, Any],
    memory: Memory,
    constants: Mapping[str, Tensor] | None,
) -> Learner:
    """The models and optimizers as the task makes them, on the device, prepared for several processes; `constants`: what its
    encoders left.

    What requires a gradient trains; the rest is frozen.
    """
    base = cfg.base
    models = make_models(task, cfg, accelerator, constants)
    state = TrainState(placement.saved(models, task), task.make_optim(models, cfg))
    state.step, state.examples, state.skipped = (manifest[name] for name in ("step", "examples", "skipped"))
    weights = trained(models)
    for k, optim in state.optims.items() if base.weights != "float32" else ():
        rounding.attach(optim, base.seed, k)
    if base.use_ema:
        state.ema = ema.begin(weights, base.offload_ema)
    decay = lambda step, _: ema.decay_at(step, base.ema_decay, base.ema_power)  # noqa: E731
    followed = list(weights.values())
    shown = ema.Ema(state.ema, followed, decay, base.offload_ema, lambda: optimizers.averaged(state.optims, followed))
    following, kept = ema.following(models, task.follows, cfg), ema.of_lengths(weights, base)
    state.follows, state.kept = ({key: x for each in some for key, x in each.values.items()} for some in (following, kept))
    memory.watch(models, state)
    if accelerator.mixed_precision == "fp16" and len(state.optims) > 1:
        several = f"fp16's one loss scale cannot follow {len(state.optims)} optimizers ({', '.join(state.optims)})"
        raise BadInput(f"--base.mixed-precision is 'fp16'; expected auto, bf16 or no: {several}")
    fused.check(base, accelerator)
    if base.compile:
        compilation.compile_models(
            {k: m for k, m in state.models.items() if trains(m)}, accelerator.device, base.gradient_accumulation_steps
        )
    scale = examples_per_step(cfg, accelerator.num_processes) if base.scale_lr else 1
    return Learner(
        state,
        models,
        # They are placed: accelerate would bring what is offloaded.
        called=models | {k: accelerator.prepare_model(m, False, not trains(m)) for k, m in state.models.items()},
        optims={k: prepare_optimizer(accelerator, o) for k, o in state.optims.items()},
        weights=weights,
        averages=[shown, *following, *kept],
        shared=[models[name] for name in dict.fromkeys([*task.keeps, *(follow.of for follow in task.follows.values())])],
        params={k: [p for group in o.param_groups for p in group["params"]] for k, o in state.optims.items()},
        peaks={k: [group["lr"] * scale for group in o.param_groups] for k, o in state.optims.items()},
        fused={k: fused.Fused(o) for k, o in state.optims.items()} if base.fused_backward_pass else {},
    )


def named(models: Models, names: Iterable[str]) -> list[torch.nn.Module]:
    """Those of the models that there are."""
    return [models[name] for name in names if name in models]


def open_examples(
    accelerator: Accelerator, cfg: Any, source: sources.Source, manifest: dict[str, Any], say: Callable[[str], None]
) -> tuple[data.Examples, data.Examples | None]:
    """The examples to train on and those held out, decoded once on each machine, and cached unless `manifest` is of others."""
    cache, broken, block = configs.example_cache(cfg), Path(cfg.base.output_dir) / "broken.txt", manifest.get("block")

    def opened() -> list[data.Examples]:
        sets = [data.opened(s, cfg.data, cfg.base.seed, cache, broken, block, say) for s in (source, source.held_out) if s]
        if manifest.get("data", sets[0].fingerprint) != sets[0].fingerprint:
            refuse_changes(manifest, {"data": sets[0].fingerprint}, data_report.differences(sets[0], broken.parent))
        for examples in sets if accelerator.is_local_main_process else ():
            examples.cache(say)
        if accelerator.is_main_process and cache == Path(cfg.base.output_dir) / "examples":
            store.tidy(cache, {examples.cache_path for examples in sets})
        return sets

    examples, *rest = in_turns(accelerator, opened) if cache else opened()
    several, size, block = len(examples.plan.sizes) > 1, cfg.data.train_batch_size, examples.plan.block
    configs.require(
        not several or block % size == 0, "data.train_batch_size", size, f"a divisor of {block}: examples in a row of one size"
    )
    return examples, (rest[0] if rest else None)


def warm_up(run: Run, first: Batch) -> None:
    """Passes whose gradients are thrown away, where they are needed before the first step.

    DDP orders its gradient buckets anew after its first backward pass, and the order of a sum of three or more changes its
    last bits: after this pass a resumed run sums in the order of one that never stopped.
    """
    once = functools.partial(rehearse, run, first)
    with same_buffers(run.learner.models):
        if run.accelerator.num_processes > 2:
            once()
        if run.cfg.base.compile:
            run.report.say(compilation.price(run.accelerator, once, run.cfg.base.gradient_accumulation_steps))


def rehearse(run: Run, first: Batch) -> None:
    """One pass whose gradients are thrown away. Its `step` is the run's last, for losses that start late."""
    rng = Rng.of(run.cfg.base.seed, first["n"].tolist(), device=run.accelerator.device)
    for loss in losses(run, first, rng, run.learner.called, run.total, "warm-up"):
        run.accelerator.backward(loss.value)
    for module in run.learner.called.values():
        module.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def stream(run: Run) -> Generator[Batch]:
    """The batches of this process, from the next example of the run on.

    Example n is the same whatever the layout: processes take turns, a batch each.
    """
    size, accelerator = run.cfg.data.train_batch_size, run.accelerator
    first = run.learner.state.examples + accelerator.process_index * size
    return run.examples.stream(first, size * accelerator.num_processes)


def train(run: Run, batches: Iterator[Batch], signals: Signals, saved: Path | None) -> Path:
    """Optimizer steps until the run is complete or a signal asks to stop; returns the last checkpoint, which is committed."""
    accelerator, base, learner, report = run.accelerator, run.cfg.base, run.learner, run.report
    state, per_step = learner.state, examples_per_step(run.cfg, accelerator.num_processes)
    meter, compared = Meter(accelerator, len(learner.optims) > 1), set()
    signals.training = True
    drawn = lambda: any(run.report.out.glob(f"samples/{state.step}*.png"))  # noqa: E731
    if validates(run) and not on_main(accelerator, drawn):  # before the first step; or saved, and killed before this
        validate(run)
    showing.judge(run, again=False)
    while state.step < run.total and not signals.agreed():
        factor = set_rates(run)
        for batch in meter.fetch(batches, base.gradient_accumulation_steps):
            numbers, rows = batch["n"].tolist(), batch["index"]
            rng = Rng.of(base.seed, numbers, device=accelerator.device)
            seed_layers(accelerator.device, hash64(base.seed, "layers", numbers[0]))
            with accelerator.accumulate(*(learner.called[name] for name in state.models)):
                made = losses(run, batch, rng, learner.called, state.step, "train")
                for loss in in_order(made, base.gradient_accumulation_steps):
                    with no_leak(loss, learner.params), fused.stepping(learner.fused, loss):
                        accelerator.backward(loss.value)
                    run.guard.watch(loss, rows)
                    meter.descended(loss)
                    if loss.step and accelerator.sync_gradients:  # the batch of the step is complete
                        if loss.name not in compared:
                            same_gradients(accelerator, loss.name, learner.params[loss.name])
                            compared.add(loss.name)
                        step_optimizer(run, loss.name, meter)
        state.step, state.examples = state.step + 1, state.examples + per_step
        share(accelerator, (buffer for module in learner.shared for buffer in module.buffers()))
        decay, *_ = [average.update(state.step, run.total) for average in learner.averages]
        meter.steps += 1
        report.advance()
        last = state.step == run.total
        if last or state.step % base.logging_steps == 0:
            run.guard.read()
            rates = {f"lr/{k}" if len(learner.peaks) > 1 else "lr": peak[0] * factor for k, peak in learner.peaks.items()}
            report.log(meter.read(per_step) | rates | {"ema_decay": decay}, state.step)
        if last or state.step % base.checkpointing_steps == 0:
            saved = save(run)
        if validates(run):
            validate(run)
        showing.judge(run)
    run.saves.settle()
    if saved is None or saved.name != f"checkpoint-{state.step}":  # stopped by a signal between two checkpoints
        saved = save(run)
        run.saves.settle()
    return saved


def validates(run: Run) -> bool:
    """Whether a validation belongs to the step that was just taken, or, at 0, to the start."""
    step, every = run.learner.state.step, run.cfg.base.validation_steps
    return step == run.total or (every > 0 and step % every == 0 and (step > 0 or run.cfg.base.validate_first))


def losses(run: Run, batch: Batch, rng: Rng, models: Models, step: int, phase: str) -> Iterator[Loss]:
    """The task's losses on a batch as the data plane made it, computed in the precision of the run; what happens between two
    of them is not."""
    batch = encodings.encode(run.encodings, models, run.examples.ready(batch, run.accelerator.device), run.cfg)
    made = run.task.loss_fn(models, batch | {"step": step, "total": run.total, "phase": phase}, rng, run.cfg)
    while True:
        with run.accelerator.autocast():
            loss = next(made, None)
        if loss is None:
            return
        yield loss


def set_rates(run: Run) -> float:
    """The learning rates of the step that follows; returns the factor on their peaks."""
    factor = run.factor_at(run.learner.state.step)
    for name, optim in run.learner.optims.items():
        for group, peak in zip(optim.param_groups, run.learner.peaks[name], strict=True):
            group["lr"] = peak * factor
    return factor


def step_optimizer(run: Run, name: str, meter: Meter) -> None:
    """One optimizer step, with its gradient clipped; one that stepped in the backward pass has none left."""
    optim, params, largest = run.learner.optims[name], run.learner.params[name], run.cfg.base.max_grad_norm or math.inf
    fused = run.learner.fused.get(name)
    norm = fused.norm() if fused else run.accelerator.clip_grad_norm_(params, largest)
    meter.add("grad_norm", name, norm)
    if run.guard.allows(name, norm):
        optim.step()
    optim.zero_grad()


def validate(run: Run) -> None:
    """The loss on held-out examples, and a grid of samples; a sample that fails is a warning, and training goes on."""
    accelerator, learner, state = run.accelerator, run.learner, run.learner.state
    run.guard.read()
    run.guard.check_weights(learner.weights, state.averages)
    if run.held_out:
        move(learner.models, run.idle, accelerator.device)
        versions = {"loss": {}} | ({"loss_ema": state.ema} if state.ema else {})
        shown = {name: at_rest(learner.models, learner.weights, version) for name, version in versions.items()}
        measured = lambda batch, rng: losses(run, batch, rng, learner.models, state.step, "validate")  # noqa: E731
        with same_buffers(learner.models):
            measures = validation.measure(run.held_out, accelerator, measured, shown)
        run.report.log(measures, state.step)
    showing.samples(run)


def save(run: Run) -> Path:
    """A checkpoint of the state, inside the task's export of the EMA; returns the folder that it will be committed to."""
    learner, state = run.learner, run.learner.state
    run.guard.read()
    run.guard.check_weights(learner.weights, state.averages)

    def export(folder: Path) -> None:
        count = None if state.step == run.total else min(EXPORT_EXAMPLES, run.examples.size)
        seen = data.Fixed(run.examples, run.cfg.data.train_batch_size, run.accelerator.device, count)
        with at_rest(learner.models, learner.weights, state.ema):
            lines = run.task.export_fn(learner.models, seen, folder, run.cfg)
        (folder / "load.py").write_text(load_file(lines), "utf-8")

    now = {"examples": state.examples, "skipped": state.skipped}
    return run.saves.save(state.step, run.manifest | now, export)


@contextlib.contextmanager
def closing(report: Report) -> Iterator[None]:
    """Let go of the console, files and trackers, whatever happened."""
    try:
        yield
    finally:
        report.close()
