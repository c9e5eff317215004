"""Images, from files to pixels, once: every file of a set is read, checked and resized, and what was found may be kept.

What one pass over the files found can lie on disk (`keep`, `kept`), where the run's next life, its other processes and other
runs find it. The pixels are then mapped from there, so that processes of a machine share them, and a start reads no image.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import xxhash
from PIL import ExifTags, Image, ImageCms, ImageOps, features
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from oneloop.configs import Data
from oneloop.inputs.crop import corner
from oneloop.inputs.files import reason
from oneloop.inputs.sources import Source, content_hash
from oneloop.machine.files import erase, strangers

# ---------------------------------------------------------------------------------------------------------------------
# One image.


def to_rgb(image: Image.Image, say: Callable[[str], Any] = lambda change: None) -> Image.Image:
    """Any image as 8-bit sRGB, upright: EXIF orientation applied, deep ranges scaled, colours converted from the embedded
    profile, transparency laid on white. `say` is called with what else was changed.

    Floating-point images are read as [0, 1], [0, 255] or [0, 65535], in the smallest whose maximum is at least half of theirs;
    what lies beyond is clipped. An image of a larger range has its half empty: nothing is lost that could be seen.

    Raises:
        ValueError: a floating-point image that is not finite, or falls below zero by more than a twentieth of its range.
    """
    ImageOps.exif_transpose(image, in_place=True)
    profile, grey = image.info.get("icc_profile"), image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    if image.mode == "F" or image.mode.startswith("I"):
        x = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            top = next((t for t in (1.0, 255.0, 65535.0) if x.max() <= 2 * t), x.max())
        else:
            top = max(65535.0, x.max())
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


def pixels(image: Image.Image, cfg: Data) -> tuple[Tensor, tuple[int, int]]:
    """An upright RGB image with its shorter side at the resolution, [3, h, w] uint8; a square already where the crop is
    central. And the room that a crop has after resizing, in height and width.

    Raises:
        ValueError: it is so narrow that it would exceed the pixels that PIL takes for an attack.
    """
    side, most = cfg.resolution, 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if max(image.size) * side**2 > most * min(image.size):
        raise ValueError(f"{image.width} x {image.height} is too narrow for a resolution of {side}")
    image = F.resize(image, [side], interpolation=F.InterpolationMode(cfg.interpolation))  # with antialiasing, as PIL does it
    room = (image.height - side, image.width - side)
    if cfg.center_crop:
        top, left = corner(np.array(room), None).tolist()
        image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), room


def thumb(image: Image.Image) -> np.ndarray:
    """An RGB image as 8 x 9 pixels, [8, 9, 3] uint8."""
    return np.asarray(image.resize((9, 8), Image.Resampling.BOX))


# ---------------------------------------------------------------------------------------------------------------------
# All of a set.


@dataclass(frozen=True)
class Pictures:
    """What one pass over a set found: N images that can be read, and those that cannot."""

    columns: dict[str, Tensor]
    """For each image, [N, ...]: `row` of the source, int64; `size` before resizing and `room` for a crop after it, [2] int64
    each, height and width; `file`, a hash of its bytes, and `mark`, one of its pixels, [16] uint8 each; `thumb`, itself as
    8 x 9 pixels, [8, 9, 3] uint8."""
    modes: dict[str, int]
    """PIL's mode -> images."""
    changes: dict[str, int]
    """What was changed -> images."""
    broken: list[str]
    """Name and reason of each that cannot be read."""
    pixels: Tensor | list[Tensor] | None
    """[3, h, w] uint8 of each: one tensor where all have one shape; None where they exceed the memory budget."""

    def __len__(self) -> int:
        return len(self.columns["row"])

    def shapes(self, cfg: Data) -> Tensor:
        """Height and width of each after resizing, [N, 2]."""
        return cfg.resolution + self.columns["room"] * (not cfg.center_crop)

    def nbytes(self, cfg: Data) -> int:
        """What their pixels take, held or not."""
        return 3 * int(self.shapes(cfg).prod(1).sum())


@dataclass(frozen=True)
class _Found:
    """One image of the pass."""

    values: dict[str, Any]
    mode: str
    changes: list[str]
    pixels: Tensor


