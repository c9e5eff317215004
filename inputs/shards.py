"""Shards: files of many rows, opened by footers and indexes alone, read when a row of theirs is asked for.

A shard is a row group of a parquet file, or a WebDataset tar, whose samples are consecutive members of the same name up to the
first dot; here or behind anything that fsspec opens. Shards that were read are in memory up to a number of bytes, the least
recently used leave first. In memory for each shard: 24 bytes, for a file its path; nothing for a row.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import posixpath
import re
import sys
import tarfile
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from oneloop.configs import BadInput
from oneloop.inputs.files import listed, reason, shown
from oneloop.inputs.shuffle import permute
from oneloop.machine.files import erase
from oneloop.tasks import hash64

ENDINGS = (".parquet", ".tar")
INDEXES = ("index.json", "shardindex.json", "sizes.json")
"""Files beside tars that may say how many samples each has: as wids writes them, or an object of file names and numbers."""
REQUESTS = 16
"""Requests at a time."""
DELAYS = (0.5, 2.0, 8.0)
"""Seconds before each further try of a request that failed."""
GAP = 2**16
"""Bytes between two ranges that are not worth a request of their own."""
FOOTERS = 64
"""Footers in memory."""
FORMAT = 1
"""To be raised with every change to what is kept of an opened set."""


# ---------------------------------------------------------------------------------------------------------------------
# Files, here or elsewhere.


def remote(path: str) -> bool:
    """Whether it is opened by fsspec."""
    return "://" in path


def system(path: str) -> tuple[Any, str]:
    """The file system of a path and its name there. Made where it is used, since none survives a fork."""
    import fsspec

    return fsspec.core.url_to_fs(path)


def tried(function: Callable[[], Any]) -> Any:
    """What it returns, tried anew after DELAYS where the trouble may pass."""
    for delay in (*DELAYS, None):
        try:
            return function()
        except Exception as error:
            if delay is None or isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            time.sleep(delay)
    return None


def fetch(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """These bytes of a remote file, or all, in one request."""
    fs, name = system(path)
    raw = tried(lambda: fs.cat_file(name, start=start, end=end))
    if start is not None and len(raw) > end - start:  # a server without ranges
        raw = raw[start:end]
    if start is not None and len(raw) < end - start:
        raise OSError(f"{end - start:,} bytes asked for, {len(raw):,} received")
    return raw


class Remote(io.RawIOBase):
    """A remote file for readers that seek: a request for each read, but of the ranges that were fetched before."""

    def __init__(self, path: str, size: int, ranges: Iterable[tuple[int, int]] = ()):
        self.path, self.size, self.at = path, size, 0
        self.pieces = [(start, fetch(path, start, end)) for start, end in ranges]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, to: int, whence: int = 0) -> int:
        self.at = to + (0, self.at, self.size)[whence]
        return self.at

    def read(self, count: int = -1) -> bytes:
        start, end = self.at, self.size if count < 0 else min(self.at + count, self.size)
        self.at = max(start, end)
        for first, piece in self.pieces:
            if first <= start and end <= first + len(piece):
                return piece[start - first : end - first]
        return fetch(self.path, start, end) if start < end else b""


def expanded(pattern: str) -> list[str]:
    """The patterns that braces stand for: {000..127} for numbers, {a,b} for words."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    words = match[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        words = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [path for word in words for path in expanded(pattern[: match.start()] + word + pattern[match.end() :])]


def paths(pattern: str, given: str) -> list[str]:
    """The shards' files that a pattern without braces names."""
    if pattern.endswith(ENDINGS) and not set(pattern) & set("*?["):
        return [pattern]
    fs, name = system(pattern)
    try:
        if set(name) & set("*?["):
            names = tried(lambda: fs.glob(name))
        else:
            names = [path for path in tried(lambda: fs.find(name)) if path.endswith(ENDINGS)]
    except Exception as error:
        raise BadInput(f"{given}: it cannot be listed ({reason(error)})") from None
    return [fs.unstrip_protocol(path) if remote(pattern) else path for path in names]


# ---------------------------------------------------------------------------------------------------------------------
# Tars.


