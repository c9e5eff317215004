"""The images of a source, decoded once: one pass over every file, and where what it found is kept on disk.

A store on disk is named by all that decides its content, so nothing in it goes stale; later starts, other processes and other
runs find it there. Its pixels are mapped, so that the processes of a machine share them, and a start reads no image.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import xxhash
from PIL import ExifTags, Image, features
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oneloop.configs import BadInput, Data
from oneloop.inputs import annotators, conditions
from oneloop.inputs.buckets import targets
from oneloop.inputs.cache import WRITING
from oneloop.inputs.crop import Size, resized
from oneloop.inputs.decoding import MARGIN, fit, plain, shrink, thumb, to_rgb
from oneloop.inputs.files import reason
from oneloop.inputs.sources import Source, content_hash
from oneloop.machine.files import erase, strangers
from oneloop.tasks import Column

SHAPE_TOLERANCE = 0.02
"""How much the ratio of sides of an image may differ from that of the image it is like: what rounding does to small ones."""


@dataclass(frozen=True)
class Decoded:
    """What one pass over a source found: N entries, an image at one of its sizes each, and the images that cannot be read.

    With one resolution there is one entry a row; with several, one for each size that a row has, the largest last.
    """

    columns: dict[str, Tensor]
    """Of each entry, [N, ...]: `row` of the source and `times`, at how many resolutions it has this size, int64; `file`, a hash
    of the row's bytes, [16] uint8; `thumb`, the image as 8 x 9 pixels, [8, 9, 3] uint8. Of each column of images without
    `like`: its `size` before resizing, `target`, what is cut out, and `room`, what resizing leaves beyond it, [2] int64 each,
    height and width. Of each column of images its `mark`, a hash of its pixels, [16] uint8. (By `about`.)"""
    kinds: dict[str, Column]
    """The columns of images and masks."""
    modes: dict[str, int]
    """PIL's mode -> images."""
    changes: dict[str, int]
    """What was changed -> images."""
    broken: list[str]
    """Name and reason of each that cannot be read."""
    pixels: dict[str, Tensor | list[Tensor]] | None
    """Column -> [C, h, w] uint8 of each entry: one tensor where all have one shape; None where they exceed the budget."""

    def __len__(self) -> int:
        return len(self.columns["row"])

    def about(self, column: str, what: str) -> Tensor:
        """`mark` of a column of images; `size`, `target` or `room` of the one it is like. [N, ...]"""
        anchor = column if what == "mark" else self.kinds[column].like or column
        return self.columns[named(anchor, what)]

    def shapes(self, column: str, cfg: Data) -> Tensor:
        """Height and width of each as it is held, [N, 2]."""
        return self.about(column, "target") + self.about(column, "room") * (not cfg.center_crop)

    def channels(self, column: str) -> int:
        """3, or 1 for a mask."""
        return 1 if self.kinds[column].kind == "mask" else 3

    def nbytes(self, cfg: Data) -> int:
        """What the pixels take, in memory or not."""
        return sum(self.channels(name) * int(self.shapes(name, cfg).prod(1).sum()) for name in self.kinds)


def named(column: str, what: str) -> str:
    """How `Decoded.columns` calls it: those of `pixel_values` need no prefix."""
    return what if column == "pixel_values" else f"{column}.{what}"


def image_columns(source: Source) -> dict[str, Column]:
    """Those of a source, each after the one that it is like."""
    there = {name: source.columns[name] for name in (*source.images, *source.made)}
    return dict(sorted(there.items(), key=lambda item: (item[1].like is not None, item[0] != "pixel_values")))


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the files.


Row = tuple[dict[str, Any], dict[str, Tensor]]
"""Values of `Decoded.columns`, and pixels by column."""


@dataclass(frozen=True)
class _Row:
    """What there is at a row."""

    entries: list[Row]
    """Of each size."""
    mode: str
    changes: list[str]


