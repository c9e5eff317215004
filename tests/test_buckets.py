"""Buckets and crops, against brute force and torchvision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from oneloop.configs import BadInput
from oneloop.inputs.buckets import assign, bucket_sizes, enlargement, nearest, table
from oneloop.inputs.crop import Crop, corner, crops, resized

SIDES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes.


def test_the_sizes_of_sdxl():
    """The longest of each height in the table of the SDXL report, appendix I, are ours."""
    sizes = bucket_sizes(1024, 64, 4.0)
    assert sizes == sorted(sizes, key=lambda s: s[0] / s[1])
    wide = [s for s in sizes if s[0] < s[1]]
    assert wide == [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]
    assert {s[::-1] for s in wide} | set(wide) | {(1024, 1024)} == set(sizes)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([8, 16, 32, 64]), st.integers(1, 24), st.floats(1, 4))
def test_sizes_are_about_the_resolution(multiple, steps, ratio):
    resolution = multiple * steps
    sizes = bucket_sizes(resolution, multiple, ratio)
    assert (resolution, resolution) in sizes and {s[::-1] for s in sizes} == set(sizes) and len(set(sizes)) == len(sizes)
    for h, w in sizes:
        assert h % multiple == w % multiple == 0 and max(h / w, w / h) <= ratio
        assert resolution**2 - multiple * min(h, w) < h * w <= resolution**2


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match=r"--data.resolution is 500; expected a multiple of 64"):
        bucket_sizes(500, 64)
    with pytest.raises(BadInput, match="ratio"):
        bucket_sizes(512, 64, 0.5)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(SIDES, min_size=1, max_size=30), st.sampled_from([(512, 64), (512, 8), (1024, 64), (96, 16)]))
def test_the_nearest_ratio_is_the_smallest_crop(images, setting):
    sizes = bucket_sizes(*setting, 3.0)
    for (h, w), i in zip(images, nearest(np.array(images), sizes).tolist(), strict=True):
        distance = [abs(math.log(h / w) - math.log(x / y)) for x, y in sizes]
        assert distance[i] <= min(distance) + 1e-12


def test_enlarging_is_by_the_side_that_has_to_grow_more():
    assert enlargement(np.array([[256, 600], [600, 256], [1024, 2048]]), (512, 512)).tolist() == [2, 2, 0.5]


def test_enormous_images_are_refused():
    with pytest.raises(OverflowError):
        nearest(np.array([[1 << 20, 3]]), bucket_sizes(512, 64))


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(SIDES, min_size=1, max_size=40), st.sampled_from([(512,), (512, 768), (512, 768, 1024)]), st.floats(1, 2))
def test_every_image_has_an_entry_in_each_resolution(images, resolutions, limit):
    images = np.array(images)
    groups = [bucket_sizes(r, 64) for r in resolutions]
    assigned = assign(images, groups, limit)
    assert all(len(rows) and (np.diff(rows) >= 0).all() for rows in assigned.values())
    assert np.bincount(np.concatenate(list(assigned.values())), minlength=len(images)).tolist() == [len(groups)] * len(images)
    lowest = set(groups[0])
    for size, rows in assigned.items():
        assert size in lowest or (enlargement(images[rows], size) <= limit).all()
    # An image that is large enough for all of them is once in each.
    for i in np.flatnonzero(images.min(1) >= 2048):
        sizes = [size for size, rows in assigned.items() if i in rows]
        assert len(sizes) == len(groups) and all(len(set(g) & set(sizes)) == 1 for g in groups)


def test_the_table_says_what_each_bucket_costs():
    images = np.array([[600, 600], [512, 640], [300, 310], [1000, 2600]])
    lines = {line.size: line for line in table(images, assign(images, [bucket_sizes(512, 64)]), block=2)}
    assert {size: line.images for size, line in lines.items()} == {(384, 640): 1, (448, 576): 1, (512, 512): 2}
    assert lines[512, 512].small == (2,) and lines[512, 512].cropped_most == pytest.approx(1 - 512 / 529)
    assert lines[512, 512].cropped == pytest.approx((1 - 512 / 529) / 2)
    assert lines[384, 640].fewer and not lines[512, 512].fewer
    assert lines[384, 640].cropped == pytest.approx(1 - 640 / 998)
    generous = table(images, assign(images, [bucket_sizes(512, 64)]), limit=1.71)
    assert all(line.small == () for line in generous)


# ---------------------------------------------------------------------------------------------------------------------
# Crops.


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(SIDES, st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_resizing_covers_with_one_side_equal(image, size):
    (h, w), (high, wide) = image, size
    tall, broad = resized(image, size).tolist()
    assert tall >= high and broad >= wide and (tall == high or broad == wide)
    assert abs(tall - high - max(0.0, wide * h / w - high)) < 1 and abs(broad - wide - max(0.0, high * w / h - wide)) < 1


def test_a_square_is_resized_as_torchvision_does():
    for h, w in [(31, 97), (97, 31), (40, 40), (33, 32), (64, 65), (500, 333), (29, 58)]:
        for side in (16, 32, 33):
            expected = F.resize(torch.zeros(1, h, w, dtype=torch.uint8), [side]).shape[1:]
            assert tuple(resized((h, w), (side, side)).tolist()) == tuple(expected)


def test_the_centre_is_torchvisions_for_all_parities():
    for height in range(8, 17):
        for width in range(8, 17):
            x = torch.arange(height * width).view(1, height, width)
            for size in [(8, 8), (7, 8), (8, 7), (7, 7)]:
                top, left = corner(np.array([height - size[0], width - size[1]]), None)
                expected = F.center_crop(x, list(size))
                assert torch.equal(x[:, top : top + size[0], left : left + size[1]], expected), (height, width, size)


def test_random_corners_are_uniform_over_the_room():
    u = (np.arange(1200) + 0.5)[:, None] / 1200
    top, left = corner(np.array([2, 5]), np.concatenate([u, u], 1)).T
    assert np.bincount(top).tolist() == [400] * 3 and np.bincount(left).tolist() == [200] * 6
    last = np.float32(1 - 2**-24)  # the largest uniform of a float32
    rooms = np.arange(5000)
    assert (corner(rooms, np.full(5000, last, np.float32)) == rooms).all()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(8, 24), st.integers(8, 24)),
    st.sampled_from([(8, 8), (8, 6), (5, 8)]),
    st.floats(0, 0.999),
    st.booleans(),
)
def test_the_corner_of_a_mirrored_crop_is_in_the_mirrored_image(image, size, u, central):
    uniforms = None if central else np.array([[u, u], [u, u]])
    plain, mirrored = crops(np.array([image, image]), size, uniforms, np.array([False, True]))
    assert (plain.top, plain.left) == plain.crop_top_left == (mirrored.top, mirrored.left)
    h, w = plain.resized
    x = torch.arange(h * w).view(h, w)
    cut = x[mirrored.top : mirrored.top + size[0], mirrored.left : mirrored.left + size[1]].flip(-1)
    top, left = mirrored.crop_top_left
    assert torch.equal(cut, x.flip(-1)[top : top + size[0], left : left + size[1]])


def test_a_crop_is_plain_data():
    assert crops(np.array([[300, 200]]), (64, 64), None, [True]) == [Crop((64, 64), (96, 64), 16, 0, True)]
