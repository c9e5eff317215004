"""Aspect-ratio buckets: their sizes, which image goes into which, and the table of what that costs. Pure functions of sizes.

Sizes are (height, width) in pixels; images are [N, 2] int arrays of them, upright as the model sees them. All comparisons are
in integers, so that every machine builds the same buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oneloop.configs import require
from oneloop.inputs.crop import Size, resized


def bucket_sizes(resolution: int, multiple: int, ratio: float = 2.0) -> list[Size]:
    """For each shorter side, a multiple of `multiple`, the longest other side with at most resolution^2 pixels, in both
    orientations, up to this ratio of sides; from widest to tallest. The square is one of them and has the most pixels: a
    batch that fits in memory there fits everywhere.

    Raises:
        BadInput: a resolution that is no multiple of `multiple`, a ratio below 1.
    """
    require(resolution > 0 and resolution % multiple == 0, "data.resolution", resolution, f"a multiple of {multiple}")
    require(ratio >= 1, "data.bucket_ratio", ratio, "at least 1")
    short = range(multiple, resolution + 1, multiple)
    pairs = [(s, resolution**2 // s // multiple * multiple) for s in short]
    pairs = [(s, long) for s, long in pairs if long <= ratio * s]
    return pairs + [(long, s) for s, long in reversed(pairs) if long > s]


def nearest(images: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """The index of the size whose ratio is nearest on a log scale, [N]: the one with the smallest crop. `sizes` from widest to
    tallest; in the middle between two the wider one.

    Raises:
        OverflowError: sides of an image beyond 2^20.
    """
    if images.size and images.max() >= 1 << 20:
        raise OverflowError(f"an image with a side of {images.max()} pixels")
    h, w = (images[:, i].astype(np.int64) ** 2 for i in (0, 1))
    index = np.zeros(len(images), np.int64)
    for (h1, w1), (h2, w2) in itertools.pairwise(sizes):
        index += h * (w1 * w2) > w * (h1 * h2)  # (h / w)^2 is beyond the geometric mean of both ratios, squared
    return index


def targets(image: Size, resolutions: Sequence[Sequence[Size]], limit: float = 1.0) -> list[Size]:
    """The size of one image at each resolution, from the lowest to the highest: the nearest in ratio; where that would enlarge
    it by more than `limit`, the one at the next lower resolution."""
    if len(resolutions) == 1 and len(resolutions[0]) == 1:
        return [resolutions[0][0]]
    chosen, array = [], np.array([image])
    for sizes in resolutions:
        own = sizes[int(nearest(array, sizes)[0])]
        chosen.append(own if not chosen or enlargement(array, own)[0] <= limit else chosen[-1])
    return chosen


def enlargement(images: np.ndarray, sizes: np.ndarray | Size) -> np.ndarray:
    """The factor by which resizing enlarges each image, [N]; below 1 it shrinks."""
    return (np.asarray(sizes) / images).max(-1)


def assign(images: np.ndarray, resolutions: Sequence[Sequence[Size]], limit: float = 1.0) -> dict[Size, np.ndarray]:
    """size -> rows of the images that go there, ascending; sizes without an image are left out.

    Each image goes once into each resolution (from the lowest to the highest, sizes as `bucket_sizes` has them): where that
    would enlarge it by more than `limit`, into the next lower one that does not, and where none is low enough, into the lowest,
    which `table` reports. So none is dropped, and of K resolutions every image has K entries, perhaps in one size: repeats / K
    for each bucket deals all images equally often. 8 bytes an entry.
    """
    entries: dict[Size, list[np.ndarray]] = {}
    best = np.zeros((len(images), 2), np.int64)  # the highest size so far that does not enlarge
    for i, sizes in enumerate(resolutions):
        own = np.array(sizes)[nearest(images, sizes)]
        best = own if i == 0 else np.where((enlargement(images, own) <= limit)[:, None], own, best)
        for size in np.unique(best, axis=0):
            entries.setdefault(tuple(size.tolist()), []).append(np.flatnonzero((best == size).all(1)))
    return {size: np.sort(np.concatenate(rows), kind="stable") for size, rows in sorted(entries.items())}


@dataclass(frozen=True)
class Line:
    """One bucket of the table."""

    size: Size
    images: int
    cropped: float
    """Mean share of the pixels that cropping leaves out, in [0, 1)."""
    cropped_most: float
    small: tuple[int, ...]
    """Rows that are enlarged by more than the limit."""
    fewer: bool
    """Fewer images than a block: one batch has some of them several times."""


def table(images: np.ndarray, assigned: dict[Size, np.ndarray], limit: float = 1.0, block: int = 1) -> list[Line]:
    """What each bucket does to its images, for a person to read before training."""
    lines = []
    for size, rows in assigned.items():
        own = np.unique(rows)
        left_out = 1 - size[0] * size[1] / resized(images[own], size).prod(-1)
        small = own[enlargement(images[own], size) > limit]
        lines.append(
            Line(size, len(own), float(left_out.mean()), float(left_out.max()), tuple(small.tolist()), len(own) < block)
        )
    return lines
