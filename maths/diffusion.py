"""The mathematics that diffusion tasks share, as pure functions of tensors.

Symbols: x the clean image or latent, x_t the noised one, a = alpha-bar_t the cumulative signal power in [0, 1), so that
x_t = sqrt(a) x + sqrt(1 - a) noise (Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239, eq. 4)
and the signal-to-noise ratio is SNR = a / (1 - a).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def alphas_cumprod(steps: int, schedule: str, device: Any) -> Tensor:
    """alpha-bar of every timestep of a diffusers beta schedule, [steps] float32 on the device; made once."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule).alphas_cumprod.to(device)


def like(a: Tensor, x: Tensor) -> Tensor:
    """One number an example, [B], shaped to multiply x, [B, ...]."""
    return a.view(-1, *[1] * (x.ndim - 1))


def add_noise(x: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """x_t (Ho et al. 2020, eq. 4). x, noise [B, ...]; a [B]."""
    a = like(a, x)
    return a.sqrt() * x + (1 - a).sqrt() * noise


def target(prediction_type: str, x: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """What the model predicts: the noise, the clean x, or v = sqrt(a) noise - sqrt(1 - a) x (Salimans and Ho 2022, Progressive
    Distillation, arXiv:2202.00512, section 4)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x
    a = like(a, x)
    return a.sqrt() * noise - (1 - a).sqrt() * x


def clean(prediction_type: str, prediction: Tensor, x_t: Tensor, a: Tensor) -> Tensor:
    """The x that a prediction at x_t means; x_t, prediction [B, ...]; a [B], above 0 for epsilon."""
    if prediction_type == "sample":
        return prediction
    a = like(a, x_t)
    if prediction_type == "epsilon":
        return (x_t - (1 - a).sqrt() * prediction) / a.sqrt()
    return a.sqrt() * x_t - (1 - a).sqrt() * prediction


def noise_in(prediction_type: str, prediction: Tensor, x_t: Tensor, a: Tensor) -> Tensor:
    """The noise that a prediction at x_t means; x_t, prediction [B, ...]; a [B], below 1 for sample."""
    if prediction_type == "epsilon":
        return prediction
    a = like(a, x_t)
    if prediction_type == "sample":
        return (x_t - a.sqrt() * prediction) / (1 - a).sqrt()
    return a.sqrt() * prediction + (1 - a).sqrt() * x_t


def loss_weight(prediction_type: str, a: Tensor, snr_gamma: float | None) -> Tensor:
    """Weight of each example's squared error, [B].

    Without snr_gamma: 1 for epsilon and v_prediction, and SNR for sample, which is the loss of epsilon in terms of x. With
    it, min-SNR (Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv:2303.09556): the weight of
    the loss on x is min(SNR, gamma). An error of size d in x is one of size d sqrt(SNR) in epsilon and, since
    v = (sqrt(a) x_t - x) / sqrt(1 - a), one of d sqrt(SNR + 1) in v; so their weights are that over SNR and over SNR + 1.
    At the end of a zero-terminal-SNR schedule, a = 0, these are 1 (the limit) and 0.
    """
    import torch

    snr = a / (1 - a)
    on_x = snr if snr_gamma is None else snr.clamp(max=snr_gamma)
    if prediction_type == "sample":
        return on_x
    if snr_gamma is None:
        return torch.ones_like(a)
    return (snr_gamma / snr).clamp(max=1) if prediction_type == "epsilon" else on_x / (snr + 1)


def square_error(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Squared error in float32, of the shape of both."""
    return (prediction.float() - wanted.float()).square()
