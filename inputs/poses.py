"""The pose of a person as an image: VitPose's points (Xu et al. 2022, arXiv:2204.12484), drawn as OpenPose draws them (Cao et
al. 2018, arXiv:1812.08008), as the published ControlNets for poses were trained.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

SURE = 0.3
"""The least score of a point that is drawn."""
BODY = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""OpenPose's 18 points, from nose to left ear, as numbers of COCO's 17; the neck is between the shoulders."""
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0))
LIMBS += ((0, 14), (14, 16), (0, 15), (15, 17))
"""Pairs of those points, in the order in which OpenPose colours them."""
COLOURS = tuple(
    tuple(round(255 * min(max(abs((hue / 60 + shift) % 6 - 3) - 1, 0), 1)) for shift in (0, 4, 2)) for hue in range(0, 360, 20)
)
"""OpenPose's: 18 hues around the circle."""


PADDING = 1.25
"""How much more than the person's box a model of poses sees."""


def pose(net: Any, processor: Any, image: Image.Image) -> Tensor:
    """The skeleton of the person that fills the image, drawn as OpenPose draws it, [3, h, w].

    The image is put into the model's size and points are read off its heatmaps as `VitPoseImageProcessor` does both for a box
    that is the whole image; that class needs scipy for it.
    """
    high, wide = processor.size["height"], processor.size["width"]
    span = max(image.width, image.height * wide / high) * PADDING  # in pixels of the image, across what the model sees
    span, centre = np.array([span, span * high / wide]), np.array([image.width, image.height]) / 2  # x, y
    grid = [np.arange(n) * s / (n - 1) + c - s / 2 for n, s, c in zip((wide, high), span, centre, strict=True)]
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    x = (sampled(x, *grid) * processor.rescale_factor - mean) / std  # [1, 3, high, wide]
    experts = getattr(getattr(net.config, "backbone_config", None), "num_experts", 1)
    coco = {"dataset_index": torch.zeros(1, dtype=torch.long, device=net.device)} if experts > 1 else {}
    heatmaps = net(pixel_values=x.to(net.device), **coco).heatmaps[0].float().cpu().numpy()  # [K, h', w']
    if len(heatmaps) < 17:
        raise ValueError(f"its model finds {len(heatmaps)} points; expected COCO's 17, or those and more")
    points, scores = peaks(heatmaps)
    points = points * span / (np.array(heatmaps.shape[:0:-1]) - 1) + centre - span / 2
    return skeleton(points, scores, image.height, image.width)


def sampled(x: Tensor, across: np.ndarray, down: np.ndarray) -> Tensor:
    """An image [1, 3, h, w] in [0, 255] at these places, in pixels from the middle of the first, in whole levels; black
    outside. [1, 3, H, W]"""
    scale = [2 / max(n - 1, 1) for n in (x.shape[-1], x.shape[-2])]
    u, v = (torch.from_numpy(at * s - 1).float() for at, s in zip((across, down), scale, strict=True))
    grid = torch.stack([u.expand(len(v), -1), v[:, None].expand(-1, len(u))], -1)[None]
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True).round() * (grid.abs() <= 1).all(-1)[:, None]


def peaks(heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where heatmaps [K, h, w] have their maxima, [K, 2], x before y, and how large these are, [K]: between pixels by a step of
    Newton's in the logarithm of the blurred maps (Zhang et al. 2020, Distribution-Aware Coordinate Representation for Human
    Pose Estimation, arXiv:1910.06278, equation 9)."""
    count, _, wide = heatmaps.shape
    best, scores = heatmaps.reshape(count, -1).argmax(1), heatmaps.reshape(count, -1).max(1)
    points = np.stack([best % wide, best // wide], 1).astype(np.float64)
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 0.8) ** 2)
    padded = np.pad(heatmaps, ((0, 0), (5, 5), (5, 5)), "symmetric").astype(np.float64)
    for axis in (1, 2):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), "valid")
    z = np.pad(np.log(padded.clip(0.001, 50)), ((0, 0), (1, 1), (1, 1)), "edge")
    at = lambda dx, dy: z[np.arange(count), best // wide + 1 + dy, best % wide + 1 + dx]  # noqa: E731
    slope = np.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)], 1) / 2
    bend = [at(1, 0) - 2 * at(0, 0) + at(-1, 0), at(0, 1) - 2 * at(0, 0) + at(0, -1)]
    mixed = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * at(0, 0) - at(-1, 0) - at(0, -1) + at(-1, -1)) / 2
    hessian = np.stack([bend[0], mixed, mixed, bend[1]], 1).reshape(count, 2, 2) + np.finfo(np.float32).eps * np.eye(2)
    return points - np.linalg.solve(hessian, slope[..., None])[..., 0], scores


def skeleton(points: np.ndarray, scores: np.ndarray, height: int, width: int) -> Tensor:
    """COCO's points [17 or more, 2], x before y, with scores [17 or more], on black, [3, h, w] uint8: limbs as ellipses in 0.6
    of their colour, then points as discs; half as broad as 8 pixels of 512."""
    shoulders = [5, 6]
    there = [(points[shoulders].mean(0), scores[shoulders].min()) if i is None else (points[i], scores[i]) for i in BODY]
    canvas, broad = Image.new("RGB", (width, height)), max(min(height, width) / 128, 1.0)
    draw = ImageDraw.Draw(canvas)
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        (start, sure), (end, other) = there[a], there[b]
        if min(sure, other) >= SURE:
            along, turn = (end - start) / 2, np.linspace(0, 2 * math.pi, 48, endpoint=False)[:, None]
            across = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-6) * broad
            outline = (start + end) / 2 + np.cos(turn) * along + np.sin(turn) * across
            draw.polygon([*map(tuple, outline.tolist())], fill=tuple(int(0.6 * level) for level in colour))
    for (at, sure), colour in zip(there, COLOURS, strict=True):
        if sure >= SURE:
            draw.ellipse([*(at - broad).tolist(), *(at + broad).tolist()], fill=colour)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