def _find(source: Source, cfg: Data, skim: bool, rows: range) -> list[_Found | str]:
    """What there is at each row, or what is wrong with it."""
    found: list[_Found | str] = []
    for row in rows:
        try:
            image, raw = source.read(row)
            mode, whole, changes = image.mode, image.size, []
            if image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False):
                changes.append("with several frames, of which the first is taken")
            if skim:
                image.draft(mode, (cfg.resolution, cfg.resolution))
            smaller, turned = image.size != whole, 5 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8
            image = to_rgb(image, changes.append)
            size = (whole if turned else whole[::-1]) if smaller else image.size[::-1]
            x, room = pixels(image, cfg)
            file = hashlib.blake2b(raw, digest_size=16).digest()
            mark = bytes.fromhex(content_hash(x.shape, x.numpy().data))
            file, mark = (np.frombuffer(digest, np.uint8) for digest in (file, mark))
            values = {"row": row, "size": size, "room": room, "file": file, "mark": mark, "thumb": thumb(image)}
            found.append(_Found(values, mode, changes, x))
        except Exception as error:  # whatever a decoder throws at a broken file
            found.append(f"{source.name(row)} ({reason(error)})")
    return found


def threads(first: _Found | str) -> int:
    """How many threads decode images like the first. Work in Python, which one thread does at a time, is the same for every
    image, that in C grows with its area; at 64 x 64 they are about equal. Where Python's is the larger, threads only fight
    for its lock."""
    most = os.cpu_count() or 1
    return most if isinstance(first, str) else min(max(math.prod(first.values["size"]) // 64**2, 1), most)


def decode(source: Source, cfg: Data, progress: Callable[[int], Any] = lambda pictures: None, skim: bool = False) -> Pictures:
    """Read every image of a source. With `skim`, where nothing is trained on them, JPEGs are decoded at half, a quarter or an
    eighth of their size, as long as the resolution is left."""
    shapes = {"row": (), "size": (2,), "room": (2,), "file": (16,), "mark": (16,), "thumb": (8, 9, 3)}
    kinds = {name: torch.int64 if name in ("row", "size", "room") else torch.uint8 for name in shapes}
    columns = {name: torch.empty(source.size, *shape, dtype=kinds[name]) for name, shape in shapes.items()}
    arrays = {name: column.numpy() for name, column in columns.items()}
    held, count, modes, changes, broken = _Held(source.size, cfg.memory_budget * 2**30), 0, Counter(), Counter(), []
    find = functools.partial(_find, source, cfg, skim)
    first, chunks = find(range(1)), [range(i, min(i + 32, source.size)) for i in range(1, source.size, 32)]
    with ThreadPoolExecutor(threads(first[0])) as pool:
        # In blocks: a million queued reads would be a heap of their own.
        blocks = (pool.map(find, chunks[i : i + 32]) for i in range(0, len(chunks), 32))
        lists = itertools.chain([first], itertools.chain.from_iterable(blocks))
        for found in itertools.chain.from_iterable(lists):
            if isinstance(found, str):
                broken.append(found)
            else:
                for name, value in found.values.items():
                    arrays[name][count] = value
                modes[found.mode] += 1
                changes.update(found.changes)
                held.add(count, found.pixels)
                count += 1
            progress(1)
    columns = {name: column[:count] for name, column in columns.items()}
    return Pictures(columns, dict(modes), dict(changes), broken, None if held.pixels is None else held.pixels[:count])


class _Held:
    """Decoded images in memory: one tensor while all have one shape, a list where they differ, None once too large."""

    def __init__(self, size: int, budget: float):
        self.size, self.budget, self.taken = size, budget, 0
        self.pixels: Tensor | list[Tensor] | None = []

    def add(self, i: int, x: Tensor) -> None:
        """Take the i-th image, [3, h, w]."""
        self.taken += x.numel()
        if self.pixels is None or self.taken > self.budget:
            self.pixels = None
            return
        if i == 0 and self.size * x.numel() <= self.budget:
            self.pixels = torch.empty(self.size, *x.shape, dtype=torch.uint8)  # taken from the system as it fills
        elif isinstance(self.pixels, Tensor) and x.shape != self.pixels.shape[1:]:
            self.pixels = list(self.pixels[:i].clone())
        if isinstance(self.pixels, Tensor):
            self.pixels[i] = x
        else:
            self.pixels.append(x)


# ---------------------------------------------------------------------------------------------------------------------
# Kept on disk: a folder with the pixels, one image after the other, and a safetensors file with everything else.

FORMAT = 2
"""To be raised with every change to what is made of an image, or to how it is kept."""
DAY = 86_400  # seconds


def place(folder: Path, source: Source, cfg: Data) -> Path:
    """Where in a folder the images of a source are kept: named by all that decides them, without reading one."""
    decoder = (FORMAT, PIL.__version__, *map(features.version, ("libjpeg_turbo", "littlecms2")))
    parts = (source.identity(), cfg.resolution, cfg.center_crop, cfg.interpolation, decoder)
    return folder / f"pictures-{content_hash(*parts)[:16]}"


def keep(pictures: Pictures, path: Path, cfg: Data, say: Callable[[str], Any]) -> Pictures:
    """Write them, there whole or not at all, and have the pixels mapped from there.

    Of a set with broken images nothing is kept: it may have been the disk that was broken. Nor where less space would be
    left than it takes: checkpoints come first. A disk that refuses ends nothing: that is said, and the images stay in memory.
    """
    if pictures.broken:
        return pictures
    staged, aside = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing") for _ in range(2))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.writing"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)
        held = pictures.pixels
        parts = () if held is None else held.split(1024) if isinstance(held, Tensor) else held
        needed = sum(x.nbytes for x in (*parts, *pictures.columns.values()))
        free = shutil.disk_usage(path.parent).free
        if free < 2 * needed:
            raise OSError(errno.ENOSPC, f"they take {needed:,} bytes, and {free:,} are free")
        staged.mkdir()
        check = xxhash.xxh3_128()
        with open(staged / "pixels", "wb") as file:
            for x in parts:
                check.update(x.numpy().data)
                file.write(x.numpy().data)
        facts = {"name": path.name, "modes": pictures.modes, "changes": pictures.changes}
        facts = json.dumps(facts | {"decoded": held is not None, "pixels": check.hexdigest()})
        file = staged / "columns.safetensors"
        save_file(pictures.columns, file, {"facts": facts, "hash": _hash(pictures.columns, facts)})
        file.chmod((staged / "pixels").stat().st_mode)  # safetensors writes for the owner alone
        mapped = _mapped(pictures, staged, cfg)
        for attempt in itertools.count():
            if (there := kept(path, cfg)) is not None:  # another process was quicker, and may have them mapped
                return there
            if attempt:  # a damaged one: moved away whole, since others look there too
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path, aside)
                shutil.rmtree(aside, ignore_errors=True)
            try:
                os.rename(staged, path)
                return mapped
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if (there := kept(path, cfg)) is not None:
            return there
        say(f"warning: the decoded images are not kept in {path.parent}: {getattr(error, 'strerror', None) or error}")
        return pictures
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def tidy(folder: Path, used: set[Path]) -> None:
    """Remove what is cached in a run's own folder of sets that it no longer uses, and what killed processes left of it. What
    this program did not write stays."""
    for path in set(folder.glob("pictures-*")) - used:
        with contextlib.suppress(OSError, SafetensorError), safe_open(path / "columns.safetensors", "pt") as file:
            if "hash" in (file.metadata() or {}) and not strangers(path, {"columns.safetensors", "pixels"}):
                erase(path)
    staged = r"\.pictures-[0-9a-f]{16}\.[0-9a-f]{32}\.writing|\.[0-9a-f]+(-mirrored)?\.\d+\.writing"
    for path in (path for form in (".*.writing", "*/??/.*.writing") for path in folder.glob(form)):
        if re.fullmatch(staged, path.name):
            erase(path)


