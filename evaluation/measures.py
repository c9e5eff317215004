"""How far two sets of images are apart, from their features: Frechet distance, KID, precision and recall, with intervals.

The formulas are torch-fidelity's own functions, called on given features; here they get intervals. An interval is the value
plus and minus 1.96 standard errors of the grouped jackknife (Efron and Tibshirani 1993, An Introduction to the Bootstrap,
chapter 11): each group of both sets is left out once. It says how much the value moves with the draw of images, and nothing of
the Frechet distance's bias, which falls with their number: compare values of equal numbers, and with the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oneloop.configs import BadInput

GROUPS = 20
"""Parts of the jackknife; a quarter of them where features have more than 256 dimensions, whose Frechet distance takes time."""
NEIGHBOURS = 3
"""k of precision and recall."""
SEEN = 64
"""Side at which images are compared pixel by pixel, at most."""
LEAST = 32
"""Images that a comparison takes at least."""
Measures = dict[str, float]
Estimate = dict[str, float]
"""`value`, and `low` and `high`, the ends of its 95 % interval."""


def distances() -> tuple[Any, Any, Any]:
    """torch-fidelity's modules of distances.

    Raises:
        BadInput: it is not installed.
    """
    try:
        from torch_fidelity import metric_fid, metric_kid, metric_prc
    except ImportError:
        raise BadInput('distances are torch-fidelity\'s, which is not installed: pip install "oneloop[evaluate]"') from None
    return metric_fid, metric_kid, metric_prc


def measure(samples: Tensor, reference: Tensor) -> Measures:
    """The distances of two sets of features, [N, D] and [M, D].

    frechet: Heusel et al. 2017 (arXiv:1706.08500), eq. 6. kid: the unbiased squared MMD with the kernel (x.y / D + 1)^3 of
    Binkowski et al. 2018 (arXiv:1801.01401), over subsets of 1,000 where there are more. precision, recall: Kynkaanniemi et al.
    2019 (arXiv:1904.06991), with 3 neighbours.

    Raises:
        BadInput: torch-fidelity is not installed.
    """
    metric_fid, metric_kid, metric_prc = distances()
    x, y = samples.double(), reference.double()
    statistics = [metric_fid.fid_features_to_statistics(z) for z in (x, y)]
    frechet = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    size = min(1000, len(x), len(y))
    subsets = 1 if size == max(len(x), len(y)) else 20
    kid = metric_kid.kid_features_to_metric(x, y, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    precision, recall = metric_prc.calculate_precision_recall_part(x, y, NEIGHBOURS)
    return {"frechet": frechet, "kid": kid[metric_kid.KEY_METRIC_KID_MEAN], "precision": precision, "recall": recall}


def similarity(x: Tensor, y: Tensor) -> float:
    """The mean cosine of all pairs of features, [N, D] and [M, D]; of a set with itself, of all pairs of two. In features of a
    self-supervised ViT this is DINO of Ruiz et al. 2022, DreamBooth (arXiv:2208.12242), section 4.2."""
    a, b = (F.normalize(z.double(), dim=1) for z in (x, y))
    every = (a.sum(0) @ b.sum(0)).item()
    return (every - len(x)) / (len(x) * (len(x) - 1)) if x is y else every / (len(x) * len(y))


def clip_score(images: Tensor, texts: Tensor) -> Estimate:
    """100 max(cos, 0), averaged over images and their texts, features [N, D] each: Hessel et al. 2021, CLIPScore
    (arXiv:2104.08718), with 100 in the place of its 2.5. The interval is that of a mean."""
    each = 100 * F.cosine_similarity(images.double(), texts.double()).clamp(min=0)
    reach = 1.96 * (each.std() / math.sqrt(len(each))).item()
    return {"value": (mean := each.mean().item()), "low": mean - reach, "high": mean + reach}


def compare(samples: Tensor, reference: Tensor) -> dict[str, Estimate]:
    """`measure` with intervals; the sets must be in no order, as draws by key and rows spread over a set are."""
    return jackknife(measure, samples, reference, GROUPS if samples.shape[1] <= 256 else GROUPS // 4)


def jackknife(of: Callable[[Tensor, Tensor], Mapping[str, float]], x: Tensor, y: Tensor, groups: int) -> dict[str, Estimate]:
    """The value of each measure of two sets, [N, ...] and [M, ...], and the interval of the grouped jackknife."""
    every = lambda z, g: z[torch.arange(len(z)) % groups != g]  # noqa: E731
    whole, parts = of(x, y), [of(every(x, g), every(y, g)) for g in range(groups)]
    made = {}
    for name, value in whole.items():
        left = np.array([part[name] for part in parts])
        error = math.sqrt((groups - 1) * left.var())
        least, most = (0.0, 1.0) if name in ("precision", "recall") else (-math.inf, math.inf)
        ends = {"low": max(least, value - 1.96 * error), "high": min(most, value + 1.96 * error)}
        made[name] = {"value": value} | ends
    return made


def share(holds: Tensor | np.ndarray) -> Estimate:
    """The share of what holds, [N] bool, with Wilson's interval (1927), which is no point at 0 or 1."""
    n, z = len(holds), 1.96
    p = float(np.mean(np.asarray(holds, dtype=float)))
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {
        "value": p,
        "low": max(0.0, (middle - reach) / (1 + z * z / n)),
        "high": min(1.0, (middle + reach) / (1 + z * z / n)),
    }


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image of x, [N, C, H, W], the distance to the nearest of y, [M, C, H, W], as the root of the mean square of what
    pixels differ by, [N], and which that is, [N]. Images larger than SEEN x SEEN are averaged to that size."""
    small = lambda z: z.float() if max(z.shape[2:]) <= SEEN else F.adaptive_avg_pool2d(z.float(), SEEN)  # noqa: E731
    a, b = (torch.cat([small(part) for part in z.split(256)]).flatten(1) for z in (x, y))
    found = [torch.cdist(part, b).min(1) for part in a.split(256)]
    return torch.cat([part.values for part in found]) / math.sqrt(a.shape[1]), torch.cat([part.indices for part in found])