def _read(source: Source, cfg: Data, kinds: dict[str, Column], skim: bool, row: int, marks: bool = True) -> _Row:
    """All images of a row, at all sizes; without `marks` none of the hashes and no thumb. Raises whatever a decoder throws at a
    broken file."""
    images, opened, whole, changes, mode, file = {}, {}, {}, [], "", hashlib.blake2b(digest_size=16)
    for name, column in kinds.items():
        if name in source.made:
            continue
        image, raw = source.images[name].read(row)
        if marks:
            file.update(raw)
        mode = mode or image.mode
        if image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False):
            changes.append("with several frames, of which the first is taken")
        before, turned = image.size, 5 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8
        upright = before if turned else before[::-1]
        anchor = whole.get(column.like, upright)
        shrink(image, tuple(resized(anchor, targets(anchor, source.sizes)[-1]).tolist()), 1.0 if skim else MARGIN)
        smaller = image.size != before
        opened[name] = image, raw
        images[name] = functools.cache(functools.partial(coloured, image, column, changes.append))
        # Some formats turn an image themselves; a JPEG, which alone can be smaller, does not.
        whole[name] = upright if smaller or image.format == "JPEG" else images[name]().size[::-1]
        if column.like and _apart(whole[name], whole[column.like]) > SHAPE_TOLERANCE:
            sizes = [f"{w} x {h}" for h, w in (whole[name], whole[column.like])]
            raise ValueError(f"its {name}, {source.images[name].name(row)}, is {sizes[0]} where it is {sizes[1]}")
    sizes = {name: targets(whole[name], source.sizes) for name, column in kinds.items() if column.like is None}
    each, shared = list(zip(*sizes.values(), strict=True)), {"row": row}
    if marks:
        shared |= {"file": np.frombuffer(file.digest(), np.uint8), "thumb": thumb(images["pixel_values"]())}
    entries = []
    for chosen in dict.fromkeys(each):
        values, pixels = shared | {"times": each.count(chosen)}, {}
        for name, column in kinds.items():
            anchor = column.like or name
            size: Size = chosen[list(sizes).index(anchor)]
            cover = tuple(resized(whole[anchor], size).tolist())
            if name in source.made:
                seen = skim and not isinstance(source.made[name], str)  # where a model would be called for nothing
                x = pixels[anchor] if seen else conditions.make(source.made[name], pixels[anchor])
            else:
                x = None if marks or column.kind != "image" else plain(*opened[name], cover, size, cfg)
                x = (fit(images[name](), cover, size, cfg) if x is None else x).contiguous()
            pixels[name] = x
            if marks:
                mark = bytes.fromhex(content_hash(x.shape, x.numpy().data))
                values[named(name, "mark")] = np.frombuffer(mark, np.uint8)
            if anchor == name:
                room = [c - s for c, s in zip(cover, size, strict=True)]
                values |= {named(name, k): v for k, v in (("size", whole[name]), ("target", size), ("room", room))}
        entries.append((values, pixels))
    return _Row(entries, mode, changes)


def upright(source: Source, row: int) -> Size | None:
    """Height and width of a row's image, by its header; None where it cannot be read."""
    try:
        image = source.read(row)[0]
        turned = 5 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8
    except (MemoryError, torch.OutOfMemoryError, BadInput):
        raise
    except Exception:  # whatever a decoder throws at a broken file: who reads it all says so
        return None
    return image.size if turned else image.size[::-1]


def coloured(image: Image.Image, column: Column, say: Callable[[str], Any] = lambda change: None) -> Image.Image:
    """An image in RGB, a mask in grey."""
    image = to_rgb(image, say)
    return image.convert("L") if column.kind == "mask" else image


def _apart(a: Size, b: Size) -> float:
    """How much the ratios of two sizes differ: the logarithm of their quotient, at least 0."""
    return abs(math.log(a[0] * b[1] / (a[1] * b[0])))


