"""Conditioning images that are functions of the image alone: what a user without a prepared set can start from.

`make(by, x)` takes the image as training sees it, resized, [3, h, w] uint8, and gives one of the same shape. Each is pure, in
integers where the result could depend on the machine, and is kept with the decoded image. What a pretrained model makes is
annotators.py's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

VERSION = 1
"""To be raised with every change to what one of them gives: it is in the name of what is cached."""
LOW, HIGH = 100, 200
"""Canny's thresholds: below the first nothing is an edge, above the second everything is."""
TAN = 13573
"""tan(22.5 degrees) 2^15."""


By = str | Callable[[Tensor], Tensor]
"""What a condition is made by: the name of a function of the image, or an annotator."""


def make(by: By, x: Tensor) -> Tensor:
    """The conditioning image of an image."""
    return (FUNCTIONS[by] if isinstance(by, str) else by)(x).contiguous()


def greyscale(x: Tensor) -> Tensor:
    """Luma by ITU-R BT.601 in each channel, as PIL's mode L has it."""
    r, g, b = x.int()
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).to(torch.uint8).expand_as(x)


def blur(x: Tensor) -> Tensor:
    """By PIL's Gaussian, whose deviation is a 32nd of the shorter side: colours and places, no detail."""
    image = Image.fromarray(x.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(min(x.shape[-2:]) / 32))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def edges(x: Tensor) -> Tensor:
    """White edges on black by Canny 1986, A Computational Approach to Edge Detection, without its smoothing: those of OpenCV's
    `Canny(image, 100, 200)`, on which the published ControlNets for edges were trained.

    Sobel's derivatives in the channel where |dx| + |dy| is largest, its maxima along the gradient, and of those above LOW the
    ones that touch, by way of others, one above HIGH.
    """
    padded = np.pad(x.numpy().astype(np.int32), ((0, 0), (1, 1), (1, 1)), "edge")  # [3, h + 2, w + 2]
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    dx, dy = rows[..., 2:] - rows[..., :-2], columns[:, 2:] - columns[:, :-2]  # [3, h, w]
    channel = (np.abs(dx) + np.abs(dy)).argmax(0)[None]
    dx, dy = (np.take_along_axis(d, channel, 0)[0] for d in (dx, dy))  # [h, w]
    there = _maxima(dx, dy)
    strong = there & (np.abs(dx) + np.abs(dy) > HIGH)
    return torch.from_numpy(255 * _reached(there, strong).astype(np.uint8)).expand_as(x)


def _maxima(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Where the magnitude is above LOW and no neighbour along the gradient, one of four directions, has more, [h, w] bool."""
    size = np.abs(dx) + np.abs(dy)
    around = np.pad(size, 1)
    at = lambda down, right: around[1 + down : around.shape[0] - 1 + down, 1 + right : around.shape[1] - 1 + right]  # noqa: E731
    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat, steep = y < x * TAN, y > x * TAN + (x << 16)
    rising = (dx ^ dy) < 0
    across = (size > at(0, -1)) & (size >= at(0, 1))
    along = (size > at(-1, 0)) & (size >= at(1, 0))
    falling = (size > at(-1, -1)) & (size > at(1, 1))
    other = (size > at(-1, 1)) & (size > at(1, -1))
    return (size > LOW) & np.where(flat, across, np.where(steep, along, np.where(rising, other, falling)))


def _reached(there: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What of `there` is connected, by its eight neighbours, with `start`, [h, w] bool each."""
    wide = there.shape[1] + 2
    open_, front = np.pad(there, 1).ravel(), np.flatnonzero(np.pad(start, 1))
    found = np.zeros_like(open_)
    around = np.array([-wide - 1, -wide, -wide + 1, -1, 1, wide - 1, wide, wide + 1])
    while len(front):
        found[front] = True
        near = (front[:, None] + around).ravel()
        front = np.unique(near[open_[near] & ~found[near]])
    return found.reshape(-1, wide)[1:-1, 1:-1]


def inpainting(x: Tensor) -> Tensor:
    """The image as it is: what is hidden of it is the task's to say, anew for each example."""
    return x.clone()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "edges": edges,
    "greyscale": greyscale,
    "blur": blur,
    "inpainting": inpainting,
}
"""Their names, as of `--data.conditioning`."""
