"""Examples of sets larger than memory: read from shards (inputs/shards.py) while training.

Example n is the row that `Lanes` (inputs/lanes.py) deals to it, a function of the numbers of rows of the shards, the settings,
the seed and n; the rest is keyed by n as everywhere. So batches, accumulation, processes, workers and a resume change nothing.

Images are seen when their turn comes. The one of example n that cannot be read then is replaced, with --data.skip-broken, by
the first that can among the rows of its shard in an order keyed by (seed, n): uniform over them, whatever the layout.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneloop.configs import BadInput, Data
from oneloop.inputs import batches, store
from oneloop.inputs.files import reason, shown
from oneloop.inputs.lanes import Lanes
from oneloop.inputs.plan import Bucket, Plan
from oneloop.inputs.shuffle import permute
from oneloop.inputs.sources import Source, select
from oneloop.tasks import Batch, Rng, hash64

FIXED = 1024
"""Examples that are shown as all of them."""
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
        """The examples of a source of shards. `block`: examples in a row from one lane, as of `Plan`; images that were replaced
        are listed in the file `report`.

        Raises:
            BadInput: fewer rows than lanes.
        """
        self.source, self.cfg, self.seed, self.size, self.shards = source, cfg, seed, source.size, source.shards
        self.report, self.say = report, say
        self.target = source.sizes[-1][-1]
        self.plan = Plan((Bucket(0, self.target, self.size),), block or cfg.bucket_block or cfg.train_batch_size, seed)
        self.lanes = Lanes(self.shards.rows, cfg.stream_lanes, cfg.stream_window, self.plan.block, seed)
        self.collation = batches.Collation(source, cfg)
        self.encoded: dict[str, Any] = {}
        facts = (self.shards.identity(), sorted(self.shards.columns), cfg.stream_lanes, cfg.stream_window)
        self.fingerprint = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
        self.replaced, self.noted = 0, collections.deque(maxlen=1024)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"say": print}  # workers say nothing

    # What an example is.

    def __getitem__(self, numbers: range) -> Batch:
        """The batch of these examples of the run; images still uint8. Where images were replaced it has `replaced`, a list of
        what there is to say of it."""
        rows = self.shards.row(*self.lanes.examples(numbers))
        return self._batch(torch.tensor(numbers), rows, Rng.of(self.seed, numbers, "data"))

    def at(self, rows: Tensor) -> Batch:
        """These rows, [B]: cut from the middle, never mirrored, with their first captions."""
        return self._batch(rows, rows.numpy(), None)

    def fixed(self, size: int, count: int | None = None, first: int = 0, alike: bool = False) -> Iterator[Batch]:
        """`count` rows, or FIXED of them, from the one numbered `first` on, at most `size` at a time: of a few shards, the same
        for every run, since all would be read else. All are `alike`."""
        count = min(FIXED, self.size) if count is None else count
        lanes = Lanes(self.shards.rows, 1, self.cfg.stream_window, 1, 0)
        for i in range(first, count, size):
            rows = self.shards.row(*lanes.examples(range(i, min(i + size, count))))
            yield self.at(torch.from_numpy(rows))

    def sizes(self, rows: Tensor) -> list[tuple[int, ...]]:
        """All have one size."""
        return [self.target] * len(rows)

    def _batch(self, n: Tensor, rows: np.ndarray, rng: Rng | None) -> Batch:
        """The examples `n`, [B], whose rows are these, [B], or what replaces them."""
        self.shards.need((self.shards.at(row)[0] for row in rows.tolist()), self._budget())
        said: list[str] = []
        read = [self._read(number, row, said) for number, row in zip(n.tolist(), rows.tolist(), strict=True)]
        decoded = store.gathered(self.source, read)

        def cut(name: str, corner: Tensor, flip: Tensor) -> Batch:
            size = tuple(decoded.about(name, "target")[0].tolist())
            return {name: self.collation.cropped(decoded.pixels[name], size, corner, flip)}

        batch = self.collation.batch(n, decoded.columns["row"], decoded, torch.arange(len(read)), rng, cut)
        return batch | {"replaced": said} if said else batch

    def _read(self, n: int, row: int, said: list[str]) -> store.Row:
        """The images of example n, of this row or of the one that replaces it.

        Raises:
            BadInput: it cannot be read, and nothing is to replace it, or nothing can.
        """
        try:
            return store.read_row(self.source, self.cfg, row)
        except (BadInput, MemoryError):
            raise
        except Exception as error:  # whatever a decoder throws at a broken file
            broken = f"{self.source.name(row)} ({reason(error)})"
        if not self.cfg.skip_broken:
            raise BadInput(f"the image of example {n} cannot be read: {broken}; --data.skip-broken replaces such images")
        shard, own = self.shards.at(row)
        count = int(self.shards.rows[shard])
        key = np.array([hash64(self.seed, "replace", n)], np.uint64)
        for i in range(count):
            other = int(permute(key, count, np.array([i]))[0])
            with contextlib.suppress(Exception):
                made = store.read_row(self.source, self.cfg, row - own + other)
                said.append(f"example {n}: {broken}; {self.source.name(row - own + other)} is in its place")
                return made
        raise BadInput(f"none of the {count:,} images beside it can be read: {broken}")

    def _budget(self) -> float:
        worker = torch.utils.data.get_worker_info()
        return self.cfg.stream_memory * 2**30 / (worker.num_workers if worker else 1)

    # What encodings ask: images are seen once, so that nothing is encoded before it is.

    def texts(self) -> list[str] | None:
        """None: they are not listed."""
        return None

    def values(self, columns: tuple[str, ...]) -> None:
        """None: they are not listed."""
        return None

    def hide(self, columns: set[str]) -> None:
        """Nothing is encoded beforehand, so nothing is hidden."""
        assert not columns, columns

    # Where the images lie.

    def cache(self, say: Callable[[str], Any]) -> None:
        """Nothing is cached on disk. Says where the shards that are mixed exceed their memory."""
        shards = min(self.cfg.stream_lanes * self.cfg.stream_window, len(self.shards.rows))
        taken, budget = float(self.shards.bytes.mean()) * shards / 2**30, self.cfg.stream_memory
        if taken > budget and not self.shards.local_tars:
            once = "which are read again for every batch where they exceed it; a smaller --data.stream-window, or more memory"
            say(f"warning: --data.stream-memory is {budget:g} GiB; {shards} shards are mixed, about {taken:.1f} GiB, {once}")

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
            self.shards.clear()  # workers read their own
        return batches.stream(self, self.cfg.train_batch_size, first, stride, self.cfg.dataloader_num_workers)


def sample(source: Source, count: int = FIXED) -> Source:
    """A few rows of a streamed source by themselves: those of `Streamed.fixed`, in the order of the data."""
    lanes = Lanes(source.shards.rows, 1, 4, 1, 0)
    return select(source, np.sort(source.shards.row(*lanes.examples(range(min(count, source.size))))))
