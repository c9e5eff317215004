"""Aspect-ratio buckets of images that nobody has seen beforehand: sizes are read from headers, a span of rows at a time.

A span is SPAN blocks of one lane, or as many as a window of its shards has rows; its rows are those that the order without
buckets has there. `arranged` deals the same rows again, each once, in blocks of one size. It is a function of the span's sizes
and of a key, so example n stays arithmetic: it costs the headers of its span, nothing of those before. Which sizes other spans
have is unknown, so that a size whose rows are no multiple of the block cannot wait for more of them: its rest, below a block
for each size, joins the rest of those that are next to it in ratio, and all are cropped to the size that most of them have.
So of a span of K blocks and B sizes, less than B / K of the rows have a size that is not the nearest to theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oneloop.inputs.shuffle import permute

SPAN = 256
"""Blocks in a span, at most."""


def blocks(rows: Sequence[int], window: int, block: int) -> int:
    """How many blocks a span has where shards have these rows: as many as a window holds, so that about two windows are read
    for it; at least 1, at most SPAN."""
    return int(min(max(window * sum(rows) // (len(rows) * block), 1), SPAN))


def arranged(sizes: np.ndarray, block: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which a span's rows are dealt, [m] int64, and the size of each of its blocks, [m / block] int64.

    sizes: of each row the index of the size that is nearest to it, [m], from widest to tallest; m is a multiple of `block`.
    """
    shuffled = permute(np.array([key], np.uint64), len(sizes), np.arange(len(sizes)))  # which rows are the rest is a draw
    of = sizes[shuffled]
    within = np.empty_like(of)  # number among the rows of its size
    for size in np.unique(of):
        within[of == size] = np.arange((of == size).sum())
    counts = np.bincount(of)
    whole = within < counts[of] // block * block
    by_size = np.lexsort((within, of, ~whole))  # whole blocks, then the rest, each from widest to tallest
    groups = shuffled[by_size].reshape(-1, block)
    chosen = np.array([np.bincount(sizes[group]).argmax() for group in groups])
    turn = permute(np.array([key ^ 1], np.uint64), len(groups), np.arange(len(groups)))
    return groups[turn].reshape(-1), chosen[turn]
