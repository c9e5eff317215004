"""What it costs to know which rows a batch has: microseconds an example and bytes of memory, by the number of rows.

    python benchmarks/plan.py
    python benchmarks/plan.py --rows 1000 1000000000 --buckets 1 30 --block 64

A batch is 64 consecutive examples (or --batch) somewhere in the first three passes, each batch elsewhere, so that nothing is in
a cache; in blocks of 4 it has sixteen blocks. Lanes have shards of 10,000 rows and are measured in the order of a run. Beside
them `torch.randperm`, a permutation in memory, up to 1e7 rows. Peak: the most memory that a call allocates in Python and numpy.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from oneloop.inputs.lanes import Lanes
from oneloop.inputs.plan import Bucket, Plan

CALLS = 300


def measure(call: Callable[[np.ndarray], object], firsts: np.ndarray, batch: int) -> tuple[float, int]:
    """Median microseconds an example over batches that begin there, and the most bytes allocated in a call."""
    batches = [first * batch + np.arange(batch) for first in firsts.tolist()]
    times = []
    for numbers in batches:
        start = time.perf_counter()
        call(numbers)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    for numbers in batches[:20]:
        call(numbers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(np.median(times)) / batch * 1e6, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**5, 10**7, 10**9], help="rows in all")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 10, 30, 100])
    parser.add_argument("--block", type=int, nargs="+", default=[64, 4])
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    print("| what | rows | us an example | peak, KiB |\n|---|---|---|---|")

    def line(what: str, rows: int, us: float, peak: int) -> None:
        print(f"| {what} | {rows:.0e} | {us:.2g} | {peak / 1024:.0f} |", flush=True)

    for count in args.buckets:
        for block in args.block:
            for rows in args.rows:
                sizes = tuple(Bucket(0, (64, 64 * (i + 1)), max(rows // count, 1)) for i in range(count))
                firsts = draw.integers(0, max(3 * rows // args.batch, CALLS), CALLS)
                line(f"{count} buckets, blocks of {block}", rows, *measure(Plan(sizes, block, 0).examples, firsts, args.batch))
    for rows in args.rows:
        lanes = Lanes([min(rows, 10_000)] * max(rows // 10_000, 1), 8, 16, 64, 0)
        firsts = np.arange(CALLS) + int(draw.integers(0, 2 * rows) // args.batch)
        line("8 lanes, window of 16 shards", rows, *measure(lanes.examples, firsts, args.batch))
    import torch

    for rows in (r for r in args.rows if r <= 10**7):
        start = time.perf_counter()
        order = torch.randperm(rows)
        line("randperm, once a pass", rows, (time.perf_counter() - start) / rows * 1e6, order.nbytes)


if __name__ == "__main__":
    main()
