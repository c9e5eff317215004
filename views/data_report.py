"""What is in a set of images: sizes, modes, captions, labels, duplicates, and what training will crop away.

    python loop.py ddpm --data.train-data-dir images --base.check

A run decodes every image once, and says at its start what somebody would want to know of them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from oneloop import checkpoint, data
from oneloop.configs import BadInput
from oneloop.families import hub
from oneloop.inputs import encodings, files, sources, store, streaming
from oneloop.inputs.buckets import enlargement
from oneloop.inputs.crop import resized
from oneloop.machine.files import read_text
from oneloop.machine.processes import on_main
from oneloop.tasks import Task

NEAR_BITS, NEAR_LEVELS, NEIGHBOURS = 3, 8.0, 64
LISTED = 1000


@dataclass(frozen=True)
class Survey:
    """A set of images in numbers."""

    fingerprint: str
    """Of the data; what it says holds for no other."""
    resolution: int
    rows: int
    notes: list[str]
    """What was left out of the set, or changed in it, when it was opened."""
    changes: dict[str, int]
    """What was changed when they were read -> images."""
    images: list[str]
    """Hashes of what they are: of each, or of each of LISTED blocks of equal length."""
    texts: list[str]
    """The same of their captions and labels."""
    broken: list[str]
    """Name and reason of each."""
    width: list[float]
    """Smallest, median and largest, in pixels, upright."""
    height: list[float]
    aspect: list[float]
    """The same of width over height."""
    modes: dict[str, int]
    """PIL's mode -> images."""
    small: int
    """Images that are enlarged."""
    cropped: list[float]
    """Mean and largest share of an image's area that is outside its crop."""
    buckets: list[list[Any]]
    """Of each size of images: width, height, images, mean and largest share that is cropped, and those that are enlarged."""
    mixture: list[list[float]]
    """Of each source of a mixture: images, repeats, weight of the loss."""
    captions: list[int] | None
    """Different ones, and images that have none."""
    empty: int
    """Images whose caption is empty."""
    labels: dict[str, int] | None
    """Class -> images."""
    exact: int
    """Images whose pixels are those of an earlier one."""
    exact_pairs: list[list[str]]
    """The first LISTED of them, by name: (earlier, this)."""
    near: int
    """Images that look like an earlier one."""
    near_pairs: list[list[str]]
    """The first LISTED of them."""


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of images.


def difference_hash(thumbs: np.ndarray) -> np.ndarray:
    """64 bits an image, [N] uint64: whether each of 8 x 9 pixels is brighter than its left neighbour, by more than what
    compression does to a flat area (N. Krawetz 2013, Kind of Like That). thumbs [N, 8, 9, 3]."""
    grey = thumbs.astype(np.int16).sum(-1)  # [N, 8, 9], three times the brightness
    bits = grey[:, :, 1:] > grey[:, :, :-1] + 6
    return np.packbits(bits.reshape(len(bits), 64), axis=1).view(np.uint64)[:, 0]


def near_pairs(thumbs: np.ndarray) -> np.ndarray:
    """For each image that looks like an earlier one such a pair (earlier, this), [P, 2]: hashes within NEAR_BITS bits, and
    colours within NEAR_LEVELS levels on average. thumbs [N, 8, 9, 3].

    Of hashes at most 3 bits apart, at least one of four 16-bit bands is equal: only images that share a band are compared,
    and of those that do, each with the NEIGHBOURS that come next in the order of hash and brightness. An image that was
    found to be like an earlier one is compared no more, so where all look alike it takes neither longer nor more memory.
    """
    hashes, brightness = difference_hash(thumbs), thumbs.reshape(len(thumbs), -1).mean(1, dtype=np.float32)
    earlier = np.full(len(thumbs), -1)
    for band in range(NEAR_BITS + 1):
        key = (hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)).astype(np.uint16)
        order = np.lexsort((brightness, hashes, key))
        for apart in range(1, min(NEIGHBOURS + 1, len(order))):
            shares = np.flatnonzero(key[order[:-apart]] == key[order[apart:]])
            if not len(shares):
                break
            i, j = np.sort([order[shares], order[shares + apart]], 0)
            close = (earlier[j] < 0) & (np.bitwise_count(hashes[i] ^ hashes[j]) <= NEAR_BITS)
            close &= np.abs(brightness[i] - brightness[j]) <= NEAR_LEVELS
            close = np.flatnonzero(close)
            for some in np.split(close, range(4096, len(close), 4096)):  # so that no block fills the memory
                x, y = thumbs[i[some]].astype(np.int16), thumbs[j[some]]
                some = some[np.abs(x - y).mean((1, 2, 3)) <= NEAR_LEVELS]
                earlier[j[some]] = i[some]
    later = np.flatnonzero(earlier >= 0)
    return np.stack([earlier[later], later], 1)


