"""A folder of images: which of its files are images, and what captions and metadata say of them. No image is read here.

Rows come in the order of metadata.jsonl, .csv or .parquet, and without one in that of the files' paths. What lies in the folder
and is not trained on is counted.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneloop.configs import BadInput
from oneloop.inputs.files import endings, listed, reason, shown

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LABELS = ("label", "labels", "class")


@dataclass(frozen=True)
class FolderTable:
    """The rows of a folder, in columns."""

    root: str
    columns: dict[str, list[Any]]
    """Name -> values. Of images, paths relative to the root, or None."""
    kinds: dict[str, str]
    """Name -> image, text, class, int or other."""
    classes: dict[str, list[str]]
    """Column of labels -> their names."""
    notes: list[str]
    """What is left out of it."""

    def captions_beside(self, image: str) -> list[list[str]] | None:
        """The text in the .txt beside each image; None where there is none at all.

        Raises:
            BadInput: some of them are not text in UTF-8, or in UTF-16 with its mark.
        """
        captions, wrong = [], []
        for path in self.columns[image]:
            beside = Path(self.root, posixpath.splitext(path)[0] + ".txt")
            try:
                captions.append([text_of(beside).strip()] if beside.is_file() else [])
            except (OSError, ValueError) as error:
                wrong.append(f"{shown(beside.name)} ({reason(error)})")
        if wrong:
            raise BadInput(f"--data.train-data-dir {shown(self.root)}: {len(wrong):,} captions cannot be read: {listed(wrong)}")
        return captions if any(captions) else None


def text_of(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 if it begins with its mark; a mark of UTF-8 stays.

    Raises:
        ValueError: it is in neither. OSError: it cannot be read.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8")
    except UnicodeDecodeError:
        raise ValueError("not in UTF-8") from None
    if "\0" in text:
        raise ValueError("not in UTF-8: it has zero bytes")
    return text


def files_in(root: Path, given: str = "--data.train-data-dir") -> tuple[list[str], Counter[str]]:
    """The regular files under a folder, as sorted paths relative to it, and the number of what else is there by its kind.

    Links are followed, into each folder once. What is hidden, or in folders whose names begin with __, is left out.

    Raises:
        BadInput: a folder in it cannot be read.
    """
    files, left, folders, seen = [], Counter(), [""], set()
    while folders:
        inside = folders.pop()
        try:
            status = os.stat(root / inside)
            if (status.st_dev, status.st_ino) in seen:
                left["links to folders that are there already"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / inside) as entries:
                entries = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise BadInput(f"{given}: {shown(root / inside)} cannot be read: {reason(error)}") from None
        for entry in entries:
            name, image = posixpath.join(inside, entry.name), ending(entry.name) in endings()
            try:
                folder, file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                folder = file = False
            if entry.name.startswith(".") or (folder and entry.name.startswith("__")):
                left["hidden images"] += image
            elif folder:
                folders.append(name)
            elif file:
                files.append(name)
            else:
                left["images that are no files (links to nothing, pipes)"] += image
    return sorted(files), +left


def ending(path: str) -> str:
    """What a file's name ends in, in lower case."""
    return posixpath.splitext(path)[1].lower()


