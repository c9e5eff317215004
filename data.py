"""The examples: an opened data set (inputs/), dealt out as an endless keyed stream of batches.

Example number n of a run (which image, which crop, which flip) is a function of (seed, n) alone: each pass over the data is
a permutation keyed by its epoch, and batches are cut from the numbers by arithmetic. So nothing has to be skipped to
continue, and processes, batch sizes and loader workers change nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneloop.configs import BadInput, Data
from oneloop.inputs.crop import corner as centre
from oneloop.inputs.decoding import Pictures, decode, keep, kept, pixels, place, to_rgb
from oneloop.inputs.files import LISTED, listed, reason, shown
from oneloop.inputs.sources import Source, content_hash, select
from oneloop.machine.processes import signals_blocked
from oneloop.tasks import Batch, Rng, hash64

# ---------------------------------------------------------------------------------------------------------------------
# The data set made ready.

RESIDENT = 0.1
"""Share of a GPU's memory that the decoded set may take, so that only the places of the cuts travel in a step."""

Reader = Callable[[Iterable[str]], dict[str, Tensor]]
"""The marks of B values -> the columns that stand in their place, [B, ...] each."""


class Examples(torch.utils.data.Dataset):
    """The training set: numbers of the run in, a batch out."""

    def __init__(self, source: Source, cfg: Data, seed: int, pictures: Pictures | None = None, report: Path | None = None):
        """The examples of a source whose images were decoded and checked as `pictures`; None: they are here.

        Raises:
            BadInput: images that cannot be read. The first ten are named, and where they are more, all of them in the file
                `report`.
        """
        pictures = decode(source, cfg) if pictures is None else pictures
        if pictures.broken:
            named = f"{len(pictures.broken)} of {source.size} images cannot be read: {_listed(pictures.broken, report)}"
            if not cfg.skip_broken:
                raise BadInput(f"{named}; --data.skip-broken leaves them out")
            source, size = select(source, pictures.columns["row"].tolist()), cfg.train_batch_size
            if source.size < size:
                raise BadInput(f"--data.train-batch-size is {size}; expected at most the {source.size} images left: {named}")
        self.source, self.cfg, self.seed, self.size, self.pictures = source, cfg, seed, source.size, pictures
        self.encoded: dict[str, Reader] = {}  # column -> what stands in its place
        self.unheld = {"pixel_values"} if pictures.pixels is None else set()  # columns that every batch reads from the disk
        self.resident: Tensor | None = None  # the decoded set on the device
        self.place, self.kept = None, False  # where the images may be kept, and whether they came from there
        files = pictures.columns["file"].contiguous().numpy().tobytes()
        self.fingerprint = hashlib.blake2b(files + repr((source.captions, source.labels)).encode(), digest_size=16).hexdigest()

    def _pixels(self, row: int) -> Tensor:
        """The image of a row, [3, h, w] uint8.

        Raises:
            BadInput: it could be read at the start, and cannot now.
        """
        if self.pictures.pixels is not None:
            return self.pictures.pixels[row]
        try:
            return pixels(to_rgb(self.source.read(row)[0]), self.cfg)[0]
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder throws at a broken file
            where = f"the image {self.source.name(row)} could be read at the start and cannot be any more ({reason(error)})"
            raise BadInput(f"{where}; the same command resumes once it is there") from None

    @functools.lru_cache(maxsize=2)  # noqa: B019  a batch may touch two epochs
    def order(self, epoch: int) -> Tensor:
        """The permutation of the rows in this epoch."""
        seed = hash64(self.seed, "order", epoch) & 0xFFFFFFFF
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))

    def __getitem__(self, numbers: range) -> Batch:
        """The batch of these examples of the run; images still uint8."""
        n = torch.tensor(numbers)
        epochs = range(numbers[0] // self.size, numbers[-1] // self.size + 1)
        rows = torch.cat([self.order(e)[n[n // self.size == e] % self.size] for e in epochs])
        rng = Rng.of(self.seed, numbers, "data")
        flip = rng.uniform("flip") < (0.5 if self.cfg.random_flip else 0.0)
        texts = self._texts(rows, rng.uniform("caption"), rng.uniform("caption dropout") < self.cfg.caption_dropout)
        return self._batch(n, rows, rng.uniform("crop", 2), flip, texts, self.encoded)

    def fixed(self, size: int, count: int | None = None, first: int = 0) -> Iterator[Batch]:
        """The data in order, as `at` has them, or `count` rows spread evenly over them (more than there are begin again), from
        the one numbered `first` on, `size` at a time."""
        count = count or self.size
        rows = torch.arange(count) * self.size // count if count <= self.size else torch.arange(count) % self.size
        yield from map(self.at, rows[first:].split(size))

    def at(self, rows: Tensor) -> Batch:
        """These rows, [B]: cut from the middle, never mirrored, with their first captions."""
        never = torch.zeros(len(rows), dtype=torch.bool)
        return self._batch(rows, rows, None, never, self._texts(rows, torch.zeros(len(rows)), never), {})

    def _texts(self, rows: Tensor, choice: Tensor, dropped: Tensor) -> list[str] | None:
        """One of each row's captions, or the empty one."""
        if self.source.captions is None:
            return None
        texts = (self.source.captions[row] or [""] for row in rows.tolist())
        return ["" if d else t[int(u * len(t))] for t, u, d in zip(texts, choice.tolist(), dropped.tolist(), strict=True)]

    def _batch(
        self, n: Tensor, rows: Tensor, crop: Tensor | None, flip: Tensor, texts: list[str] | None, encoded: dict[str, Reader]
    ) -> Batch:
        size, room = (self.pictures.columns[name][rows] for name in ("size", "room"))  # [B, 2] each
        central = crop is None or self.cfg.center_crop
        corner = centre(room, None) if central else (crop * (room + 1)).long()  # [B, 2] top, left
        if "pixel_values" in encoded:
            x = encoded["pixel_values"]([self._mark(r, f) for r, f in zip(rows.tolist(), flip.tolist(), strict=True)])
        elif self.resident is not None and crop is not None:
            whole = self.resident.shape[-2:] == (self.cfg.resolution,) * 2  # cut when it was decoded
            x = {"window": torch.cat([rows[:, None], corner * (not whole), flip[:, None]], 1)}  # [B, 4], for `ready`
        else:
            x = {"pixel_values": torch.where(flip[:, None, None, None], (cut := self._cut(rows, corner)).flip(-1), cut)}
        # Mirroring the square is mirroring the image and cutting at the mirrored corner.
        corner[:, 1] = torch.where(flip, room[:, 1] - corner[:, 1], corner[:, 1])
        batch = {"n": n, "index": rows, **x, "original_size": size, "crop_top_left": corner}
        if texts is not None:
            batch |= encoded["caption"](map(content_hash, texts)) if "caption" in encoded else {"caption": texts}
        if self.source.labels is not None:
            batch["label"] = torch.tensor([self.source.labels[row] for row in rows.tolist()])
        return batch

    def _cut(self, rows: Tensor, corner: Tensor) -> Tensor:
        """The squares at these corners, [B, 3, H, W] uint8; a central cut was made when the image was decoded."""
        side = self.cfg.resolution
        held = self.pictures.pixels
        if isinstance(held, Tensor) and held.shape[-2:] == (side, side):
            return held[rows]
        whole = zip(map(self._pixels, rows.tolist()), corner.tolist(), strict=True)
        return torch.stack([x if self.cfg.center_crop else x[:, t : t + side, i : i + side] for x, (t, i) in whole])

    def _mark(self, row: int, flip: bool) -> str:
        """What tells an image as the model sees it from every other."""
        return self.pictures.columns["mark"][row].numpy().tobytes().hex() + ("-mirrored" if flip else "")

    def distinct(self, column: str) -> dict[str, Callable[[], Any]] | None:
        """Every value of a column that the run may ask for, as its mark -> the function that makes it.

        None where they cannot be listed: images that are cut at random.
        """
        if column == "caption" and self.source.captions is not None:
            texts = {text for several in self.source.captions for text in several or [""]}
            if self.cfg.caption_dropout:
                texts.add("")
            return {content_hash(text): functools.partial(str, text) for text in texts}
        if column != "pixel_values" or (self.pictures.columns["room"].any() and not self.cfg.center_crop):
            return None

        def square(row: int, flip: bool) -> Tensor:
            x = self._pixels(row)
            return x.flip(-1) if flip else x

        flips = (False, True) if self.cfg.random_flip else (False,)
        every = ((row, flip) for row in range(self.size) for flip in flips)
        return {self._mark(row, flip): functools.partial(square, row, flip) for row, flip in every}

    def replace(self, column: str, read: Reader, held: bool) -> None:
        """From now on the stream has what `read` gives in place of this column, from memory or from the disk."""
        self.encoded[column] = read
        (self.unheld.discard if held else self.unheld.add)(column)
        if column == "pixel_values":
            self.pictures = replace(self.pictures, pixels=None)  # `fixed` reads the few that it shows

    def keep(self, say: Callable[[str], Any]) -> None:
        """Keep the images in their place, unless they are there."""
        if self.place and not self.kept:
            self.pictures = keep(self.pictures, self.place, self.cfg, say)

    def reside(self, device: torch.device, share: float = RESIDENT) -> bool:
        """Keep the decoded set on a GPU too, where it takes at most this share of its memory; returns whether it is there."""
        room = torch.cuda.get_device_properties(device).total_memory * share if device.type == "cuda" else 0
        held = self.pictures.pixels
        if isinstance(held, Tensor) and held.nbytes <= room:
            self.resident = held.to(device)
        return self.resident is not None

    def ready(self, batch: Batch, device: Any) -> Batch:
        """The batch on the device, its images float32 in [-1, 1]."""
        batch = to_device(batch, device)
        if "window" in batch:
            cut = cut_out(self.resident, batch.pop("window"), self.cfg.resolution)
            batch = to_device({"pixel_values": cut}, device) | batch
        return batch

    def stream(self, first: int, stride: int) -> Iterator[Batch]:
        """The endless stream of one process: a batch from example `first` on, then one every `stride` examples."""
        size = self.cfg.train_batch_size
        numbers = (range(n, n + size) for n in itertools.count(first, stride))
        processes = self.cfg.dataloader_num_workers if self.unheld else 0
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
            return map(_readable, iter(loader))


@dataclass(frozen=True)
class _Readable:
    """Batches for loader workers: what is wrong with an image comes back as a value, since of an exception they make a page."""

    examples: Examples

    def __getitem__(self, numbers: range) -> Batch | BadInput:
        try:
            return self.examples[numbers]
        except BadInput as error:
            return error


def _readable(batch: Batch | BadInput) -> Batch:
    if isinstance(batch, BadInput):
        raise batch
    return batch


def _listed(broken: list[str], report: Path | None) -> str:
    """Some of the images that cannot be read, in words; all in the file `report`, where they are more than that."""
    rest = " (--base.check lists all)"
    if report is not None and len(broken) > LISTED:
        with contextlib.suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text("\n".join(broken) + "\n", "utf-8")
            rest = f" (all are in {shown(report, 250)})"
    return listed(broken, rest)


def opened(source: Source, cfg: Data, seed: int, shelf: Path | None, report: Path | None = None) -> Examples:
    """The examples of a source, with the images that are cached on the shelf, or decoded here. `report`: as of Examples."""
    path = shelf and place(shelf, source, cfg)
    found = path and kept(path, cfg)
    examples = Examples(source, cfg, seed, found, report)
    examples.place, examples.kept = path, found is not None
    return examples


def _as_it_is(batch: Batch) -> Batch:
    """In place of the loader's own function, which would look at every caption."""
    return batch


@dataclass(frozen=True)
class Fixed:
    """The data as samples and exports see them: in order, cropped in the middle, never mirrored, `size` at a time, on the
    device; all, or `count` spread evenly over the set, from number `first` on. Nothing is read before it is iterated over."""

    examples: Examples
    size: int
    device: Any
    count: int | None = None
    first: int = 0

    def __iter__(self) -> Iterator[Batch]:
        return (to_device(batch, self.device) for batch in self.examples.fixed(self.size, self.count, self.first))


def cut_out(pictures: Tensor, window: Tensor, side: int) -> Tensor:
    """Squares [B, C, side, side] of images [N, C, H, W]; window [B, 4] has row, top, left, and whether to mirror."""
    row, top, left, flip = (x[:, None, None, None] for x in window.unbind(1))
    across = torch.arange(side, device=pictures.device)
    channel = torch.arange(pictures.shape[1], device=pictures.device)[:, None, None]
    return pictures[row, channel, top + across[:, None], left + torch.where(flip > 0, side - 1 - across, across)]


def to_device(batch: Batch, device: Any) -> Batch:
    """The batch on the device; images, which travel as uint8, become float32 in [-1, 1] there."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {k: v.float() / 127.5 - 1 if isinstance(v, Tensor) and v.dtype == torch.uint8 else v for k, v in moved.items()}
