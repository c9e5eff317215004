"""Which row of which bucket example n of a run is: a pure function of (buckets, block length, seed, n).

A `Bucket` is one source's images of one size. The rule below deals a run's examples twice: to the sizes in blocks of L
examples, then those of a size to its buckets, one by one. So a batch has one size, and mixes sources.

**The rule.** Stream b of weight w_b has its event k at the time (k + u) / w_b, u in [0, 1) a keyed uniform of (b, k): jittered
sampling. Events in order of time are the dealing: event j is the k-th of stream b. By time T stream b has dealt
C_b = floor(w_b T + phi) events, phi in [0, 1] keyed anew for each k: within 1 of w_b T. Drift: of B streams with the shares
s_b = w_b / sum(w), after j events |C_b - s_b j| <= D_b = (1 - s_b) + s_b (B - 1), for C_i = w_i T + d_i, |d_i| <= 1, and their
sum j without T give C_b - s_b j = (1 - s_b) d_b - s_b sum(d_i, i != b). D_b is 0 for a stream that is alone.

**What holds** for n below 2^50:
- An aligned block of L examples has one size, and so has every aligned batch whose size divides L, under any split over
  processes and accumulation. Nothing is dropped: a size with fewer rows than L, down to one, repeats them within a block.
- In the order of n a bucket's examples are its positions 0, 1, 2, ... in an endless stream of keyed permutations of its rows,
  each row once a pass. Of a bucket that is alone, position n is example n, whatever L.
- A row with r repeats was dealt n r / length times after any n examples, with a difference below `Plan.bound`, which does not
  grow with n: 1 + (f L D_size + D_bucket) / rows, f the bucket's share of its size. Proof: its size was dealt P examples,
  within L D_size of its share (at the ends of blocks, and linear between them); the bucket, within D_bucket of f P; and
  permutations one after another deal each row floor or ceil of positions / rows times.
- A pass of the run, the unit of `num_epochs`, is `length` = sum(repeats x rows) examples; repeats may be fractions.
- An example costs O(buckets) time and memory; nothing grows with the number of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from oneloop.configs import BadInput
from oneloop.inputs.shuffle import mix, permute, uniform
from oneloop.tasks import hash64


def deal(keys: np.ndarray, weights: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Event j [J] of the rule over B streams: (b, k), [J] int64 each. keys [B] uint64, weights [B] float64 above 0.

    By the bound above event j lies between the times (j - B) / W and (j + 1 + B) / W, W = sum(weights), in which there are O(B)
    events: these are sorted. One event more at either end absorbs the rounding of the times, whose order alone decides.
    """
    if len(keys) == 1:
        return np.zeros_like(j), j
    scale = weights / math.fsum(weights)  # [B]
    low = np.maximum(np.floor((j[:, None] - len(keys)) * scale) - 1, 0).astype(np.int64)  # [J, B]
    counts = np.floor((j[:, None] + 1 + len(keys)) * scale).astype(np.int64) + 2 - low
    cell = np.repeat(np.arange(counts.size), counts.ravel())  # [E], (j, b) of every event
    k = np.arange(len(cell)) + (low.ravel() - counts.cumsum() + counts.ravel())[cell]
    b = cell % len(keys)
    time = (k + uniform(keys[b], k.astype(np.uint64))) / weights[b]
    order = np.lexsort((time, cell // len(keys)))  # stable: of equal times the first stream is first
    every = counts.sum(1)
    chosen = order[every.cumsum() - every + j - low.sum(1)]
    return b[chosen], k[chosen]


# ---------------------------------------------------------------------------------------------------------------------
# The plan of a run.


@dataclass(frozen=True)
class Bucket:
    """The images of one source that have one size."""

    source: int
    size: tuple[int, ...]
    """Height and width in pixels, as the model sees them; of a second image after those of the first."""
    rows: int
    repeats: float = 1.0
    """How often a pass of the run has each row; a fraction is exact over several passes."""


class Dealt(NamedTuple):
    """What examples are, [n] int64 each."""

    bucket: np.ndarray
    position: np.ndarray
    """Number of the example in its bucket's own endless stream."""
    row: np.ndarray
    """Row of the bucket, in [0, rows)."""
    epoch: np.ndarray
    """Pass over the bucket, position // rows."""


@dataclass(frozen=True)
class Plan:
    """The dealing of a run: frozen, and equal where its three fields are.

    Raises:
        BadInput: no buckets, a bucket without rows, repeats that are not above 0, two buckets of one source and size.
    """

    buckets: tuple[Bucket, ...]
    block: int
    """L: examples in a row that share a size; every batch size that divides it can be used. Part of the run's identity."""
    seed: int

    def __post_init__(self):
        if not self.buckets or self.block < 1:
            raise BadInput(f"the plan has {len(self.buckets)} buckets in blocks of {self.block}; expected at least 1 of both")
        for b in self.buckets:
            if b.rows < 1 or not 0 < b.repeats < math.inf:
                raise BadInput(f"source {b.source} has {b.rows} rows of {b.size}, repeats {b.repeats}; expected both above 0")
        if len({(b.source, b.size) for b in self.buckets}) < len(self.buckets):
            raise BadInput("the plan has two buckets of one source and size; expected one")

    @functools.cached_property
    def length(self) -> float:
        """Examples in one pass of the run."""
        return math.fsum(b.repeats * b.rows for b in self.buckets)

    @functools.cached_property
    def sizes(self) -> dict[tuple[int, ...], np.ndarray]:
        """size -> its buckets, in order."""
        sizes = dict.fromkeys(b.size for b in self.buckets)
        return {size: np.array([i for i, b in enumerate(self.buckets) if b.size == size]) for size in sizes}

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        """Keys and weights of the sizes; keys (of the dealing, of the rows), weights and rows of the buckets."""
        weights = np.array([b.repeats * b.rows for b in self.buckets])
        keys = [[hash64(self.seed, name, b.source, *b.size) for b in self.buckets] for name in ("deal", "order")]
        sizes = np.array([hash64(self.seed, "deal", *size) for size in self.sizes], np.uint64)
        sums = np.array([math.fsum(weights[i]) for i in self.sizes.values()])
        return sizes, sums, *np.array(keys, np.uint64), weights, np.array([b.rows for b in self.buckets])

    def examples(self, numbers: Sequence[int] | np.ndarray) -> Dealt:
        """What the examples with these numbers are, in any order; each as if it were asked alone."""
        size_keys, size_weights, keys, order_keys, weights, rows = self._arrays
        n = np.asarray(numbers, np.int64)
        blocks, where = np.unique(n // self.block, return_inverse=True)
        size, k = (x[where] for x in deal(size_keys, size_weights, blocks))  # [n]
        within = k * self.block + n % self.block  # number among the examples of this size
        bucket, position = np.empty_like(n), np.empty_like(n)
        for i, members in enumerate(self.sizes.values()):
            if (mine := size == i).any():
                b, position[mine] = deal(keys[members], weights[members], within[mine])
                bucket[mine] = members[b]
        epoch, i = np.divmod(position, rows[bucket])
        row = permute(mix(order_keys[bucket], epoch.astype(np.uint64)), rows[bucket], i)
        return Dealt(bucket, position, row, epoch)

    def bound(self, bucket: int) -> float:
        """Each row of this bucket was dealt n x repeats / length times after n examples, with a difference below this."""

        def drift(share: float, streams: int) -> float:
            return (1 - share) + share * (streams - 1) if streams > 1 else 0.0

        b = self.buckets[bucket]
        others = [x.repeats * x.rows for x in self.buckets if x.size == b.size]
        of_size, total = b.repeats * b.rows / math.fsum(others), math.fsum(others)
        blocks = drift(total / self.length, len(self.sizes))
        return 1 + (of_size * self.block * blocks + drift(of_size, len(others))) / b.rows


def repeats(shares: Sequence[float], rows: Sequence[int]) -> list[float]:
    """Repeats of sources that are to have these shares of the run: the source that is passed most slowly has 1, so that a pass
    of the run has every row at least once, to within the bound.

    Raises:
        BadInput: a share that is not above 0, a source without rows.
    """
    if not all(0 < x < math.inf for x in (*shares, *rows)):
        raise BadInput(f"sources have the shares {list(shares)} and {list(rows)} rows; expected all above 0")
    rates = [share / n for share, n in zip(shares, rows, strict=True)]
    return [rate / min(rates) for rate in rates]
