"""What a run shows of its samples while it trains: a grid of them, and what `python loop.py evaluate` measures of them.

Both are made on the main process. Where that fails there is a warning, and training goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from oneloop import data
from oneloop.configs import require
from oneloop.machine.placement import batches, draw, move
from oneloop.machine.processes import on_main
from oneloop.tasks import Images, Rng
from oneloop.views.evaluate import CHUNK, Settings, alone, during


def check_judged(task: Any, cfg: Any) -> None:
    """Refuse to judge what cannot be judged.

    Raises:
        BadInput: the settings ask for it.
    """
    every = cfg.base.evaluate_steps
    require(task.judged or not every, "base.evaluate_steps", every, f"0: {alone(cfg)}")


def grids(cfg: Any) -> list[tuple[int, range]]:
    """All that is drawn while it trains: (images of a grid, numbers of those of it that are drawn together)."""
    count, num, size = cfg.base.num_samples, Settings.num, cfg.data.train_batch_size
    chunks = batches(num, CHUNK) if cfg.base.evaluate_steps else []
    judged = [(num, chunk[part.start : part.stop]) for chunk in chunks for part in batches(len(chunk), size)]
    return [(count, part) for part in batches(count, size)] + judged


def samples(run: Any) -> None:
    """A grid of the step, from the same seeds each time."""
    count = run.cfg.base.num_samples
    show(run, "samples", lambda drawn: drawn(range(count), count), run.report.images)


def judge_of(task: Any, cfg: Any, accelerator: Any) -> Callable[[], Any]:
    """What judges samples, made once, on the main process.

    Raises:
        BadInput: the settings ask for it, and there is nothing to compare with.
    """
    made = functools.cache(lambda: during(task, cfg))
    if cfg.base.evaluate_steps:
        on_main(accelerator, lambda: made() and None)
    return made


def judge(run: Any, again: bool = True) -> None:
    """The figures of the step that was just taken, where the settings ask for them; with `again` also those that there are."""
    step, every = run.learner.state.step, run.cfg.base.evaluate_steps
    if not every or step == 0 or (step % every and step < run.total):
        return
    there = lambda: (run.report.out / "evaluation" / f"{step}.json").exists()  # noqa: E731
    if again or not on_main(run.accelerator, there):
        show(run, "judgement", lambda drawn: run.judge()(step, drawn), run.report.log)


def show(run: Any, what: str, make: Callable[..., Any], tell: Callable[[Any, int], None]) -> None:
    """Tell what is made with a function that draws the samples of some numbers of a grid."""
    accelerator, learner = run.accelerator, run.learner

    def drawn(numbers: range, count: int) -> Images:
        rng = Rng.of(run.cfg.base.seed, numbers, "samples", accelerator.device)
        shown = lambda at, size: data.Fixed(run.examples, size, accelerator.device, count, numbers[0] + at, True)  # noqa: E731
        return draw(run.task, learner.models, learner.weights, learner.state.ema, shown, rng, accelerator, run.cfg)

    def told() -> None:
        try:
            made = make(drawn)
        except Exception as error:
            reason = " ".join(str(error).split())[:500]
            run.report.say(f"warning: no {what} of step {learner.state.step}: {type(error).__name__}: {reason}")
        else:
            tell(made, learner.state.step)

    move(learner.models, run.idle, accelerator.device)
    on_main(accelerator, told)
    move(learner.models, run.idle, "cpu")
