"""Data sets, opened but not read: the embedded shapes, a folder of images, a local data set, one on the hub.

Each source gives the same: the number of its rows, an image by its row, captions and labels. Sources travel between processes:
their functions are methods of dataclasses, which pickle.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oneloop.configs import BadInput, Data, fraction
from oneloop.inputs import files
from oneloop.inputs.folder import LABELS, FolderTable, open_folder
from oneloop.inputs.shapes import SHAPES, caption_shape, describe_shape, draw_shape
from oneloop.tasks import hash64


def content_hash(*parts: Any) -> str:
    """Texts, numbers and buffers as 32 hexadecimal digits."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(part if isinstance(part, memoryview) else repr(part).encode())
    return h.hexdigest()


@dataclass(frozen=True)
class Source:
    """A data set that was opened but not read."""

    size: int
    read: Callable[[int], tuple[Image.Image, bytes]]
    """Row -> (the image, the bytes that identify it). Raises whatever a broken file raises."""
    name: Callable[[int], str]
    """Row -> what to call it in a message."""
    captions: list[list[str]] | None
    """Of each row; empty where it has none, which is trained on as the empty one."""
    labels: list[int] | None
    summary: str
    """One line: what there is, and where."""
    identity: Callable[[], Any]
    """What tells its images from all others without reading them."""
    classes: list[str] | None = None
    """Label -> its name."""
    held_out: Source | None = None
    """What the loss is measured on and never trained on."""
    notes: tuple[str, ...] = ()
    """What was left out or changed on the way."""


@dataclass(frozen=True)
class Selected:
    """Some rows of a source."""

    source: Source
    rows: list[int]

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Source.read."""
        return self.source.read(self.rows[row])

    def name(self, row: int) -> str:
        """As Source.name."""
        return self.source.name(self.rows[row])

    def identity(self) -> str:
        """As Source.identity."""
        return content_hash(self.source.identity(), np.array(self.rows).data)


def select(source: Source, rows: list[int]) -> Source:
    """These rows of a source, by themselves."""
    captions, labels = (values and [values[row] for row in rows] for values in (source.captions, source.labels))
    part = Selected(replace(source, captions=None, labels=None, held_out=None), rows)
    made = {"read": part.read, "name": part.name, "identity": part.identity}
    return replace(source, size=len(rows), captions=captions, labels=labels, **made)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded shapes.


@dataclass(frozen=True)
class Shapes:
    """Images that are drawn from their row."""

    count: int
    side: int

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Source.read."""
        image = draw_shape(row, self.side)[0]
        return Image.fromarray(image), image.tobytes()

    def name(self, row: int) -> str:
        """As Source.name."""
        return f"shape {row}"

    def identity(self) -> str:
        """As Source.identity."""
        drawn = (draw_shape(row, self.side)[0].tobytes() for row in range(8))  # numpy's streams may change
        return content_hash("shapes", self.count, *drawn)


def _open_shapes(cfg: Data) -> Source:
    captions, labels, lists, numbers = [], [], {}, {name: i for i, name in enumerate(SHAPES)}
    for row in range(cfg.num_shapes):
        text = caption_shape(*(looks := describe_shape(row)[:4]))
        captions.append(lists.setdefault(text, [text]))
        labels.append(numbers[looks[0]])
    summary, drawn = f"{cfg.num_shapes} embedded shapes, captions, {len(SHAPES)} labels", Shapes(cfg.num_shapes, cfg.resolution)
    return Source(cfg.num_shapes, drawn.read, drawn.name, captions, labels, summary, drawn.identity, list(SHAPES))


# ---------------------------------------------------------------------------------------------------------------------
# Tables: a folder of images, or a data set.


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder."""

    root: str
    paths: list[str | None]
    """Relative to the root."""

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Source.read."""
        if self.paths[row] is None:
            raise ValueError("the image is missing")
        path = Path(self.root, self.paths[row])
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        raw = path.read_bytes()
        return files.opened(raw), raw

    def name(self, row: int) -> str:
        """As Source.name."""
        return files.shown(self.paths[row] or f"row {row}", 10_000)

    def identity(self) -> str:
        """As Source.identity."""
        outside = [path and os.path.abspath(os.path.join(self.root, path)) for path in self.paths]
        return content_hash([(path, path and _stamp(path)) for path in outside])


