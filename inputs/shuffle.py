"""Keyed uniforms and permutations with random access: numpy arrays in, arrays out, no state, no memory that grows with rows."""

from __future__ import annotations

import numpy as np

GOLDEN, ROUNDS = 0x9E3779B97F4A7C15, 24


def mix(key: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Number `count` of the sequence of this key, uint64: SplitMix64 (Steele, Lea, Flood, 2014, Fast splittable pseudorandom
    number generators). Both are arrays of uint64, which wrap."""
    x = key + count * np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(key: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The same as a float64 in [0, 1)."""
    return (mix(key, count) >> np.uint64(11)) * 2.0**-53


def permute(key: np.ndarray, size: np.ndarray, i: np.ndarray) -> np.ndarray:
    """Where the permutation of [0, size) with this key takes i, int64; i in [0, size), all three broadcast together.

    A generalised Feistel network on Z_a x Z_b, a b >= size, with cycle walking (Black, Rogaway, 2002, Ciphers with arbitrary
    finite domains): a bijection whatever its round function. a and b are about sqrt(size), so that a walk is rare; a is even,
    so that odd permutations exist. It has to be unbiased, not secret: over many keys tests/test_shuffle.py cannot tell it from
    chance (orders of up to 7 rows, rows against positions, neighbours, successive passes, a million rows). From 50 rows on 10
    rounds do; below 9 rows it takes 20, where 8 are off by hundreds of standard deviations.
    """
    key, size, i = np.broadcast_arrays(key, np.uint64(size), np.asarray(i, np.uint64))
    shape, (key, size, x) = i.shape, (v.flatten() for v in (key, size, i))
    a = np.ceil(np.sqrt(size)).astype(np.uint64)
    a += a % np.uint64(2)
    b = (size + a - np.uint64(1)) // a
    keys, todo = mix(key, np.arange(ROUNDS, dtype=np.uint64)[:, None]), np.arange(len(x))  # [R, n]
    while len(todo):
        (left, right), m, n = divmod(x[todo], b[todo]), a[todo], b[todo]
        for k in keys[:, todo]:
            y = (right + k) * np.uint64(0xBF58476D1CE4E5B9)
            y = (y ^ (y >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
            left, right, m, n = right, (left + (y >> np.uint64(32))) % m, n, m
        x[todo] = left * n + right  # after an even number of rounds left is in Z_a again
        todo = todo[x[todo] >= size[todo]]
    return x.reshape(shape).astype(np.int64)
