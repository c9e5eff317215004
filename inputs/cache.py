"""Encodings on disk: append-only shards, which several processes and runs write and read at once.

A shard is a safetensors file with the values of up to SHARD_ROWS marks, stacked by column, and the marks themselves: the marks
of all shards are the index, so a start reads those alone. A shard is written under another name and renamed when it is whole;
then it never changes. So a writer that is killed loses its last shard, and of two that encode the same value one is read.
A shard's header has a hash of its content and of its folder's name, which says which encoder made it: it is checked when a
process first reads from the shard.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oneloop.configs import BadInput
from oneloop.machine.files import erase

SHARD_ROWS, SHARD_BYTES = 1024, 64 * 2**20
"""At which of the two a shard is written."""
NAME = r"[0-9a-f]{32}\.safetensors"
WRITING = rf"\.{NAME}\.writing"
MARKS, DAY = "marks", 86_400
ANEW = "the same command encodes its values anew"

Marks = np.ndarray
"""Names of values, [n, 16] uint8: hashes of all that decides them."""
Reader = Callable[[Marks], dict[str, Tensor]]
"""The marks of B values -> what was made of them, [B, ...] each."""


def digest(content: bytes) -> bytes:
    """16 bytes that tell it from all others."""
    return hashlib.blake2b(content, digest_size=16).digest()


def as_marks(digests: Sequence[bytes]) -> Marks:
    """Digests of 16 bytes as one array."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


@dataclass(frozen=True)
class Values:
    """Everything that a run may ask an encoding for."""

    marks: Marks
    """What tells each from all others."""
    make: Callable[[int], tuple[Any, ...]]
    """Its number -> the value of each column."""
    sizes: Callable[[int], Any] | None = None
    """Its number -> the sizes of its images; None: all are of one size."""


