"""One judgement: samples beside the images that were held out and those of the training, before every judge there is."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

from oneloop import data
from oneloop.configs import BadInput, example_cache
from oneloop.evaluation import drawings, features, measures, models
from oneloop.inputs import sources

MOST, BYTES = 10_000, 2**30
"""Images of each set of the data that are looked at, spread evenly over it, and what they take at most."""
SHOWN = 12
"""Samples that are shown above the training images nearest to them."""


@dataclass(frozen=True)
class Sets:
    """What samples are compared with, [N, 3, H, W] uint8 each; labels [N], or None where there are none."""

    held_out: Tensor | None
    """None where nothing was, and models say how alike samples and training images are."""
    held_out_labels: Tensor | None
    trained: Tensor
    trained_labels: Tensor | None
    captions: list[str] | None
    """Of the training images; None where the task has none."""
    about: str
    """What was held out, in a line."""
    drawings: bool
    """Whether all of them are embedded shapes."""


def open_sets(task: Any, cfg: Any, given: str | None, split: str, num: int, unheld: bool = False) -> Sets:
    """The images of a run's training, and those to compare with: `given`, a folder or the name of a data set with this split;
    or what the run held out; or, of the embedded shapes, drawings that are none of its own; or, `unheld`, nothing.

    Raises:
        BadInput: there is nothing to compare with, or less than the distances take.
    """
    source = sources.open_for(task, cfg)
    own = cfg.data.dataset_name == "shapes" and not (cfg.data.train_data_dir or cfg.data.stream or cfg.data.parts())
    if given is not None:
        is_folder = Path(given).expanduser().is_dir() and not any(Path(given).expanduser().rglob("*.parquet"))
        named = {"train_data_dir": given} if is_folder else {"train_data_dir": None, "dataset_name": given, "split": split}
        with said_of_data():
            other, about = open_other(task, cfg, **named), given if is_folder else f"{given}, {split}"
    elif source.held_out is not None:
        other, about = source.held_out, f"{source.held_out.size} images that the run held out"
    elif own:
        count = max(num, 1000)
        other = open_other(task, cfg, num_shapes=cfg.data.num_shapes + count)
        other = sources.select(other, list(range(cfg.data.num_shapes, cfg.data.num_shapes + count)))
        about = f"{count} drawings that the run did not have"
    elif unheld:
        return Sets(None, None, *images(source, cfg), "the training images: the run held out none", False)
    else:
        raise BadInput(
            "the run held out no images: --data.validation-split holds some out, `evaluate --data` names others to compare "
            "with, and `evaluate --model` compares with the training images alone"
        )
    with said_of_data() if given is not None else contextlib.nullcontext():
        held_out, labels, _ = images(other, cfg)
    trained, known, captions = images(source, cfg)
    for what, found in (("to compare with", held_out), ("to train on", trained)):
        if len(found) < measures.LEAST:
            few = f"{about}: {len(found)} images {what}"
            if unheld and given is None:
                return Sets(None, None, trained, known, captions, f"the training images; {few}, too few for distances", False)
            raise BadInput(f"{few}; expected at least {measures.LEAST}, or `evaluate --model`, and not --data")
    return Sets(held_out, labels, trained, known, captions, about, own and given is None)


@contextlib.contextmanager
def said_of_data() -> Iterator[None]:
    """Mistakes in what --data names are said of it, not of the settings of a run."""
    try:
        yield
    except BadInput as error:
        said = re.sub(r"--data\.(train-data-dir|dataset-name)", "--data", str(error)).replace("--data.split", "--split")
        said = said.replace("--data.skip-broken leaves them out", "move them elsewhere")
        raise BadInput(said if said.startswith("--data") else f"--data: {said}") from None


def open_other(task: Any, cfg: Any, **named: Any) -> Any:
    """Another data set, of these settings, opened as this run would open it alone: all of it, and nothing beside it."""
    alone = replace(cfg.data, validation_split=None, validation_data_dir=None, max_train_samples=None, mixture=())
    alone = replace(alone, class_data_dir=None, num_class_images=0, stream=None)
    return sources.open_for(task, replace(cfg, data=replace(alone, **named)))


def images(source: Any, cfg: Any) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """At most MOST images of a source, spread evenly over it and of its most frequent size, their labels and captions."""
    examples = data.opened(source, cfg.data, cfg.base.seed, example_cache(cfg), say=lambda text: None)
    most = min(MOST, max(BYTES // (3 * cfg.data.resolution**2), measures.LEAST), examples.size)
    batches = list(examples.fixed(min(256, most), most, alike=True))
    labels = torch.cat([batch["label"] for batch in batches]) if "label" in batches[0] else None
    captions = [text for batch in batches for text in batch["caption"]] if "caption" in batches[0] else None
    return torch.cat([batch["pixel_values"] for batch in batches]), labels, captions


def judges(sets: Sets, named: tuple[str, ...], folder: Path) -> list[features.Features]:
    """What makes features: the models that are named, and a classifier of the training's labels, where there are any.

    Raises:
        BadInput: a model cannot be loaded, or what measures distances of features is not installed.
    """
    labelled = sets.held_out is not None and sets.trained_labels is not None and sets.trained_labels.unique().numel() > 1
    if sets.held_out is not None and (named or labelled):
        measures.distances()
    found = [models.open_model(name) for name in named]
    if labelled:
        known = sets.held_out_labels is not None
        held_out = (sets.held_out, sets.held_out_labels) if known else None
        found.append(features.train_classifier(sets.trained, sets.trained_labels, held_out, folder))
    return found


def spread(images: Tensor, count: int) -> Tensor:
    """So many of the images, or all where there are fewer, spread evenly over them."""
    count = min(count, len(images))
    return images[torch.arange(count) * len(images) // count]


def judge(samples: Tensor, sets: Sets, judges: list[features.Features], prompts: list[str] | None = None) -> dict[str, Any]:
    """Everything that is measured of samples [N, 3, H, W] uint8, drawn after these prompts: under `features` what each judge
    says of them, and of as many training images in their place (the floor); under `drawings` what the exact reader says; under
    `copies` the share of samples that are nearer to a training image than 95 % of the held-out images are."""
    result: dict[str, Any] = {"held out": sets.about, "features": {}}
    for one in judges:
        result["features"][one.name.partition(" of ")[0]] = {"about": one.name} | scored(one, samples, sets, prompts)
    if sets.held_out is None:
        return result
    near = measures.nearest(spread(sets.held_out, 1000), sets.trained)[0].quantile(0.05)
    copied = measures.nearest(samples, sets.trained)[0] < near
    result["copies"] = measures.share(copied) | {"held out": 0.05, "nearer than": float(near)}
    if sets.drawings:
        result["drawings"] = drawings.judge(samples, sets.held_out)
    return result


def scored(one: features.Features, samples: Tensor, sets: Sets, prompts: list[str] | None) -> dict[str, measures.Measures]:
    """What one judge says of the samples, and of training images in their place."""
    rows = spread(torch.arange(len(sets.trained)), len(samples))
    made, floor = one(samples), one(sets.trained[rows])
    found: dict[str, Any] = {"samples": {}, "floor": {}}
    if sets.held_out is not None:
        reference = one(sets.held_out)
        found = {"samples": measures.compare(made, reference), "floor": measures.compare(floor, reference)}
    if one.angles:
        alike = lambda x, _: {"similarity": measures.similarity(x, floor)}  # noqa: E731
        found["samples"] |= measures.jackknife(alike, made, floor, measures.GROUPS)
        if len(floor) > 1:
            found["floor"] |= {"similarity": {"value": measures.similarity(floor, floor)}}
    if one.text is not None and prompts:
        found["samples"]["clip score"] = measures.clip_score(made, one.texts(prompts))
        if sets.captions and len(floor) > 1:
            own = [sets.captions[row] for row in rows.tolist()]
            found["floor"]["clip score"] = measures.clip_score(floor, one.texts(own))
    return found


def told(result: dict[str, Any]) -> Iterator[str]:
    """The result in lines for a console."""
    as_text = lambda e: f"{e['value']:.4g}" + (f" ({e['low']:.4g} to {e['high']:.4g})" if "low" in e else "")  # noqa: E731
    yield f"compared with {result['held out']}"
    for kind in result["features"].values():
        yield f"{kind['about']}:"
        for name, value in kind["samples"].items():
            yield f"    {name} {as_text(value)}" + (f"; floor {as_text(floor)}" if (floor := kind["floor"].get(name)) else "")
    for name, value in result.get("drawings", {}).get("samples", {}).items():
        yield f"{name} {as_text(value)}; held-out drawings {as_text(result['drawings']['held out'][name])}"
    if "copies" in result:
        yield f"copies of training images {as_text(result['copies'])}; held-out images {result['copies']['held out']:.4g}"


def save_neighbours(samples: Tensor, sets: Sets, path: Path) -> None:
    """A PNG of the first samples above the training images nearest to them, pixel by pixel."""
    first = samples[:SHOWN]
    known = sets.trained
    if known.shape[2:] != first.shape[2:]:
        known = F.interpolate(known.float(), first.shape[2:], mode="bilinear", antialias=True).round().to(torch.uint8)
    beside = known[measures.nearest(first, known)[1]]
    large = torch.cat([first, beside]).repeat_interleave(scale := max(1, math.ceil(64 / first.shape[-1])), -1)
    grid = make_grid(large.repeat_interleave(scale, -2).float() / 255, nrow=len(first), padding=4, pad_value=1.0)
    save_image(grid, staged := path.with_name(f"{path.stem}.writing.png"))
    staged.rename(path)
