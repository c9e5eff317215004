"""One image, from its file to the pixels that training sees: upright, 8-bit sRGB, resized."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as F

from oneloop.configs import Data
from oneloop.inputs.crop import Size, corner

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MARGIN = 2.0
"""How much larger than its pixels a JPEG is decoded at least."""


def to_rgb(image: Image.Image, say: Callable[[str], Any] = lambda change: None) -> Image.Image:
    """Any image as 8-bit sRGB, upright: EXIF orientation applied, deep ranges scaled, colours converted from the embedded
    profile, transparency laid on white. `say` is called with what else was changed.

    Floating-point images are read as [0, 1], [0, 255] or [0, 65535], in the smallest whose maximum is at least half of theirs;
    what lies beyond is clipped. An image of a larger range has its half empty: nothing is lost that could be seen. Integers of
    32 bits are read as 8 bits where all fit, else as 16, else up to their largest.

    Raises:
        ValueError: a floating-point image that is not finite, or falls below zero by more than a twentieth of its range.
    """
    ImageOps.exif_transpose(image, in_place=True)
    profile, grey = image.info.get("icc_profile"), image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    if image.mode == "F" or image.mode.startswith("I"):
        x = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            top = next((t for t in (1.0, 255.0, 65535.0) if x.max() <= 2 * t), x.max())
        elif image.mode == "I":  # 32 bits, of which a file uses 8, 16 or all
            top = next((t for t in (255.0, 65535.0) if x.max() <= t), x.max())
        else:
            top = 65535.0
        if not np.isfinite(x).all() or x.min() < -top / 20:
            raise ValueError("its values are negative or not finite")
        if x.min() < 0 or x.max() > top:
            say("clipped to their range")
        image = Image.fromarray((x.clip(0, top) / top * 255).round().astype(np.uint8))
    clear = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    image = image.convert("RGBA") if clear else image
    if profile:
        alpha = image.getchannel("A") if clear else None
        image = _to_srgb(image, profile, grey, say)
        if clear:
            image.putalpha(alpha)
    if clear:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes, grey: bool, say: Callable[[str], Any]) -> Image.Image:
    """The image in RGB, its colours converted from an embedded ICC profile to sRGB, unless they are sRGB to 2 levels."""
    try:
        mode, convert = _conversion(profile)
    except (OSError, ImportError, ValueError):  # PyCMSError is none of its own kind in every version
        mode, convert = None, None
    if mode is None or (mode == "L" and not grey) or (mode == "CMYK") != (image.mode == "CMYK"):
        say("read as sRGB, since their colour profile cannot be used")
    elif convert is not None:
        say("converted to sRGB from their colour profile")
        return ImageCms.applyTransform(image.convert(mode), convert)
    return image.convert("RGB")


@functools.lru_cache(64)
def _conversion(profile: bytes) -> tuple[str, Any]:
    """The mode of images with this profile, and the conversion of such an image to sRGB; None where it changes nothing."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[given.profile.xcolor_space.strip()]
        convert = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, KeyError) as error:
        raise ValueError(str(error)) from None
    if mode == "CMYK":
        return mode, convert
    levels = np.linspace(0, 255, 9 if mode == "RGB" else 256).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3) if mode == "RGB" else levels[None]
    probe = Image.fromarray(probe)
    changed = np.asarray(ImageCms.applyTransform(probe, convert)).astype(int) - np.asarray(probe.convert("RGB"))
    return mode, convert if np.abs(changed).max() > 2 else None


def shrink(image: Image.Image, cover: Size, margin: float = MARGIN) -> None:
    """Have a JPEG that was not read yet decoded at half, a quarter or an eighth of its size, as long as that is `margin` times
    the size `cover`, height and width, that it will have. With a margin of 2 that takes a half to a quarter of the time, and
    changes pixels by 0.4 of 255 on average and by 4 at most (tests/test_decode.py)."""
    turned = 5 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8
    least = [math.ceil(margin * side) for side in cover]
    image.draft(image.mode, tuple(least if turned else least[::-1]))


def plain(image: Image.Image, raw: bytes, whole: Size, size: Size, cfg: Data) -> Tensor | None:
    """What `fit` makes of an RGB JPEG of which nothing has to be changed, sooner: by simplejpeg where it is installed, else by
    torchvision. They and PIL decode with libjpeg-turbo, to the same bits (tests/test_decode.py).

    None: it is another image, or one that only PIL can judge. `raw`: the file.
    """
    known = image.format == "JPEG" and image.mode == "RGB" and image.size == whole[::-1] and raw.startswith(b"\xff\xd8")
    if not known or "icc_profile" in image.info or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    try:
        if simplejpeg is not None:
            x = torch.from_numpy(simplejpeg.decode_jpeg(raw)).permute(2, 0, 1)  # [3, h, w]
        else:
            x = decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    except (ValueError, RuntimeError):
        return None
    top, left = corner(np.array(whole) - np.array(size), None).tolist() if cfg.center_crop else (0, 0)
    (h, w) = size if cfg.center_crop else whole
    return x[:, top : top + h, left : left + w] if x.shape == (3, *whole) else None


def fit(image: Image.Image, whole: Size, size: Size, cfg: Data) -> Tensor:
    """An upright 8-bit image resized to `whole`, with antialiasing, [C, h, w] uint8; where the crop is central, cut to `size`
    already. Grey ones, which are masks, are resized bilinearly.

    Raises:
        ValueError: it is so narrow that it would exceed the pixels that PIL takes for an attack.
    """
    if math.prod(whole) > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{image.width} x {image.height} is too narrow for a size of {size[1]} x {size[0]}")
    if image.size != whole[::-1]:
        interpolation = F.InterpolationMode("bilinear" if image.mode == "L" else cfg.interpolation)
        image = F.resize(image, list(whole), interpolation=interpolation)
    if cfg.center_crop and whole != size:
        top, left = corner(np.array(whole) - np.array(size), None).tolist()
        image = image.crop((left, top, left + size[1], top + size[0]))
    x = np.array(image)
    return torch.from_numpy(x[None] if x.ndim == 2 else x.transpose(2, 0, 1))


def thumb(image: Image.Image) -> np.ndarray:
    """An RGB image as 8 x 9 pixels, [8, 9, 3] uint8."""
    return np.asarray(image.resize((9, 8), Image.Resampling.BOX))
