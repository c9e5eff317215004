"""How an image becomes the size of its bucket: resized until it covers it, cropped, perhaps mirrored.

Pure integers, exact on every machine; sizes and corners are (height, width) and (top, left) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """One example's crop: resize to `resized`, cut `size` at (top, left), then mirror.

    A column that is `like` another (a mask, a conditioning image) is resized to the same `resized`, whatever its own pixels.
    """

    size: Size
    resized: Size
    top: int
    left: int
    mirrored: bool

    @property
    def crop_top_left(self) -> Size:
        """The corner that SDXL is conditioned on, in the image as the model sees it: of a mirrored crop it is the corner in the
        mirrored image (Podell et al., 2023, arXiv 2307.01952, section 2.2). `original_size` is that of the file, upright."""
        return self.top, self.resized[1] - self.size[1] - self.left if self.mirrored else self.left


def resized(image: np.ndarray | Size, size: np.ndarray | Size) -> np.ndarray:
    """The smallest size that covers `size` with the ratio of `image`, its longer part rounded down; [..., 2] each.

    One side equals that of `size`. For a square it is torchvision's Resize(side).
    """
    (h, w), (high, wide) = np.moveaxis(np.asarray(image, np.int64), -1, 0), np.moveaxis(np.asarray(size, np.int64), -1, 0)
    by_height = high * w >= wide * h  # scaled until the heights agree, the width is no smaller
    return np.stack([np.where(by_height, high, wide * h // w), np.where(by_height, high * w // h, wide)], -1)


def corner(room: np.ndarray, u: np.ndarray | None) -> np.ndarray:
    """Top and left of a crop, where resizing left this room, [..., 2]: uniform in [0, room] by u in [0, 1), or central.

    The centre is torchvision's CenterCrop, int(round(room / 2)), which rounds halves to even.
    """
    return (room + (room % 4 == 3)) // 2 if u is None else (np.asarray(u, np.float64) * (room + 1)).astype(np.int64)


def crops(images: np.ndarray, size: Size, u: np.ndarray | None, mirrored: np.ndarray) -> list[Crop]:
    """The crops of B images [B, 2] of one bucket: u [B, 2] uniforms or None (central), mirrored [B] bool."""
    whole = resized(images, size)
    corners = corner(whole - np.array(size), u)
    rows = zip(whole.tolist(), corners.tolist(), np.asarray(mirrored, bool).tolist(), strict=True)
    return [Crop(size, tuple(r), top, left, m) for r, (top, left), m in rows]
