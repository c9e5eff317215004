"""The mathematics of rectified flow, as pure functions of tensors.

Symbols: x the clean latent, x_t the noised one, sigma in [0, 1] the share of noise (the papers' t): 0 is the image, 1 is noise.
A model predicts the velocity dx_t/dsigma = noise - x (Liu et al. 2022, Flow Straight and Fast, arXiv:2209.03003; Lipman et al.
2022, Flow Matching, arXiv:2210.02747). Equations are those of Esser et al. 2024, Scaling Rectified Flow Transformers
(arXiv:2403.03206).

Every density of sigma is an increasing map of one uniform number u: what spreads u evenly spreads sigma by its density, so that
validation can be stratified.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from oneloop.maths.diffusion import like

if TYPE_CHECKING:
    from torch import Tensor

DENSITIES = ("logit_normal", "mode", "uniform", "cosmap")
WEIGHTS = ("none", "sigma_sqrt", "cosmap")


def interpolate(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) x + sigma noise (eq. 13). x, noise [B, ...]; sigma [B]."""
    return x + like(sigma, x) * (noise - x)


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts at every sigma: noise - x."""
    return noise - x


def clean(x_t: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The x that a velocity implies: x_t - sigma v. x_t, v [B, ...]; sigma [B]."""
    return x_t - like(sigma, x_t) * v


# ---------------------------------------------------------------------------------------------------------------------
# Which sigma: densities of u -> sigma, then the shift.


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigma whose logit is normal (eq. 19): sigmoid(mean + std Phi^-1(u)). Most weight where mean says, none at 0 and 1."""
    import torch

    inside = torch.finfo(u.dtype).eps / 4  # half a step of a float32 in [0, 1): u = 0 has a finite quantile
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(inside, 1 - 2 * inside)))


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """Heavy-tailed sigma around the middle (eq. 20), as its mirror image 1 - u, which has the same density and increases.
    Monotone for scale in [-1, 2 / (pi - 2)]; 0 is uniform."""
    import torch

    return u - scale * (torch.sin(math.pi / 2 * u).square() - u)


def cosmap(u: Tensor) -> Tensor:
    """The noise levels of a cosine schedule (eq. 21): 1 - 1 / (tan(pi u / 2) + 1), of density 2 / (pi (1 - 2 s + 2 s^2))."""
    import torch

    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def density(name: str, u: Tensor, mean: float = 0.0, std: float = 1.0, scale: float = 1.29) -> Tensor:
    """Uniform numbers u in [0, 1) -> sigma in [0, 1] of the density called `name`, any shape; increasing in u.

    `mean` and `std` are logit_normal's, `scale` is mode's.
    """
    if name == "logit_normal":
        return logit_normal(u, mean, std)
    if name == "mode":
        return mode(u, scale)
    assert name in DENSITIES, name
    return cosmap(u) if name == "cosmap" else u


def shift(sigma: Tensor, alpha: float) -> Tensor:
    """sigma' = alpha sigma / (1 + (alpha - 1) sigma) (eq. 23), alpha times the odds sigma / (1 - sigma): a larger image, whose
    neighbouring pixels say more of each other, needs more noise to lose as much. 1 changes nothing."""
    return alpha * sigma / (1 + (alpha - 1) * sigma)


def unshift(sigma: Tensor, alpha: float) -> Tensor:
    """The sigma that `shift` maps to this one."""
    return shift(sigma, 1 / alpha)


# ---------------------------------------------------------------------------------------------------------------------
# How much each sigma counts.


def weight(name: str, sigma: Tensor) -> Tensor:
    """Weight of each example's squared error, [B].

    none: 1. sigma_sqrt: sigma^-2, which counts little noise most (on the error of x, sigma times that of the velocity, it would
    be weight 1). cosmap: eq. 22, the density of `cosmap` as a weight on uniform sigmas.
    """
    import torch

    assert name in WEIGHTS, name
    if name == "sigma_sqrt":
        return sigma**-2.0
    if name == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    return torch.ones_like(sigma)
