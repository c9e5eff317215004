"""What is in a set of pictures: sizes, modes, captions, labels, duplicates, and what training will crop away.

    python loop.py ddpm --data.train-data-dir pictures --base.check

A run decodes every picture once, and says at its start what somebody would want to know of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from oneloop import checkpoint, data
from oneloop.configs import BadInput
from oneloop.inputs import decoding, encodings, sources
from oneloop.machine.processes import on_main
from oneloop.tasks import Task

NEAR_BITS, NEAR_LEVELS, NEIGHBOURS = 3, 8.0, 64
LISTED = 1000


@dataclass(frozen=True)
class Survey:
    """A set of pictures in numbers."""

    fingerprint: str
    """Of the data; what it says holds for no other."""
    resolution: int
    pictures: int
    broken: list[str]
    """Name and reason of each."""
    width: list[float]
    """Smallest, median and largest, in pixels, upright."""
    height: list[float]
    aspect: list[float]
    """The same of width over height."""
    modes: dict[str, int]
    """PIL's mode -> pictures."""
    small: int
    """Pictures that are enlarged, their shorter side being below the resolution."""
    cropped: list[float]
    """Mean and largest share of a picture's area that is outside the square."""
    captions: list[int] | None
    """Different ones, and pictures that have none."""
    empty: int
    """Pictures whose caption is empty."""
    labels: dict[str, int] | None
    """Class -> pictures."""
    exact: int
    """Pictures whose pixels are those of an earlier one."""
    exact_pairs: list[list[str]]
    """The first LISTED of them, by name: (earlier, this)."""
    near: int
    """Pictures that look like an earlier one."""
    near_pairs: list[list[str]]
    """The first LISTED of them."""


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of pictures.


def difference_hash(thumbs: np.ndarray) -> np.ndarray:
    """64 bits a picture, [N] uint64: whether each of 8 x 9 pixels is brighter than its left neighbour, by more than what
    compression does to a flat area (N. Krawetz 2013, Kind of Like That). thumbs [N, 8, 9, 3]."""
    grey = thumbs.astype(np.int16).sum(-1)  # [N, 8, 9], three times the brightness
    bits = grey[:, :, 1:] > grey[:, :, :-1] + 6
    return np.packbits(bits.reshape(len(bits), 64), axis=1).view(np.uint64)[:, 0]