@dataclass
class Cache:
    """The encodings of one encoder. Processes of their own may open the same folder, and a copy travels to loader workers."""

    folder: Path
    """Its name says which encoder made the values."""
    shards: list[Path] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """The first half of each mark, ascending: with what follows 28 bytes a value."""
    rest: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    where: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """Shard and row of each mark, [n, 2]."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}  # what is mapped does not travel

    @functools.cached_property
    def _open(self) -> dict[int, Any]:
        return {}

    def refresh(self) -> Cache:
        """Read the index anew. Shards whose header cannot be read are as if they were not there."""
        shards, marks, where = [], [np.empty((0, 16), np.uint8)], [np.empty((0, 2), np.int32)]
        for path in sorted(self.folder.glob("*.safetensors")):
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
                own = file.get_tensor(MARKS)
                if re.fullmatch(NAME, path.name) and own.dtype == torch.uint8 and own.shape[1:] == (16,):
                    marks.append(own.numpy())
                    where.append(np.stack([np.full(len(own), len(shards), np.int32), np.arange(len(own), dtype=np.int32)], 1))
                    shards.append(path)
        halves = np.concatenate(marks).view(np.uint64)  # [n, 2]
        order = np.argsort(halves[:, 0], kind="stable")
        self.shards, self.keys, self.rest = shards, halves[order, 0], halves[order, 1]
        self.where = np.concatenate(where)[order]
        self._open.clear()
        return self

    def find(self, marks: Marks) -> np.ndarray:
        """Shard and row of each, [n, 2]; -1 where it is not there."""
        halves, where = np.ascontiguousarray(marks).view(np.uint64), np.full((len(marks), 2), -1, np.int32)
        at, open_ = np.searchsorted(self.keys, halves[:, 0]), np.arange(len(marks))
        while len(open_ := open_[at[open_] < len(self.keys)]):
            open_ = open_[self.keys[at[open_]] == halves[open_, 0]]
            hit = self.rest[at[open_]] == halves[open_, 1]
            where[open_[hit]] = self.where[at[open_[hit]]]
            open_ = open_[~hit]  # another mark with the same first half
            at[open_] += 1
        return where

    def missing(self, marks: Marks) -> np.ndarray:
        """Which of the marks have no value, [m] int64; of equal ones the first."""
        first = (
            np.unique(np.ascontiguousarray(marks).view("V16")[:, 0], return_index=True)[1] if len(marks) else np.empty(0, int)
        )
        return np.sort(first[self.find(marks[first])[:, 0] < 0])

    @property
    def nbytes(self) -> int:
        """Bytes of all shards that there are: another run may have removed a damaged one."""
        total = 0
        for path in self.shards:
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def read(self, marks: Marks) -> dict[str, Tensor]:
        """The columns of these values, stacked, [B, ...] each.

        Raises:
            BadInput: a shard is not what was written, and is removed; or it cannot be read. The next start encodes what is
                not there anew.
        """
        rows: list[dict[str, Tensor]] = []
        for shard, row in self.find(marks).tolist():
            assert shard >= 0, "a value that was encoded is not in the cache"
            try:
                file = self._open.get(shard) or self._opened(shard)
                names = [name for name in file.keys() if name != MARKS]  # noqa: SIM118
                rows.append({name: file.get_slice(name)[row : row + 1] for name in names})
            except OSError as error:  # gone, or a disk that fails: no reason to remove it
                raise BadInput(f"--data.example-cache: {self.shards[shard]} cannot be read: {error}; {ANEW}") from None
            except (SafetensorError, ValueError) as error:
                erase(self.shards[shard])
                what = f"{self.shards[shard]} is not what was written ({error}) and was removed"
                raise BadInput(f"--data.example-cache: {what}; {ANEW}") from None
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _opened(self, shard: int) -> Any:
        """The shard, mapped and checked."""
        file = safe_open(self.shards[shard], "pt").__enter__()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  mapped, not read
        if (file.metadata() or {}).get("hash") != _hash(self.folder.name, tensors):
            raise ValueError("its hash is another")
        return self._open.setdefault(shard, file)

    def fill(
        self,
        marks: Marks,
        todo: Iterable[int],
        size: int,
        make: Callable[[Sequence[int]], Iterator[tuple[int, dict[str, Tensor]]]],
        count: int = 0,
    ) -> None:
        """Write the values of marks[i] for the i of `todo`; `make` gives of at most `size` of them (i, its columns). `count`:
        how many are written by all processes, for which there must be space.

        A shard has columns of one shape, and ends where another shape comes: `todo` has those of one shape in a row.

        Raises:
            BadInput: the folder cannot be written, or its disk is too small for all of them.
        """
        for left in self.folder.glob(".*.writing"):  # by a writer that was killed
            with contextlib.suppress(OSError):
                if re.fullmatch(WRITING, left.name) and time.time() - left.stat().st_mtime > DAY:
                    erase(left)
        todo, names, rows, shape = list(todo), [], [], None
        for start in range(0, len(todo), size):
            for i, columns in make(todo[start : start + size]):
                columns = {name: x.detach().cpu() for name, x in columns.items()}
                if i == todo[0]:
                    self._check_space(max(count, len(todo)), sum(x.nbytes for x in columns.values()))
                own = [(name, x.shape, x.dtype) for name, x in sorted(columns.items())]
                taken = len(rows) * sum(x.nbytes for x in columns.values())
                if rows and (own != shape or len(rows) >= SHARD_ROWS or taken >= SHARD_BYTES):
                    self._write(names, rows)
                    names, rows = [], []
                shape = own
                names.append(marks[i])
                rows.append(columns)
        if rows:
            self._write(names, rows)

    def _check_space(self, count: int, each: int) -> None:
        """Before the first of `count` values is written, `each` bytes large as the first is."""
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        needed, free = count * each / 2**30, shutil.disk_usage(place).free / 2**30
        if needed > free:
            sizes = f"{count:,} encodings take {needed:,.1f} GiB, and {free:,.1f} GiB are free in {place}"
            raise BadInput(f"--data.example-cache: {sizes}; another folder, or `no`: they are made anew in every step")

    def _write(self, marks: list[np.ndarray], rows: list[dict[str, Tensor]]) -> None:
        """One shard, there whole or not at all."""
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {
            MARKS: torch.from_numpy(np.stack(marks))
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        staged = path.with_name(f".{path.name}.writing")  # a folder: safetensors writes under another name still
        try:
            staged.mkdir(parents=True)
            save_file(tensors, staged / path.name, {"hash": _hash(self.folder.name, tensors)})
            (staged / path.name).chmod(self.folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            os.replace(staged / path.name, path)
            staged.rmdir()
        except (OSError, SafetensorError) as error:
            erase(staged)
            reason = f"{self.folder} cannot be written: {getattr(error, 'strerror', None) or error}"
            raise BadInput(f"--data.example-cache: {reason}; another folder, or `no` for none") from None


def _hash(folder: str, tensors: dict[str, Tensor]) -> str:
    check = xxhash.xxh3_128(folder.encode())
    for name, x in sorted(tensors.items()):
        check.update(repr((name, x.shape, x.dtype)).encode())
        check.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return check.hexdigest()