@dataclass(frozen=True)
class DatasetImages:
    """The column of images of a `datasets.Dataset`, not decoded."""

    rows: Any
    column: str

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Source.read."""
        value = self.rows[row][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("the image is missing")
        raw = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        return files.opened(raw), raw

    def name(self, row: int) -> str:
        """As Source.name."""
        return files.shown((self.rows[row][self.column] or {}).get("path") or f"row {row}", 10_000)

    def identity(self) -> str:
        """As Source.identity."""
        outside = [path for chunk in self.rows.data.column(self.column).chunks for path in _outside(chunk)]
        if len(outside) == len(self.rows) and self.rows._indices is None:  # whatever else is there, these are the images
            return content_hash([(os.path.abspath(path), _stamp(path)) for path in outside])
        outside += [file["filename"] for file in self.rows.cache_files]
        return content_hash(self.rows._fingerprint, [(path, _stamp(path)) for path in outside])


def _outside(chunk: Any) -> list[str]:
    """The files that a part of an arrow column of images names, rather than holds."""
    return [path for path in chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist() if path]


def _stamp(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written or another takes its place: its size, and its times in nanoseconds. None: no file."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return None


def _load(cfg: Data, setting: str) -> Any:
    """The rows of a local data set or one on the hub, in the split that `setting` names, as a `datasets.Dataset`."""
    import datasets

    if not os.isatty(2):
        datasets.disable_progress_bars()
    name, flag = cfg.dataset_name, f"--data.dataset-name {cfg.dataset_name}"
    split, asked = getattr(cfg, setting), f"--data.{setting.replace('_', '-')}"
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            rows = datasets.load_from_disk(str(folder))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise BadInput(f"{asked} is {split!r}; {flag} has: {', '.join(rows)}")
                rows = rows[split]
            return rows
        return datasets.load_dataset(name, cfg.dataset_config_name, split=split, cache_dir=cfg.cache_dir)
    except BadInput:
        raise
    except (FileNotFoundError, ConnectionError) as error:
        said = files.shown(error, 400)
        raise BadInput(f"{flag}: expected `shapes`, a folder that holds a data set, or a name on the hub ({said})") from None
    except Exception as error:  # an unknown split or configuration, a script, damaged files: the library says which
        said = files.shown(" ".join(str(error.__cause__ or error).split()), 800)
        raise BadInput(f"{flag}, {asked} {split}, --data.dataset-config-name {cfg.dataset_config_name}: {said}") from None


def _described_as(feature: Any) -> str:
    """What a column of a `datasets.Dataset` holds: image, text, class, int or other."""
    import datasets

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    return "text" if "string" in str(feature).lower() else "int" if getattr(feature, "dtype", "").startswith("int") else "other"


def _open_table(cfg: Data, setting: str = "split") -> Source:
    """The images, captions and labels of a folder or a data set, in the columns that settings name, or those that fit."""
    notes: list[str] = []
    if cfg.train_data_dir is not None:
        table: Any = open_folder(cfg.train_data_dir, cfg.label_column)
        kinds, values, where = table.kinds, table.columns.__getitem__, cfg.train_data_dir
        notes += table.notes
    else:
        table = _load(cfg, setting)
        kinds, where = {k: _described_as(f) for k, f in table.features.items()}, f"{cfg.dataset_name} ({getattr(cfg, setting)})"
        values = lambda name: table[name][:]  # noqa: E731

    def column(setting: str, fits: tuple[str, ...], names: tuple[str, ...]) -> str | None:
        given = getattr(cfg, setting)
        if given is not None and given not in kinds:
            flag = setting.replace("_", "-")
            raise BadInput(f"--data.{flag} is {given!r}; the data set has the columns {files.shown(', '.join(kinds), 400)}")
        return given or next((name for name in names if kinds.get(name) in fits), None)

    def made(setting: str, name: str | None, make: Callable[[Any], Any]) -> Any:
        """What is made of a column; one that was not asked for, and cannot be used, is not used."""
        try:
            return name and make(values(name))
        except ValueError as error:
            if getattr(cfg, setting) is not None:
                raise BadInput(f"--data.{setting.replace('_', '-')} is {name!r}, which {error}") from None
            notes.append(f"the column {name!r}, which {error}")
            return None

    usual = ("image", "img", "picture", "pixel_values", "jpg", "png", "webp")
    image = column("image_column", ("image",), (*usual, *(name for name, kind in kinds.items() if kind == "image")))
    if image is None:
        raise BadInput(f"no column of images among {files.shown(', '.join(kinds), 400)}; --data.image-column names one")
    images = _images(table, kinds, image)
    caption = column("caption_column", ("text",), ("text", "caption", "captions", "prompt", "description", "sentence", "txt"))
    captions, source = made("caption_column", caption, _texts), caption
    if caption is None and isinstance(table, FolderTable) and (captions := table.captions_beside(image)):
        captions, source = _texts(captions), "the .txt beside each image"
    label = column("label_column", ("class", "int"), (*(k for k, kind in kinds.items() if kind == "class"), *LABELS))
    labels, classes = made("label_column", label, _numbered) or (None, None)
    if labels is not None and kinds[label] == "class":
        named = table.classes if isinstance(table, FolderTable) else {label: table.features[label].names}
        classes = named[label]
    if marked := sum(text.startswith("\ufeff") for texts in captions or () for text in texts):
        captions = [
            [text.removeprefix("\ufeff").strip() if text.startswith("\ufeff") else text for text in texts] for texts in captions
        ]
        notes.append(f"byte order marks of {marked:,} captions")
    size = len(values(image)) if isinstance(table, FolderTable) else len(table)
    summary = f"{size} images of {where}: image column {image!r}, captions {source!r}, labels {label!r}"
    return Source(size, images.read, images.name, captions, labels, summary, images.identity, classes, notes=tuple(notes))


def _images(table: Any, kinds: dict[str, str], column: str) -> FolderImages | DatasetImages:
    if isinstance(table, FolderTable):
        if kinds[column] != "image":
            raise BadInput(f"--data.image-column {column} does not hold images; expected a column of file names")
        return FolderImages(table.root, table.columns[column])
    import datasets

    try:
        if isinstance(feature := table.features[column], dict) and not {"bytes", "path"} & feature.keys():
            raise ValueError(f"its values have {', '.join(feature)}; expected bytes or path")
        return DatasetImages(table.cast_column(column, datasets.Image(decode=False)).select_columns([column]), column)
    except (ValueError, TypeError) as error:
        raise BadInput(f"--data.image-column {column} does not hold images: {files.shown(error, 400)}") from None


def _texts(values: Any) -> list[list[str]]:
    """The captions of each row: one, several or none.

    Raises:
        ValueError: they are no texts.
    """
    captions = []
    for row, value in enumerate(values):
        several = value if isinstance(value, (list, tuple)) else [value]
        if wrong := [type(x).__name__ for x in several if not isinstance(x, str | None)]:
            raise ValueError(f"holds {wrong[0]} in row {row}; expected texts, or lists of texts")
        captions.append([text for text in several if text is not None])
        if not all(map(_encodable, captions[-1])):
            raise ValueError(f"has half a surrogate pair in row {row}; expected Unicode")
    return captions


def _encodable(text: str) -> bool:
    try:
        return text.isascii() or text.encode() is not None
    except UnicodeEncodeError:
        return False


def _numbered(values: Any) -> tuple[list[int], list[str]]:
    """Labels as numbers from 0 on, and the name of each.

    Raises:
        ValueError: some are missing, negative, or no labels at all.
    """
    values = list(values)
    for row, value in enumerate(values):
        if not isinstance(value, (int, str, float)) or value != value or (isinstance(value, int) and value < 0):
            raise ValueError(f"has {files.shown(repr(value), 40)} in row {row}; expected a label of 0 or more, or a name")
    kinds, order = np.unique(np.asarray(values), return_inverse=True)
    if kinds.dtype.kind in "iu":
        return values, [str(i) for i in range(max(values) + 1)]
    return order.tolist(), [str(kind) for kind in kinds]


# ---------------------------------------------------------------------------------------------------------------------
# What settings name.

UNUSED = {
    "shapes": ("dataset_config_name", "split", "image_column", "caption_column", "label_column"),
    "a folder of images": ("dataset_name", "dataset_config_name", "split", "num_shapes"),
    "a data set": ("num_shapes",),
}
"""What the images are -> the settings that then have no effect."""


def kind_of(cfg: Data) -> str:
    """What the images are."""
    return (
        "a folder of images" if cfg.train_data_dir is not None else "shapes" if cfg.dataset_name == "shapes" else "a data set"
    )


def unused(cfg: Data) -> str:
    """In one line the settings that were given and have no effect, or empty."""
    what, defaults = kind_of(cfg), {field.name: field.default for field in fields(cfg)}
    given = [f"--data.{name.replace('_', '-')}" for name in UNUSED[what] if getattr(cfg, name) != defaults[name]]
    return f"{', '.join(given)}: no effect with {what}" if given else ""


def held_out_rows(size: int, share: str) -> list[int]:
    """round(share * size) of the rows 0 to size - 1: one of each block of 1 / share rows, by a keyed hash.

    A row's block and its place in it depend on the row's number alone, so rows that are appended change nothing before
    the last block: of those held out all stay, but perhaps the last. Inserted rows move what follows.
    """
    p, q = Fraction(share).as_integer_ratio()
    starts = (block * q // p for block in range(round(float(share) * size) + 1))
    blocks = (range(start, min(end, size)) for start, end in pairwise(starts))
    return [min(block, key=functools.partial(hash64, "validation")) for block in blocks]


def open_source(cfg: Data, needs: tuple[str, ...] = ()) -> Source:
    """Open what the settings name, without reading images: what is trained on, and in its `held_out` what is not.

    Raises:
        BadInput: there is no such data set, folder, split or column, it is empty, smaller than a batch, or lacks a column
            that the task `needs`.
    """
    what = kind_of(cfg)
    source = described(_open_shapes(cfg) if what == "shapes" else _open_table(cfg), cfg, needs)
    given, share, held = cfg.validation_split, fraction(cfg.validation_split), None
    if share is not None:
        out = held_out_rows(source.size, given)
        held, source = select(source, out), select(source, sorted(set(range(source.size)) - set(out)))
    elif given is not None:
        if what != "a data set" or given == cfg.split:
            there = "which is trained on" if given == cfg.split else "and these images have no splits"
            raise BadInput(f"--data.validation-split is {given!r}, {there}; expected another split or a fraction, such as 0.1")
        held = described(_open_table(cfg, "validation_split"), cfg, needs)
    if cfg.max_train_samples is not None and cfg.max_train_samples < source.size:
        source = select(source, [i * source.size // cfg.max_train_samples for i in range(cfg.max_train_samples)])
    if held is not None:
        if held.size < 4:
            rows = held.size + source.size
            enough = f"; of {rows} rows that is {math.ceil(400 / rows) / 100} or more" if share and rows >= 8 else ""
            expected = f"expected at least 4 images, one for each quarter of the noise levels, not {held.size}"
            raise BadInput(f"--data.validation-split is {given!r}; {expected}{enough}")
        source = replace(source, held_out=held, summary=f"{source.summary}; {held.size} held out")
    if source.size < cfg.train_batch_size:
        beside = f" beside the {held.size} of --data.validation-split {given}" if share else ""
        raise BadInput(f"--data.train-batch-size is {cfg.train_batch_size}; the data set has {source.size} images{beside}")
    return source


def described(source: Source, cfg: Data, needs: tuple[str, ...]) -> Source:
    """A source with the captions that its trigger makes, and all that the task needs."""
    if cfg.trigger:
        if "{label}" in cfg.trigger and source.labels is None:
            raise BadInput(f"--data.trigger is {cfg.trigger!r}, and the images have no labels; --data.label-column names them")
        captions, labels = source.captions or [[]] * source.size, source.labels or [0] * source.size
        front = [cfg.trigger.replace("{label}", (source.classes or [""])[label]) for label in labels]
        made = [[f"{f} {t}".strip() for t in ts or [""]] for f, ts in zip(front, captions, strict=True)]
        source = replace(source, captions=made)
    for column, there in (("caption", source.captions), ("label", source.labels)):
        if column in needs and there is None:
            raise BadInput(
                f"the task needs a {column} for each image and found none; --data.{column}-column names their column"
            )
    return source
