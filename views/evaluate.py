"""Judge what a run draws against images that it was not trained on.

    python loop.py evaluate runs/ddpm --num 1000
    python loop.py evaluate runs/ddpm/checkpoint-500
    python loop.py evaluate runs/ddpm --images others

It draws images by key, with the EMA, keeps them in evaluation/ of the output folder, and compares them with the images that the
run held out, or with --data: in features of a classifier that it trains itself where there are labels, in features of --model,
and, of the embedded shapes, exactly. The floor is what as many training images score in the place of the samples. With --images
it draws none, and compares those of a folder, which another program made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from oneloop.configs import BadInput, Name, Range, Seed, check, require, task_group
from oneloop.inputs.files import shown
from oneloop.tasks import hash64
from oneloop.views.sample import drawer, opened

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64
"""Images that are drawn, and kept, at a time."""


@dataclass(frozen=True)
class Settings:
    """Judge what a run draws against images that it was not trained on."""

    folder: Positional[Name]
    """The output folder of a run, whose last checkpoint draws, or one checkpoint-N in it."""
    num: Annotated[int, Range(32, 65_536)] = 256
    """Images that are drawn. Distances depend on the number: compare those of equal numbers."""
    seed: Seed | None = None
    """Which images. None: the run's own seed."""
    images: Name | None = None
    """Images to judge in the place of the run's own, as another program drew them: a folder, of which --num are taken, spread
    evenly over it, resized and cut to the run's size. They get no clip score: what they were drawn after is unknown."""
    data: Name | None = None
    """What to compare with: a folder of images, or a data set by name. None: what the run held out, or, where it trained on
    the embedded shapes and held out none, drawings of numbers that it did not have."""
    split: Name = "test"
    """Split of the data set that --data names."""
    model: tuple[Name, ...] = ()
    """Models whose features are compared: `inception`, the name of a torchvision model, or the folder or name of a model of
    transformers (DINOv2, or CLIP, which also reads the prompts) or diffusers."""
    task: Name | None = None
    """The task that drew, where it is not one of oneloop's: its import path, as of `sample`."""

    def __post_init__(self):
        check(self)
        if not Path(self.folder).expanduser().is_dir():
            raise BadInput(f"{self.folder}: there is no such folder; expected a run's output folder or a checkpoint-N in it")
        if self.images is not None and not Path(self.images).expanduser().is_dir():
            raise BadInput(f"--images {self.images}: there is no such folder; expected one of images")
        require(self.images is None or self.seed is None, "seed", self.seed, "none with --images, where nothing is drawn")


def main(settings: Settings) -> None:
    """Draw or open, compare, write the results, and say them.

    Raises:
        BadInput: the folder holds no run, there is nothing to judge or to compare with, or a model cannot be loaded.
            StorageError: the results could not be written.
    """
    from oneloop import checkpoint
    from oneloop.evaluation import given, judge
    from oneloop.views import page

    saved, facts, task, cfg = opened(settings.folder, settings.task, "evaluate")
    if not task.judged:
        raise BadInput(f"{settings.folder}: {alone(cfg)}")
    out, seed = saved.parent, cfg.base.seed if settings.seed is None else settings.seed
    cfg = replace(cfg, base=replace(cfg.base, output_dir=str(out), check=False, dry_run=False))
    folder, step = out / "evaluation", facts["step"]
    of = f"-of-{settings.num}" if task.prompts else ""  # captions are those of as many examples, spread over the data
    kept = folder / f"{step}-{facts['sha256'][:8]}-seed-{seed}{of}"
    path, about, prompts = folder / f"{step}.json", {"step": step, "seed": seed}, None
    there = given.listed(settings.images) if settings.images else []
    try:
        (folder if there else kept).mkdir(parents=True, exist_ok=True)
        sets = judge.open_sets(task, cfg, settings.data, settings.split, settings.num, bool(settings.model))
        if there:
            samples = given.read(there, settings.num, sets.trained if sets.held_out is None else sets.held_out, cfg)
            place = str(Path(settings.images).expanduser().resolve())
            path, about = folder / f"images-{hash64(place):016x}.json", {"images": place}
        judges = judge.judges(sets, settings.model, folder)
        if not there:
            samples = drawn(kept, saved, task, cfg, seed, settings.num)
            prompts = texts(task, cfg, seed, settings.num) if any(one.text for one in judges) else None
        result = judged(samples, sets, judges, path, about, prompts)
        if not there and (out / "run.json").is_file():
            page.write(out)
    except OSError as error:
        raise checkpoint.StorageError(f"writing {error.filename or folder} failed: {error.strerror or error}") from None
    print("\n".join(judge.told(result)))
    which = f"of {len(there)} images in {shown(settings.images)}" if there else f"images of step {step}, seed {seed}"
    print(f"{len(samples)} {which}, judged: {path}")