def near_pairs(thumbs: np.ndarray) -> np.ndarray:
    """For each picture that looks like an earlier one such a pair (earlier, this), [P, 2]: hashes within NEAR_BITS bits, and
    colours within NEAR_LEVELS levels on average. thumbs [N, 8, 9, 3].

    Of hashes at most 3 bits apart, at least one of four 16-bit bands is equal: only pictures that share a band are compared,
    and of those that do, each with the NEIGHBOURS that come next in the order of hash and brightness. A picture that was
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
    found = np.flatnonzero(earlier >= 0)
    return np.stack([earlier[found], found], 1)


# ---------------------------------------------------------------------------------------------------------------------
# A set of them.


def survey(examples: data.Examples) -> Survey:
    """The numbers of a set whose pictures were inspected when they were decoded."""
    source, side, pictures = examples.source, examples.cfg.resolution, examples.pictures
    size, marks, thumbs = (pictures.columns[name].numpy() for name in ("size", "mark", "thumb"))
    spread = lambda x: [float(x.min()), float(np.median(x)), float(x.max())]  # noqa: E731
    lost = 1 - size.min(1) / size.max(1)  # [N]
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
        pictures=examples.size,
        broken=pictures.broken,
        width=spread(size[:, 1]),
        height=spread(size[:, 0]),
        aspect=spread(size[:, 1] / size[:, 0]),
        modes=dict(Counter(pictures.modes).most_common()),
        small=int((size.min(1) < side).sum()),
        cropped=[float(lost.mean()), float(lost.max())],
        captions=captions,
        empty=sum(bool(texts) and not any(texts) for texts in source.captions or ()),
        labels=labels,
        exact=len(exact),
        exact_pairs=named(exact),
        near=len(near),
        near_pairs=named(near),
    )


def whole(found: Survey) -> Iterator[str]:
    """All of it, a line each."""
    three = lambda x, form: f"{x[0]:{form}} to {x[2]:{form}}, median {x[1]:{form}}"  # noqa: E731
    yield f"pictures    {found.pictures:,} can be read, {len(found.broken):,} cannot"
    yield f"width       {three(found.width, '.0f')}"
    yield f"height      {three(found.height, '.0f')}"
    yield f"aspect      {three(found.aspect, '.2f')} (width over height)"
    yield f"modes       {', '.join(f'{mode} {count:,}' for mode, count in found.modes.items())}"
    yield f"too small   {found.small:,} are enlarged to {found.resolution}"
    yield f"cropped     {found.cropped[0]:.0%} of a picture on average, {found.cropped[1]:.0%} at most"
    captions = "{:,} different; {:,} pictures have none".format(*found.captions) if found.captions else "none"
    yield f"captions    {captions}{f', of {found.empty:,} it is empty' if found.empty else ''}"
    labels = [f"{name} {count:,}" for name, count in (found.labels or {}).items()]
    more = f", and {len(labels) - 20:,} more" if len(labels) > 20 else ""
    yield f"labels      {', '.join(labels[:20]) + more or 'none'}"
    yield f"exact twins {found.exact:,}{examples_of(found.exact_pairs)}"
    yield f"near twins  {found.near:,}{examples_of(found.near_pairs)}"
    for name in found.broken:
        yield f"broken      {name}"


def examples_of(pairs: list[list[str]]) -> str:
    """The first few of them in words."""
    return f" (such as {'; '.join(f'{b} of {a}' for a, b in pairs[:3])})" if pairs else ""


def notable(found: Survey) -> Iterator[str]:
    """What somebody would want to know before training on it."""
    if found.small:
        yield f"{found.small:,} of {found.pictures:,} pictures are smaller than {found.resolution} pixels and are enlarged"
    if found.cropped[0] > 0.3:
        yield f"{found.cropped[0]:.0%} of the pictures' area is cropped away"
    if found.captions and found.captions[1]:
        yield f"{found.captions[1]:,} of {found.pictures:,} pictures have no caption"
    if found.empty:
        yield f"{found.empty:,} of {found.pictures:,} pictures have an empty caption"
    twins = (("the same as", found.exact, found.exact_pairs), ("much like", found.near, found.near_pairs))
    for kind, count, pairs in twins:
        if 0 < count < found.pictures / 4:  # where most are alike, as drawn shapes are, that is what the set is
            yield f"{count:,} of {found.pictures:,} pictures are {kind} an earlier one{examples_of(pairs)}"


def remarks(accelerator: Accelerator, examples: data.Examples, out: Path) -> list[str]:
    """What a run says of its pictures at its start; kept in check.json for its next life, with broken.txt beside it."""
    return on_main(accelerator, lambda: _remarks(examples, out))


def _remarks(examples: data.Examples, out: Path) -> list[str]:
    path, said = out / "check.json", []
    try:
        found = Survey(**json.loads(path.read_text("utf-8")))
        valid = (found.fingerprint, found.resolution) == (examples.fingerprint, examples.cfg.resolution)
        notes = list(notable(found)) if valid else []
    except FileNotFoundError:
        valid = False
    except Exception:  # whatever damage does to it: the survey is made anew
        valid, said = False, [f"warning: {path} is damaged; it is made anew"]
    if not valid:
        found = survey(examples)
        checkpoint.write(path, json.dumps(asdict(found), indent=1) + "\n")
        notes = list(notable(found))
    said += [f"warning: {text}" for text in notes]
    if broken := examples.pictures.broken:
        checkpoint.write(out / "broken.txt", "\n".join(broken) + "\n")
        said.append(f"warning: {len(broken):,} pictures cannot be read and are left out; {out}/broken.txt names them")
    return said


def check(task: Task, cfg: Any) -> None:
    """Open every picture of the training set and of what is held out, and print what is found. Nothing is written.

    Raises:
        BadInput: there are broken pictures, and --data.skip-broken was not given.
    """
    source, broken = sources.open_source(cfg.data, task.needs), []
    for title, part in (("trained on", source), ("held out", source.held_out)):
        if part is None:
            continue
        opened = replace(cfg.data, skip_broken=True, memory_budget=0)
        with tqdm(total=part.size, desc=title, unit="picture", disable=None) as bar:
            examples = data.Examples(part, opened, cfg.base.seed, decoding.decode(part, opened, bar.update, skim=True))
        print(f"{title}: {part.summary}", *whole(survey(examples)), *encodings.remarks(examples, task.encodings, cfg), sep="\n")
        broken += examples.pictures.broken
    if broken and not cfg.data.skip_broken:
        raise BadInput(f"{len(broken)} pictures cannot be read: {'; '.join(broken)}; --data.skip-broken leaves them out")
