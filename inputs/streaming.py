"""Examples of sets larger than memory: read from shards (inputs/shards.py) while training.

Example n is the row that `Lanes` (inputs/lanes.py) deals to it, a function of the numbers of rows of the shards, the settings,
the seed and n; the rest is keyed by n as everywhere. So batches, accumulation, processes, workers and a resume change nothing.

Images are seen when their turn comes. The one of example n that cannot be read then is replaced, with --data.skip-broken, by
the first that can among the GROUP places of its lane where it is, in an order keyed by (seed, n): whatever the layout. So the
captions that a run may ask for are known before an image is read (inputs/listing.py).
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneloop.configs import BadInput, Data
from oneloop.inputs import batches, listing, spans, store
from oneloop.inputs.buckets import nearest
from oneloop.inputs.cache import Reader, Values, as_marks, digest
from oneloop.inputs.crop import Size
from oneloop.inputs.files import reason, shown
from oneloop.inputs.lanes import Free, Lanes, Mixed, positions, turns
from oneloop.inputs.plan import Bucket, Plan
from oneloop.inputs.shuffle import permute
from oneloop.inputs.sources import Source, select
from oneloop.tasks import Batch, Rng, hash64

FIXED = 1024
"""Examples that are shown as all of them."""
GROUP = 64
"""Places of a lane, at least, of which one may be in the place of another."""
SAID = 10
"""Replaced images that are logged one by one; then each whose number is a power of two. broken.txt has all."""


class Streamed(torch.utils.data.Dataset):
    """The training set, as data.Examples: numbers of the run in, a batch out."""

    images, cached, cache_path = None, False, None

    def __init__(
        self,
        source: Source,
        cfg: Data,
        seed: int,
        report: Path | None = None,
        block: int | None = None,
        say: Callable[[str], Any] = print,
    ):
        """The examples of a streamed source. `block`: examples in a row from one lane, as of `Plan`; images that were replaced
        are listed in the file `report`.

        Raises:
            BadInput: fewer rows than lanes.
        """
        self.source, self.cfg, self.seed, self.size = source, cfg, seed, source.size
        self.report, self.say = report, say
        self.sized, self.target = source.sizes[-1], max(source.sizes[-1], key=min)  # the square, where there is one
        block = block or cfg.bucket_block or cfg.train_batch_size
        self.plan = Plan(tuple(Bucket(0, size, self.size) for size in self.sized), block, seed)
        self.lanes = dealt(source, cfg.stream_lanes, cfg.stream_window, block, seed)
        rows = np.concatenate([there.own for there in filter(None, source.streams)])
        self.span = block * spans.blocks(rows, cfg.stream_window, block) if len(self.sized) > 1 else 0
        self.group = self.span or -(-GROUP // block) * block
        self.spans: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # (lane, number): of two for each lane
        self.starts = np.cumsum([0, *(share.rows for share in source.mixed())])  # the first row of each source
        self.collation = batches.Collation(source, cfg)
        self.encoded: dict[str, tuple[tuple[str, ...], Reader]] = {}
        self.hidden: set[str] = set()
        facts: tuple[Any, ...] = (*_facts(source), cfg.stream_lanes, cfg.stream_window)
        facts += (self.sized, self.span) if self.span else ()
        self.fingerprint = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
        self.replaced, self.noted = 0, collections.deque(maxlen=1024)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"say": print}  # workers say nothing

    # What an example is.

    def __getitem__(self, numbers: range) -> Batch:
        """The batch of these examples of the run; images still uint8. Where images were replaced it has `replaced`, a list of
        what there is to say of it. All is drawn by the example's place in the order without buckets, which is its number where
        there are none: so captions are known before the images are."""
        places, target = self._places(numbers) if self.span else (np.array(numbers), self.target)
        return self._batch(torch.tensor(numbers), places, target)

    def rows(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of the source at these places of the order without buckets, [n] int64."""
        return rows_at(self.source, self.lanes, places)

    def _places(self, numbers: range) -> tuple[np.ndarray, Size]:
        """The places in the order without buckets that examples of one size have, [n], and that size."""
        lanes, block = self.cfg.stream_lanes, self.plan.block
        lane, number = turns(numbers, lanes, block)
        span, within = np.divmod(number, self.span)
        places, targets = np.empty_like(number), set()
        for g, k in sorted(set(zip(lane.tolist(), span.tolist(), strict=True))):
            if (g, k) not in self.spans:
                if len(self.spans) >= 2 * lanes:
                    self.spans.pop(next(iter(self.spans)))
                rows = self.rows(positions(g, np.arange(k * self.span, (k + 1) * self.span), lanes, block))
                self.need(rows)
                self.spans[g, k] = spans.arranged(self._nearest(rows), block, hash64(self.seed, "spans", g, k))
            order, chosen = self.spans[g, k]
            mine = (lane == g) & (span == k)
            places[mine] = positions(g, k * self.span + order[within[mine]], lanes, block)
            targets |= {self.sized[i] for i in chosen[within[mine] // block].tolist()}
        assert len(targets) == 1, "a batch has one size: it does not cross blocks"
        return places, targets.pop()

    def _nearest(self, rows: np.ndarray) -> np.ndarray:
        """Which size is nearest to each row's image, [n], by its header; to one that cannot be read the square."""
        square = [min(self.target)] * 2
        sides = np.array([store.upright(self.source, row) or square for row in rows.tolist()])
        return nearest(np.minimum(sides, 2**20 - 1), self.sized)

    def need(self, rows: np.ndarray) -> None:
        """Have the shards of these rows in memory."""
        part = np.searchsorted(self.starts, rows, "right") - 1
        for i in np.unique(part):
            if (there := self.source.streams[i]) is not None:
                there.need((there.at(row)[0] for row in (rows[part == i] - self.starts[i]).tolist()), self._budget())

    def at(self, rows: Tensor) -> Batch:
        """These rows, [B]: cut from the middle, never mirrored, with their first captions."""
        return self._batch(rows, None, self.target)

    def fixed(self, size: int, count: int | None = None, first: int = 0, alike: bool = False) -> Iterator[Batch]:
        """`count` rows, or FIXED of them, from the one numbered `first` on, at most `size` at a time: of a few shards, the same
        for every run, since all would be read else. All are `alike`."""
        count = min(FIXED, self.size) if count is None else count
        lanes = dealt(self.source, 1, self.cfg.stream_window, 1, 0)
        for i in range(first, count, size):
            yield self.at(torch.from_numpy(rows_at(self.source, lanes, range(i, min(i + size, count)))))

    def sizes(self, rows: Tensor) -> list[tuple[int, ...]]:
        """All have one size."""
        return [self.target] * len(rows)

    def _batch(self, n: Tensor, places: np.ndarray | None, target: Size) -> Batch:
        """The examples `n`, [B], at these places, or what replaces them. Without places: the rows `n`, shown without chance."""
        rows = n.numpy() if places is None else self.rows(places)
        self.need(rows)
        said: list[str] = []
        sized = replace(self.source, sizes=((target,),)) if self.span else self.source
        each = zip(n.tolist(), rows.tolist(), rows if places is None else places.tolist(), strict=True)
        read, places_ = zip(*(self._read(sized, *one, places is None, said) for one in each), strict=True)
        rng = None if places is None else Rng.of(self.seed, places_, "data")
        decoded = store.gathered(self.source, list(read))

        def cut(name: str, corner: Tensor, flip: Tensor) -> Batch:
            size = tuple(decoded.about(name, "target")[0].tolist())
            return {name: self.collation.cropped(decoded.pixels[name], size, corner, flip)}

        batch = self.collation.batch(n, decoded.columns["row"], decoded, torch.arange(len(read)), rng, cut)
        if rng is not None:
            for columns, read_ in self.encoded.values():
                batch |= read_(as_marks([digest(repr(text).encode()) for text in batch[columns[0]]]))
            batch = {name: value for name, value in batch.items() if name not in self.hidden}
        return batch | {"replaced": said} if said else batch

    def _read(self, source: Source, n: int, row: int, place: int, shown: bool, said: list[str]) -> tuple[store.Row, int]:
        """The images of example n, of the row at its place, and the place; or of another place that replaces it.

        Raises:
            BadInput: it cannot be read, and nothing is to replace it, or nothing can.
        """
        try:
            return store.read_row(source, self.cfg, row), place
        except (BadInput, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a decoder throws at a broken file
            broken = f"{self.source.name(row)} ({reason(error)})"
        if not self.cfg.skip_broken:
            raise BadInput(f"the image of example {n} cannot be read: {broken}; --data.skip-broken replaces such images")
        others = range(self.size) if shown else self._beside(place)
        key = np.array([hash64(self.seed, "replace", n)], np.uint64)
        for i in range(min(len(others), FIXED)):
            other = int(others[permute(key, len(others), np.array([i]))[0]])
            row = other if shown else int(self.rows([other])[0])
            with contextlib.suppress(Exception):
                made = store.read_row(source, self.cfg, row)
                said.append(f"example {n}: {broken}; {self.source.name(row)} is in its place")
                return made, other
        raise BadInput(f"none of the {len(others):,} images beside it can be read: {broken}")

    def _beside(self, place: int) -> np.ndarray:
        """The places in a group with this one."""
        lanes, block = self.cfg.stream_lanes, self.plan.block
        (lane,), (number,) = turns([place], lanes, block)
        first = number // self.group * self.group
        return positions(lane, np.arange(first, first + self.group), lanes, block)

    def _budget(self) -> float:
        worker = torch.utils.data.get_worker_info()
        return self.cfg.stream_memory * 2**30 / (worker.num_workers if worker else 1)

    # What encodings ask: images are seen once, so that nothing is encoded of them; captions are read before.

    def texts(self) -> list[str] | None:
        """None: they are not listed."""
        return None

    def values(self, columns: tuple[str, ...]) -> Values | None:
        """Every caption that this start will ask for; None where it is not known which, and for other columns."""
        captions = self.source.captions
        if columns != ("caption",) or not self.source.asked or captions is None:
            return None
        return listing.captions(self, captions.alone())

    def substitute(self, name: str, columns: tuple[str, ...], read: Reader, nbytes: int) -> None:
        """From now on the stream has what `read` gives of these columns."""
        self.encoded[name] = columns, read

    def hide(self, columns: set[str]) -> None:
        """From now on the stream is without these columns."""
        self.hidden = columns

    # Where the images lie.

    def cache(self, say: Callable[[str], Any]) -> None:
        """Nothing is cached on disk. Says where the shards that are mixed exceed their memory."""
        for there in filter(None, self.source.streams):
            shards = min(self.cfg.stream_lanes * self.cfg.stream_window, len(there.rows))
            taken, budget = float(there.bytes.mean()) * shards / 2**30, self.cfg.stream_memory
            if taken > budget and not there.local_tars:
                once = (
                    "which are read again for every batch where they exceed it; a smaller --data.stream-window, or more memory"
                )
                say(
                    f"warning: --data.stream-memory is {budget:g} GiB; {shards} shards are mixed, about {taken:.1f} GiB, {once}"
                )

    def reside(self, device: torch.device) -> bool:
        """The set is on no device."""
        return False

    def ready(self, batch: Batch, device: Any) -> Batch:
        """The batch on the device, its images float32 in [-1, 1], its masks in [0, 1]; what was replaced in it is logged."""
        for line in batch.get("replaced", ()):
            self._note(line)
        batch = {name: value for name, value in batch.items() if name != "replaced"}
        return batches.to_device(batch, device, self.source.columns, self.cfg.mask_minimum)

    def _note(self, line: str) -> None:
        if line in self.noted:  # a batch is shown twice where it warms up
            return
        self.noted.append(line)
        self.replaced += 1
        where = ""
        if self.report is not None:
            with contextlib.suppress(OSError), open(self.report, "a", encoding="utf-8") as file:
                file.write(line + "\n")
                where = f"; all are in {shown(self.report, 250)}"
        if self.replaced <= SAID or self.replaced & (self.replaced - 1) == 0:
            self.say(f"warning: {line} ({self.replaced:,} images replaced{where})")

    def stream(self, first: int, stride: int) -> Generator[Batch]:
        """As `batches.stream`."""
        if self.cfg.dataloader_num_workers:
            for there in filter(None, self.source.streams):
                there.clear()  # workers read their own
        return batches.stream(self, self.cfg.train_batch_size, first, stride, self.cfg.dataloader_num_workers)


def dealt(source: Source, lanes: int, window: int, block: int, seed: int) -> Mixed:
    """The order of a streamed source."""
    made: list[Lanes | Free] = []
    for i, (there, share) in enumerate(zip(source.streams, source.mixed(), strict=True)):
        own = hash64(seed, "source", i) if i else seed
        made.append(Free(share.rows, lanes, block, own) if there is None else Lanes(there.own, lanes, window, block, own))
    return Mixed(tuple(made), tuple(share.repeats for share in source.mixed()))


def rows_at(source: Source, lanes: Mixed, places: Sequence[int] | np.ndarray) -> np.ndarray:
    """The rows of a streamed source at these places of an order, [n] int64."""
    part, shard, own = lanes.examples(places)
    for i, there in enumerate(source.streams):
        mine, first = part == i, sum(share.rows for share in source.mixed()[:i])
        own[mine] = first + (own[mine] if there is None else there.row(shard[mine], own[mine]))
    return own


def _facts(source: Source) -> tuple[Any, ...]:
    """What tells the rows of a streamed source from all others."""
    first = source.streams[0]
    if len(source.streams) == 1:
        return first.identity(), sorted(first.columns)
    each = [there and (there.identity(), sorted(there.columns)) for there in source.streams]
    return source.identity(), each, source.shares


def sample(source: Source, count: int = FIXED) -> Source:
    """A few rows of a streamed source by themselves: those of `Streamed.fixed`, in the order of the data."""
    rows = rows_at(source, dealt(source, 1, 4, 1, 0), range(min(count, source.size)))
    return select(source, np.unique(rows))
