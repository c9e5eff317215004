"""Class images that are drawn before training, by the model as it was, for DreamBooth's prior preservation (Ruiz et al. 2022,
arXiv:2208.12242, section 3.2).

Image n is a function of the task's settings and n: a run's seed is no part of its key, and it is always drawn in the company of
the same BATCH numbers, since matrix products of another shape may round otherwise. So processes, batch sizes, resuming and the
number of images change nothing, and runs share a folder (inputs/drawn.py).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from oneloop import configs
from oneloop.configs import BadInput, require
from oneloop.inputs import drawn, sources
from oneloop.machine import files, placement
from oneloop.machine.processes import gather, in_turns, on_main
from oneloop.tasks import Encoders, Models, Rng, Task

BATCH = 4
"""Images that are drawn at a time, as in the official scripts; half as many after the memory did not suffice."""
SEED = 0
"""Of the images, whatever a run's: another run finds them drawn."""


def draw(task: Task, cfg: Any, accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Draw what `class_data_dir` lacks of `num_class_images`. All processes share it, and their models are gone when this
    returns; where nothing is lacking none is loaded.

    Raises:
        BadInput: this task draws none; the folder has images of something else, cannot be written, or is another data set's; or
            what the run will be trained on cannot be opened.
    """
    if not cfg.data.num_class_images:
        return
    wanted = asked(task, cfg)
    look = functools.partial(drawn.look, wanted)
    missing, remark = in_turns(accelerator, look)
    if remark:
        say(remark)
    if not any(gather(accelerator, bool(missing))):
        return
    encoders = task.encoders(cfg)  # mistakes of the model, and of the data, before what takes long
    with blank(cfg) as other:
        in_turns(accelerator, functools.partial(sources.open_for, task, other))
    with contextlib.ExitStack() as locked:
        on_main(accelerator, lambda: take(wanted, locked, say))
        models = functools.cache(lambda: untouched(task, task.prior.settings(cfg), accelerator, encoders))
        ranks, host = gather(accelerator, socket.gethostname()), socket.gethostname()
        neighbours = [rank for rank, other in enumerate(ranks) if other == host]
        for peers in (range(len(ranks)), neighbours):  # these for what they miss on a disk that others do not see
            lists = gather(accelerator, in_turns(accelerator, look)[0])
            if not any(lists):
                break
            if todo := lists[peers[0]]:
                what = f"{len(todo):,} of {wanted.count:,} class images of {cfg.data.class_prompt!r}"
                say(f"drawing {what} into {wanted.folder}, before training")
            part = (peers.index(accelerator.process_index), len(peers))
            together(accelerator, functools.partial(fill, task, cfg, accelerator, wanted, todo, part, models))
    models.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def asked(task: Task, cfg: Any) -> drawn.Wanted:
    """What the settings ask for.

    Raises:
        BadInput: the task draws no class images, or the folder is, holds or lies in one of something else.
    """
    count, group = cfg.data.num_class_images, configs.task_group(cfg)
    where = f"0: {group} draws no class images; put some into --data.class-data-dir"
    require(task.prior is not None, "data.num_class_images", count, where)
    folder = Path(cfg.data.class_data_dir).expanduser()
    others = [("--data.train-data-dir", cfg.data.train_data_dir), ("--data.validation-data-dir", cfg.data.validation_data_dir)]
    others += [("--data.mixture", part.train_data_dir) for part in cfg.data.mixture]
    inside = lambda one, other: Path(one).expanduser().resolve().is_relative_to(Path(other).expanduser().resolve())  # noqa: E731
    for flag, other in (*others, ("--base.output-dir", cfg.base.output_dir)):
        if other and (inside(other, folder) or (inside(folder, other) and flag != "--base.output-dir")):
            apart = "images that are drawn into one would be found in the other; expected folders beside each other"
            raise BadInput(f"{drawn.FLAG} {folder} and {flag} {other}: {apart}")
    of, how = (json.loads(json.dumps(dict(words(cfg)), default=str)) for words in (task.prior.of, task.prior.how))
    return drawn.Wanted(folder, count, of, how)


def take(wanted: drawn.Wanted, locked: contextlib.ExitStack, say: Callable[[str], None]) -> None:
    """Have the folder to oneself; while another run draws into it, which may draw the same, wait."""
    said = functools.cache(lambda holder: say(f"{wanted.folder}: waiting for {holder}, which draws into it"))
    files.take(wanted.folder, drawn.FLAG, locked, lambda holder: (said(holder), time.sleep(0.2)))
    for left in (wanted.folder / files.WORK).glob("drawn-*"):  # by a writer that was killed
        files.erase(left)


def together(accelerator: Accelerator, function: Callable[[], None]) -> None:
    """Call on all processes; what one raises all do, when all have ended."""
    error = None
    try:
        function()
    except Exception as trouble:
        error = trouble
    if error := next(filter(None, (error, *gather(accelerator, error))), None):
        raise error


def untouched(task: Task, cfg: Any, accelerator: Accelerator, encoders: Encoders | None) -> Models:
    """The models as they are before training, on the device; encoders have done their work and are gone before the others are
    loaded, as in training."""
    made = None
    if encoders is not None:
        models, made = encoders.load(cfg), {}
        placement.place(models, accelerator, False, task.float32)
        for size in sizes():
            with torch.no_grad(), accelerator.autocast():
                made |= encoders.prompts(models, (), keys(range(size), accelerator), cfg)
        del models
        gc.collect()
    models = task.prior.load(cfg, made)
    placement.place(models, accelerator, False, task.float32)
    return models


def sizes() -> Iterator[int]:
    """BATCH, and in what a batch is drawn where the memory does not suffice."""
    size = BATCH
    while size:
        yield size
        size //= 2


def keys(numbers: Iterable[int], accelerator: Accelerator) -> Rng:
    """What images of these numbers are drawn from."""
    return Rng.of(SEED, numbers, "class", accelerator.device)


def fill(
    task: Task,
    cfg: Any,
    accelerator: Accelerator,
    wanted: drawn.Wanted,
    todo: list[int],
    part: tuple[int, int],
    models: Callable[[], Models],
) -> None:
    """Draw and write the numbers of `todo` that are this process's part: which one, of how many."""
    batches = [list(group) for _, group in itertools.groupby(todo, lambda number: number // BATCH)][part[0] :: part[1]]
    own = task.prior.settings(replace(cfg, data=replace(cfg.data, train_batch_size=BATCH)))
    share = f"class images, a part of {part[1]}" if part[1] > 1 else "class images"
    shown = None if accelerator.is_main_process else True
    with tqdm(total=sum(map(len, batches)), desc=share, unit="image", disable=shown) as bar:
        for numbers in batches:
            first = numbers[0] // BATCH * BATCH
            rng = keys(range(first, first + BATCH), accelerator)
            images = placement.draw(task, models(), {}, {}, lambda *_: (), rng, accelerator, own)["samples"]
            for number in numbers:
                drawn.write(wanted, number, levels(number, images[number - first], accelerator))
                bar.update()


def levels(number: int, image: Tensor, accelerator: Accelerator) -> Any:
    """An image [3, H, W] in [0, 1] as [H, W, 3] uint8."""
    if not image.isfinite().all():
        precision = f"in the precision {accelerator.mixed_precision}; expected another --base.mixed-precision"
        raise BadInput(f"class image {number} has values that are no numbers {precision}")
    return (255 * image.float()).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing is drawn.


@contextlib.contextmanager
def planned(task: Task, cfg: Any) -> Iterator[Any]:
    """The settings with which data are checked, or a run's cost is estimated: as they are where no class image is lacking;
    else a line says how many would be drawn, and blank images stand in for all of them, or, where data are checked, there
    are those alone that there are."""
    if not (cfg.data.num_class_images and (cfg.base.check or cfg.base.dry_run)):
        yield cfg
        return
    wanted = asked(task, cfg)
    missing, _ = drawn.look(wanted)
    if not missing:
        yield cfg
        return
    if PartialState(cpu=not torch.accelerator.is_available()).is_main_process:
        print(f"class images: {len(missing):,} of {wanted.count:,} would be drawn into {wanted.folder} first")
    if cfg.base.dry_run:
        with blank(cfg) as other:
            yield other
        return
    some = wanted.count > len(missing)
    yield replace(cfg, data=replace(cfg.data, num_class_images=0, **{} if some else {"class_data_dir": None}))


@contextlib.contextmanager
def blank(cfg: Any) -> Iterator[Any]:
    """The settings with a folder of blank images in the place of class images, as many as a batch may ask for."""
    with tempfile.TemporaryDirectory() as folder:
        side = cfg.data.resolution
        Image.new("L", (side, side)).save(Path(folder, drawn.name_of(0)))
        for number in range(1, min(cfg.data.num_class_images, cfg.data.train_batch_size)):
            Path(folder, drawn.name_of(number)).symlink_to(drawn.name_of(0))
        yield replace(cfg, data=replace(cfg.data, class_data_dir=folder, num_class_images=0))