# ---------------------------------------------------------------------------------------------------------------------
# A set of them.


def survey(examples: data.Examples) -> Survey:
    """The numbers of a set whose images were inspected when they were decoded."""
    source, side, decoded = examples.source, examples.cfg.resolution, examples.images
    size, marks, thumbs = (decoded.columns[name][examples.shown].numpy() for name in ("size", "mark", "thumb"))
    spread = lambda x: [float(x.min()), float(np.median(x)), float(x.max())]  # noqa: E731
    target = decoded.columns["target"][examples.shown].numpy()  # [N, 2]
    lost = 1 - target.prod(1) / np.maximum(resized(size, target).prod(1), 1)  # [N]
    enlarged = enlargement(size, target) > 1  # [N]
    _, first, same = np.unique(marks.view("V16")[:, 0], return_index=True, return_inverse=True)
    first = first[same]  # row -> the first one with its pixels
    again = np.flatnonzero(first != np.arange(len(first)))
    exact = np.stack([first[again], again], 1)  # [P, 2]
    unique = np.flatnonzero(first == np.arange(len(first)))
    near = unique[near_pairs(thumbs[unique])]  # [Q, 2]
    named = lambda pairs: [[source.name(i), source.name(j)] for i, j in pairs[:LISTED].tolist()]  # noqa: E731
    captions = labels = None
    if source.captions is not None:
        captions = [len({t for texts in source.captions for t in texts if t}), source.captions.count([])]
    if source.labels is not None:
        names = source.classes or []
        labels = {names[label]: count for label, count in sorted(Counter(source.labels).items())}
    return Survey(
        fingerprint=examples.fingerprint,
        resolution=side,
        rows=examples.size,
        notes=list(source.notes),
        changes=decoded.changes,
        images=_images(examples, block_length(examples.size)),
        texts=_texts(examples, block_length(examples.size)),
        broken=decoded.broken,
        width=spread(size[:, 1]),
        height=spread(size[:, 0]),
        aspect=spread(size[:, 1] / size[:, 0]),
        modes=dict(Counter(decoded.modes).most_common()),
        small=int(enlarged.sum()),
        cropped=[float(lost.mean()), float(lost.max())],
        buckets=[_bucket(own, lost, enlarged, (target == own).all(1)) for own in np.unique(target, axis=0)],
        mixture=[[share.rows, share.repeats, share.weight] for share in source.shares],
        captions=captions,
        empty=sum(bool(texts) and not any(texts) for texts in source.captions or ()),
        labels=labels,
        exact=len(exact),
        exact_pairs=named(exact),
        near=len(near),
        near_pairs=named(near),
    )


def _bucket(size: np.ndarray, lost: np.ndarray, enlarged: np.ndarray, own: np.ndarray) -> list[Any]:
    """A line of the table of sizes."""
    return [
        int(size[1]),
        int(size[0]),
        int(own.sum()),
        float(lost[own].mean()),
        float(lost[own].max()),
        int(enlarged[own].sum()),
    ]


