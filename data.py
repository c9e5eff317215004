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
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneloop.configs import BadInput, Data
from oneloop.inputs import store
from oneloop.inputs.cache import Marks, as_marks
from oneloop.inputs.captions import PURPOSES, Captions, caption, fill
from oneloop.inputs.crop import corner as centre
from oneloop.inputs.files import LISTED, listed, reason, shown
from oneloop.inputs.plan import Bucket, Plan
from oneloop.inputs.sources import Source, select
from oneloop.inputs.store import Decoded
from oneloop.machine.processes import signals_blocked
from oneloop.tasks import COLUMNS, Batch, Column, Rng

RESIDENT = 0.1
"""Share of a GPU's memory that the decoded set may take, so that only the corners of the crops travel in a step."""
CHUNK = 1024
"""Examples that are planned at a time."""

Reader = Callable[[Marks], dict[str, Tensor]]
"""The marks of B values -> what was made of them, [B, ...] each."""


@dataclass(frozen=True)
class Values:
    """Everything that a run may ask an encoding for."""

    marks: Marks
    """What tells each from all others."""
    make: Callable[[int], tuple[Any, ...]]
    """Its number -> the value of each column."""


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
        self.share = torch.from_numpy(np.repeat(np.arange(len(shares)), [share.rows for share in shares]))  # [rows]
        self.weight = torch.tensor([share.weight for share in shares])
        self.entries, buckets = [], []  # of each bucket its entries, [n] int64
        for (i, *size), entries in _grouped(self.share[self.rows], images):
            self.entries.append(entries)
            buckets.append(Bucket(i, tuple(size), len(entries), shares[i].repeats / max(len(source.sizes), 1)))
        self.plan = Plan(tuple(buckets), block, seed)
        self.captions = Captions(
            *(getattr(cfg, name) for name in ("shuffle_tags", "keep_tags", "tag_dropout", "tag_separator"))
        )
        self.captions = replace(self.captions, templates=cfg.caption_templates, caption_dropout=cfg.caption_dropout)
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
        rows, cfg, images, encoded = self.rows[entries], self.cfg, self.images, rng is not None or self.measured
        flip = rng.uniform("flip") < 0.5 if rng is not None and cfg.random_flip else torch.zeros(len(rows), dtype=torch.bool)
        corners: dict[str, Tensor] = {}  # column without `like` -> top, left of its crop, [B, 2]
        batch: Batch = {"n": n, "index": rows, "source": self.share[rows], "key": list(map(self.source.name, rows.tolist()))}
        for name, column in images.kinds.items():
            anchor, room = column.like or name, images.about(name, "room")[entries]
            if anchor not in corners:
                central = rng is None or cfg.center_crop
                draw = None if central else rng.uniform("crop" if anchor == "pixel_values" else f"crop {anchor}", 2)
                corners[anchor] = centre(room, None) if central else (draw * (room + 1)).long()
            if name in self.hidden and encoded:
                continue
            if self.resident is not None and name == "pixel_values" and rng is not None:
                whole = self.resident.shape[-2:] == tuple(images.about(name, "target")[0].tolist())  # cut when it was decoded
                batch["crop"] = torch.cat([entries[:, None], corners[anchor] * (not whole), flip[:, None]], 1)  # for `ready`
            else:
                cut = self._cut(name, entries, corners[anchor])
                batch[name] = torch.where(flip[:, None, None, None], cut.flip(-1), cut) if flip.any() else cut
        corner, room = corners["pixel_values"], images.about("pixel_values", "room")[entries]
        # Mirroring the crop is mirroring the image and cutting at the mirrored corner.
        left = torch.where(flip, room[:, 1] - corner[:, 1], corner[:, 1])
        batch |= {
            k: images.about("pixel_values", what)[entries] for k, what in (("target_size", "target"), ("original_size", "size"))
        }
        batch |= {
            "crop_top_left": torch.stack([corner[:, 0], left], 1),
            "mirrored": flip,
            "weight": self.weight[batch["source"]],
        }
        if self.source.captions is not None:
            batch["caption"] = self._texts(rows.tolist(), rng)
        if self.source.labels is not None:
            batch["label"] = torch.tensor([self.source.labels[row] for row in rows.tolist()])
        for name, values in self.source.more.items():
            own = [values[row] for row in rows.tolist()]
            texts = self.source.columns[name].kind == "text"
            batch[name] = [(several or [""])[0] for several in own] if texts else torch.tensor(own)
        for columns, read in self.encoded.values() if encoded else ():
            texts = batch.get("caption", [""] * len(rows))
            each = zip(entries.tolist(), flip.tolist(), texts, strict=True)
            batch |= read(as_marks([self._mark(columns, *one) for one in each]))
        return {name: value for name, value in batch.items() if name not in self.hidden} if encoded else batch

    def _texts(self, rows: list[int], rng: Rng | None) -> list[str]:
        """Of each row what becomes of its captions."""
        captions, cfg = self.source.captions, self.captions
        if rng is None:
            cfg = Captions(templates=cfg.templates)
        used = {
            "caption": True,
            "tag dropout": cfg.tag_dropout,
            "tag order": cfg.shuffle_tags,
            "template": len(cfg.templates) > 1,
            "caption dropout": cfg.caption_dropout,
        }
        u = {name: rng.uniform(name).tolist() if rng is not None and used[name] else [0.0] * len(rows) for name in PURPOSES}
        return [caption(captions[row] or [""], cfg, {name: u[name][i] for name in PURPOSES}) for i, row in enumerate(rows)]

    def _pixels(self, name: str, entry: int) -> Tensor:
        """The image of an entry, [C, h, w] uint8.

        Raises:
            BadInput: it could be read at the start, and cannot now.
        """
        if self.images.pixels is not None:
            return self.images.pixels[name][entry]
        row, target = int(self.rows[entry]), tuple(self.images.about(name, "target")[entry].tolist())
        try:
            return store.read(self.source, self.cfg, name, row, target)
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder throws at a broken file
            image = self.source.images[name].name(row)
            where = f"the image {image} could be read at the start and cannot be any more ({reason(error)})"
            raise BadInput(f"{where}; the same command resumes once it is there") from None

    def _cut(self, name: str, entries: Tensor, corner: Tensor) -> Tensor:
        """The crops at these corners, [B, C, H, W] uint8; a central one was made when the image was decoded."""
        high, wide = self.images.about(name, "target")[entries[0]].tolist()
        pixels = self.images.pixels and self.images.pixels[name]
        if isinstance(pixels, Tensor) and pixels.shape[-2:] == (high, wide):
            return pixels[entries]
        whole = zip([self._pixels(name, entry) for entry in entries.tolist()], corner.tolist(), strict=True)
        return torch.stack([x if self.cfg.center_crop else x[:, t : t + high, i : i + wide] for x, (t, i) in whole])

    # What is encoded once.

    def _mark(self, columns: tuple[str, ...], entry: int, flip: bool, text: str) -> bytes:
        """What tells the values of these columns, as a model sees them, from all others: 16 bytes."""
        marks = []
        for column in columns:
            if column in self.images.kinds:
                mark = self.images.about(column, "mark")[entry].numpy().tobytes()
                marks.append(digest(mark + b"mirrored") if flip else mark)
            else:
                value = text if column == "caption" else self.source.more[column][int(self.rows[entry])]
                marks.append(digest(repr(value).encode()))
        return marks[0] if len(marks) == 1 else digest(b"".join(marks))

    def texts(self) -> list[str] | None:
        """Every caption that the run may ask for; None where they cannot be listed, since tags are drawn, or there are none."""
        if self.source.captions is None or self.cfg.shuffle_tags or self.cfg.tag_dropout:
            return None
        return list(dict.fromkeys(text for row in range(self.size) for text in self._texts_of(row)))

    def _texts_of(self, row: int) -> list[str]:
        templates, captions = self.cfg.caption_templates or ("{}",), self.source.captions[row] or [""]
        return [fill(form, text) for text in captions for form in templates] + [""] * bool(self.cfg.caption_dropout)

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
        several = [list(dict.fromkeys(self._texts_of(row))) for row in self.rows.tolist()] if captions else [[""]] * len(every)
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

        return Values(as_marks([self._mark(columns, *which(i)) for i in range(int(starts[-1]))]), make)

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
        if self.images.pixels and set(self.images.kinds) <= columns:
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
        batch = to_device(batch, device, self.source.columns)
        if "crop" in batch:
            size = tuple(self.images.about("pixel_values", "target")[0].tolist())
            cut = crop(self.resident, batch.pop("crop"), size)
            batch = to_device({"pixel_values": cut}, device) | batch
        if "mask" in batch and self.cfg.mask_minimum:
            batch["mask"] = self.cfg.mask_minimum + (1 - self.cfg.mask_minimum) * batch["mask"]
        return batch

    def stream(self, first: int, stride: int) -> Generator[Batch]:
        """The endless stream of one process: a batch from example `first` on, then one every `stride` examples. Close it: no
        signal ends its loader workers, and a process that waits for them at its exit would wait forever."""
        size = self.cfg.train_batch_size
        numbers = (range(n, n + size) for n in itertools.count(first, stride))
        processes = self.cfg.dataloader_num_workers if self.from_disk else 0
        loader = torch.utils.data.DataLoader(
            _Readable(self),
            sampler=numbers,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=processes,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        with signals_blocked():
            return _readable(iter(loader))


def digest(content: bytes) -> bytes:
    """16 bytes that tell it from all others."""
    return hashlib.blake2b(content, digest_size=16).digest()


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
    for values in (source.captions, source.labels, *source.more.values(), source.shares):
        for i in range(0, len(values or ()), 4096):
            check.update(repr(values[i : i + 4096]).encode())
        check.update(b"\0")
    return check.hexdigest()


@dataclass(frozen=True)
class _Readable:
    """Batches for loader workers: what is wrong with an image comes back as a value, since of an exception they make a page."""

    examples: Examples

    def __getitem__(self, numbers: range) -> Batch | BadInput:
        try:
            return self.examples[numbers]
        except BadInput as error:
            return error


def _readable(batches: Iterator[Batch | BadInput]) -> Generator[Batch]:
    """What `_Readable` gave, until this generator is closed or ends by an exception: then the loader's workers end too."""
    try:
        while not isinstance(batch := next(batches), BadInput):
            yield batch
        raise batch
    finally:
        del batches


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
    source: Source, cfg: Data, seed: int, cache: Path | None, report: Path | None = None, block: int | None = None
) -> Examples:
    """The examples of a source, with the images that are cached in the folder, or decoded here; the rest as of Examples."""
    path = cache and store.path_of(cache, source, cfg)
    images = path and store.load(path, cfg)
    examples = Examples(source, cfg, seed, images, report, block)
    examples.cache_path, examples.cached = path, images is not None
    return examples


def _as_it_is(batch: Batch) -> Batch:
    """In place of the loader's own function, which would look at every caption."""
    return batch


@dataclass(frozen=True)
class Fixed:
    """The data as samples and exports see them: in order, cropped in the middle, never mirrored, at most `size` at a time, on
    the device; the rest as of Examples.fixed. Nothing is read before it is iterated over."""

    examples: Examples
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


def to_device(batch: Batch, device: Any, columns: Mapping[str, Column] = COLUMNS) -> Batch:
    """The batch on the device; images and masks, which travel as uint8, become float32 there, in [-1, 1] and in [0, 1]."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    for name in (name for name, x in moved.items() if isinstance(x, Tensor) and x.dtype == torch.uint8 and name in columns):
        x = moved[name].float()
        moved[name] = x / 255 if columns[name].kind == "mask" else x / 127.5 - 1
    return moved