def judged(
    samples: Tensor, sets: Any, judges: list[Any], path: Path, about: dict[str, Any], prompts: list[str] | None = None
) -> dict[str, Any]:
    """What is measured of the samples, after what is known `about` them; written to the path too, with a PNG beside it."""
    from oneloop.evaluation import judge
    from oneloop.machine import files

    if sets.held_out is not None and samples.shape[1:] != sets.held_out.shape[1:]:
        sizes = " and ".join("x".join(map(str, x.shape[:1:-1])) for x in (samples, sets.held_out))
        raise BadInput(f"samples and the images to compare with have the sizes {sizes}; expected one size")
    result = about | {"num": len(samples)} | judge.judge(samples, sets, judges, prompts)
    judge.save_neighbours(samples, sets, path.with_suffix(".png"))
    files.write(path, json.dumps(result, indent=2) + "\n")
    return result


def alone(cfg: Any) -> str:
    """Why a run of a task that says so cannot be judged."""
    return f"{task_group(cfg)} shows what it makes of other images beside them; those that are drawn alone can be judged"


def during(task: Any, cfg: Any) -> Callable[[int, Callable[[range, int], Any]], dict[str, float]]:
    """A judge of a run that goes on: (step, what draws some numbers of a grid) -> figures by name. It compares what this
    command would compare, with the run's own seed, as many images as its default, and no models but its own classifier.

    Raises:
        BadInput: there is nothing to compare with.
    """
    import torch

    from oneloop.evaluation import judge

    folder, num = Path(cfg.base.output_dir).expanduser() / "evaluation", Settings.num
    try:
        sets = judge.open_sets(task, cfg, None, "test", num)
    except BadInput as error:
        raise BadInput(f"--base.evaluate-steps: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    judges = judge.judges(sets, (), folder)

    def figures(step: int, draw: Callable[[range, int], Any]) -> dict[str, float]:
        samples = torch.cat([pixels(draw(range(i, min(i + CHUNK, num)), num), "the task") for i in range(0, num, CHUNK)])
        result = judged(samples, sets, judges, folder / f"{step}.json", {"step": step, "seed": cfg.base.seed})
        found = [result.get("drawings", {}), *result["features"].values()]
        return {f"evaluate/{name}": value["value"] for kind in found for name, value in kind.get("samples", {}).items()}

    return figures


def pixels(images: Any, name: Any) -> Tensor:
    """A task's samples, [N, 3, H, W] uint8.

    Raises:
        BadInput: they are something else, such as reconstructions.
    """
    import torch

    if "samples" not in images:
        raise BadInput(f"{name}: its task draws {', '.join(images)}; expected samples, which alone can be judged")
    return images["samples"].float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)


def texts(task: Any, cfg: Any, seed: int, num: int) -> list[str] | None:
    """What the images 0 to `num` - 1 were drawn after; None where the task draws after no texts."""
    from oneloop import data
    from oneloop.tasks import Rng
    from oneloop.views.sample import Unopened

    if task.prompts is None:
        return None
    examples, found = Unopened(task, cfg), []
    for first in range(0, num, CHUNK):
        numbers = range(first, min(first + CHUNK, num))
        shown = data.Fixed(examples, len(numbers), "cpu", num, first, True)
        found += task.prompts(shown, Rng.of(seed, numbers, "samples"), cfg)
    return found


def drawn(folder: Path, saved: Path, task: Any, cfg: Any, seed: int, num: int) -> Tensor:
    """The images 0 to `num` - 1 of a checkpoint and a seed, [num, 3, H, W] uint8: those that the folder has from there.

    Raises:
        BadInput: the task's samples are something else, such as reconstructions.
    """
    import numpy as np
    import torch

    parts, draw = [], None
    for first in range(0, num, CHUNK):
        numbers = range(first, min(first + CHUNK, num))
        path = folder / f"{numbers[0]:06}-{numbers[-1]:06}.npy"
        if not path.is_file():
            draw = draw or drawer(saved, task, cfg, seed, num)
            made = pixels(draw(numbers), saved)
            with open(staged := path.with_suffix(".writing"), "wb") as file:
                np.save(file, made.numpy())
            staged.rename(path)
            print(f"drew {numbers[-1] + 1} of {num} images", file=sys.stderr)
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)
