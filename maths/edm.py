"""The mathematics of EDM, as pure functions of tensors (Karras, Aittala, Aila, Laine 2022, Elucidating the Design Space of
Diffusion-Based Generative Models, arXiv:2206.00364).

Symbols: x the clean image, n standard normal noise, x + sigma n the noised one, sigma in (0, inf); sigma_data the deviation of
the data. The network F answers to c_in (x + sigma n) at c_noise, the denoiser is D = c_skip (x + sigma n) + c_out F (eq. 7).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from oneloop.maths.diffusion import like

if TYPE_CHECKING:
    from torch import Tensor


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise (table 1), of the shape of sigma."""
    total = sigma.square() + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) of the denoiser's squared error (table 1): c_out^-2, so that the error of F counts alike at every sigma."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def noise_level(u: Tensor, p_mean: float, p_std: float) -> Tensor:
    """Uniform numbers in [0, 1) -> sigma whose logarithm is normal (table 1): exp(p_mean + p_std Phi^-1(u)). It increases in u:
    what spreads u evenly spreads sigma by its density."""
    import torch

    inside = torch.finfo(u.dtype).eps / 4  # half a step of a float32 in [0, 1): u = 0 has a finite quantile
    return (p_mean + p_std * torch.special.ndtri(u.clamp(inside, 1 - 2 * inside))).exp()


def add_noise(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x + sigma n. x, noise [B, ...]; sigma [B]."""
    return x + like(sigma, x) * noise


def denoised(answer: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """D(x; sigma) of a network `answer`(input [B, ...], c_noise [B]) (eq. 7). x [B, ...]; sigma [B]."""
    c_skip, c_out, c_in, c_noise = preconditioning(sigma, sigma_data)
    return like(c_skip, x) * x + like(c_out, x) * answer(like(c_in, x) * x, c_noise)


def sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The noise levels of a sampler, [steps + 1] float64, falling from sigma_max to sigma_min, and then 0 (eq. 5)."""
    import torch

    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    least, most = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(most + ramp * (least - most)) ** rho, torch.zeros(1, dtype=torch.float64)])


def heun(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Tensor) -> Tensor:
    """The second-order deterministic sampler (algorithm 1): `denoise`(x, sigma) is D, x is sigma_max n, `levels` [steps + 1]
    fall to 0. It calls D twice a step, once in the last."""
    for now, after in zip(levels[:-1].to(x), levels[1:].to(x), strict=True):
        slope = (x - denoise(x, now)) / now
        moved = x + (after - now) * slope
        if after > 0:
            slope = (slope + (moved - denoise(moved, after)) / after) / 2
            moved = x + (after - now) * slope
        x = moved
    return x
