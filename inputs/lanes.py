"""Which row of which shard example n of a streamed source is: mostly sequential reading, and still arithmetic.

The rows of a source are cut into G lanes, the same in every pass and of the same number of rows to within one. Block k of the
source's stream belongs to lane k mod G: where the number of processes divides G, each process reads its own lanes and no
other; another layout costs locality, never the examples. In each pass a lane permutes its shards and goes through them in
windows of W; inside a window the rows are permuted. So, with numbers of rows per shard alone:
- each pass of a lane deals each of its rows once;
- a lane reads from at most W shards until it is done with them for this pass; all lanes of a process, G W / processes;
- after n examples of R rows each row was dealt n / R times to within 1 + (L + n / R) / floor(R / G): the lanes' numbers of rows
  differ by one, so this grows by less than 1 / floor(R / G) in a pass;
- memory: at most 72 bytes a shard (300 for a moment, when they are permuted), nothing for a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from oneloop.configs import BadInput
from oneloop.inputs.plan import deal
from oneloop.inputs.shuffle import mix, permute
from oneloop.tasks import hash64


@dataclass(frozen=True, eq=False)
class Lanes:
    """The order of a streamed source.

    Raises:
        BadInput: fewer rows than lanes.
    """

    rows: Sequence[int]
    """Number of rows of each shard."""
    lanes: int
    window: int
    """Shards that a lane mixes at a time."""
    block: int
    """Examples in a row from one lane: the block length of the plan."""
    seed: int
    _orders: dict = field(default_factory=dict, init=False, repr=False)
    """(lane, epoch) -> its order: of two passes."""

    def __post_init__(self):
        if min(self.lanes, self.window, self.block) < 1 or sum(self.rows) < self.lanes:
            given = f"{sum(self.rows)} rows for {self.lanes} lanes, a window of {self.window} shards, blocks of {self.block}"
            raise BadInput(f"streaming has {given}; expected at least 1 of each, and a row for each lane")

    def _key(self, *parts: int) -> np.ndarray:
        return np.array([hash64(self.seed, "lanes", *parts)], np.uint64)

    @functools.cached_property
    def _cuts(self) -> np.ndarray:
        """Where lanes begin, [G + 1], in the rows of the permuted shards."""
        return np.arange(self.lanes + 1) * sum(self.rows) // self.lanes

    @functools.cached_property
    def _shards(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shards in a keyed order, the same in every pass: a lane of a sorted source samples it. Where they begin and end."""
        shards = permute(self._key(), len(self.rows), np.arange(len(self.rows)))
        rows = np.asarray(self.rows, np.int64)[shards]
        return shards, (end := rows.cumsum()) - rows, end

    def _order(self, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The lane's pieces of shards in the order of this pass: shard, its first row here, where pieces end. [S] each."""
        if (lane, epoch) in self._orders:
            return self._orders[lane, epoch]
        shards, start, end = self._shards
        low, high = self._cuts[lane : lane + 2]
        own = np.flatnonzero((end > low) & (start < high) & (end > start))
        own = own[permute(self._key(lane, epoch), len(own), np.arange(len(own)))]
        first = np.maximum(low - start[own], 0)
        if len(self._orders) >= 2 * self.lanes:
            self._orders.pop(next(iter(self._orders)))
        order = shards[own], first, (np.minimum(high, end[own]) - start[own] - first).cumsum()
        return self._orders.setdefault((lane, epoch), order)

    def examples(self, position: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of the shard, [n] int64 each, of these positions in the source's endless stream, in any order."""
        return self.at(*turns(position, self.lanes, self.block))

    def length(self, lane: int) -> int:
        """Rows of a lane."""
        return int(self._cuts[lane + 1] - self._cuts[lane])

    def at(self, lane: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of these numbers in the endless streams of lanes, [n] each."""
        epoch, r = np.divmod(number, np.diff(self._cuts)[lane])
        shard, row = np.empty_like(r), np.empty_like(r)
        for g, e in sorted(set(zip(lane.tolist(), epoch.tolist(), strict=True))):
            mine = (lane == g) & (epoch == e)
            shards, first, ends = self._order(g, e)
            edges = np.append(0, ends)[:: self.window]  # where windows begin
            edges = edges if edges[-1] == ends[-1] else np.append(edges, ends[-1])
            w = np.searchsorted(edges, r[mine], "right") - 1
            x = edges[w] + permute(mix(self._key(g, e, 1), w.astype(np.uint64)), np.diff(edges)[w], r[mine] - edges[w])
            piece = np.searchsorted(ends, x, "right")
            shard[mine], row[mine] = shards[piece], first[piece] + x - np.append(0, ends)[piece]
        return shard, row


@dataclass(frozen=True)
class Free:
    """The order of a source whose rows are read one by one, wherever they are: every lane goes through all of them, in a keyed
    order of its own in each pass."""

    size: int
    lanes: int
    block: int
    seed: int

    def length(self, lane: int) -> float:
        """A lane's part of the rows, as if they had been cut."""
        return self.size / self.lanes

    def at(self, lane: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Lanes.at; all is one shard."""
        epoch, r = np.divmod(number, self.size)
        keys = np.array([hash64(self.seed, "lanes", g) for g in range(self.lanes)], np.uint64)[lane]
        return np.zeros_like(r), permute(mix(keys, epoch.astype(np.uint64)), self.size, r)


def turns(position: Sequence[int] | np.ndarray, lanes: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The lane of these positions, and their numbers in its stream, [n] int64 each."""
    blocks, within = np.divmod(np.asarray(position, np.int64), block)
    turn, lane = np.divmod(blocks, lanes)
    return lane, turn * block + within


def positions(lane: int, number: np.ndarray, lanes: int, block: int) -> np.ndarray:
    """The inverse of `turns`, of numbers of one lane."""
    turn, within = np.divmod(number, block)
    return (turn * lanes + lane) * block + within


@dataclass(frozen=True, eq=False)
class Mixed:
    """The order of several streamed sources, cut into the same lanes: in each lane they are dealt as `plan.deal` deals, by
    their repeats times their rows there. So a process that reads its own lanes alone does so of every source; of one source the
    order is that of `Lanes`. Of a lane's examples a source has its share to within the bound of inputs/plan.py."""

    parts: tuple[Lanes | Free, ...]
    repeats: tuple[float, ...]
    """How often a pass of the run has each row of each."""

    def examples(self, position: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, shard, and row of the shard, [n] int64 each, of these positions of the run, in any order."""
        first = self.parts[0]
        lane, number = turns(position, first.lanes, first.block)
        part, shard, row = np.zeros_like(lane), np.empty_like(lane), np.empty_like(lane)
        for g in set(lane.tolist()) if len(self.parts) > 1 else ():
            part[lane == g], number[lane == g] = deal(*self._lane(g), number[lane == g])
        for i, lanes in enumerate(self.parts):
            mine = part == i
            shard[mine], row[mine] = lanes.at(lane[mine], number[mine])
        return part, shard, row

    def _lane(self, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and weights of the sources in a lane, [B] each."""
        keys = [hash64(part.seed, "deal", i, lane) for i, part in enumerate(self.parts)]
        weights = [part.length(lane) * times for part, times in zip(self.parts, self.repeats, strict=True)]
        return np.array(keys, np.uint64), np.array(weights, np.float64)
