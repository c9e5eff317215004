"""An exact reader of the embedded shapes: which drawing an image is, and how far from it.

There are 180 kinds of drawings, shape x size x front colour x back colour, and what else differs between two of a kind is the
place of the centre. So the nearest drawing of each kind can be found by trying all places, and no model has to be trusted.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oneloop.evaluation.measures import Estimate, share
from oneloop.inputs.shapes import COLOURS, REACH, SHAPES, SIZES, cover_shape

KINDS = [
    (shape, size, front, back)
    for shape, size in itertools.product(SHAPES, SIZES)
    for front, back in itertools.permutations(COLOURS, 2)
]
PLACES = 11
"""Centres that are tried in x and in y, over all that a drawing may have: of 16x16 pixels a fifth of a pixel apart."""
MARGIN = 1.25
"""An image is named where the nearest drawing of another kind is so many times as far as the nearest one."""


@dataclass(frozen=True)
class Reading:
    """What N images are."""

    kind: Tensor
    """The number in KINDS of the nearest drawing, [N]."""
    distance: Tensor
    """To it, the root of the mean square difference in levels of 255, [N]."""
    second: Tensor
    """To the nearest drawing of another kind, [N]."""
    place: Tensor
    """The nearest drawing's centre (x, y), as shares of the side, [N, 2]."""
    blank: Tensor
    """Whether the image is nearer to one plain colour than to any drawing, [N] bool."""

    @property
    def named(self) -> Tensor:
        """Whether it is clear what it is, [N] bool."""
        return (self.second >= MARGIN * self.distance) & ~self.blank


def read(images: Tensor) -> Reading:
    """The nearest drawings of square images [N, 3, H, H] uint8."""
    side, flat = images.shape[-1], images.permute(0, 2, 3, 1).flatten(1).float()  # [N, 3 H H]
    centres = [0.5 + offset for offset in np.linspace(-REACH, REACH, PLACES)]
    pairs = torch.tensor([(COLOURS[a], COLOURS[b]) for a, b in itertools.permutations(COLOURS, 2)]).float()  # [30, 2, 3]
    found, places = [], []
    for shape, size in itertools.product(SHAPES, SIZES):
        covers = np.stack([cover_shape(shape, size, x, y, side) for x, y in itertools.product(centres, centres)])
        cover = torch.from_numpy(covers).float().flatten(1)[None, :, :, None]  # [1, places, H H, 1]
        drawn = cover * pairs[:, None, None, 0] + (1 - cover) * pairs[:, None, None, 1]  # [30, places, H H, 3]
        distance = torch.cdist(flat, drawn.round().flatten(2).flatten(0, 1))  # [N, 30 places]
        nearest = distance.view(len(flat), len(pairs), -1).min(2)
        found.append(nearest.values)
        places.append(nearest.indices)
    tried = torch.tensor([*itertools.product(centres, centres)]).float()  # [places, 2]
    near = torch.cat(found, 1).div(math.sqrt(flat.shape[1])).topk(2, largest=False)  # in the order of KINDS
    plain = images.flatten(2).float().var(2, correction=0).mean(1).sqrt()  # [N]
    place = tried[torch.cat(places, 1).gather(1, near.indices[:, :1])[:, 0]]  # [N, 2]
    return Reading(near.indices[:, 0], near.values[:, 0], near.values[:, 1], place, plain < near.values[:, 0])


def judge(images: Tensor, like: Tensor) -> dict[str, dict[str, Estimate]]:
    """What images [N, 3, H, H] uint8 are read as, and the same of drawings that were not trained on, `like`."""
    return {"samples": judged(read(images)), "held out": judged(read(like[: len(images)]))}


def judged(reading: Reading) -> dict[str, Estimate]:
    """The figures of a reading. The interval of the coverage, the share of the 180 kinds that are named at least once, is that
    of as many drawings of kinds drawn at random."""
    rng, n = np.random.default_rng(0), len(reading.kind)
    ordered = reading.distance.sort().values
    reach = 0.98 * math.sqrt(n)  # of the rank of a median (Conover 1999, Practical Nonparametric Statistics, section 3.2)
    at = lambda rank: float(ordered[min(max(round(rank), 0), n - 1)])  # noqa: E731
    covers = [len(np.unique(rng.integers(len(KINDS), size=n))) / len(KINDS) for _ in range(1000)]
    low, high = np.quantile(covers, (0.025, 0.975))
    covered = len(reading.kind[reading.named].unique()) / len(KINDS)
    return {
        "blank": share(reading.blank),
        "named": share(reading.named),
        "median distance": {"value": float(reading.distance.median()), "low": at(n / 2 - reach), "high": at(n / 2 + reach)},
        "coverage": {"value": covered, "expected low": float(low), "expected high": float(high)},
    }