def open_folder(folder: str, label_column: str | None = None, given: str = "--data.train-data-dir") -> FolderTable:
    """The rows of a folder; `given` is the flag that names it.

    Raises:
        BadInput: there is no such folder, no image in it, or its metadata are not what they should be.
    """
    root, flag = Path(folder).expanduser(), f"{given} {shown(folder)}"
    if not root.is_dir():
        raise BadInput(f"{flag}: there is no such folder; expected a folder of images")
    files, left = files_in(root, given)
    images = [path for path in files if ending(path) in endings()]
    metadata = [path for path in files if posixpath.basename(path) in METADATA]
    if not images:
        raise BadInput(f"{flag}: holds no images; expected PNG, JPEG, WebP, TIFF, ... files")
    if len({ending(path) for path in metadata}) > 1:
        raise BadInput(f"{flag}: expected metadata of one kind, and there are: {listed(map(shown, metadata))}")
    captions, trained = {posixpath.splitext(path)[0] + ".txt" for path in images}, set(images)
    foreign = Counter(ending(p) or "no ending" for p in files if p not in trained and p not in captions and p not in metadata)
    notes = [f"{count:,} {kind}" for kind, count in sorted(left.items())]
    if foreign:
        most = sorted(foreign.items(), key=lambda item: (-item[1], item[0]))[:5]
        kinds = ", ".join(f"{shown(kind, 20)} {count:,}" for kind, count in most)
        notes.append(f"{foreign.total():,} files that are no images ({kinds}{', ...' if len(foreign) > 5 else ''})")
    columns, kinds, classes = {"image": images}, {"image": "image"}, {}
    if metadata:
        columns = columns_of([row for path in metadata for row in rows_of(root, path, label_column)])
        kinds = {name: kind_of(name, values) for name, values in columns.items()}
        for name in list(kinds):
            if kinds[name] == "file":
                new = name.removesuffix("file_name").removesuffix("_") or "image"
                columns[new], kinds[new] = columns.pop(name), "image"
                kinds.pop(name)
        used = {path for name, kind in kinds.items() if kind == "image" for path in columns[name]}
        if unused := sum(path not in used for path in images):
            notes.append(f"{unused:,} images without a row in {posixpath.basename(metadata[0])}")
    else:
        inside = [posixpath.dirname(path) for path in images]
        labels = sorted({posixpath.basename(folder) for folder in inside})
        if len(labels) > 1 and len({folder.count("/") + bool(folder) for folder in inside}) == 1:
            numbers = {name: i for i, name in enumerate(labels)}
            columns["label"], kinds["label"] = [numbers[posixpath.basename(folder)] for folder in inside], "class"
            classes["label"] = [shown(name) for name in labels]
    return FolderTable(str(root), columns, kinds, classes, notes)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata.


def rows_of(root: Path, path: str, label_column: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file, file names relative to the root.

    Raises:
        BadInput: it cannot be read, or a row names no file inside its folder.
    """
    where, some = shown(root / path), False
    parse = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[ending(path)]
    try:
        for number, row in parse(root / path, label_column):
            names = [name for name in row if name == "file_name" or name.endswith("_file_name")]
            if not names:
                raise ValueError(f"line {number}: it has no file_name")
            for name in names:
                if not isinstance(row[name], str):
                    raise ValueError(f"line {number}: {name} is {shown(repr(row[name]), 60)}; expected the path of an image")
                row[name] = _inside(root, posixpath.dirname(path), row[name], number)
            some = True
            yield row
        if not some:
            raise ValueError("it has no rows")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise BadInput(f"--data.train-data-dir: {where} cannot be read: {reason(error)}") from None


def _inside(root: Path, folder: str, name: str, number: int) -> str:
    """The path of a file that metadata name, relative to the root; it lies in the folder of the metadata."""
    if "\\" in name and not (root / folder / name).exists():  # written on Windows
        name = name.replace("\\", "/")
    path = posixpath.normpath(name)
    outside = posixpath.isabs(path) or path in (".", "..") or path.startswith("../") or re.match(r"[A-Za-z]:/", path)
    if outside or "://" in name or "\0" in name:
        raise ValueError(f"line {number}: file_name is {shown(name, 60)!r}; expected a path inside the folder of the metadata")
    return posixpath.join(folder, path)


def _jsonl(path: Path, label_column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_of(path).removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {reason(error)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected an object, such as {{'file_name': '1.png', 'text': 'a red circle'}}")
            yield number, row


def _csv(path: Path, label_column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Texts as they are, empty ones None; labels are numbers where all of them are."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text_of(path).removeprefix("\ufeff"), newline=""))
    names, lines = next(reader, []), []
    for values in reader:
        if values and len(values) != len(names):
            raise ValueError(f"line {reader.line_num}: {len(values)} values for {len(names)} columns; quote texts with commas")
        if values:
            lines.append((reader.line_num, dict(zip(names, (value or None for value in values), strict=True))))
    for name in {label_column, *LABELS} & set(names):
        if all(re.fullmatch(r"-?\d{1,18}", row[name] or "") for _, row in lines):
            lines = [(number, row | {name: int(row[name])}) for number, row in lines]
    yield from lines


def _parquet(path: Path, label_column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; None where a row has no such value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def kind_of(name: str, values: list[Any]) -> str:
    """What a column of metadata holds."""
    if name == "file_name" or name.endswith("_file_name"):
        return "file"
    types = {type(value) for value in values} - {type(None)}
    return "int" if types == {int} else "text" if types and types <= {str, list} else "other"
