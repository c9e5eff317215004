"""Encode once: what frozen models make of images and captions, kept on disk and read in place of the columns themselves.

A task's encodings (tasks/__init__.py) say what may be kept. An entry is named by what was encoded and by the encoder's own
weights, so nothing in the cache goes stale, and folders may be shared by runs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneloop import configs
from oneloop.configs import BadInput
from oneloop.data import Examples, Reader, to_device
from oneloop.inputs.sources import content_hash
from oneloop.tasks import Batch, Encoding, Models


def remarks(examples: Examples, encodings: Mapping[str, Encoding], cfg: Any) -> Iterator[str]:
    """What the encodings have to say of the texts they will be given."""
    for column, encoding in encodings.items():
        if encoding.remark is not None:
            texts = sorted(make() for make in (examples.distinct(column) or {}).values())
            yield from filter(None, [encoding.remark(texts, cfg)])


def encode(encodings: Mapping[str, Encoding], models: Models, batch: Batch, cfg: Any) -> Batch:
    """The batch with the columns that have an encoding replaced by it; what is cached has been replaced before."""
    for column, encoding in encodings.items():
        if column in batch:
            batch = {k: v for k, v in batch.items() if k != column} | _encode(encoding, models, batch[column], cfg)
    return batch


@torch.no_grad()
def _encode(encoding: Encoding, models: Models, values: Any, cfg: Any) -> dict[str, Tensor]:
    return dict(encoding.fn(models, values, cfg))


def encode_once(
    examples: Examples,
    encodings: Mapping[str, Encoding],
    models: Models,
    cfg: Any,
    accelerator: Any,
    say: Callable[[str], None],
) -> set[str]:
    """Encode every value of the columns that have an encoding and can be listed, and have the stream read it: from memory,
    where all of it fits the memory budget, else from disk.

    Processes share the work. Entries that stand from an earlier run are kept if they are what was written, and made anew if
    not. Returns the names of the models that nothing calls any more.

    Raises:
        BadInput: the folder cannot be written.
    """
    folder, size, budget = configs.example_cache(cfg), cfg.data.train_batch_size, cfg.data.memory_budget * 2**30
    if folder is None:
        return set()
    for column, encoding in encodings.items():
        wanted = examples.distinct(column)
        if wanted is None:
            continue
        cache = Encoded(folder / f"{column}-{encoder_identity(encoding, models, cfg)}")
        missing = cache.missing(sorted(wanted))
        if missing:
            say(f"encoding {column} once: {len(missing):,} of {len(wanted):,}, into {cache.folder}")

        def columns(
            marks: list[str], column: str = column, encoding: Encoding = encoding, wanted: Any = wanted
        ) -> Iterator[tuple[str, dict[str, Tensor]]]:
            # Always as many as a batch has, of one size: the same shape as in a step, and so the same bits.
            values = {mark: wanted[mark]() for mark in marks}
            shape = lambda mark: tuple(getattr(values[mark], "shape", ()))  # noqa: E731
            for _, same in itertools.groupby(sorted(marks, key=shape), shape):
                some = list(same)
                several = [values[mark] for mark in (some * size)[:size]]
                several = torch.stack(several) if isinstance(several[0], Tensor) else several
                several = to_device({column: several}, accelerator.device, examples.source.columns)[column]
                made = _encode(encoding, models, several, cfg)
                yield from ((mark, {name: x[i] for name, x in made.items()}) for i, mark in enumerate(some))

        accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
        cache.fill(missing[accelerator.process_index :: accelerator.num_processes], size, columns)
        accelerator.wait_for_everyone()
        cache.fill(cache.missing(missing), size, columns)  # what others wrote to a disk that is not seen from here
        accelerator.wait_for_everyone()
        held, taken = cache.held(sorted(wanted), budget)
        examples.substitute(column, held or cache.read, held is not None)
        budget -= taken
    called = {name for column, e in encodings.items() if column not in examples.encoded for name in e.models}
    return {name for column in examples.encoded for name in encodings[column].models if name in models} - called


def encoder_identity(encoding: Encoding, models: Models, cfg: Any) -> str:
    """A hash of everything but the value that decides an encoding: function, weights in their precision, configs, key."""
    parts: list[Any] = [encoding.fn.__module__, encoding.fn.__qualname__, encoding.key(cfg)]
    for name in encoding.models:
        if name in models:
            config = getattr(models[name], "config", {})
            config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            own = sorted((k, str(v)) for k, v in config.items() if not k.startswith("_"))  # not where it was loaded from
            parts += [name, type(models[name]).__name__, own]
            for key, x in models[name].state_dict().items():
                parts += [key, x.dtype, x.shape, _bytes(x)]
    return content_hash(*parts)[:16]


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Encoded:
    """Encodings on disk: a safetensors file for each value, in a folder that names the encoder.

    An entry is named by what was encoded, so it never goes stale; it holds a hash of that name, its folder's and its content,
    so it is known to be whole and in its place.
    """

    folder: Path

    def path(self, mark: str) -> Path:
        """The entry of the value with this mark."""
        return self.folder / mark[:2] / f"{mark}.safetensors"

    def read(self, marks: Iterable[str]) -> dict[str, Tensor]:
        """The columns of these values, stacked, [B, ...] each."""
        entries = [load_file(self.path(mark)) for mark in marks]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def held(self, marks: list[str], budget: float) -> tuple[Reader | None, int]:
        """These values in memory, and the bytes that they take there; None and 0 where that is more than the budget."""
        taken, values = 0, {}
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(marks), 1024):  # in blocks: every file that is open is a mapping of its own
                some = marks[start : start + 1024]
                for mark, entry in zip(some, pool.map(load_file, map(self.path, some)), strict=True):
                    taken += sum(x.nbytes for x in entry.values())
                    if taken > budget:
                        return None, 0
                    values[mark] = {name: x.clone() for name, x in entry.items()}
        return _InMemory(values).read, taken

    def fill(
        self, marks: list[str], size: int, columns: Callable[[list[str]], Iterator[tuple[str, dict[str, Tensor]]]]
    ) -> None:
        """Write the entries of these marks, `size` at a time."""
        for some in (marks[start : start + size] for start in range(0, len(marks), size)):
            for mark, made in columns(some):
                try:
                    self.write(mark, made)
                except (OSError, SafetensorError) as error:
                    reason = f"{self.folder} cannot be written: {getattr(error, 'strerror', None) or error}"
                    raise BadInput(f"--data.example-cache: {reason}; another folder, or `no` for none") from None

    def write(self, mark: str, columns: dict[str, Tensor]) -> None:
        """One entry, there whole or not at all."""
        path = self.path(mark)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{mark}.{os.getpid()}.writing")
        columns = {name: x.cpu().contiguous() for name, x in columns.items()}
        save_file(columns, staged, {"hash": self.hash(mark, columns)})
        staged.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for the owner alone
        os.replace(staged, path)

    def hash(self, mark: str, columns: dict[str, Tensor]) -> str:
        """A hash of an entry: of what and by which encoder it is, and everything in it."""
        parts = (part for name, x in sorted(columns.items()) for part in (name, x.dtype, x.shape, _bytes(x)))
        return content_hash(self.folder.name, mark, *parts)

    def missing(self, marks: list[str]) -> list[str]:
        """Those of the marks without an entry, or with a damaged one."""
        with ThreadPoolExecutor(4) as pool:
            return [mark for mark, whole in zip(marks, pool.map(self._whole, marks), strict=True) if not whole]

    def _whole(self, mark: str) -> bool:
        try:
            with safe_open(self.path(mark), "pt") as entry:
                columns = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118
                return (entry.metadata() or {}).get("hash") == self.hash(mark, columns)
        except (OSError, SafetensorError):
            return False


@dataclass(frozen=True)
class _InMemory:
    """Encodings in memory, as loader workers can be given them."""

    values: dict[str, dict[str, Tensor]]

    def read(self, marks: Iterable[str]) -> dict[str, Tensor]:
        """The columns of these values, stacked, [B, ...] each."""
        entries = [self.values[mark] for mark in marks]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
