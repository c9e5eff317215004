"""The mathematics of consistency models, as pure functions of tensors.

A consistency function f maps every point of a trajectory of the probability flow to its start: f(x_t, t) = x. It is trained to
answer at neighbouring points alike (Song et al. 2023, Consistency Models, arXiv:2303.01469).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
