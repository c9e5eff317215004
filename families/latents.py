"""Images to latents and back, in the scale in which a flow transformer was trained, and latents to tokens and back.

One normalisation serves every family: z = (latent - mean) / std per channel, whose mean and std the autoencoder says itself.
Images are [B, 3, H, W], latents [B, C, h, w]; the frame axis of a video autoencoder lives inside these functions. `family` is a
`families.flow.Family`, of which they read `sample`, `eps` and `video`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oneloop.tasks import transfer

if TYPE_CHECKING:
    from torch import Tensor, nn


def statistics(vae: nn.Module, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Mean and std of the latents' channels, [1, C, 1, 1] each, on the autoencoder's device.

    From its batch-norm, after 2x2 patches (FLUX.2, ERNIE); else from latents_mean and latents_std in its config (Qwen-Image);
    else shift_factor and 1 / scaling_factor. `eps` is the batch-norm's; None: its own.
    """
    import torch

    config, device = vae.config, next(vae.parameters()).device
    if hasattr(vae, "bn"):
        mean, std = vae.bn.running_mean, (vae.bn.running_var + (vae.bn.eps if eps is None else eps)).sqrt()
    elif config.get("latents_mean") is not None:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    else:
        mean, std = torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([1 / config.scaling_factor])
    mean, std = (transfer(x, device).float().view(1, -1, 1, 1) for x in (mean, std))
    return mean, std


def encode(family: Any, vae: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Images [B, 3, H, W] in [-1, 1] -> `latent_mean` and, where the family trains on samples of the posterior, `latent_std`,
    [B, C, h, w] each and normalised. An autoencoder without a posterior (Sana's) has a mean alone."""
    import torch.nn.functional as F

    encoded = vae.encode(images.unsqueeze(2) if family.video else images)
    posterior = getattr(encoded, "latent_dist", None)
    parts = [encoded.latent] if posterior is None else [posterior.mean, posterior.std] if family.sample else [posterior.mean]
    if family.video:
        parts = [part.squeeze(2) for part in parts]
    if hasattr(vae, "bn"):
        parts = [F.pixel_unshuffle(part, 2) for part in parts]
    mean, std = statistics(vae, family.eps)
    parts = [(parts[0] - mean) / std, *(part / std for part in parts[1:])]
    return dict(zip(("latent_mean", "latent_std"), parts, strict=False))


def draw(columns: Mapping[str, Tensor], noise: Tensor) -> Tensor:
    """A latent of the posterior, [B, C, h, w]; its mode where the columns have no `latent_std`."""
    mean = columns["latent_mean"]
    return mean + columns["latent_std"] * noise if "latent_std" in columns else mean


def decode(family: Any, vae: nn.Module, z: Tensor) -> Tensor:
    """Normalised latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], in the precision of the autoencoder's weights."""
    import torch
    import torch.nn.functional as F

    mean, std = statistics(vae, family.eps)
    with torch.autocast(z.device.type, enabled=False):
        z = (z * std + mean).to(vae.dtype)
        if hasattr(vae, "bn"):
            z = F.pixel_shuffle(z, 2)
        images = vae.decode(z.unsqueeze(2) if family.video else z).sample
        return ((images.squeeze(2) if family.video else images) / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens.


def pack(x: Tensor, patch: int = 2) -> Tensor:
    """Latents [B, C, h, w] -> tokens [B, (h/p)(w/p), C p^2] in the order of rows; a token's numbers in the order (C, p, p)."""
    import torch.nn.functional as F

    return F.pixel_unshuffle(x, patch).flatten(2).mT


def unpack(tokens: Tensor, like: Tensor, patch: int = 2) -> Tensor:
    """Tokens [B, n, C p^2] -> latents [B, C, h, w] of the size of `like`; those behind the first h w / p^2 are left out."""
    import torch.nn.functional as F

    h, w = like.shape[-2] // patch, like.shape[-1] // patch
    return F.pixel_shuffle(tokens[:, : h * w].mT.unflatten(2, (h, w)), patch)


def positions(h: int, w: int, axes: int = 3, device: object = None) -> Tensor:
    """Positions of h x w tokens in the order of rows: axis 1 is the row, axis 2 the column, the others 0. [h w, axes]."""
    import torch

    grid = torch.zeros(h, w, axes, device=device)
    grid[..., 1] = torch.arange(h, device=device)[:, None]
    grid[..., 2] = torch.arange(w, device=device)
    return grid.flatten(0, 1)


REFERENCES = ("reference", "reference_2", "reference_3")
"""Columns of images that a model draws after."""


def sequence(
    x: Tensor, columns: Mapping[str, Tensor], patch: int = 2, axes: int = 3, place: int = 1
) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Tokens of x_t [B, n, C p^2] with those of the images REFERENCES [B, C, h', w'] behind them, as far as the columns have
    them; the positions of all, [n, axes], whose axis 0 is `place` for the first of these, twice that for the second, and so on;
    and the grid of each image."""
    import torch

    images = [x, *(columns[key] for key in REFERENCES if key in columns)]
    grids = [(1, image.shape[-2] // patch, image.shape[-1] // patch) for image in images]
    where = [positions(h, w, axes, x.device) for _, h, w in grids]
    for number, grid in enumerate(where):
        grid[:, 0] = number * place
    return torch.cat([pack(image.to(x.dtype), patch) for image in images], 1), torch.cat(where), grids


def beside(x: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """x_t [B, C, h, w] with the channels that the columns have `beside` it, [B, C + C', h, w]."""
    import torch

    return torch.cat([x, columns["beside"].to(x.dtype)], 1) if "beside" in columns else x
