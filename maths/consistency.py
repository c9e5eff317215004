"""The mathematics of consistency models, as pure functions of tensors.

A consistency function f maps every point of a trajectory of the probability flow to its start: f(x_t, t) = x. It is trained to
answer at neighbouring points alike (Song et al. 2023, Consistency Models, arXiv:2303.01469).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from oneloop.maths.diffusion import like
from oneloop.tasks import transfer

if TYPE_CHECKING:
    from torch import Tensor


def huber(error: Tensor, c: float) -> Tensor:
    """Pseudo-Huber distance by element, sqrt(error^2 + c^2) - c: quadratic below c, linear above it (Luo et al. 2023,
    arXiv:2310.04378, section 4)."""
    return (error.square() + c * c).sqrt() - c


def boundary(t: Tensor, scaling: float, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of f(x, t) = c_skip x + c_out F(x, t), which is x itself at t = 0, for timesteps t [B] times `scaling`
    (Luo et al. 2023, appendix D): s_d^2 / (t^2 + s_d^2) and t / sqrt(t^2 + s_d^2)."""
    t = scaling * t.float()
    return sigma_data**2 / (t.square() + sigma_data**2), t / (t.square() + sigma_data**2).sqrt()


def embedded(w: Tensor, width: int) -> Tensor:
    """Guidance strengths w [B] as the UNet's `timestep_cond` [B, width], an even width: sines and cosines of 1000 w, at
    frequencies from 1 to 1 / 10,000, as diffusers' pipelines give them."""
    import torch

    half = width // 2
    step = torch.tensor(10_000.0).log() / (half - 1)  # in float32, as theirs: an angle is up to thousands
    frequencies = torch.exp(torch.arange(half, device=w.device, dtype=torch.float32) * -step)
    angles = 1000 * w[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Training from data alone: x_t = x + sigma noise. Equations are those of Song and Dhariwal 2023, Improved Techniques for
# Training Consistency Models (arXiv:2310.14189).


def levels(step: int, total: int, first: int, last: int) -> int:
    """Noise levels N(k) at an optimizer step of a run: `first` + 1, doubled at even intervals up to `last` + 1 (eq. 15;
    where `last` / `first` is no power of 2, with as many intervals as reach it)."""
    interval = max(total // (math.ceil(math.log2(last / first)) + 1), 1)
    return min(first * 2 ** min(step // interval, 63), last) + 1


@functools.cache
def ladder(count: int, low: float, high: float, rho: float, mean: float, std: float, device: Any) -> tuple[Tensor, Tensor]:
    """The noise levels, [count] rising from `low` to `high` evenly in sigma^(1 / rho) (Karras et al. 2022, arXiv:2206.00364,
    eq. 5), and the probability that a pair of neighbours is at most the i-th, [count - 1]: their share of a lognormal density
    of sigma (eq. 10). float32, on the device; made once."""
    import torch

    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    sigma = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    below = torch.erf((sigma.log() - mean) / (math.sqrt(2) * std))
    share = (below[1:] - below[0]) / (below[-1] - below[0])
    return transfer(sigma.float(), device), transfer(share.float(), device)


def preconditioned(net: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, low: float, data: float) -> Tensor:
    """f(x, sigma) = c_skip x + c_out F(c_in x, 250 ln sigma), which is x itself at sigma = `low`; `data` is the deviation of
    the data (Song et al. 2023, appendix C). x [B, ...]; sigma [B]."""
    above, power = sigma - low, sigma.square() + data * data
    skip, out, inside = data * data / (above.square() + data * data), data * above / power.sqrt(), power.rsqrt()
    return like(skip, x) * x + like(out, x) * net(like(inside, x) * x, 250 * sigma.log())