def read(source: Source, cfg: Data, name: str, row: int, cover: Size, target: Size, largest: Size) -> Tensor:
    """The image of one column at a row, [C, h, w] uint8, resized to `cover` and cut to `target`, as `decode` makes it;
    `largest` is what it covers at the highest of its resolutions."""
    if name in source.made:
        return conditions.make(source.made[name], read(source, cfg, source.columns[name].like, row, cover, target, largest))
    image, raw = source.images[name].read(row)
    shrink(image, largest)
    if source.columns[name].kind == "image" and (x := plain(image, raw, cover, target, cfg)) is not None:
        return x
    return fit(coloured(image, source.columns[name]), cover, target, cfg)


def threads(first: _Row | str) -> int:
    """How many threads decode images like the first. Work in Python, which one thread does at a time, is the same for every
    image, that in C grows with its area; at 64 x 64 they are about equal. Where Python's is the larger, threads only fight
    for its lock."""
    most = os.cpu_count() or 1
    return most if isinstance(first, str) else min(max(math.prod(first.entries[0][0]["size"]) // 64**2, 1), most)


def decode(source: Source, cfg: Data, progress: Callable[[int], Any] = lambda images: None, skim: bool = False) -> Decoded:
    """Read every image of a source. With `skim`, where nothing is trained on them, JPEGs are decoded at half, a quarter or an
    eighth of their size, as long as the resolution is left.

    Raises:
        BadInput: a model that makes conditions cannot be loaded, or what it makes could not be kept.
    """
    kinds, most = image_columns(source), source.size * len(source.sizes)
    shapes = {"row": (), "times": (), "file": (16,), "thumb": (8, 9, 3)} | {named(name, "mark"): (16,) for name in kinds}
    shapes |= {named(k, what): (2,) for k, c in kinds.items() if c.like is None for what in ("size", "target", "room")}
    small = lambda name: name in ("file", "thumb") or name.endswith("mark")  # noqa: E731
    columns = {k: torch.empty(most, *shape, dtype=torch.uint8 if small(k) else torch.int64) for k, shape in shapes.items()}
    arrays = {name: column.numpy() for name, column in columns.items()}
    memory, count, modes, changes, broken = _Memory(most, cfg.memory_budget * 2**30), 0, Counter(), Counter(), []

    def rows(some: range) -> list[_Row | str]:
        results: list[_Row | str] = []
        for row in some:
            try:
                results.append(_read(source, cfg, kinds, skim, row))
            except torch.OutOfMemoryError:  # of a model that makes conditions: the image is not broken
                raise
            except Exception as error:  # whatever a decoder throws at a broken file
                results.append(f"{source.name(row)} ({reason(error)})")
        return results

    models = [by for by in source.made.values() if isinstance(by, annotators.Annotator)]
    for model in models:
        model.load()
    for model in () if skim else models:
        model.check_kept(cfg, source.size * sum(2 * 3 * math.prod(sizes[len(sizes) // 2]) for sizes in source.sizes))
    first, chunks = rows(range(1)), [range(i, min(i + 32, source.size)) for i in range(1, source.size, 32)]
    with ThreadPoolExecutor(threads(first[0])) as pool:
        # In blocks: a million queued reads would be a heap of their own.
        blocks = (pool.map(rows, chunks[i : i + 32]) for i in range(0, len(chunks), 32))
        lists = itertools.chain([first], itertools.chain.from_iterable(blocks))
        for row in itertools.chain.from_iterable(lists):
            progress(1)
            if isinstance(row, str):
                broken.append(row)
                continue
            modes[row.mode] += 1
            changes.update(row.changes)
            for values, pixels in row.entries:
                for name, value in values.items():
                    arrays[name][count] = value
                memory.add(count, pixels)
                count += 1
    annotators.forget() if models else None
    for model in models if memory.pixels is None and not skim else ():
        model.check_kept(cfg, memory.taken)
    columns = {name: column[:count] for name, column in columns.items()}
    pixels = memory.pixels and {name: x[:count] for name, x in memory.pixels.items()}
    return Decoded(columns, kinds, dict(modes), dict(changes), broken, pixels)


def read_row(source: Source, cfg: Data, row: int) -> Row:
    """The images of a row at the one size that it has. Raises whatever a decoder throws at a broken file."""
    return _read(source, cfg, image_columns(source), False, row, False).entries[0]


def gathered(source: Source, rows: Sequence[Row]) -> Decoded:
    """Rows that `read_row` read, as entries in their order: without hashes and thumbs."""
    columns = {name: torch.tensor([values[name] for values, _ in rows]) for name in rows[0][0]}
    pixels = {name: [x[name] for _, x in rows] for name in rows[0][1]}
    return Decoded(columns, image_columns(source), {}, {}, [], pixels)


class _Memory:
    """Decoded images in memory: of each column one tensor while all have one shape, a list where they differ; None of them once
    they are too large."""

    def __init__(self, most: int, budget: float):
        self.most, self.budget, self.taken = most, budget, 0
        self.pixels: dict[str, Tensor | list[Tensor]] | None = {}

    def add(self, i: int, images: dict[str, Tensor]) -> None:
        """Take the i-th entry's images, [C, h, w] each."""
        own = sum(x.numel() for x in images.values())
        self.taken += own
        if self.pixels is None or self.taken > self.budget:
            self.pixels = None
            return
        for name, x in images.items():
            if i == 0:
                fits = self.most * own <= self.budget  # taken from the system as it fills
                self.pixels[name] = torch.empty(self.most, *x.shape, dtype=torch.uint8) if fits else []
            there = self.pixels[name]
            if isinstance(there, Tensor) and x.shape != there.shape[1:]:
                there = self.pixels[name] = list(there[:i].clone())
            if isinstance(there, Tensor):
                there[i] = x
            else:
                there.append(x)


# ---------------------------------------------------------------------------------------------------------------------
# On disk: a folder with a file of pixels for each column of images, one after the other, and a safetensors file with the rest.

FORMAT = 3
"""To be raised with every change to what is made of an image, or to how it is kept."""
DAY = 86_400  # seconds


def path_of(folder: Path, source: Source, cfg: Data) -> Path:
    """Where in a folder the images of a source are cached: named by all that decides them, without reading one."""
    decoder = (FORMAT, PIL.__version__, *map(features.version, ("libjpeg_turbo", "littlecms2")))
    kinds = [(name, column.kind, column.like) for name, column in image_columns(source).items()]
    parts = (source.identity(), kinds, source.sizes, cfg.center_crop, cfg.interpolation, decoder)
    return folder / f"images-{content_hash(*parts)[:16]}"


def write(decoded: Decoded, path: Path, cfg: Data, say: Callable[[str], Any]) -> Decoded:
    """Cache them on disk, there whole or not at all, and have the pixels mapped from there.

    Of a set with broken images nothing is cached: it may have been the disk that was broken. Nor where less space would be
    left than it takes: checkpoints come first. A disk that refuses is a warning, and the images stay in memory.
    """
    if decoded.broken:
        return decoded
    staged, aside = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing") for _ in range(2))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.writing"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)
        tensors = [x for xs in (decoded.pixels or {}).values() for x in _blocks(xs)]
        needed = sum(x.nbytes for x in (*tensors, *decoded.columns.values()))
        free = shutil.disk_usage(path.parent).free
        if free < 2 * needed:
            raise OSError(errno.ENOSPC, f"they take {needed:,} bytes, and {free:,} are free: fewer than twice as many")
        staged.mkdir()
        hashes = {name: _write_pixels(staged / file_of(name), xs) for name, xs in (decoded.pixels or {}).items()}
        facts = {"name": path.name, "modes": decoded.modes, "changes": decoded.changes, "pixels": hashes}
        facts = json.dumps(facts | {"kinds": {name: [c.kind, c.like] for name, c in decoded.kinds.items()}})
        file = staged / "columns.safetensors"
        save_file(decoded.columns, file, {"facts": facts, "hash": _hash(decoded.columns, facts)})
        file.chmod(staged.stat().st_mode & 0o666)  # safetensors writes for the owner alone
        mapped = _mapped(decoded, staged, cfg) if hashes else decoded
        for attempt in itertools.count():
            if (there := load(path, cfg)) is not None:  # another process was quicker, and may have them mapped
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
        if (there := load(path, cfg)) is not None:
            return there
        say(f"warning: the decoded images are not cached in {path.parent}: {getattr(error, 'strerror', None) or error}")
        return decoded
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def file_of(column: str) -> str:
    """The file of its pixels."""
    return "pixels" if column == "pixel_values" else f"pixels-{column}"


def _blocks(pixels: Tensor | list[Tensor]) -> Iterator[Tensor]:
    yield from pixels.split(1024) if isinstance(pixels, Tensor) else pixels


def _write_pixels(path: Path, pixels: Tensor | list[Tensor]) -> str:
    """Write them one after the other; returns the hash of the file."""
    check = xxhash.xxh3_128()
    with open(path, "wb") as file:
        for x in _blocks(pixels):
            check.update(x.numpy().data)
            file.write(x.numpy().data)
    return check.hexdigest()


def tidy(folder: Path, used: set[Path]) -> None:
    """Remove what is cached in a run's own folder of sets that it no longer uses, and what killed processes left of it. What
    this program did not write stays."""
    for path in {*folder.glob("images-*"), *folder.glob("pictures-*")} - used:  # pictures: of earlier versions
        with contextlib.suppress(OSError, SafetensorError), safe_open(path / "columns.safetensors", "pt") as file:
            ours = "hash" in (file.metadata() or {})
            pixels = {name.name for name in path.glob("pixels*") if re.fullmatch(r"pixels(-\w+)?", name.name)}
            if ours and not strangers(path, {"columns.safetensors", *pixels}):
                erase(path)
    staged = r"\.(images|pictures)-[0-9a-f]{16}\.[0-9a-f]{32}\.writing|\.[0-9a-f]+(-mirrored)?\.\d+\.writing"
    staged += f"|{WRITING}"
    for path in (path for form in (".*.writing", "*/.*.writing", "*/??/.*.writing") for path in folder.glob(form)):
        if re.fullmatch(staged, path.name):
            erase(path)


def load(path: Path, cfg: Data) -> Decoded | None:
    """The images that are cached there, if they are what was written and what these settings ask for."""
    with contextlib.suppress(OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        with safe_open(path / "columns.safetensors", "pt") as file:
            metadata = file.metadata()
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _hash(columns, metadata["facts"]) != metadata["hash"]:
            return None
        facts = json.loads(metadata["facts"])
        if facts["name"] != path.name:
            return None
        kinds = {name: Column(kind, like) for name, (kind, like) in facts["kinds"].items()}
        decoded = Decoded(columns, kinds, facts["modes"], facts["changes"], [], None)
        if decoded.nbytes(cfg) > cfg.memory_budget * 2**30:
            return decoded
        for name in kinds:
            with open(path / file_of(name), "rb") as file:
                if hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() != facts["pixels"][name]:
                    return None
        return _mapped(decoded, path, cfg)
    return None


def _mapped(decoded: Decoded, path: Path, cfg: Data) -> Decoded:
    """The same, with the pixels in the files in place of those in memory."""
    pixels: dict[str, Tensor | list[Tensor]] = {}
    for name in decoded.kinds:
        shapes, channels = decoded.shapes(name, cfg), decoded.channels(name)
        sizes = channels * shapes.prod(1)
        flat = torch.from_file(str(path / file_of(name)), shared=False, size=int(sizes.sum()), dtype=torch.uint8)
        if (shapes == shapes[0]).all():
            pixels[name] = flat.view(len(decoded), channels, *shapes[0].tolist())
        else:
            parts = zip(flat.split(sizes.tolist()), shapes.tolist(), strict=True)
            pixels[name] = [x.view(channels, *shape) for x, shape in parts]
    return replace(decoded, pixels=pixels)


def _hash(columns: dict[str, Tensor], facts: str) -> str:
    check = xxhash.xxh3_128(facts.encode())
    for name in sorted(columns):
        check.update(repr((name, columns[name].shape, columns[name].dtype)).encode())
        check.update(columns[name].contiguous().numpy().data)
    return check.hexdigest()
