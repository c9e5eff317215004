"""The order of streamed sources: properties over random shards."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oneloop.configs import BadInput
from oneloop.inputs.lanes import Lanes

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=12)
SMALL = st.integers(1, 4)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SHARDS, SMALL, SMALL, st.integers(1, 5), st.integers(0, 2**40))
def test_each_pass_reads_each_row_once_from_few_shards_at_a_time(rows, lanes, window, block, seed):
    assume(sum(rows) >= lanes)
    order = Lanes(rows, lanes, window, block, seed)
    passes = 3
    turns = -(-passes * (sum(rows) // lanes + 1) // block)
    shard, row = order.examples(range(turns * lanes * block))
    per_lane = [x.reshape(turns, lanes, block).swapaxes(0, 1).reshape(lanes, -1) for x in (shard, row)]
    owned = []
    for s, r in zip(*per_lane, strict=True):
        pairs = list(zip(s.tolist(), r.tolist(), strict=True))
        size = len(set(pairs))
        assert size in (sum(rows) // lanes, -(-sum(rows) // lanes))
        owned += sorted(set(pairs))
        for e in range(passes):
            part = pairs[e * size : (e + 1) * size]
            assert sorted(part) == sorted(set(pairs))
            spans = {x: [i for i, (y, _) in enumerate(part) if y == x] for x, _ in part}
            in_use = [sum(at[0] <= i <= at[-1] for at in spans.values()) for i in range(len(part))]
            assert max(in_use) <= window
    counts = np.stack([((shard == s) & (row == r)).cumsum() for s, r in set(owned)])
    n = np.arange(1, len(shard) + 1) / sum(rows)
    assert (np.abs(counts - n) < 1 + (block + n) / (sum(rows) // lanes)).all()
    assert sorted(owned) == [(s, r) for s, n in enumerate(rows) for r in range(n)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(SHARDS, SMALL, SMALL, st.integers(1, 5), st.lists(st.integers(0, 2**40), min_size=1, max_size=10))
def test_an_example_is_a_function_of_its_number(rows, lanes, window, block, numbers):
    assume(sum(rows) >= lanes)
    shard, row = Lanes(rows, lanes, window, block, 0).examples(numbers)
    alone = [Lanes(rows, lanes, window, block, 0).examples([n]) for n in numbers]
    assert shard.tolist() == [int(s[0]) for s, _ in alone] and row.tolist() == [int(r[0]) for _, r in alone]


def test_processes_read_their_own_lanes():
    order = Lanes([100] * 24, 4, 2, 8, 0)
    blocks = np.arange(4800).reshape(-1, 8)
    shards = [set(order.examples(blocks[p::2].ravel())[0].tolist()) for p in range(2)]
    assert not shards[0] & shards[1] and len(shards[0] | shards[1]) == 24


def test_passes_windows_and_seeds_have_orders_of_their_own():
    order = Lanes([50] * 8, 1, 2, 4, 0)
    shard, row = order.examples(range(800))
    assert (shard[:400] != shard[400:]).any()
    windows = [{frozenset(shard[i : i + 100].tolist()) for i in range(e, e + 400, 100)} for e in (0, 400)]
    assert windows[0] != windows[1]  # other shards meet in the next pass
    first = [row[(np.arange(800) < 400) & (shard == s)].tolist() for s in range(8)]
    assert len({tuple(rows) for rows in first}) == 8 and all(rows != sorted(rows) for rows in first)
    assert len(set(shard[:100].tolist())) == 2 and (np.diff(shard[:100]) != 0).mean() > 0.3  # mixed within a window
    assert (Lanes([50] * 8, 1, 2, 4, 1).examples(range(800))[0] != shard).any()


def test_orders_of_two_passes_are_in_memory():
    order = Lanes([5] * 8, 4, 2, 4, 0)
    order.examples(range(4000))
    assert len(order._orders) == 8


def test_lanes_without_rows_are_refused():
    for given_ in (([1, 1], 3, 1, 1), ([5], 1, 0, 1), ([], 1, 1, 1)):
        with pytest.raises(BadInput, match="expected"):
            Lanes(*given_, 0)


def test_known_values():
    """The order of a run may not change unnoticed: these values are part of what a seed means."""
    shard, row = Lanes([5, 0, 9, 4], 2, 2, 3, 0).examples([0, 1, 2, 3, 30, 10**9])
    assert (shard.tolist(), row.tolist()) == ([3, 3, 2, 2, 2, 0], [0, 1, 2, 5, 3, 0])
