"""Draw images from a run's output folder, or from one of its checkpoints.

    python loop.py sample runs/ddpm --num 16
    python loop.py sample runs/ddpm/checkpoint-500 --num 4 --to images.png

With the task's own `sample_fn`, the checkpoint's averaged weights and its own settings: for the run's seed and number of
images these are, to the bit, those of the run's own grid at that step.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from oneloop import configs
from oneloop.configs import BadInput, Images, Name, Seed, check, require
from oneloop.settings import command_line
from oneloop.views import check_writable


@dataclass(frozen=True)
class Settings:
    """Draw images with what a run has learned."""

    folder: Positional[Name]
    """The output folder of a run, whose last checkpoint draws, or one checkpoint-N in it."""
    num: Images | None = None
    """Images. None: as many as a grid of the run has."""
    seed: Seed | None = None
    """Which images. None: the run's own seed, and so its own images."""
    to: Name | None = None
    """The PNG file for the grid. None: samples/drawn/ in the output folder."""
    task: Name | None = None
    """The task that drew, where it is not one of oneloop's: its import path. Its code is run, on your word and never on that of
    a file in the folder."""

    def __post_init__(self):
        check(self)
        require(self.to is None or self.to.endswith(".png"), "to", self.to, "the name of a .png file")
        if not Path(self.folder).expanduser().is_dir():
            raise BadInput(f"{self.folder}: there is no such folder; expected a run's output folder or a checkpoint-N in it")
        if self.to:
            check_writable(Path(self.to).expanduser())


def opened(given: str, named: str | None = None, command: str = "sample") -> tuple[Path, dict[str, Any], Any, Any]:
    """A run's output folder or one of its checkpoints -> the checkpoint, its manifest, the task and its settings; `command` is
    what was asked for.

    Raises:
        BadInput: the folder holds no run, or no valid checkpoint.
    """
    from oneloop import checkpoint

    folder = Path(given).expanduser().resolve()
    is_checkpoint = (folder / "manifest.json").is_file()
    if not is_checkpoint and not list(folder.glob("checkpoint-*")):
        has = "no checkpoint yet" if (folder / "run.json").is_file() else "neither run.json nor a checkpoint"
        raise BadInput(f"{given}: holds {has}; expected a run's output folder or a checkpoint-N in it")
    warn = lambda text: print(text, file=sys.stderr)  # noqa: E731
    try:
        saved, facts = (folder, checkpoint.verify(folder)) if is_checkpoint else checkpoint.find(folder, "latest", warn)
    except checkpoint.Damaged as error:
        raise BadInput(f"{given}: not a valid checkpoint: {error}") from None
    manifest = f"{saved}/{checkpoint.MANIFEST}"
    if not isinstance(facts.get("step"), int) or not isinstance(facts.get("settings"), dict):
        raise BadInput(f"{manifest}: expected the step and the settings of a run")
    typed = f"python loop.py {command} {given} --task {facts.get('module')}"
    task = command_line.find_task(named or command_line.own_task(facts.get("module", facts.get("task")), manifest, typed)).task
    cfg = command_line.build(
        task.config, command_line.as_flags(facts["settings"], task.config, f"{manifest}: "), source=f"{manifest}: "
    )
    return saved, facts, task, cfg


def main(settings: Settings) -> None:
    """Draw, and say where the images are.

    Raises:
        BadInput: the folder holds no run, or no valid checkpoint, or what the task samples from is not there.
    """
    from oneloop import checkpoint
    from oneloop.views import console

    saved, facts, task, cfg = opened(settings.folder, settings.task)
    seed = cfg.base.seed if settings.seed is None else settings.seed
    num = settings.num or cfg.base.num_samples
    name = f"{facts['step']}-seed-{seed}-num-{num}.png"
    to = Path(settings.to).expanduser() if settings.to else saved.parent / "samples" / "drawn" / name
    check_writable(to)
    images = drawer(saved, task, cfg, seed, num)(range(num))
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        paths = console.save_grids(images, to.with_suffix(""))
    except OSError as error:
        raise checkpoint.StorageError(f"writing {to} failed: {error.strerror or error}") from None
    print(f"{num} images of step {facts['step']}, seed {seed}: {', '.join(map(str, paths))}")


def loaded(saved: Path, task: Any, cfg: Any) -> tuple[Any, Any, Any, Any]:
    """A checkpoint's models on the device, the accelerator that has them, what trains in them and its EMA, each by name."""
    from oneloop import checkpoint
    from oneloop.machine import placement
    from oneloop.machine.accelerator import make_accelerator
    from oneloop.training.ema import following, of_lengths

    accelerator = make_accelerator(cfg.base, saved)
    models = placement.make_models(task, cfg, accelerator)
    weights = placement.trained(models)
    ema = {key: p.detach().clone() for key, p in weights.items()} if cfg.base.use_ema else {}
    training = placement.saved(models, task)
    others = (*following(models, task.follows, cfg), *of_lengths(weights, cfg.base))
    for module in training.values():
        accelerator.prepare(module)  # called as in the run: in its precision
    checkpoint.attach(accelerator, training, functools.reduce(operator.or_, (each.values for each in others), ema))
    checkpoint.load(accelerator, saved)
    return accelerator, models, weights, ema


def drawer(saved: Path, task: Any, cfg: Any, seed: int, num: int) -> Callable[[range], Any]:
    """What a checkpoint draws: some of the numbers 0 to `num` - 1 of `seed` -> these images, as `Task.sample_fn` has them."""
    from oneloop import data
    from oneloop.machine import placement
    from oneloop.tasks import Rng

    cfg = replace(cfg, base=replace(cfg.base, output_dir=str(saved.parent), logger=("none",), push_to_hub=False, compile=False))
    accelerator, models, weights, ema = loaded(saved, task, cfg)
    unopened = Unopened(task, cfg)

    def draw(numbers: range) -> Any:
        shown = lambda first, count: data.Fixed(unopened, count, accelerator.device, num, numbers[0] + first, True)  # noqa: E731
        rng = Rng.of(seed, numbers, "samples", accelerator.device)
        return placement.draw(task, models, weights, ema, shown, rng, accelerator, cfg)

    return draw


@dataclass(frozen=True)
class Unopened:
    """The run's examples, opened and decoded only for a task that looks at them."""

    task: Any
    cfg: Any

    @functools.cached_property
    def examples(self) -> Any:
        from oneloop import data
        from oneloop.inputs import sources

        source = sources.open_for(self.task, self.cfg)
        return data.opened(source, self.cfg.data, self.cfg.base.seed, configs.example_cache(self.cfg))

    def fixed(self, *given: Any) -> Iterator[Any]:
        return self.examples.fixed(*given)

    def ready(self, batch: Any, device: Any) -> Any:
        return self.examples.ready(batch, device)
