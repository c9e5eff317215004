"""The keyed permutation against chance."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneloop.inputs.shuffle import mix, permute
from oneloop.tasks import hash64


def keys(*parts) -> np.ndarray:
    return np.array([hash64(*parts)], np.uint64)


def chi2(counts, cells: int) -> float:
    """How many standard deviations the chi-square statistic of these counts is above its mean, for equal chances."""
    counts = np.asarray(list(counts.values()) if isinstance(counts, dict) else counts).ravel()
    expected = counts.sum() / cells
    statistic = ((counts - expected) ** 2).sum() / expected + (cells - len(counts)) * expected
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_takes_each_row_once(size: int, key: int):
    assert sorted(permute(np.array([key], np.uint64), size, np.arange(size))) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_all_orders_are_equally_likely(size: int):
    trials = max(40 * math.factorial(size), 2000)
    key = mix(keys("orders", size), np.arange(trials, dtype=np.uint64))
    rows = permute(key[:, None], size, np.arange(size))  # [trials, size]
    assert abs(chi2(collections.Counter(map(tuple, rows.tolist())), math.factorial(size))) < 4


@pytest.mark.parametrize("size", [7, 16, 31, 100])
def test_rows_positions_neighbours_and_passes_are_independent(size: int):
    trials = 400_000 // size
    key = mix(keys("cells", size), np.arange(trials, dtype=np.uint64))  # of successive passes
    rows = permute(key[:, None], size, np.arange(size))  # [trials, size]
    cells = np.zeros((size, size), int)
    np.add.at(cells, (np.arange(size), rows), 1)
    assert abs(chi2(cells, size**2)) < 5 * math.sqrt(2)  # rows and columns have fixed sums
    follows = np.zeros((size, size), int)
    np.add.at(follows, (rows[:, :-1], rows[:, 1:]), 1)
    assert abs(chi2(follows[~np.eye(size, dtype=bool)], size * (size - 1))) < 5 * math.sqrt(2)
    differences = np.zeros(size, int)
    np.add.at(differences, (rows[:, 1:] - rows[:, :-1]) % size, 1)
    assert differences[0] == 0 and abs(chi2(differences[1:], size - 1)) < 5
    passes = np.zeros((size, size), int)
    np.add.at(passes, (rows[:-1, 0], rows[1:, 0]), 1)
    assert abs(chi2(passes, size**2)) < 5
    fixed = (rows == np.arange(size)).sum(1)  # Poisson: mean 1, variance 1
    assert abs(fixed.mean() - 1) < 5 / math.sqrt(trials) and abs(fixed.var() - 1) < 5 * math.sqrt(3 / trials)


def test_large_permutations_leave_no_trace_of_the_order():
    """Of a million rows: where a stretch goes is uniform, and the order does not correlate with the rows."""
    size = 10**6 + 3
    rows = permute(keys("large"), size, np.arange(size))
    for first in (0, 1000, 500_000):
        assert abs(chi2(np.bincount(rows[first : first + 50_000] * 100 // size, minlength=100), 100)) < 4
    for lag in (1, 2, 1000, 1001):  # 1001: the side of the network
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 5 / math.sqrt(size)
    assert abs(np.corrcoef(rows, np.arange(size))[0, 1]) < 5 / math.sqrt(size)
    inversions = (rows[:-1] > rows[1:]).mean()
    assert abs(inversions - 0.5) < 5 * math.sqrt(1 / 12 / size)