def block_length(size: int) -> int:
    """The rows of a block, of which there are at most LISTED."""
    return -(-size // LISTED)


def _images(examples: data.Examples, length: int) -> list[str]:
    parts = examples.images.columns["file"][examples.shown].split(length)
    return [sources.content_hash(part.contiguous().numpy().data)[:8] for part in parts]


def _texts(examples: data.Examples, length: int) -> list[str]:
    captions, labels = examples.source.captions or [], examples.source.labels or []
    starts = range(0, examples.size, length)
    return [sources.content_hash(captions[i : i + length], labels[i : i + length])[:8] for i in starts]


def differences(examples: data.Examples, out: Path) -> list[str]:
    """How a set differs from the one that the run in an output folder began with, as far as its check.json knows."""
    report = _read(out)
    if report is None:
        return []
    length, name = block_length(report.rows), examples.source.name
    said = [f"it had {report.rows:,} images and has {examples.size:,}"] if report.rows != examples.size else []
    for what, before, now in (
        ("image", report.images, _images(examples, length)),
        ("caption or label", report.texts, _texts(examples, length)),
    ):
        if differ := [i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b]:
            first, last = differ[0] * length, min(differ[0] * length + length, examples.size) - 1
            said.append(f"the first {what} that differs is that of {name(first)}{f' to {name(last)}' if last > first else ''}")
    return said


def left_out_or_changed(report: Survey) -> str:
    """In one line, or empty."""
    counted = [f"{count:,} {'image' if count == 1 else 'images'} {change}" for change, count in report.changes.items()]
    return "; ".join((*report.notes, *counted))


def whole(report: Survey) -> Iterator[str]:
    """All of it, a line each."""
    three = lambda x, form: f"{x[0]:{form}} to {x[2]:{form}}, median {x[1]:{form}}"  # noqa: E731
    yield f"images      {report.rows:,} can be read, {len(report.broken):,} cannot"
    if said := left_out_or_changed(report):
        yield f"left out or changed: {said}"
    yield f"width       {three(report.width, '.0f')}"
    yield f"height      {three(report.height, '.0f')}"
    yield f"aspect      {three(report.aspect, '.2f')} (width over height)"
    yield f"modes       {', '.join(f'{mode} {count:,}' for mode, count in report.modes.items())}"
    yield f"too small   {report.small:,} are enlarged to {report.resolution}"
    for wide, high, count, mean, most, enlarged in report.buckets if len(report.buckets) > 1 else ():
        small = f", {enlarged:,} enlarged" if enlarged else ""
        cut = f"{mean:.0%} cropped on average, {most:.0%} at most"
        yield f"bucket      {f'{wide} x {high}':<11} {count:>7,} images, {cut}{small}"
    for i, (count, repeats, weight) in enumerate(report.mixture):
        yield f"source {i:<4} {count:,} images, each {repeats:.4g} times a pass, loss weight {weight:g}"
    yield f"cropped     {report.cropped[0]:.0%} of an image on average, {report.cropped[1]:.0%} at most"
    captions = "{:,} different; {:,} images have none".format(*report.captions) if report.captions else "none"
    yield f"captions    {captions}{f', of {report.empty:,} it is empty' if report.empty else ''}"
    labels = [f"{name} {count:,}" for name, count in (report.labels or {}).items()]
    more = f", and {len(labels) - 20:,} more" if len(labels) > 20 else ""
    yield f"labels      {', '.join(labels[:20]) + more or 'none'}"
    yield f"exact twins {report.exact:,}{examples_of(report.exact_pairs)}"
    yield f"near twins  {report.near:,}{examples_of(report.near_pairs)}"


def examples_of(pairs: list[list[str]]) -> str:
    """The first few of them in words."""
    return f" (such as {'; '.join(f'{b} of {a}' for a, b in pairs[:3])})" if pairs else ""


def notable(report: Survey) -> Iterator[str]:
    """What somebody would want to know before training on it."""
    if said := left_out_or_changed(report):
        yield f"left out or changed: {said}"
    if report.small:
        crop = "the size of their bucket" if len(report.buckets) > 1 else f"{report.resolution} pixels"
        yield f"{report.small:,} of {report.rows:,} images are smaller than {crop} and are enlarged"
    if report.cropped[0] > 0.3:
        yield f"{report.cropped[0]:.0%} of the images' area is cropped away"
    if report.captions and report.captions[1]:
        yield f"{report.captions[1]:,} of {report.rows:,} images have no caption"
    if report.empty:
        yield f"{report.empty:,} of {report.rows:,} images have an empty caption"
    twins = (("the same as", report.exact, report.exact_pairs), ("much like", report.near, report.near_pairs))
    for kind, count, pairs in twins:
        if 0 < count < report.rows / 4:  # where most are alike, as drawn shapes are, that is what the set is
            yield f"{count:,} of {report.rows:,} images are {kind} an earlier one{examples_of(pairs)}"


def remarks(accelerator: Accelerator, examples: data.Examples, out: Path) -> list[str]:
    """What a run says of its images at its start; written to check.json for the next start, with broken.txt beside it."""
    return on_main(accelerator, lambda: _remarks(examples, out))


def _remarks(examples: data.Examples, out: Path) -> list[str]:
    if examples.source.streams:  # read while training
        said = (sources.unused(examples.cfg), *(f"left out or changed: {note}" for note in examples.source.notes))
        return [f"warning: {text}" for text in said if text]
    report, path = _read(out), out / "check.json"
    damaged = [f"warning: {path} is damaged; it is made anew"] * (report is None and path.exists())
    if report is None or (report.fingerprint, report.resolution) != (examples.fingerprint, examples.cfg.resolution):
        report = survey(examples)
        checkpoint.write(path, json.dumps(asdict(report), indent=1) + "\n")
    report = replace(report, notes=list(examples.source.notes))  # of this start
    said = damaged + [f"warning: {text}" for text in filter(None, (sources.unused(examples.cfg), *notable(report)))]
    if broken := examples.images.broken:
        checkpoint.write(out / "broken.txt", "\n".join(broken) + "\n")
        said.append(f"warning: {len(broken):,} images cannot be read and are left out; {out}/broken.txt names them")
    return said


def _read(out: Path) -> Survey | None:
    """What an output folder's check.json says, if it says all of it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        report = json.loads(read_text(out / "check.json"))
        kinds = {field.name: field.type.partition("[")[0].partition(" |")[0] for field in fields(Survey)}
        types = {"str": str, "int": int, "list": list, "dict": dict}
        if all(report[name] is None or isinstance(report[name], types[kind]) for name, kind in kinds.items()):
            return Survey(**report)
    return None


def check(task: Task, cfg: Any) -> None:
    """Open every image of the training set and of what is held out, and print what is there. Nothing is written.

    Raises:
        BadInput: there are broken images, and --data.skip-broken was not given.
    """
    opened = replace(cfg.data, skip_broken=True, memory_budget=0, train_batch_size=1)
    source, broken, size = sources.open_for(task, replace(cfg, data=opened)), [], cfg.data.train_batch_size
    for title, part in (("trained on", source), ("held out", source.held_out)):
        if part is None:
            continue
        summary = part.summary
        if part.streams:
            part = streaming.sample(part)
            summary += f"; {part.size:,} of them follow"
        with tqdm(total=part.size, desc=title, unit="image", disable=None) as bar:
            images = store.decode(part, opened, bar.update, skim=True)
        print(f"{title}: {summary}")
        if len(images):
            examples = data.Examples(part, opened, cfg.base.seed, images, block=cfg.data.train_batch_size)
            print(*whole(survey(examples)), sep="\n")
            try:
                for text in encodings.remarks(examples, task.encodings, cfg):
                    print(text)
            except hub.Unavailable as error:
                print(f"captions    not measured in tokens: {error}")
            for n in range(3) if part.captions is not None else ():
                first = examples[range(n, n + 1)]
                print(f"example {n:<3} {first['key'][0]}: {first['caption'][0]!r}")
        for name in images.broken:
            print(f"broken      {name}")
        if part is source and len(images) < size:
            print(f"too few     {len(images):,} images; --data.train-batch-size is {size:,}, and a run expects as many")
        broken += images.broken
    if said := sources.unused(cfg.data):
        print(said)
    if broken and not cfg.data.skip_broken:
        named = files.listed(broken, " (all are listed above)")
        raise BadInput(f"{len(broken)} images cannot be read: {named}; --data.skip-broken leaves them out")
