"""From decoded images to a batch: what the examples in memory (data.py) and the streamed ones (inputs/streaming.py) share.

A batch is a function of its entries and of draws that are keyed by the examples' numbers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneloop.configs import BadInput, Data
from oneloop.inputs.captions import PURPOSES, Captions, caption
from oneloop.inputs.crop import corner as centre
from oneloop.inputs.sources import Source
from oneloop.inputs.store import Decoded
from oneloop.machine.processes import signals_blocked
from oneloop.tasks import COLUMNS, Batch, Column, Rng

Cut = Callable[[str, Tensor, Tensor], Batch]
"""(column of images, top and left of its crops [B, 2], whether to mirror them [B]) -> what the batch has of it."""


class Collation:
    """How rows of a source and their decoded images become a batch."""

    def __init__(self, source: Source, cfg: Data):
        shares = source.mixed()
        self.source, self.cfg = source, cfg
        self.ends = torch.tensor([share.rows for share in shares]).cumsum(0)  # [shares]
        self.weight = torch.tensor([share.weight for share in shares])
        tags = (cfg.shuffle_tags, cfg.keep_tags, cfg.tag_dropout, cfg.tag_separator)
        self.captions = Captions(*tags, cfg.templates(), cfg.caption_dropout)

    def share(self, rows: Tensor) -> Tensor:
        """Which source of a mixture each row is of, like `rows`."""
        return torch.bucketize(rows, self.ends, right=True)

    def batch(self, n: Tensor, rows: Tensor, images: Decoded, entries: Tensor, rng: Rng | None, cut: Cut) -> Batch:
        """These rows, [B], whose images are these entries, [B], by the draws of `rng`; None: without chance, plain."""
        source, cfg = self.source, self.cfg
        flip = rng.uniform("flip") < 0.5 if rng is not None and cfg.random_flip else torch.zeros(len(rows), dtype=torch.bool)
        corners: dict[str, Tensor] = {}  # column without `like` -> top, left of its crop, [B, 2]
        batch: Batch = {"n": n, "index": rows, "source": self.share(rows), "key": list(map(source.name, rows.tolist()))}
        for name, column in images.kinds.items():
            anchor, room = column.like or name, images.about(name, "room")[entries]
            if anchor not in corners:
                central = rng is None or cfg.center_crop or not room.any()
                draw = None if central else rng.uniform("crop" if anchor == "pixel_values" else f"crop {anchor}", 2)
                corners[anchor] = centre(room, None) if central else (draw * (room + 1)).long()
            batch |= cut(name, corners[anchor], flip)
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
        if source.captions is not None:
            batch["caption"] = self.texts(rows.tolist(), rng)
        if source.labels is not None:
            batch["label"] = torch.tensor([source.labels[row] for row in rows.tolist()])
        for name, values in source.more.items():
            own = [values[row] for row in rows.tolist()]
            texts = source.columns[name].kind == "text"
            batch[name] = [(several or [""])[0] for several in own] if texts else torch.tensor(own)
        return batch

    def texts(self, rows: list[int], rng: Rng | None) -> list[str]:
        """Of each row what becomes of its captions."""
        captions, cfg = self.source.captions, self.captions
        if rng is None:
            cfg = Captions(templates=cfg.templates)
        own = [captions[row] or [""] for row in rows]
        used = {
            "caption": any(len(several) > 1 for several in own),
            "tag dropout": cfg.tag_dropout,
            "tag order": cfg.shuffle_tags,
            "template": len(cfg.templates) > 1,
            "caption dropout": cfg.caption_dropout,
        }
        u = {name: rng.uniform(name).tolist() if rng is not None and used[name] else [0.0] * len(rows) for name in PURPOSES}
        return [caption(several, cfg, {name: u[name][i] for name in PURPOSES}) for i, several in enumerate(own)]

    def cropped(self, pixels: Sequence[Tensor], size: tuple[int, int], corner: Tensor, flip: Tensor) -> Tensor:
        """The crops at these corners of images [C, h, w], [B, C, H, W] uint8; a central one was made when it was decoded."""
        high, wide = size
        whole = zip(pixels, corner.tolist(), strict=True)
        cut = torch.stack([x if self.cfg.center_crop else x[:, t : t + high, i : i + wide] for x, (t, i) in whole])
        return mirrored(cut, flip)


def mirrored(images: Tensor, flip: Tensor) -> Tensor:
    """Images [B, C, H, W] on the CPU, in place mirrored where `flip` [B]."""
    for i in np.flatnonzero(flip.numpy()):
        images[i] = images[i].flip(-1)
    return images


def to_device(batch: Batch, device: Any, columns: Mapping[str, Column] = COLUMNS, mask_minimum: float = 0.0) -> Batch:
    """The batch on the device; images and masks, which travel as uint8, become float32 there, in [-1, 1] and in
    [mask_minimum, 1]. A mask of tokens can still be read on the host (tasks.on_host)."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    for name, x in moved.items():
        if isinstance(x, Tensor) and x.dtype == torch.bool and x is not batch[name]:
            x.host = batch[name]
    for name in (name for name, x in moved.items() if isinstance(x, Tensor) and x.dtype == torch.uint8 and name in columns):
        x = moved[name].float()
        moved[name] = x / 255 if columns[name].kind == "mask" else x / 127.5 - 1
    if "mask" in moved and mask_minimum:
        moved["mask"] = mask_minimum + (1 - mask_minimum) * moved["mask"]
    return moved


# ---------------------------------------------------------------------------------------------------------------------
# Loader workers.

PATIENCE = 10.0
"""Seconds that the end of a loader worker may take."""


def stream(examples: Any, size: int, first: int, stride: int, workers: int) -> Generator[Batch]:
    """The endless stream of one process: `examples[numbers]` of `size` numbers from `first` on, then so many every `stride`.
    Close it: no signal ends its loader workers, and a process that waits for them at its exit would wait forever."""
    numbers = (range(n, n + size) for n in itertools.count(first, stride))
    loader = torch.utils.data.DataLoader(
        Readable(examples),
        sampler=numbers,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    with signals_blocked():
        return _readable(iter(loader))


@dataclass(frozen=True)
class Readable:
    """Batches for loader workers: what is wrong with an image comes back as a value, since of an exception they make a page."""

    examples: Any

    def __getitem__(self, numbers: range) -> Batch | BadInput:
        try:
            return self.examples[numbers]
        except BadInput as error:
            return error


def _readable(batches: Iterator[Batch | BadInput]) -> Generator[Batch]:
    """What `Readable` gave, until this generator is closed or ends by an exception: then the loader's workers end too."""
    try:
        while not isinstance(batch := next(batches), BadInput):
            yield batch
        raise batch
    except (ConnectionError, EOFError):  # a worker is going that had not handed over all of a batch
        time.sleep(PATIENCE)  # until torch's handler for the end of a child raises what says so, in here and nowhere else
        raise
    finally:
        del batches


def _as_it_is(batch: Batch) -> Batch:
    """In place of the loader's own function, which would look at every caption."""
    return batch