@dataclass(frozen=True)
class Samples:
    """The samples of a tar, by row."""

    parts: list[dict[str, tuple[int, int]]]
    """Ending -> first byte and number of bytes."""


def split_name(name: str) -> tuple[str, str]:
    """What a sample is called, and what its part is: up to the first dot of the file's name, and after it."""
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}/{stem}", ending.lower()


def iterated(file: Any) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """What each sample of a tar is called, and its parts as of Samples, from the headers alone.

    Raises:
        ValueError: it is no whole tar, or compressed.
    """
    last, parts = None, {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, ending = split_name(member.name)
                tar.members.clear()  # it would remember all of them
                if not member.isreg() or not ending or posixpath.basename(key).startswith((".", "__")) or not key.strip("/"):
                    continue
                if key != last and parts:
                    yield last, parts
                    parts = {}
                parts[ending], last = (member.offset_data, member.size), key
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError("it is damaged")
    except tarfile.TarError as error:
        raise ValueError(f"no whole tar without compression: {error}") from None
    if parts:
        yield last, parts


def samples(file: Any) -> Samples:
    """All samples of a tar."""
    return Samples([parts for _, parts in iterated(file)])


def declared(index: Any) -> dict[str, int]:
    """File -> number of samples, as an index says: wids' shardlist, or an object of names and numbers."""
    if isinstance(index, dict) and isinstance(index.get("shardlist"), list):
        index = {shard["url"]: shard["nsamples"] for shard in index["shardlist"]}
    return {name: rows for name, rows in index.items() if isinstance(rows, int) and rows >= 0 and name.endswith(".tar")}


def first_endings(path: str, count: int = 16) -> list[str]:
    """The endings in a tar's first samples.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        fs, name = system(path) if remote(path) else (None, path)
        with open(path, "rb") if fs is None else fs.open(name, "rb", cache_type="readahead") as file:
            return list(dict.fromkeys(ending for _, parts in itertools.islice(iterated(file), count) for ending in parts))
    except Exception as error:
        raise BadInput(f"--data.stream: {path} cannot be read ({reason(error)})") from None


def read_index(path: str) -> dict[str, int]:
    """The tars that an index lists, as paths -> number of samples. Raises whatever a file that is none raises."""
    raw = fetch(path) if remote(path) else Path(path).read_bytes()
    base = path.rpartition("/")[0]
    joined = lambda name: name if remote(name) or name.startswith("/") else f"{base}/{name}" if base else name  # noqa: E731
    return {joined(name): rows for name, rows in declared(json.loads(raw)).items()}


# ---------------------------------------------------------------------------------------------------------------------
# What is known of a file before a row is read.


@dataclass(frozen=True)
class Opened:
    """A file of shards."""

    path: str
    size: int
    """In bytes; 0: an index said how many rows it has, and nobody asked."""
    rows: tuple[int, ...]
    """Of each shard."""
    bytes: tuple[int, ...]
    """Of each shard, once decompressed."""
    schema: str | None = None
    """Of parquet: its arrow schema, as base64."""
    most: dict[str, int] = field(default_factory=dict)
    """Of parquet: column of integers -> its largest value, where the footer says."""


def footer(path: str, size: int) -> Any:
    """The metadata of a parquet file."""
    import pyarrow.parquet as pq

    if not remote(path):
        return pq.read_metadata(path)
    return pq.read_metadata(Remote(path, size, [(max(size - GAP, 0), size)]))


def open_parquet(path: str, size: int) -> Opened:
    """A parquet file, by its footer."""
    meta = footer(path, size)
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    schema, most = meta.schema.to_arrow_schema(), {}
    for i in range(meta.num_columns if groups else 0):
        if groups[0].column(i).physical_type in ("INT32", "INT64"):
            statistics = [group.column(i).statistics for group in groups]
            if all(s is not None and s.has_min_max and isinstance(s.max, int) for s in statistics):
                most[groups[0].column(i).path_in_schema] = max(s.max for s in statistics)
    made = base64.b64encode(schema.serialize().to_pybytes()).decode()
    return Opened(path, size, tuple(g.num_rows for g in groups), tuple(g.total_byte_size for g in groups), made, most)


def schema(file: Opened) -> Any:
    """Its arrow schema."""
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(file.schema)))


def open_tar(path: str, size: int) -> Opened:
    """A tar, by a scan of its headers."""
    fs, name = system(path) if remote(path) else (None, path)
    with open(path, "rb") if fs is None else fs.open(name, "rb", cache_type="readahead") as file:
        return Opened(path, size, (len(samples(file).parts),), (size,))


def stamp(path: str) -> tuple[int, str]:
    """The size of a file, and what changes when it is written."""
    if not remote(path):
        status = os.stat(path)
        if not os.path.isfile(path):
            raise ValueError("not a file")
        return status.st_size, str(status.st_mtime_ns)
    fs, name = system(path)
    info = tried(lambda: fs.info(name))
    if info.get("size") is None:
        raise ValueError("the server does not say its size")
    return int(info["size"]), str(next((info[k] for k in ("ETag", "etag", "LastModified", "mtime", "sha256") if k in info), ""))


def spread(function: Callable[[str], Any], names: Sequence[str], given: str) -> list[Any]:
    """What a function makes of each file, several at a time.

    Raises:
        BadInput: with all the files that it could not be made of.
    """
    wrong: list[str] = []

    def one(name: str) -> Any:
        try:
            return function(name)
        except Exception as error:  # whatever a library throws at a damaged file or a server that is not there
            wrong.append(f"{name} ({'there is no such file' if isinstance(error, FileNotFoundError) else reason(error)})")
            return None

    with ThreadPoolExecutor(REQUESTS if any(map(remote, names)) else 1) as pool:
        made = list(pool.map(one, names))
    if wrong:
        raise BadInput(f"{given}: {len(wrong):,} of {len(names):,} files cannot be read: {listed(sorted(wrong))}")
    return made


def opened(pattern: str, folder: Path | None, say: Callable[[str], Any]) -> list[Opened]:
    """The files of shards that a pattern names, in the order of their paths. What was asked of them is kept in `folder`.

    Raises:
        BadInput: there are none, they are of both kinds, or some cannot be read.
    """
    given = f"--data.stream {shown(pattern)}"
    expected = "expected .parquet or .tar files: a folder, a pattern such as shards/*.tar or shards/{000..127}.tar, or an index"
    pattern = pattern if remote(pattern) else os.path.expanduser(pattern)
    counts: dict[str, int] = {}
    if pattern.endswith(".json"):
        try:
            counts = read_index(pattern)
        except Exception as error:
            raise BadInput(f"{given}: it lists no shards ({reason(error)}); {expected}") from None
        names = sorted(counts)
    else:
        names = sorted({path for part in expanded(pattern) for path in paths(part, given)})
    kinds = {os.path.splitext(name)[1] for name in names}
    if not names or not kinds <= set(ENDINGS):
        other = next((name for name in names if not name.endswith(ENDINGS)), None)
        raise BadInput(f"{given}: it names {shown(other) if other else 'no shards'}; {expected}")
    if len(kinds) > 1:
        raise BadInput(f"{given}: it names both .parquet and .tar files; expected one kind")
    if kinds == {".tar"} and not counts:
        for base in dict.fromkeys(name.rpartition("/")[0] for name in names):
            for index in (f"{base}/{name}" if base else name for name in INDEXES):
                with contextlib.suppress(Exception):  # there is none, or it is of something else
                    counts |= read_index(index)
                    break
    listed_ = [Opened(name, 0, (counts[name],), (0,)) for name in names if name in counts]
    names = [name for name in names if name not in counts]
    stamps = spread(stamp, names, given) if names else []
    path = folder and names and folder / f"shards-{_key(names, stamps)}.json"
    made = _kept(path) if path else None
    if made is None and names:
        began, tars = time.monotonic(), names[0].endswith(".tar")
        if tars:
            say(f"{len(names):,} tars without an index beside them ({INDEXES[0]}): their headers are read once")
        sizes = dict(zip(names, (size for size, _ in stamps), strict=True))
        made = spread(lambda name: (open_tar if tars else open_parquet)(name, sizes[name]), names, given)
        if tars:
            where = f"; what they say is cached in {path}" if path else ""
            say(f"{sum(sum(file.rows) for file in made):,} samples, in {time.monotonic() - began:.1f} s{where}")
        if path:
            _keep(path, made)
    return sorted([*listed_, *(made or ())], key=lambda file: file.path)


def _key(names: Sequence[str], stamps: Sequence[tuple[int, str]]) -> str:
    parts = repr((FORMAT, *zip(names, stamps, strict=True))).encode()
    return hashlib.blake2b(parts, digest_size=8).hexdigest()


def _kept(path: Path) -> list[Opened] | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        files = json.loads(path.read_text("utf-8"))
        schemas = files["schemas"]
        return [Opened(p, s, tuple(r), tuple(b), None if i is None else schemas[i], m) for p, s, r, b, i, m in files["files"]]
    return None


def _keep(path: Path, made: Sequence[Opened]) -> None:
    """There whole or not at all; a disk that refuses costs the next start its time."""
    schemas = list(dict.fromkeys(file.schema for file in made if file.schema is not None))
    number = {schema: i for i, schema in enumerate(schemas)}
    files = [[f.path, f.size, f.rows, f.bytes, number.get(f.schema), f.most] for f in made]
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps({"schemas": schemas, "files": files}), "utf-8")
        os.replace(staged, path)
    except OSError:
        erase(staged)


# ---------------------------------------------------------------------------------------------------------------------
# Shards, and what is in memory of them.


class Shards:
    """The shards of several files, and their rows, numbered through: all of them, or those of a `part`."""

    def __init__(self, files: Sequence[Opened], columns: Sequence[str] = ()):
        self.paths, self.columns = [file.path for file in files], tuple(columns)
        self.tar = self.paths[0].endswith(".tar")
        self.size = np.array([file.size for file in files], np.int64)
        counts = [len(file.rows) for file in files]
        self.first = np.cumsum([0, *counts])[:-1]  # [F], the first shard of each file
        self.rows = np.fromiter(itertools.chain.from_iterable(file.rows for file in files), np.int64)  # [S]
        self.bytes = np.fromiter(itertools.chain.from_iterable(file.bytes for file in files), np.int64)  # [S]
        self.own = self.rows  # [S], those of this part
        self.split: dict[int, int] = {}  # shard that is in several parts -> its first row here, in the keyed order
        self.ends = self.own.cumsum()  # [S]
        self.fetched = 0
        """Shards that were read."""
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._footers: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": OrderedDict(), "_footers": OrderedDict()}  # what was read does not travel

    def view(self, columns: Sequence[str] | None = None) -> Shards:
        """The same shards, of which nothing is in memory yet, in these columns."""
        made = copy.copy(self)
        made.columns = self.columns if columns is None else tuple(columns)
        made._open, made._footers, made.fetched = OrderedDict(), OrderedDict(), 0
        return made

    def part(self, first: int, end: int) -> Shards:
        """The rows from `first` to `end` of all, in a keyed order of shards, and of rows inside a shard that is in several
        parts: so a part is read from as few shards as can be."""
        order = permute(np.array([hash64("parts")], np.uint64), len(self.rows), np.arange(len(self.rows)))
        before = np.empty_like(self.rows)  # [S], rows of the shards before
        before[order] = self.rows[order].cumsum() - self.rows[order]
        low, high = (np.clip(edge - before, 0, self.rows) for edge in (first, end))
        made = self.view()
        made.own, made.ends = high - low, (high - low).cumsum()
        made.split = {i: int(low[i]) for i in np.flatnonzero((low < high) & (high - low < self.rows)).tolist()}
        return made

    @property
    def local_tars(self) -> bool:
        """Whether they are mapped where they lie."""
        return self.tar and not remote(self.paths[0])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def file(self, shard: int) -> int:
        """The file of a shard."""
        return bisect.bisect_right(self.first, shard) - 1

    def at(self, row: int) -> tuple[int, int]:
        """Shard of a row, and its number there."""
        shard = int(np.searchsorted(self.ends, row, "right"))
        own = row - int(self.ends[shard] - self.own[shard])
        if shard in self.split:
            key = np.array([hash64("parts", shard)], np.uint64)
            own = int(permute(key, self.rows[shard], np.array([self.split[shard] + own]))[0])
        return shard, own

    def row(self, shard: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The rows that are the own-th of this part in a shard, of arrays."""
        return self.ends[shard] - self.own[shard] + own

    def name(self, row: int) -> str:
        """What to call a row in a message; no shard is read for it."""
        shard, own = self.at(row)
        file = self.file(shard)
        before = int(self.rows[self.first[file] : shard].sum())
        return f"row {before + own} of {shown(self.paths[file])}"

    def identity(self) -> str:
        """What tells them from all others, wherever they lie: names, bytes and rows of the files."""
        check = hashlib.blake2b(repr([posixpath.basename(path) for path in self.paths]).encode(), digest_size=16)
        for numbers in (self.size, self.first, self.rows):
            check.update(numbers.astype("<i8").tobytes())
        if self.own is not self.rows:
            check.update(self.own.astype("<i8").tobytes())
        return check.hexdigest()

    def need(self, shards: Iterable[int], budget: float) -> None:
        """Have these shards in memory, and others as far as all take at most `budget` bytes."""
        shards = list(dict.fromkeys(shards))
        missing = [shard for shard in shards if shard not in self._open]
        for shard in shards:
            if shard in self._open:
                self._open.move_to_end(shard)
        if missing:
            with ThreadPoolExecutor(min(len(missing), REQUESTS) if remote(self.paths[0]) else 1) as pool:
                list(pool.map(self._footer, {} if self.tar else {self.file(shard) for shard in missing}))
                self._open.update(zip(missing, pool.map(self._read, missing), strict=True))
            self.fetched += len(missing)
        taken = sum(piece.nbytes for piece in self._open.values())
        while taken > budget and len(self._open) > len(shards):
            taken -= self._open.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Let go of all that is in memory."""
        self._open.clear()

    def value(self, row: int, column: str) -> Any:
        """What a row has in a column: of a tar the bytes of the member with this ending; None: nothing."""
        shard, own = self.at(row)
        if shard not in self._open:
            self.need([shard], math.inf if not self._open else sum(p.nbytes for p in self._open.values()))
        return self._open[shard].value(own, column)

    def _read(self, shard: int) -> Any:
        file = self.file(shard)
        path = self.paths[file]
        try:
            piece = Tar(path) if self.tar else Group(self._group(file, shard - int(self.first[file])))
        except MemoryError:
            raise
        except Exception as error:  # whatever a library throws at a damaged file or a server that is not there
            there = "it is there" if isinstance(error, FileNotFoundError) else "it can be read"
            raise BadInput(
                f"the shard {path} cannot be read ({reason(error)}); the same command resumes once {there}"
            ) from None
        if piece.rows != self.rows[shard]:
            raise BadInput(f"the shard {path} has {piece.rows:,} rows, and {self.rows[shard]:,} were expected of it")
        return piece

    def _footer(self, file: int) -> None:
        """Have a file's footer in memory, of the last FOOTERS files; what is wrong with it is seen when it is used."""
        if file not in self._footers:
            with contextlib.suppress(Exception):
                self._footers[file] = footer(self.paths[file], int(self.size[file]))
        while len(self._footers) > FOOTERS:
            self._footers.popitem(last=False)

    def _group(self, file: int, group: int) -> Any:
        """A row group's columns, as an arrow table."""
        import pyarrow.parquet as pq

        path, size, columns = self.paths[file], int(self.size[file]), list(self.columns)
        meta = self._footers.get(file) or footer(path, size)
        if not remote(path):
            with pq.ParquetFile(path, metadata=meta, memory_map=True) as opened_:
                return opened_.read_row_group(group, columns=columns, use_threads=False)
        ranges = sorted(_ranges(meta.row_group(group), columns))
        merged = [ranges[0]]
        for start, end in ranges[1:]:
            if start <= merged[-1][1] + GAP:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        opened_ = pq.ParquetFile(Remote(path, size, merged), metadata=meta, pre_buffer=False)
        return opened_.read_row_group(group, columns=columns, use_threads=False)


def _ranges(group: Any, columns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where the columns of a row group lie in their file."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.split(".")[0] in columns:
            start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
            yield start, start + column.total_compressed_size


class Group:
    """A row group in memory."""

    def __init__(self, table: Any):
        self.table, self.rows, self.nbytes = table, table.num_rows, table.nbytes

    def value(self, row: int, column: str) -> Any:
        return self.table[column][row].as_py()


class Tar:
    """A tar: mapped where it lies here, in memory where it was fetched."""

    def __init__(self, path: str):
        if remote(path):
            self.buffer = fetch(path)
            self.parts = samples(io.BytesIO(self.buffer)).parts
        else:
            with open(path, "rb") as file:
                self.parts = samples(file).parts
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.rows = len(self.parts)
        endings = sum(map(len, self.parts))
        self.nbytes = (len(self.buffer) if remote(path) else 0) + 200 * self.rows + 120 * endings

    def value(self, row: int, column: str) -> bytes | None:
        where = self.parts[row].get(column)
        return where and bytes(self.buffer[where[0] : where[0] + where[1]])


# Columns that are read when they are asked for.


@dataclass(frozen=True)
class Column:
    """A column of texts or labels, by row: as a list, but read from the shard."""

    shards: Shards
    column: str
    make: Callable[[Any], Any]
    """Its value -> what the batch has. Raises ValueError where it cannot be used."""

    def __len__(self) -> int:
        return len(self.shards)

    def alone(self) -> Column:
        """The same, with no other column read beside it."""
        return replace(self, shards=self.shards.view([self.column]))

    def need(self, rows: Iterable[int], budget: float) -> None:
        """Have the shards of these rows in memory, as Shards.need has them."""
        self.shards.need((self.shards.at(row)[0] for row in rows), budget)

    def __getitem__(self, row: int) -> Any:
        try:
            return self.make(self.shards.value(row, self.column))
        except ValueError as error:
            raise BadInput(f"{self.shards.name(row)}: its column {self.column!r} {error}") from None


@dataclass(frozen=True)
class Same:
    """A column that has one value in every row."""

    count: int
    one: Any

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.one

    def alone(self) -> Same:
        """As Column.alone."""
        return self

    def need(self, rows: Iterable[int], budget: float) -> None:
        """Nothing is read."""


@dataclass(frozen=True)
class Chained:
    """The columns of several sources, one after the other."""

    parts: tuple[Any, ...]
    numbers: tuple[Sequence[int] | None, ...] = ()
    """Of labels: for each source what its own numbers are called here."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, row: int) -> Any:
        for i, part in enumerate(self.parts):
            if row < len(part):
                return part[row] if not self.numbers else self.numbers[i][part[row]]
            row -= len(part)
        raise IndexError(row)

    def alone(self) -> Chained:
        """As Column.alone."""
        return replace(self, parts=tuple(part.alone() if hasattr(part, "alone") else part for part in self.parts))

    def need(self, rows: Iterable[int], budget: float) -> None:
        """As Column.need."""
        rows, start = list(rows), 0
        for part in self.parts:
            own = [row - start for row in rows if start <= row < start + len(part)]
            if own and hasattr(part, "need"):
                part.need(own, budget)
            start += len(part)


@dataclass(frozen=True)
class ShardImages:
    """A column of images."""

    shards: Shards
    column: str
    endings: tuple[str, ...] = ()
    """Of tars: what the image may be called, if not as the column."""

    def read(self, row: int) -> tuple[Any, bytes]:
        """As Images.read."""
        from oneloop.inputs import files

        value = self.shards.value(row, self.column)
        for ending in self.endings if value is None else ():
            value = self.shards.value(row, ending) if value is None else value
        if isinstance(value, dict):
            value = value.get("bytes")
        if value is None:
            raise ValueError("the image is missing")
        return files.opened(value), value

    def name(self, row: int) -> str:
        """As Images.name."""
        return self.shards.name(row)

    def identity(self) -> str:
        """As Images.identity."""
        return json.dumps([self.column, self.shards.identity()])


def complain(text: str) -> None:
    """A line on the console, before there is a run to say it."""
    print(text, file=sys.stderr, flush=True)
