"""How close one image is to another, as pure functions of tensors: for tasks that log it and scripts that measure it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def measure(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of y against x, each [B]; images [B, C, H, W] in [-1, 1], of which y may stray. No gradients."""
    import torch

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, y = x.float() / 2 + 0.5, (y.float() / 2 + 0.5).clamp(0, 1)
        return {"psnr": psnr(x, y), "ssim": ssim(x, y)}


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in [0, 1], [B]; 100 where they are equal."""
    return -10 * (x - y).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images [B, C, H, W] in [0, 1], [B], the mean over places and channels.

    Wang, Bovik, Sheikh, Simoncelli 2004, Image Quality Assessment: From Error Visibility to Structural Similarity, eq. 13, with
    their Gaussian window of 11 (no larger than the image) and deviation 1.5, K1 = 0.01 and K2 = 0.03.
    """
    import torch
    from torch.nn import functional as F

    side = min(11, *x.shape[-2:])
    w = torch.exp(-((torch.arange(side, device=x.device) - (side - 1) / 2) ** 2) / (2 * 1.5**2))
    w = (w / w.sum()).view(1, 1, side, 1)
    moments = torch.stack([x, y, x * x, y * y, x * y])  # [5, B, C, H, W]
    means = F.conv2d(F.conv2d(moments.flatten(0, 2)[:, None], w), w.mT).unflatten(0, moments.shape[:3])
    mx, my, xx, yy, xy = means.flatten(2)  # each [B, places]
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * (xy - mx * my) + c2) / (xx - mx**2 + yy - my**2 + c2)
    return (structure * (2 * mx * my + c1) / (mx**2 + my**2 + c1)).mean(1)
