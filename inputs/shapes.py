"""The embedded examples: coloured shapes that the program draws itself, each a function of its index alone."""

from __future__ import annotations

import functools

import numpy as np

from oneloop.tasks import hash64

COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (30, 70, 225),
    "yellow": (250, 205, 20),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SIZES = {"small": 0.28, "large": 0.4}  # the radius, as a fraction of the image's side
REACH = 0.06  # how far the centre lies from the middle at most, as a fraction of the side, in x and in y
SHAPES = {  # name -> signed distance from (x, y), in radii and y downwards, to the outline; negative inside
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": lambda x, y: np.maximum(0.894 * np.abs(x) - 0.447 * (y + 1), y - 0.86),
}


def describe_shape(index: int) -> tuple[str, str, str, str, float, float]:
    """Shape, size, front and back colour and centre (x, y) of the embedded example `index`: a function of the index alone."""
    rng = np.random.Generator(np.random.Philox(key=hash64("shapes", index)))
    shape, size = list(SHAPES)[rng.integers(len(SHAPES))], list(SIZES)[rng.integers(len(SIZES))]
    front, back = rng.choice(list(COLOURS), 2, replace=False)
    return shape, size, front, back, *0.5 + rng.uniform(-REACH, REACH, 2)


def draw_shape(index: int, resolution: int) -> tuple[np.ndarray, str, int]:
    """Image [H, W, 3] uint8, caption and label of the embedded example `index`."""
    shape, size, front, back, x0, y0 = describe_shape(index)
    cover = cover_shape(shape, size, x0, y0, resolution)[..., None]
    picture = cover * np.array(COLOURS[front]) + (1 - cover) * np.array(COLOURS[back])
    return picture.round().astype(np.uint8), caption_shape(shape, size, front, back), list(SHAPES).index(shape)


def cover_shape(shape: str, size: str, x0: float, y0: float, resolution: int) -> np.ndarray:
    """The share of each pixel inside the outline of a shape centred at (x0, y0), [H, W] in [0, 1]."""
    return np.clip(0.5 - _distance(shape, size, x0, y0, resolution), 0, 1)


def draw_outline(index: int, resolution: int) -> np.ndarray:
    """The outline of the embedded example `index`, white on black and two pixels wide, [H, W, 3] uint8: no colour of it."""
    shape, size, _, _, x0, y0 = describe_shape(index)
    line = np.clip(1.5 - np.abs(_distance(shape, size, x0, y0, resolution)), 0, 1)[..., None]
    return (255 * line).round().astype(np.uint8).repeat(3, -1)


def _distance(shape: str, size: str, x0: float, y0: float, resolution: int) -> np.ndarray:
    """Signed distance of each pixel's centre to the outline of a shape centred at (x0, y0), in pixels, [H, W]."""
    radius, grid = SIZES[size], (np.arange(resolution) + 0.5) / resolution
    return radius * SHAPES[shape]((grid[None] - x0) / radius, (grid[:, None] - y0) / radius) * resolution


@functools.cache
def caption_shape(shape: str, size: str, front: str, back: str) -> str:
    """The caption of a shape; one string for all that look alike."""
    return f"a {size} {front} {shape} on a {back} background"
