"""What a pretrained text-to-image model is trained on: the loss of flow matching, and that of diffusion.

Both take a batch whose images and captions are encoded, and give [B] float32: the weighted error of each example. With a `base`
the target is what that module answers to the same noised images, in the place of the data's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oneloop.families import latents, stable_diffusion, transformer
from oneloop.families.text_to_image import family, settings
from oneloop.maths import diffusion
from oneloop.maths import flow as rectified
from oneloop.tasks import Batch, Models, Rng, masked

if TYPE_CHECKING:
    from torch import Tensor, nn


def objective(models: Models, batch: Batch, rng: Rng, cfg: Any, base: nn.Module | None = None) -> Tensor:
    """The loss of the checkpoint's family."""
    loss = diffusion_loss if family(settings(cfg)) is stable_diffusion else flow_loss
    return loss(models, batch, rng, cfg, base)


def flow_loss(models: Models, batch: Batch, rng: Rng, cfg: Any, base: nn.Module | None = None) -> Tensor:
    """Weighted squared error of the velocity noise - x at (1 - sigma) x + sigma noise (Esser et al. 2024, eq. 13,
    arXiv:2403.03206)."""
    import torch

    s = settings(cfg)
    own = transformer.family(s)
    x = latents.draw(batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, w]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, w]
    sigma = transformer.noise_level(s, rng.uniform("timestep"), x.shape)  # [B]
    x_t = latents.beside(rectified.interpolate(x, noise, sigma), batch)  # [B, C or more, h, w]
    answer = lambda net: own.velocity(net, x_t, sigma, batch, 1.0)  # noqa: E731
    target = rectified.velocity(x, noise)  # [B, C, h, w]
    if base is not None:
        with torch.no_grad():
            target = answer(base)
    return transformer.weight(s, sigma) * masked(diffusion.square_error(answer(models["transformer"]), target), batch)


def diffusion_loss(models: Models, batch: Batch, rng: Rng, cfg: Any, base: nn.Module | None = None) -> Tensor:
    """Weighted squared error of what the UNet predicts (Ho et al. 2020, arXiv:2006.11239)."""
    import torch

    s = settings(cfg)
    x = stable_diffusion.draw(models["vae"], batch, rng.normal("posterior", *batch["latent_mean"].shape[1:]))  # [B, C, h, w]
    noise = rng.normal("noise", *x.shape[1:])  # [B, C, h, w]
    if s.noise_offset:
        noise = noise + s.noise_offset * rng.normal("noise offset", x.shape[1], 1, 1)
    seen = noise + s.input_perturbation * rng.normal("input perturbation", *x.shape[1:]) if s.input_perturbation else noise
    alphas = stable_diffusion.alphas_cumprod(s, x.device)  # [T]
    t = rng.integers("timestep", len(alphas))  # [B]
    a, predicts = alphas[t], stable_diffusion.prediction_type(s)  # [B]
    given = stable_diffusion.conditions(batch, stable_diffusion.is_xl(s))
    x_t = latents.beside(diffusion.add_noise(x, seen, a), batch)  # [B, C or more, h, w]
    answer = lambda net: net(x_t, t, **given, return_dict=False)[0]  # noqa: E731
    target = diffusion.target(predicts, x, noise, a)  # [B, C, h, w]
    if base is not None:
        with torch.no_grad():
            target = answer(base)
    error = masked(diffusion.square_error(answer(models["unet"]), target), batch)  # [B]
    return diffusion.loss_weight(predicts, a, s.snr_gamma) * error
