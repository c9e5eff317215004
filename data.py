"""The examples: an opened data set (inputs/), dealt out as an endless keyed stream of batches.

Example number n of a run (which image, which crop, which caption) is a function of (seed, n) alone: a plan (inputs/plan.py)
says which row it is, keyed draws say the rest, and batches are cut from the numbers by arithmetic. So nothing has to be skipped
to resume, and processes, batch sizes and loader workers change nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneloop.configs import BadInput, Data
from oneloop.inputs import store
from oneloop.inputs.batches import Collation, mirrored, stream, to_device
from oneloop.inputs.cache import Reader, Values, as_marks, digest
from oneloop.inputs.captions import possible
from oneloop.inputs.files import LISTED, listed, reason, shown
from oneloop.inputs.plan import Bucket, Plan
from oneloop.inputs.sources import Source, select
from oneloop.inputs.store import Decoded
from oneloop.inputs.streaming import Streamed
from oneloop.tasks import Batch, Rng

RESIDENT = 0.1
"""Share of a GPU's memory that the decoded set may take, so that only the corners of the crops travel in a step."""
CHUNK = 1024
"""Examples that are planned at a time."""


class Examples(torch.utils.data.Dataset):
    """The training set: numbers of the run in, a batch out."""

    def __init__(
        self,
        source: Source,
        cfg: Data,
        seed: int,
        images: Decoded | None = None,
        report: Path | None = None,
        block: int | None = None,
    ):
        """The examples of a source whose images were decoded as `images`; None: they are here. `block`: as of `Plan`.

        Raises:
            BadInput: images that cannot be read. The first ten are named, and where they are more, all of them in the file
                `report`.
        """
        images = store.decode(source, cfg) if images is None else images
        if images.broken:
            named = f"{len(images.broken)} of {source.size} images cannot be read: {_listed(images.broken, report)}"
            if not cfg.skip_broken:
                raise BadInput(f"{named}; --data.skip-broken leaves them out")
            source, size = select(source, np.unique(images.columns["row"].numpy())), cfg.train_batch_size
            if source.size < size:
                raise BadInput(f"--data.train-batch-size is {size}; expected at most the {source.size} images left: {named}")
        self.source, self.cfg, self.seed, self.size, self.images = source, cfg, seed, source.size, images
        self.encoded: dict[str, tuple[tuple[str, ...], Reader]] = {}  # encoding -> the columns that it reads, and its cache
        self.hidden: set[str] = set()  # columns that nothing but cached encodings reads
        self.measured = False  # whether `at` has cached encodings too, as a loss sees them
        self.encoded_bytes = 0  # of the encodings on disk
        self.from_disk = set() if images.pixels is not None else set(images.kinds)  # columns that every batch reads from there
        self.resident: Tensor | None = None  # the decoded set on the device
        self.cache_path, self.cached = None, False  # where the images may be cached, and whether they came from there
        self.rows = torch.from_numpy(np.unique(images.columns["row"].numpy(), return_inverse=True)[1])  # [N], of each entry
        self.shown = torch.from_numpy(np.flatnonzero(np.diff(self.rows.numpy(), append=self.size)))  # row -> its largest entry
        shares, block = source.mixed(), block or cfg.bucket_block or cfg.train_batch_size
        self.collation = Collation(source, cfg)
        self.entries, buckets = [], []  # of each bucket its entries, [n] int64
        for (i, *size), entries in _grouped(self.collation.share(self.rows), images):
            self.entries.append(entries)
            buckets.append(Bucket(i, tuple(size), len(entries), shares[i].repeats / max(len(source.sizes), 1)))
        self.plan = Plan(tuple(buckets), block, seed)
        self.fingerprint = _fingerprint(source, images)

    # What an example is.

    @functools.lru_cache(maxsize=2)  # noqa: B019  a batch may touch two chunks
    def dealt(self, chunk: int) -> Tensor:
        """The entry of each of CHUNK examples, [CHUNK] int64."""
        plan = self.plan.examples(np.arange(chunk * CHUNK, (chunk + 1) * CHUNK))
        entries = np.empty(CHUNK, np.int64)
        for i in np.unique(plan.bucket):
            entries[plan.bucket == i] = self.entries[i][plan.row[plan.bucket == i]]
        return torch.from_numpy(entries)

    def __getitem__(self, numbers: range) -> Batch:
        """The batch of these examples of the run; images still uint8."""
        chunks = range(numbers[0] // CHUNK, numbers[-1] // CHUNK + 1)
        entries = torch.cat([self.dealt(chunk) for chunk in chunks])[numbers[0] - chunks[0] * CHUNK :][: len(numbers)]
        return self._batch(torch.tensor(numbers), entries, Rng.of(self.seed, numbers, "data"))

    def sizes(self, rows: Tensor) -> list[tuple[int, ...]]:
        """What tells which of these rows, [B], may share a batch when they are shown: their images' sizes."""
        entries = self.shown[rows]
        return list(
            map(tuple, torch.cat([self.images.about(name, "target")[entries] for name in self.images.kinds], 1).tolist())
        )

    def fixed(self, size: int, count: int | None = None, first: int = 0, alike: bool = False) -> Iterator[Batch]:
        """The data in order, as `at` has them, or `count` rows spread evenly over them (more than there are begin again), from
        the one numbered `first` on, at most `size` at a time. With `alike` they are taken from the rows of the most frequent
        size; else a batch ends where the size changes."""
        rows = torch.arange(self.size)
        if alike and len(self.plan.buckets) > 1:
            every = self.sizes(rows)
            most = max(dict.fromkeys(every), key=every.count)
            rows = torch.tensor([row for row, own in enumerate(every) if own == most])
        if count is not None:
            rows = rows[torch.arange(count) * len(rows) // count if count <= len(rows) else torch.arange(count) % len(rows)]
        rows = rows[first:]
        edges = (
            [i for i, (a, b) in enumerate(itertools.pairwise(self.sizes(rows)), 1) if a != b]
            if len(self.plan.buckets) > 1
            else []
        )
        for same in rows.tensor_split(edges):
            yield from map(self.at, same.split(size))

    def at(self, rows: Tensor) -> Batch:
        """These rows, [B], of one size: cut from the middle, never mirrored, with their first captions."""
        return self._batch(rows, self.shown[rows], None)

    def _batch(self, n: Tensor, entries: Tensor, rng: Rng | None) -> Batch:
        """These entries, [B], by the draws of `rng`, with what is cached of their encodings; None: without chance, plain."""
        rows, encoded = self.rows[entries], rng is not None or self.measured

        def cut(name: str, corner: Tensor, flip: Tensor) -> Batch:
            if name in self.hidden and encoded:
                return {}
            if self.resident is not None and name == "pixel_values" and rng is not None:
                whole = self.resident.shape[-2:] == tuple(self.images.about(name, "target")[0].tolist())  # cut when decoded
                return {"crop": torch.cat([entries[:, None], corner * (not whole), flip[:, None]], 1)}  # for `ready`
            return {name: self._cut(name, entries, corner, flip)}

        batch = self.collation.batch(n, rows, self.images, entries, rng, cut)
        flip = batch["mirrored"]
        for columns, read in self.encoded.values() if encoded else ():
            texts = batch.get("caption", [""] * len(rows))
            each = zip(entries.tolist(), flip.tolist(), texts, strict=True)
            batch |= read(as_marks([self._mark(columns, *one) for one in each]))
        return {name: value for name, value in batch.items() if name not in self.hidden} if encoded else batch

    def _pixels(self, name: str, entry: int) -> Tensor:
        """The image of an entry, [C, h, w] uint8.

        Raises:
            BadInput: it could be read at the start, and cannot now.
        """
        if self.images.pixels is not None:
            return self.images.pixels[name][entry]
        row, target, room = int(self.rows[entry]), self.images.about(name, "target"), self.images.about(name, "room")
        largest = int(self.shown[row])
        sizes = (target[entry] + room[entry], target[entry], target[largest] + room[largest])
        try:
            return store.read(self.source, self.cfg, name, row, *(tuple(size.tolist()) for size in sizes))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a decoder throws at a broken file
            image = self.source.images["pixel_values" if name in self.source.made else name].name(row)
            where = f"the image {image} could be read at the start and cannot be any more ({reason(error)})"
            raise BadInput(f"{where}; the same command resumes once it is there") from None

    def _cut(self, name: str, entries: Tensor, corner: Tensor, flip: Tensor) -> Tensor:
        """The crops at these corners, mirrored where `flip`, [B, C, H, W] uint8."""
        size = tuple(self.images.about(name, "target")[entries[:1]].tolist()[0])
        pixels = self.images.pixels and self.images.pixels[name]
        if isinstance(pixels, Tensor) and pixels.shape[-2:] == size:
            return mirrored(pixels[entries], flip)
        return self.collation.cropped([self._pixels(name, entry) for entry in entries.tolist()], size, corner, flip)

    # What is encoded once.

    def _mark(self, columns: tuple[str, ...], entry: int, flip: bool, text: str) -> bytes:
        """What tells the values of these columns, as a model sees them, from all others: 16 bytes."""
        marks = []
        for column in columns:
            if column in self.images.kinds:
                mark = self.images.about(column, "mark")[entry].numpy().tobytes()
                if self.images.kinds[column].kind == "mask":
                    mark = digest(mark + repr(self.cfg.mask_minimum).encode())
                marks.append(digest(mark + b"mirrored") if flip else mark)
            else:
                value = text if column == "caption" else self.source.more[column][int(self.rows[entry])]
                marks.append(digest(repr(value).encode()))
        return marks[0] if len(marks) == 1 else digest(b"".join(marks))

    def texts(self) -> list[str] | None:
        """Every caption that the run may ask for; None where they cannot be listed, since tags are drawn, or there are none."""
        if self.source.captions is None or self.cfg.shuffle_tags or self.cfg.tag_dropout:
            return None
        own = self.collation.captions
        return list(dict.fromkeys(text for row in range(self.size) for text in possible(self.source.captions[row], own)))

    def values(self, columns: tuple[str, ...]) -> Values | None:
        """Everything that the run may ask an encoding of these columns for; None where that cannot be listed: images that are
        cut at random, captions whose tags are drawn, columns that are not there."""
        images = [column for column in columns if column in self.images.kinds]
        cut = any(self.images.about(column, "room").any() for column in images) and not self.cfg.center_crop
        captions = self.texts() if "caption" in columns else []
        if cut or captions is None or any(c not in (*images, "caption", *self.source.more) for c in columns):
            return None
        if columns == ("caption",):
            return Values(as_marks([digest(repr(text).encode()) for text in captions]), lambda i: (captions[i],))
        flips, every = (2 if self.cfg.random_flip and images else 1), range(len(self.images))
        several = (
            [possible(self.source.captions[row], self.collation.captions) for row in self.rows.tolist()]
            if captions
            else [[""]] * len(every)
        )
        starts = np.cumsum([0, *(flips * len(texts) for texts in several)])

        def which(i: int) -> tuple[int, bool, str]:
            entry = int(np.searchsorted(starts, i, "right")) - 1
            text, flip = divmod(i - int(starts[entry]), flips)
            return entry, bool(flip), several[entry][text]

        def make(i: int) -> tuple[Any, ...]:
            entry, flip, text = which(i)
            row = int(self.rows[entry])
            made = (
                self._pixels(c, entry) if c in images else text if c == "caption" else self.source.more[c][row] for c in columns
            )
            return tuple(x.flip(-1) if flip and isinstance(x, Tensor) else x for x in made)

        def sizes(i: int) -> list[list[int]]:
            return [self.images.about(column, "target")[which(i)[0]].tolist() for column in images]

        marks = as_marks([self._mark(columns, *which(i)) for i in range(int(starts[-1]))])
        return Values(marks, make, sizes if len(self.plan.buckets) > 1 else None)

    def substitute(self, name: str, columns: tuple[str, ...], read: Reader, nbytes: int) -> None:
        """From now on the stream has what `read` gives of these columns from so many bytes on disk: where with those of other
        encodings they fit the memory budget, the disk's cache holds them."""
        self.encoded[name] = columns, read
        self.encoded_bytes += nbytes
        in_memory = self.encoded_bytes <= self.cfg.memory_budget * 2**30
        (self.from_disk.discard if in_memory else self.from_disk.add)(name)

    def hide(self, columns: set[str]) -> None:
        """From now on the stream is without these columns."""
        self.hidden, self.from_disk = columns, self.from_disk - columns
        by_model = any(not isinstance(by, str) for by in self.source.made.values())  # which is gone
        if self.images.pixels and set(self.images.kinds) <= columns and not by_model:
            self.images = replace(self.images, pixels=None)  # `fixed` reads the few that it shows

    # Where the images lie.

    def cache(self, say: Callable[[str], Any]) -> None:
        """Write the images to their cache path, unless they are there."""
        if self.cache_path and not self.cached:
            self.images = store.write(self.images, self.cache_path, self.cfg, say)

    def reside(self, device: torch.device, share: float = RESIDENT) -> bool:
        """Keep the decoded set on a GPU too, where it takes at most this share of its memory; returns whether it is there."""
        room = torch.cuda.get_device_properties(device).total_memory * share if device.type == "cuda" else 0
        pixels = self.images.pixels and self.images.pixels["pixel_values"]
        if isinstance(pixels, Tensor) and pixels.nbytes <= room:
            self.resident = pixels.to(device)
        return self.resident is not None

    def ready(self, batch: Batch, device: Any) -> Batch:
        """The batch on the device, its images float32 in [-1, 1], its masks in [0, 1]."""
        batch = to_device(batch, device, self.source.columns, self.cfg.mask_minimum)
        if "crop" in batch:
            size = tuple(self.images.about("pixel_values", "target")[0].tolist())
            cut = crop(self.resident, batch.pop("crop"), size)
            batch = to_device({"pixel_values": cut}, device) | batch
        return batch

    def stream(self, first: int, stride: int) -> Generator[Batch]:
        """As `batches.stream`."""
        workers = self.cfg.dataloader_num_workers if self.from_disk else 0
        return stream(self, self.cfg.train_batch_size, first, stride, workers)


def _grouped(share: Tensor, images: Decoded) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(source, sizes) -> the entries that have them, [n] int64, as often as resolutions give them this size."""
    anchors = [name for name, column in images.kinds.items() if column.like is None]
    keys = torch.cat([share[:, None], *(images.about(name, "target") for name in anchors)], 1).numpy()  # [N, 1 + 2 A]
    if len(keys) and (keys == keys[0]).all():
        groups, of = keys[:1], np.zeros(len(keys), np.int64)
    else:
        groups, of = np.unique(keys, axis=0, return_inverse=True)
    for i, group in enumerate(groups.tolist()):
        entries = np.flatnonzero(of.reshape(-1) == i)
        yield tuple(group), np.repeat(entries, images.columns["times"].numpy()[entries])


def _fingerprint(source: Source, images: Decoded) -> str:
    """What tells these examples from all others: files, captions, labels, and how sources are mixed."""
    check = hashlib.blake2b(images.columns["file"].contiguous().numpy(), digest_size=16)
    made = [[*source.made.items()]] if source.made else []
    for values in (source.captions, source.labels, *source.more.values(), source.shares, *made):
        for i in range(0, len(values or ()), 4096):
            check.update(repr(values[i : i + 4096]).encode())
        check.update(b"\0")
    return check.hexdigest()


def _listed(broken: list[str], report: Path | None) -> str:
    """Some of the images that cannot be read, in words; all in the file `report`, where they are more than that."""
    rest = " (--base.check lists all)"
    if report is not None and len(broken) > LISTED:
        with contextlib.suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text("\n".join(broken) + "\n", "utf-8")
            rest = f" (all are in {shown(report, 250)})"
    return listed(broken, rest)


def opened(
    source: Source,
    cfg: Data,
    seed: int,
    cache: Path | None,
    report: Path | None = None,
    block: int | None = None,
    say: Callable[[str], Any] = print,
) -> Examples | Streamed:
    """The examples of a source, with the images that are cached in the folder, or decoded here, or streamed from its shards;
    the rest as of Examples and Streamed."""
    if source.streams:
        return Streamed(source, cfg, seed, report, block, say)
    path = cache and store.path_of(cache, source, cfg)
    images = path and store.load(path, cfg)
    examples = Examples(source, cfg, seed, images, report, block)
    examples.cache_path, examples.cached = path, images is not None
    return examples


@dataclass(frozen=True)
class Fixed:
    """The data as samples and exports see them: in order, cropped in the middle, never mirrored, at most `size` at a time, on
    the device; the rest as of Examples.fixed. Nothing is read before it is iterated over."""

    examples: Examples | Streamed
    size: int
    device: Any
    count: int | None = None
    first: int = 0
    alike: bool = False

    def __iter__(self) -> Iterator[Batch]:
        batches = self.examples.fixed(self.size, self.count, self.first, self.alike)
        return (self.examples.ready(batch, self.device) for batch in batches)


def crop(images: Tensor, where: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops [B, C, H, W] of images [N, C, h, w]; where [B, 4] has image, top, left, and whether to mirror."""
    i, top, left, flip = (x[:, None, None, None] for x in where.unbind(1))
    down, across = (torch.arange(side, device=images.device) for side in size)
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[i, channel, top + down[:, None], left + torch.where(flip > 0, size[1] - 1 - across, across)]
