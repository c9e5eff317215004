"""Inpainting as a condition (`--data.conditioning inpainting`): the image with a part hidden, which what stands beside the base
learns to fill in.

White in a mask is what is hidden and drawn anew, as pipelines have it; the loss counts all pixels, since what is kept has to be
drawn too. Without masks in the data each example's hole is a function of the run's seed and its number. What a ControlNet is
given is what its pipeline gives it: StableDiffusionControlNetInpaintPipeline takes hidden pixels as -1 in an image in [0, 1];
those of SD3 and Qwen-Image encode black ones, and add a channel that is 1 where the image is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import require
from oneloop.tasks import Batch, Rng

if TYPE_CHECKING:
    from torch import Tensor

NAME = "inpainting"
FILES = ("image.png", "mask.png")
"""In an export: what its load.py draws with."""


def asked(cfg: Any) -> bool:
    """Whether the condition is the image with a part hidden."""
    return cfg.data.conditioning == NAME


def masked(cfg: Any) -> bool:
    """Whether the data say what is hidden."""
    return bool(cfg.data.mask_column or cfg.data.mask_data_dir)


def check(cfg: Any) -> None:
    """Refuse masks that mean something else.

    Raises:
        BadInput: with the flag to change.
    """
    beside = f"with --data.conditioning {NAME}"
    alpha = f"False {beside}: what lies under transparency is not in the image; --data.mask-data-dir has masks"
    require(not cfg.data.mask_from_alpha, "data.mask_from_alpha", cfg.data.mask_from_alpha, alpha)
    counted = f"0 {beside}: masks say what is hidden, and the loss counts all pixels"
    require(not cfg.data.mask_minimum, "data.mask_minimum", cfg.data.mask_minimum, counted)


# ---------------------------------------------------------------------------------------------------------------------
# Holes.


def hole(x: Tensor, mask: Tensor | None, rng: Rng) -> Tensor:
    """1 where images [B, 3, H, W] are hidden, else 0, [B, 1, H, W]: by their masks [B, 1, H, W] in [0, 1], or drawn."""
    return drawn(rng, *x.shape[-2:]).to(x.dtype) if mask is None else (mask > 0.5).to(x.dtype)


def drawn(rng: Rng, height: int, width: int) -> Tensor:
    """Holes [B, 1, H, W] bool, one for each key: of every second example one to three rectangles, a quarter to three quarters
    as high and as wide as the image; of the others a line of two to five strokes, as broad as a 16th to a 4th of the shorter
    side."""
    import torch

    kind, rectangles, strokes = rng.uniform("hole"), rng.uniform("hole rectangles", 3, 5), rng.uniform("hole strokes", 6, 3)
    down, across = (torch.arange(side, device=kind.device) + 0.5 for side in (height, width))  # [H], [W], in pixels
    # Rectangles: whether there are those after the first, sides, corner.
    size = torch.tensor([height, width], device=kind.device)
    sides = (0.25 + rectangles[..., 1:3] / 2) * size  # [B, 3, 2]
    low = rectangles[..., 3:] * (size - sides)
    within = [(at >= a[..., None]) & (at < b[..., None]) for at, a, b in zip(
        (down, across), low.unbind(-1), (low + sides).unbind(-1), strict=True
    )]  # [B, 3, H], [B, 3, W]  # fmt: skip
    there = (rectangles[..., 0] < 0.5) | (torch.arange(3, device=kind.device) == 0)  # [B, 3]
    boxes = (within[0][..., None] & within[1][:, :, None] & there[..., None, None]).any(1)  # [B, H, W]
    # Strokes: points, and of the first the breadth, of the second how many there are.
    points, radius = strokes[..., :2] * size, (1 / 32 + strokes[:, 0, 2] * 3 / 32) * min(height, width)
    count, lines = 2 + (strokes[:, 1, 2] * 4).long(), torch.zeros_like(boxes)
    for i in range(5):
        a, b = (points[:, j, :, None, None].unbind(1) for j in (i, i + 1))  # [B, 1, 1] each
        step = [v - u for u, v in zip(a, b, strict=True)]
        off = [down[:, None] - a[0], across - a[1]]  # [B, H, 1], [B, 1, W]
        part = (off[0] * step[0] + off[1] * step[1]) / (step[0] ** 2 + step[1] ** 2).clamp(min=1e-6)
        part = part.clamp(0, 1)  # [B, H, W], of the way from one point to the next
        far = (off[0] - part * step[0]) ** 2 + (off[1] - part * step[1]) ** 2
        lines |= (far <= radius[:, None, None] ** 2) & (i < count)[:, None, None]
    return torch.where(kind[:, None, None] < 0.5, boxes, lines)[:, None]


def hidden(x: Tensor, holes: Tensor) -> Tensor:
    """Images [B, 3, H, W] with -1 where `holes` [B, 1, H, W] is 1."""
    return x.masked_fill(holes > 0.5, -1)


def kept(holes: Tensor, like: Tensor) -> Tensor:
    """1 where the image is kept, [B, 1, h, w], of the size of latents: what is nearest, as the pipelines take it."""
    import torch.nn.functional as F

    return 1 - F.interpolate(holes, size=like.shape[-2:])


# ---------------------------------------------------------------------------------------------------------------------
# What pipelines are called with.


def pixels(x: Tensor, holes: Tensor) -> dict[str, Any]:
    """Of Stable Diffusion and SDXL, for images [B, 3, H, W] in [-1, 1]. All steps are taken: a sample begins as noise."""
    image = x / 2 + 0.5
    return {"image": image, "mask_image": holes, "control_image": hidden(image, holes), "strength": 1.0}


def encoded(x: Tensor, holes: Tensor) -> dict[str, Any]:
    """Of SD3 and Qwen-Image."""
    return {"control_image": x, "control_mask": holes}


def example(batch: Batch, cfg: Any) -> Tensor:
    """The holes of fixed examples, as samples show them, [B, 1, H, W]."""
    x = batch["conditioning"]
    return hole(x, batch.get("mask"), Rng.of(cfg.base.seed, batch["n"].tolist(), "samples", x.device))


def lines(batch: Batch, path: Path, latent: bool, cfg: Any) -> tuple[str, str]:
    """Write the first example's image and mask into a folder; the lines of Python before a call of `pipeline`, for
    `str.format`, and its arguments."""
    from torchvision.utils import save_image

    for name, x in zip(FILES, (batch["conditioning"] / 2 + 0.5, example(batch, cfg)), strict=True):
        save_image(x[0], path / name)
    opened = [f'load_image({{path}} + "/{name}")' for name in FILES]
    before = f"from diffusers.utils import load_image\nimage, mask = {opened[0]}, {opened[1]}\n"
    if latent:
        return before, "control_image=image, control_mask=mask"
    before += "import numpy\nimport torch\n"
    before += "control = torch.from_numpy(numpy.array(image) / 255).float().permute(2, 0, 1)[None]\n"
    before += 'control[:, :, torch.from_numpy(numpy.array(mask.convert("L"))) > 127] = -1  # what is hidden\n'
    return before, "image=image, mask_image=mask, control_image=control, strength=1.0"