def kept(path: Path, cfg: Data) -> Pictures | None:
    """The images that are kept there, if they are what was written and what these settings ask for."""
    with contextlib.suppress(OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError):
        with safe_open(path / "columns.safetensors", "pt") as file:
            told = file.metadata()
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _hash(columns, told["facts"]) != told["hash"]:
            return None
        facts = json.loads(told["facts"])
        if facts["name"] != path.name:
            return None
        found = Pictures(columns, facts["modes"], facts["changes"], [], None)
        if found.nbytes(cfg) > cfg.memory_budget * 2**30:
            return found
        with open(path / "pixels", "rb") as file:
            whole = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() == facts["pixels"]
        return _mapped(found, path, cfg) if whole and facts["decoded"] else None
    return None


def _mapped(pictures: Pictures, path: Path, cfg: Data) -> Pictures:
    """The same, with the pixels in the file in place of those in memory."""
    if pictures.pixels is None and not (path / "pixels").stat().st_size:
        return pictures
    shapes = pictures.shapes(cfg)
    sizes = 3 * shapes.prod(1)
    flat = torch.from_file(str(path / "pixels"), shared=False, size=int(sizes.sum()), dtype=torch.uint8)
    if (shapes == shapes[0]).all():
        return replace(pictures, pixels=flat.view(len(pictures), 3, *shapes[0].tolist()))
    parts = zip(flat.split(sizes.tolist()), shapes.tolist(), strict=True)
    return replace(pictures, pixels=[x.view(3, *shape) for x, shape in parts])


def _hash(columns: dict[str, Tensor], facts: str) -> str:
    check = xxhash.xxh3_128(facts.encode())
    for name in sorted(columns):
        check.update(repr((name, columns[name].shape, columns[name].dtype)).encode())
        check.update(columns[name].contiguous().numpy().data)
    return check.hexdigest()
