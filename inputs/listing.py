"""Every caption that a run on a stream will ask for, before it starts: read from the shards' own column of texts, in order.

What a run of N examples asks for is arithmetic, so it costs the captions of N examples (or of all rows, where those are fewer
and no tags are drawn), not those of the set; a resumed run reads those that are left. While they are listed each takes 28 bytes
of memory, and as much again while duplicates are found; then 28 in the cache's index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from oneloop.inputs.batches import Collation
from oneloop.inputs.cache import Values, as_marks, digest
from oneloop.inputs.captions import possible
from oneloop.tasks import Rng

CHUNK = 4096
"""Texts that are read at a time."""


def captions(examples: Any, column: Any) -> Values:
    """Those of a `Streamed`, from its captions by row, read alone."""
    source, cfg, budget = replace(examples.source, captions=column), examples.cfg, examples.cfg.stream_memory * 2**30
    collation, places = Collation(source, cfg), sum(map(len, whole := groups(examples)))
    by_row = examples.size <= places and not (cfg.shuffle_tags or cfg.tag_dropout)

    def texts_of(some: Sequence[int]) -> list[list[str]]:
        """What each row, or the example at each place, may ask for."""
        rows = list(some) if by_row else examples.rows(some).tolist()
        column.need(rows, budget)
        if by_row:
            return [possible(column[row], collation.captions) for row in rows]
        return [[text] for text in collation.texts(rows, Rng.of(examples.seed, list(some), "data"))]

    marks, where, which = [np.empty((0, 16), np.uint8)], [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for some in chunks([range(examples.size)] if by_row else whole):
        texts = texts_of(some)
        own = as_marks([digest(repr(text).encode()) for several in texts for text in several])
        first = np.unique(own.view("V16")[:, 0], return_index=True)[1]
        marks.append(own[first])
        where.append(np.repeat(np.array(some), [len(several) for several in texts])[first])
        which.append(np.array([k for several in texts for k in range(len(several))], np.int32)[first])
    made, numbers, order = (np.concatenate(parts) for parts in (marks, where, which))
    first = np.unique(made.view("V16")[:, 0], return_index=True)[1]
    first = first[np.lexsort((order[first], numbers[first]))]  # they are read again in this order
    made, numbers, order = made[first], numbers[first], order[first]
    return Values(made, lambda i: (texts_of([int(numbers[i])])[0][order[i]],))


def asked(cfg: Any, processes: int, total: int, manifest: Mapping[str, Any]) -> tuple[range, range]:
    """The examples that this start of a run of `total` steps will ask for: those that warm it up, and those that are left."""
    left = (total - manifest["step"]) * cfg.data.train_batch_size * processes * cfg.base.gradient_accumulation_steps
    return range(cfg.data.train_batch_size), range(manifest["examples"], manifest["examples"] + max(left, 0))


def groups(examples: Any) -> list[range]:
    """The places that a run may ask for: those of its examples, and all that are in a group with one of them, since it may be
    in its place. Without overlaps."""
    unit, ranges = examples.group * examples.cfg.stream_lanes, []
    for asked in sorted(examples.source.asked, key=lambda some: some.start):
        first, end = asked.start // unit * unit, -(-asked.stop // unit) * unit
        first = max(first, ranges[-1].stop) if ranges else first
        ranges += [range(first, end)] * (first < end)
    return ranges


def chunks(ranges: Iterable[range]) -> Iterator[range]:
    """Ranges of at most CHUNK numbers."""
    for some in ranges:
        yield from (some[i : i + CHUNK] for i in range(0, len(some), CHUNK))
