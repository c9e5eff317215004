"""Data sets, opened but not read: the embedded shapes, a folder of images, a local data set, one on the hub.

Each source gives the same: the number of its rows, an image by its row, captions and labels. Sources travel between processes:
their functions are methods of dataclasses, which pickle.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
import math
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image

from oneloop.configs import BadInput, Data, Part, example_cache, fraction, require, task_group
from oneloop.families import hub
from oneloop.inputs import annotators, conditions, drawn, files, shards
from oneloop.inputs.buckets import bucket_sizes
from oneloop.inputs.crop import Size
from oneloop.inputs.folder import LABELS, FolderTable, open_folder
from oneloop.inputs.shapes import SHAPES, caption_shape, describe_shape, draw_outline, draw_shape
from oneloop.machine import internals
from oneloop.tasks import COLUMNS, Column, Facts, Task, hash64, of_settings

CLASSES = 10**6
"""The most classes whose numbers are labels: each has a name, and is counted."""


def content_hash(*parts: Any) -> str:
    """Texts, numbers and buffers as 32 hexadecimal digits."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(part if isinstance(part, memoryview) else repr(part).encode())
    return h.hexdigest()


class Images(Protocol):
    """The images of one column, by row."""

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """The image, and the bytes that identify it. Raises whatever a broken file raises."""

    def name(self, row: int) -> str:
        """What to call it in a message."""

    def identity(self) -> str:
        """What tells these images from all others without reading them."""


@dataclass(frozen=True)
class Share:
    """Consecutive rows of a source: one of a mixture."""

    rows: int
    repeats: float = 1.0
    """How often a pass of the run has each of them."""
    weight: float = 1.0
    """How much the loss of an example of them counts."""


@dataclass(frozen=True)
class Source:
    """A data set that was opened but not read."""

    size: int
    """Number of rows."""
    images: dict[str, Images]
    """Column of the batch, `pixel_values` among them -> its images."""
    captions: list[list[str]] | None
    """Of each row; empty where it has none, which is trained on as the empty one."""
    labels: list[int] | None
    summary: str
    """One line: what there is, and where."""
    classes: list[str] | None = None
    """Label -> its name."""
    held_out: Source | None = None
    """What the loss is measured on and never trained on."""
    notes: tuple[str, ...] = ()
    """What was left out or changed on the way."""
    columns: dict[str, Column] = field(default_factory=lambda: dict(COLUMNS))
    """What the images, masks, captions and labels are."""
    sizes: tuple[tuple[Size, ...], ...] = ()
    """What images may become: for each resolution, from the lowest to the highest, its sizes from widest to tallest."""
    more: dict[str, list[Any]] = field(default_factory=dict)
    """Further columns of texts (of each row a list) and labels."""
    made: dict[str, conditions.By] = field(default_factory=dict)
    """Columns that are made of the image that they are like -> by what (inputs/conditions.py)."""
    shares: tuple[Share, ...] = ()
    """The sources of a mixture, in the order of rows; none: it is not mixed."""
    streams: tuple[shards.Shards | None, ...] = ()
    """Where all of it is read from while training (inputs/streaming.py): of each source of a mixture its shards, or None for
    one whose rows are read one by one. Captions and labels are then looked up by row."""

    asked: tuple[range, ...] = ()
    """Numbers of the examples that a run will ask for, where they are known."""

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """The image of a row, and the bytes that identify it."""
        return self.images["pixel_values"].read(row)

    def name(self, row: int) -> str:
        """What to call a row in a message."""
        return self.images["pixel_values"].name(row)

    def identity(self) -> str:
        """What tells its images from all others without reading them."""
        made = [(self.made, conditions.VERSION)] if self.made else []
        return content_hash(*((name, images.identity()) for name, images in sorted(self.images.items())), *made)

    def pass_length(self) -> float:
        """Examples in one pass of a run: each row as often as its share says."""
        return math.fsum(share.rows * share.repeats for share in self.mixed())

    def mixed(self) -> tuple[Share, ...]:
        """Its shares; of one that is not mixed, all of it."""
        return self.shares or (Share(self.size),)


@dataclass(frozen=True)
class Selected:
    """Some rows of images."""

    images: Images
    rows: np.ndarray
    """[N] int64."""

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Images.read."""
        return self.images.read(int(self.rows[row]))

    def name(self, row: int) -> str:
        """As Images.name."""
        return self.images.name(int(self.rows[row]))

    def identity(self) -> str:
        """As Images.identity."""
        return content_hash(self.images.identity(), self.rows.data)


def select(source: Source, rows: Sequence[int]) -> Source:
    """These rows of a source, ascending, by themselves."""
    rows = np.asarray(rows, np.int64)
    captions, labels = (values and [values[row] for row in rows.tolist()] for values in (source.captions, source.labels))
    ends = np.searchsorted(rows, np.cumsum([share.rows for share in source.shares])) if source.shares else []
    shares = tuple(replace(s, rows=int(n)) for s, n in zip(source.shares, np.diff(ends, prepend=0), strict=True))
    images = {name: Selected(images, rows) for name, images in source.images.items()}
    more = {name: [values[row] for row in rows.tolist()] for name, values in source.more.items()}
    part = replace(source, size=len(rows), images=images, captions=captions, labels=labels, more=more)
    return replace(part, shares=shares, held_out=None, streams=())


@dataclass(frozen=True)
class Joined:
    """The images of several sources, one after the other."""

    parts: tuple[Images, ...]
    ends: tuple[int, ...]

    def _of(self, row: int) -> tuple[Images, int]:
        i = bisect.bisect_right(self.ends, row)
        return self.parts[i], row - (self.ends[i - 1] if i else 0)

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Images.read."""
        images, row = self._of(row)
        return images.read(row)

    def name(self, row: int) -> str:
        """As Images.name."""
        images, row = self._of(row)
        return images.name(row)

    def identity(self) -> str:
        """As Images.identity."""
        return content_hash(*(part.identity() for part in self.parts))


def join(sources: Sequence[Source], shares: Sequence[Share]) -> Source:
    """Sources one after the other, with what `shares` says of each. Classes of the same name are one. Where the first is
    streamed all are.

    Raises:
        BadInput: a column that one of them has and another lacks.
    """
    ends = tuple(itertools.accumulate(source.size for source in sources))
    columns = dict.fromkeys(name for source in sources for name in source.images)
    for name, source in itertools.product(columns, sources):
        if name not in source.images:
            raise BadInput(
                f"--data.mixture: {source.summary} has no {name}, which another source has; expected it in all or none"
            )
    images = {name: Joined(tuple(source.images[name] for source in sources), ends) for name in columns}
    captions = labels = classes = None
    streams = tuple(source.streams[0] if source.streams else None for source in sources) if sources[0].streams else ()
    chained = shards.Chained if streams else lambda parts: list(itertools.chain.from_iterable(parts))
    if any(source.captions is not None for source in sources):
        captions = chained(tuple(shards.Same(s.size, []) if s.captions is None else s.captions for s in sources))
    if all(source.labels is not None for source in sources):
        classes = list(dict.fromkeys(name for source in sources for name in source.classes or ()))
        number = {name: i for i, name in enumerate(classes)}
        renamed = tuple([number[name] for name in source.classes] for source in sources)
        labels = shards.Chained(tuple(source.labels for source in sources), renamed)
        labels = labels if streams else [labels[row] for row in range(ends[-1])]
    summary = "; ".join(source.summary for source in sources)
    notes = tuple(note for source in sources for note in source.notes)
    empty = lambda source: shards.Same(source.size, [])  # noqa: E731
    more = {k: chained(tuple(source.more.get(k, empty(source)) for source in sources)) for k in sources[0].more}
    first = replace(sources[0], size=ends[-1], images=images, captions=captions, labels=labels, summary=summary)
    return replace(first, classes=classes, notes=notes, more=more, shares=tuple(shares), streams=streams)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded shapes.


@dataclass(frozen=True)
class Shapes:
    """Images that are drawn from their row."""

    count: int
    side: int

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Images.read."""
        image = draw_shape(row, self.side)[0]
        return Image.fromarray(image), image.tobytes()

    def name(self, row: int) -> str:
        """As Images.name."""
        return f"shape {row}"

    def identity(self) -> str:
        """As Images.identity."""
        drawn = (draw_shape(row, self.side)[0].tobytes() for row in range(8))  # numpy's streams may change
        return content_hash("shapes", self.count, *drawn)


@dataclass(frozen=True)
class Outlines(Shapes):
    """Their outlines, white on black."""

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Images.read."""
        image = draw_outline(row, self.side)
        return Image.fromarray(image), image.tobytes()

    def identity(self) -> str:
        """As Images.identity."""
        return content_hash("outlines", super().identity(), *(draw_outline(row, self.side).tobytes() for row in range(8)))


def _open_shapes(cfg: Data, columns: Mapping[str, Column]) -> Source:
    captions, labels, lists, numbers = [], [], {}, {name: i for i, name in enumerate(SHAPES)}
    for row in range(cfg.num_shapes):
        text = caption_shape(*(looks := describe_shape(row)[:4]))
        captions.append(lists.setdefault(text, [text]))
        labels.append(numbers[looks[0]])
    summary, drawn = f"{cfg.num_shapes} embedded shapes, captions, {len(SHAPES)} labels", Shapes(cfg.num_shapes, cfg.resolution)
    images: dict[str, Images] = {"pixel_values": drawn}
    if "conditioning" in columns:
        images["conditioning"], summary = Outlines(cfg.num_shapes, cfg.resolution), f"{summary}, outlines as conditioning"
    return Source(cfg.num_shapes, images, captions, labels, summary, list(SHAPES))


# ---------------------------------------------------------------------------------------------------------------------
# Tables: a folder of images, or a data set.


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder."""

    root: str
    paths: list[str | None]
    """Relative to the root."""

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Images.read."""
        if self.paths[row] is None:
            raise ValueError("the image is missing")
        path = Path(self.root, self.paths[row])
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        raw = path.read_bytes()
        return files.opened(raw), raw

    def name(self, row: int) -> str:
        """As Images.name."""
        return files.shown(self.paths[row] or f"row {row}", 10_000)

    def identity(self) -> str:
        """As Images.identity."""
        outside = [path and os.path.abspath(os.path.join(self.root, path)) for path in self.paths]
        return content_hash([(path, path and _stamp(path)) for path in outside])


@dataclass(frozen=True)
class DatasetImages:
    """The column of images of a `datasets.Dataset`, not decoded."""

    rows: Any
    column: str

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Images.read."""
        value = self.rows[row][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("the image is missing")
        raw = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        return files.opened(raw), raw

    def name(self, row: int) -> str:
        """As Images.name."""
        return files.shown((self.rows[row][self.column] or {}).get("path") or f"row {row}", 10_000)

    def identity(self) -> str:
        """As Images.identity."""
        outside = [path for chunk in self.rows.data.column(self.column).chunks for path in _outside(chunk)]
        fingerprint, chosen = internals.fingerprint(self.rows)
        if len(outside) == len(self.rows) and not chosen:  # whatever else is there, these are the images
            return content_hash([(os.path.abspath(path), _stamp(path)) for path in outside])
        outside += [file["filename"] for file in self.rows.cache_files]
        return content_hash(fingerprint, [(path, _stamp(path)) for path in outside])


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
    why = None if folder.exists() else hub.unreachable()  # the library would ask it for half a minute
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            rows = datasets.load_from_disk(str(folder))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise BadInput(f"{asked} is {split!r}; {flag} has: {', '.join(rows)}")
                rows = rows[split]
            return rows
        with internals.offline() if why else contextlib.nullcontext():
            return datasets.load_dataset(name, cfg.dataset_config_name, split=split, cache_dir=cfg.cache_dir)
    except BadInput:
        raise
    except (FileNotFoundError, ConnectionError) as error:
        said = files.shown(why or error, 400)
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


CAPTIONS = ("text", "caption", "captions", "prompt", "description", "sentence", "txt")
"""What columns of captions are called."""
IMAGES = ("image", "img", "picture", "pixel_values", "jpg", "jpeg", "png", "webp")
"""What columns of images are called."""


def _named(
    cfg: Data,
    own: Any,
    columns: Mapping[str, Column],
    kinds: Mapping[str, str],
    column: str,
    fits: tuple[str, ...],
    usual: Sequence[str],
) -> str | None:
    """The data set's column: the one that the setting names, else the first of the usual ones that fits."""
    given = setting(cfg, own, columns[column].setting)
    if given is not None and given not in kinds:
        asked = f"{flag(columns[column].setting)} is {given!r}"
        raise BadInput(f"{asked}; the data set has the columns {files.shown(', '.join(kinds), 400)}")
    return given or next((name for name in usual if kinds.get(name) in fits), None)


def _image_column(named: Callable[..., str | None], kinds: Mapping[str, str]) -> str:
    image = named("pixel_values", ("image",), (*IMAGES, *(name for name, kind in kinds.items() if kind == "image")))
    if image is None:
        raise BadInput(f"no column of images among {files.shown(', '.join(kinds), 400)}; --data.image-column names one")
    return image


def _open_table(cfg: Data, columns: Mapping[str, Column], own: Any, split: str = "split") -> Source:
    """The images, captions and labels of a folder or a data set, in the columns that settings name, or those that fit."""
    notes: list[str] = []
    if cfg.train_data_dir is not None:
        table: Any = open_folder(cfg.train_data_dir, cfg.label_column)
        kinds, values, where = table.kinds, table.columns.__getitem__, cfg.train_data_dir
        notes += table.notes
    else:
        table = _load(cfg, split)
        kinds, where = {k: _described_as(f) for k, f in table.features.items()}, f"{cfg.dataset_name} ({getattr(cfg, split)})"
        values = lambda name: table[name][:]  # noqa: E731

    named = functools.partial(_named, cfg, own, columns, kinds)

    def made(column: str, name: str | None, make: Callable[[Any], Any]) -> Any:
        """What is made of a column; one that was not asked for, and cannot be used, is not used."""
        try:
            return name and make(values(name))
        except ValueError as error:
            if setting(cfg, own, columns[column].setting) is not None or not columns[column].optional:
                raise BadInput(f"{flag(columns[column].setting or column)} is {name!r}, which {error}") from None
            notes.append(f"the column {name!r}, which {error}")
            return None

    image = _image_column(named, kinds)
    images = {"pixel_values": _images(table, kinds, image, "data.image_column")}
    for name, column in columns.items():
        if column.kind in ("image", "mask") and name != "pixel_values":
            folder = setting(cfg, own, column.folder)
            inside = named(name, ("image",), () if column.optional else (name, f"{name}_image"))
            if name == "mask" and cfg.mask_from_alpha:
                images[name] = Alpha(images["pixel_values"])
            elif folder is not None:
                images[name] = _partners(images["pixel_values"], folder, flag(column.folder), name, notes)
            elif inside is not None:
                images[name] = _images(table, kinds, inside, column.setting or name)
    caption = named("caption", ("text",), CAPTIONS)
    captions, texts_of = made("caption", caption, _texts), caption
    if caption is None and isinstance(table, FolderTable) and (captions := table.captions_beside(image)):
        captions, texts_of = _texts(captions), "the .txt beside each image"
    label = named("label", ("class", "int"), (*(k for k, kind in kinds.items() if kind == "class"), *LABELS))
    labels, classes = made("label", label, _numbered) or (None, None)
    if labels is not None and kinds[label] == "class":
        class_names = table.classes if isinstance(table, FolderTable) else {label: table.features[label].names}
        classes = class_names[label]
    if marked := sum(text.startswith("\ufeff") for texts in captions or () for text in texts):
        captions = [
            [text.removeprefix("\ufeff").strip() if text.startswith("\ufeff") else text for text in texts] for texts in captions
        ]
        notes.append(f"byte order marks of {marked:,} captions")
    more: dict[str, list[Any]] = {}
    for name, column in columns.items():
        if column.kind in ("text", "label") and name not in COLUMNS:
            inside = named(name, ("text",) if column.kind == "text" else ("class", "int"), () if column.optional else (name,))
            if inside is not None:
                column_values = made(name, inside, _texts if column.kind == "text" else _numbered)
                more[name] = column_values if column.kind == "text" else column_values[0]
    size = len(values(image)) if isinstance(table, FolderTable) else len(table)
    others = "".join(f", {name}" for name in (*list(images)[1:], *more))
    summary = f"{size} images of {where}: image column {image!r}, captions {texts_of!r}, labels {label!r}{others}"
    return Source(size, images, captions, labels, summary, classes, notes=tuple(notes), more=more)


# ---------------------------------------------------------------------------------------------------------------------
# Shards that are read while training.


def _open_stream(cfg: Data, columns: Mapping[str, Column], own: Any, folder: Path | None, share: str | None = None) -> Source:
    """The rows of shards, in the columns that settings name, or those that fit; with a `share` of them in its `held_out`."""
    every, notes = shards.opened(cfg.stream, folder, shards.complain), []
    opened = [file for file in every if sum(file.rows)]
    if not opened:
        raise BadInput(f"--data.stream {files.shown(cfg.stream)}: its {len(every):,} files have no rows")
    if empty := len(every) - len(opened):
        notes.append(f"{empty:,} files of shards without rows")
    features, kinds = _stream_kinds(opened[0])
    named = functools.partial(_named, cfg, own, columns, kinds)
    image, tar = _image_column(named, kinds), features is None
    inside = {"pixel_values": image, "caption": named("caption", ("text",), CAPTIONS)}
    classes, label = None, named("label", ("class", "int"), (*(k for k, kind in kinds.items() if kind == "class"), *LABELS))
    most = max((file.most.get(label, -1) for file in opened), default=-1)
    known = label is not None and all(label in file.most for file in opened) and 0 <= most < CLASSES
    if label is not None and (kinds[label] == "class" or known):
        inside["label"] = label
        classes = features[label].names if kinds[label] == "class" else [str(i) for i in range(most + 1)]
    elif label is not None:
        expected = "expected class labels, or integers of which the footers have the largest"
        if cfg.label_column is not None or not columns["label"].optional:
            raise BadInput(f"--data.label-column is {label!r}, whose classes the shards' footers do not have; {expected}")
        notes.append(f"the column {label!r}, whose classes the footers do not have")
    for name, column in columns.items():
        if name in COLUMNS and column.kind not in ("mask",):
            continue
        fits = {"image": ("image",), "mask": ("image",), "text": ("text",), "label": ("class",)}[column.kind]
        usual = () if column.optional else (name, f"{name}_image") if fits == ("image",) else (name,)
        if setting(cfg, own, column.folder) is not None:
            raise BadInput(f"{flag(column.folder)} does not go with --data.stream; expected a column of the shards")
        inside[name] = named(name, fits, usual)
    inside = {name: column for name, column in inside.items() if column is not None}
    for file in opened if not tar else ():
        if file.schema != opened[0].schema:
            other = _schema_kinds(file)
            for column in inside.values():
                if other.get(column) != kinds[column]:
                    missing = f"missing among {files.shown(', '.join(other), 200)}"
                    has = f"of {other[column]}s" if column in other else missing
                    first = f"{opened[0].path} has it of {kinds[column]}s"
                    raise BadInput(f"--data.stream: in {file.path} the column {column!r} is {has}; {first}")
    whole = shards.Shards(opened, tuple(dict.fromkeys(inside.values())))
    endings = tuple(name for name in IMAGES if name in files_of_images()) if tar and cfg.image_column is None else ()
    if cfg.trigger and "{label}" in cfg.trigger:
        raise BadInput(f"--data.trigger is {cfg.trigger!r}; expected no {{label}} in it with --data.stream")
    kind = "tars" if tar else f"parquet files ({len(whole.rows):,} row groups)"
    summary = f"images in {len(opened):,} {kind} of {cfg.stream}, read while training: image column {image!r}"
    summary += f", captions {inside.get('caption')!r}, labels {inside.get('label')!r}"

    def made(there: shards.Shards) -> Source:
        look = lambda name, make: shards.Column(there, inside[name], make) if name in inside else None  # noqa: E731
        images = {
            name: shards.ShardImages(there, inside[name], endings if name == "pixel_values" else ())
            for name in inside
            if columns[name].kind in ("image", "mask")
        }
        if cfg.mask_from_alpha:
            images["mask"] = Alpha(images["pixel_values"])
        of = {name: _texts_of("") if columns[name].kind == "text" else functools.partial(_class, CLASSES) for name in inside}
        more = {name: look(name, make) for name, make in of.items() if name not in images and name not in COLUMNS}
        captions = look("caption", _texts_of(cfg.trigger or ""))
        if cfg.trigger and captions is None:
            captions = shards.Same(len(there), [cfg.trigger])
        labels, said = look("label", functools.partial(_class, len(classes or ()))), f"{len(there):,} {summary}"
        return Source(len(there), images, captions, labels, said, classes, notes=tuple(notes), more=more, streams=(there,))

    held, end = round(float(share or 0) * len(whole)), len(whole)
    if cfg.max_train_samples is not None:
        end = min(held + cfg.max_train_samples, end)
    source = made(whole.part(held, end) if end - held < len(whole) else whole)
    return replace(source, held_out=select(made(whole.part(0, held)), range(held))) if share else source


def files_of_images() -> set[str]:
    """Endings of image files, without their dot."""
    return {ending.removeprefix(".") for ending in files.endings()}


def _stream_kinds(file: shards.Opened) -> tuple[Any, dict[str, str]]:
    """The features of parquet, None for tars, and what each column holds."""
    if file.schema is None:
        parts = shards.first_endings(file.path)
        kind = lambda ending: "image" if ending in files_of_images() else "text"  # noqa: E731
        return None, {ending: kind(ending.rpartition(".")[2]) for ending in parts}
    return _features(file), _schema_kinds(file)


def _features(file: shards.Opened) -> Any:
    import datasets

    return datasets.Features.from_arrow_schema(shards.schema(file))


def _schema_kinds(file: shards.Opened) -> dict[str, str]:
    """What each column of a parquet file holds; a struct with bytes, or bytes alone, may be images."""
    import pyarrow as pa

    kinds = {name: _described_as(feature) for name, feature in _features(file).items()}
    for column in shards.schema(file):
        struct = pa.types.is_struct(column.type) and "bytes" in {part.name for part in column.type}
        raw = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        if struct or raw:
            kinds[column.name] = "image"
    return kinds


def _texts_of(trigger: str) -> Callable[[Any], list[str]]:
    return functools.partial(_stream_texts, trigger)


def _stream_texts(trigger: str, value: Any) -> list[str]:
    """A row's captions, behind the trigger."""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig").strip()
    texts = _texts([value])[0]
    return [f"{trigger} {text}".strip() for text in texts or [""]] if trigger else texts


def _class(count: int, value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"has {files.shown(repr(value), 40)}; expected a label from 0 to {count - 1:,}")
    return value


def setting(cfg: Data, own: Any, name: str | None) -> Any:
    """The value of a setting 'group.field', of the data's group or the task's own; None has none."""
    group, _, field = (name or "").partition(".")
    return getattr(cfg if group == "data" else own, field) if name else None


def flag(name: str) -> str:
    """The flag of a setting 'group.field'."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Alpha:
    """The opacity of images, as masks."""

    images: Images

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """As Images.read."""
        image, raw = self.images.read(row)
        alpha = image.convert("RGBA").getchannel("A")
        if orientation := image.getexif().get(ExifTags.Base.Orientation):
            alpha.getexif()[ExifTags.Base.Orientation] = orientation
        return alpha, raw

    def name(self, row: int) -> str:
        """As Images.name."""
        return f"the transparency of {self.images.name(row)}"

    def identity(self) -> str:
        """As Images.identity."""
        return content_hash("alpha", self.images.identity())


def _partners(images: Images, folder: str, asked: str, column: str, notes: list[str]) -> FolderImages:
    """The images of another folder that have the paths of these, whatever they end in.

    Raises:
        BadInput: these have no paths, or some of them no partner, or several.
    """
    if not isinstance(images, FolderImages):
        raise BadInput(
            f"{asked} is {files.shown(folder)!r}: it goes with --data.train-data-dir; a data set has a column of its own"
        )
    there, stem = open_folder(folder, given=asked).columns["image"], lambda path: posixpath.splitext(path)[0]
    by_path, by_stem = set(there), {}
    for path in there:
        by_stem.setdefault(stem(path), []).append(path)
    paths, wrong = [], []
    for path in images.paths:
        several = [path] if path in by_path else by_stem.get(stem(path or ""), [])
        paths.append(several[0] if len(several) == 1 else None)
        if len(several) != 1:
            wrong.append(
                f"{files.shown(path or 'a row without an image')} has {', '.join(map(files.shown, several)) or 'none'}"
            )
    if wrong:
        expected = f"expected one {column} image of the same path for each"
        raise BadInput(
            f"{asked} {files.shown(folder)}: {len(wrong):,} images have no partner; {expected}: {files.listed(wrong)}"
        )
    if unused := len(there) - len(set(paths)):
        notes.append(f"{unused:,} images of {files.shown(folder)} without a partner")
    return FolderImages(str(Path(folder).expanduser()), paths)


def _file(images: Images, row: int) -> str | None:
    """The path of the image at a row; None: it is none of a folder's."""
    while isinstance(images, Selected):
        images, row = images.images, int(images.rows[row])
    path = images.paths[row] if isinstance(images, FolderImages) else None
    return path and os.path.abspath(os.path.join(images.root, path))


def _check_apart(sources: Sequence[Source], folders: Mapping[str, str]) -> None:
    """Refuse an image that is the partner of several, such as one of a class that is called as an image of the subject is.
    `folders`: column -> the flag that names its folder.

    Raises:
        BadInput: with the names of all three.
    """
    for name, asked in folders.items():
        whose: dict[str, str] = {}
        for source in sources:
            of = source.images["pixel_values"]
            for row in range(source.size if name in source.images else 0):
                partner, image = _file(source.images[name], row), _file(of, row)
                if partner and image and (other := whose.setdefault(partner, image)) != image:
                    each = " and ".join(map(files.shown, (other, image)))
                    expected = "expected names that differ between the two"
                    raise BadInput(f"{asked}: {files.shown(partner)} would be the {name} image of {each}; {expected}")


def _images(table: Any, kinds: dict[str, str], column: str, name: str) -> FolderImages | DatasetImages:
    """The images of a column; `name` is the setting that names it."""
    if isinstance(table, FolderTable):
        if kinds[column] != "image":
            raise BadInput(f"{flag(name)} {column} does not hold images; expected a column of file names")
        return FolderImages(table.root, table.columns[column])
    import datasets

    try:
        if isinstance(feature := table.features[column], dict) and not {"bytes", "path"} & feature.keys():
            raise ValueError(f"its values have {', '.join(feature)}; expected bytes or path")
        return DatasetImages(table.cast_column(column, datasets.Image(decode=False)).select_columns([column]), column)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{flag(name)} {column} does not hold images: {files.shown(error, 400)}") from None


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
        if not isinstance(value, (int, str, float)) or value != value or (isinstance(value, int) and not 0 <= value < CLASSES):
            expected = f"expected a label from 0 to {CLASSES - 1:,}, or a name"
            raise ValueError(f"has {files.shown(repr(value), 40)} in row {row}; {expected}")
    kinds, order = np.unique(np.asarray(values), return_inverse=True)
    if kinds.dtype.kind in "iu":
        return values, [str(i) for i in range(max(values) + 1)]
    return order.tolist(), [str(kind) for kind in kinds]


# ---------------------------------------------------------------------------------------------------------------------
# What settings name.

UNUSED = {
    "a stream of shards": ("dataset_name", "dataset_config_name", "split", "num_shapes", "memory_budget"),
    "shapes": (
        *("dataset_config_name", "split", "image_column", "caption_column", "label_column"),
        *("conditioning_column", "conditioning_data_dir", "mask_column", "mask_data_dir", "mask_from_alpha"),
    ),
    "a folder of images": ("dataset_name", "dataset_config_name", "split", "num_shapes"),
    "a data set": ("num_shapes",),
}
"""What the images are -> the settings that then have no effect."""


def kind_of(cfg: Data) -> str:
    """What the images are."""
    if cfg.stream is not None:
        return "a stream of shards"
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
    blocks = (range(start, min(end, size)) for start, end in itertools.pairwise(starts))
    return [min(block, key=functools.partial(hash64, "validation")) for block in blocks]


def open_source(
    cfg: Data, columns: Mapping[str, Column] = COLUMNS, multiple: int = 1, own: Any = None, folder: Path | None = None
) -> Source:
    """Open what the settings name, without reading images: what is trained on, and in its `held_out` what is not.

    `columns` are what a batch may have, `multiple` what the model's sides are multiples of, `own` the task's group of settings.
    What shards say of themselves is cached in `folder`. A fraction is held out of the source that `cfg` itself names, before
    others are mixed in.

    Raises:
        BadInput: there is no such data set, folder, split or column, it is empty, smaller than a batch, or lacks a column
            that is not optional.
    """
    what, columns = kind_of(cfg), dict(columns)
    table = lambda cfg, split="split": described(_open_table(cfg, columns, own, split), cfg, columns, own)  # noqa: E731
    given, share, held_out = cfg.validation_split, fraction(cfg.validation_split), None
    streamed = lambda cfg, share=None: described(  # noqa: E731
        _open_stream(cfg, columns, own, folder, share), replace(cfg, trigger=None), columns, own
    )
    if what == "a stream of shards":
        source = streamed(cfg, share and given)
    else:
        source = described(_open_shapes(cfg, columns), cfg, columns, own) if what == "shapes" else table(cfg)
    if cfg.validation_data_dir is not None:
        if given is not None:
            raise BadInput(f"--data.validation-data-dir and --data.validation-split {given!r} are given; expected one of them")
        held_out = table(replace(cfg, train_data_dir=cfg.validation_data_dir, stream=None))
    elif share is not None and source.streams:
        held_out = source.held_out
    elif share is not None:
        out = held_out_rows(source.size, given)
        held_out, source = select(source, out), select(source, sorted(set(range(source.size)) - set(out)))
    elif given is not None:
        if what != "a data set" or given == cfg.split:
            there = "which is trained on" if given == cfg.split else "and these images have no splits"
            raise BadInput(f"--data.validation-split is {given!r}, {there}; expected another split or a fraction, such as 0.1")
        held_out = table(cfg, "validation_split")
    source, each = source if source.streams else thinned(source, cfg), []
    if parts := cfg.parts():
        settings = [part_of(cfg, part) for part in parts]
        more = [table(own_cfg) if own_cfg.stream is None else streamed(own_cfg) for own_cfg in settings]
        if cfg.num_class_images:
            more[0] = select(more[0], drawn.chosen([more[0].name(row) for row in range(more[0].size)], cfg.num_class_images))
        each = [source, *(s if s.streams else thinned(s, own_cfg) for s, own_cfg in zip(more, settings, strict=True))]
    beside = [*(each or [source]), *([held_out] if held_out is not None else [])]
    paired = {name: flag(column.folder) for name, column in columns.items() if setting(cfg, own, column.folder) is not None}
    _check_apart(beside, paired if len(beside) > 1 else {})
    if each:
        source = join(each, shares([source.size for source in each], parts))
    alone = [name for name in source.images if columns[name].like is None and name != "pixel_values"]
    if source.streams and cfg.buckets and alone:
        own = f"expected no --data.stream with images of a size of their own ({', '.join(alone)})"
        raise BadInput(f"--data.buckets is {cfg.buckets}; {own}")
    source = replace(source, columns=columns, sizes=sizes(cfg, multiple))
    if held_out is not None:
        where = f"--data.validation-{'split' if given else 'data-dir'} is {given or cfg.validation_data_dir!r}"
        if held_out.size < 4:
            rows = held_out.size + source.size
            enough = f"; of {rows} rows that is {math.ceil(400 / rows) / 100} or more" if share and rows >= 8 else ""
            expected = f"expected at least 4 images, one for each quarter of the noise levels, not {held_out.size}"
            raise BadInput(f"{where}; {expected}{enough}")
        held_out = replace(held_out, columns=columns, sizes=source.sizes[-1:])
        source = replace(source, held_out=held_out, summary=f"{source.summary}; {held_out.size} held out")
    if source.size < cfg.train_batch_size:
        beside = f" beside the {held_out.size} of --data.validation-split {given}" if share else ""
        raise BadInput(f"--data.train-batch-size is {cfg.train_batch_size}; the data set has {source.size} images{beside}")
    return source


def open_for(task: Task, cfg: Any) -> Source:
    """What a run of this task is trained on."""
    writes = not (cfg.base.check or cfg.base.dry_run) and (cfg.data.cache_dir or cfg.base.output_dir)
    folder, columns = example_cache(cfg) if writes else None, COLUMNS | dict(of_settings(task.columns, cfg))
    read = {name for column in columns.values() for name in (column.setting, column.folder, column.made)}
    for name in ("conditioning_column", "conditioning_data_dir", "conditioning"):
        value, expected = getattr(cfg.data, name), f"None: {task_group(cfg)} has no conditioning images from there"
        require(value is None or f"data.{name}" in read, f"data.{name}", value, expected)
    return open_source(
        cfg.data,
        columns,
        task.multiple(cfg) if cfg.data.buckets else 1,
        getattr(cfg, task_group(cfg)),
        folder,
    )


def facts(source: Source) -> Facts:
    """What a task may ask of the data before an image is read."""
    columns = [
        *source.images,
        *source.made,
        *source.more,
        *["caption"] * (source.captions is not None),
        *["label"] * (source.labels is not None),
    ]
    every = itertools.chain.from_iterable(source.sizes)
    return Facts(source.size, tuple(source.classes or ()), tuple(columns), tuple(dict.fromkeys(every)))


def sizes(cfg: Data, multiple: int) -> tuple[tuple[Size, ...], ...]:
    """For each resolution, from the lowest to the highest, the sizes that images may have."""
    resolutions = sorted({cfg.resolution, *cfg.more_resolutions})
    if not cfg.buckets:
        return tuple(((side, side),) for side in resolutions)
    given = cfg.bucket_multiple
    require(
        given is None or given % multiple == 0,
        "data.bucket_multiple",
        given,
        f"a multiple of {multiple}, which the model needs",
    )

    def step(side: int) -> int:
        m = multiple
        while side % (2 * m) == 0 and 32 * m <= side:
            m *= 2
        return given or m

    return tuple(tuple(bucket_sizes(side, step(side), cfg.bucket_ratio)) for side in resolutions)


def part_of(cfg: Data, part: Part) -> Data:
    """The settings of one more source."""
    given = {f.name: getattr(part, f.name) for f in fields(part) if f.name not in ("repeats", "share", "loss_weight")}
    given = {name: value for name, value in given.items() if value is not None}
    if places := given.keys() & {"dataset_name", "train_data_dir", "stream"}:
        given = {"train_data_dir": None, "stream": None} | given
        if "stream" in places and cfg.stream is None:
            raise BadInput(
                f"--data.mixture has the stream {part.stream!r}; expected --data.stream to name the first source too"
            )
    alone = dict.fromkeys(("class_data_dir", "class_prompt", "validation_split", "validation_data_dir"))
    alone |= {"mixture": (), "num_class_images": 0}
    return replace(cfg, **alone | given)


def shares(rows: Sequence[int], parts: Sequence[Part]) -> list[Share]:
    """The first source, dealt once a pass, and the others: with their repeats, or with as many as give them their share."""
    free = rows[0] + math.fsum(part.repeats * n for part, n in zip(parts, rows[1:], strict=True) if part.share is None)
    rest = 1 - math.fsum(part.share or 0 for part in parts)
    repeats = [
        part.repeats if part.share is None else part.share / rest * free / n for part, n in zip(parts, rows[1:], strict=True)
    ]
    made = zip(rows[1:], repeats, (part.loss_weight for part in parts), strict=True)
    return [Share(rows[0]), *(Share(n, r, weight) for n, r, weight in made)]


def thinned(source: Source, cfg: Data) -> Source:
    """As many rows as the settings ask for, spread evenly."""
    count = cfg.max_train_samples
    if count is None or count >= source.size:
        return source
    return select(source, [i * source.size // count for i in range(count)])


def described(source: Source, cfg: Data, columns: Mapping[str, Column], own: Any = None) -> Source:
    """A source with the captions that its trigger makes, and all that the task needs."""
    if cfg.trigger:
        if "{label}" in cfg.trigger and source.labels is None:
            raise BadInput(f"--data.trigger is {cfg.trigger!r}, and the images have no labels; --data.label-column names them")
        captions, labels = source.captions or [[]] * source.size, source.labels or [0] * source.size
        front = [cfg.trigger.replace("{label}", (source.classes or [""])[label]) for label in labels]
        made = [[f"{f} {t}".strip() for t in ts or [""]] for f, ts in zip(front, captions, strict=True)]
        source = replace(source, captions=made)
    chosen = {name: setting(cfg, own, column.made) for name, column in columns.items() if column.made}
    made = {name: _made(by, cfg, columns[name].made) for name, by in chosen.items() if by is not None}
    if made:
        said = "".join(f", {name} by {by}" for name, by in made.items())
        images = {name: x for name, x in source.images.items() if name not in made}
        source = replace(source, made=made, images=images, summary=source.summary + said)
    there = {"caption": source.captions, "label": source.labels} | source.images | source.made | source.more
    for name, column in columns.items():
        if there.get(name) is None and not column.optional:
            ways = [f"{flag(column.setting)} names their column"] if column.setting else []
            ways += [f"{flag(column.folder)} a folder of images of the same names"] if column.folder else []
            ways += [f"{flag(column.made)} ({', '.join(MAKERS)}) makes it"] if column.made else []
            ways += ["--data.trigger is one for all"] if name == "caption" else []
            noun, cure = f"{name} image" if column.kind == "image" else name, ", or ".join(ways) or f"a column {name}"
            article = "an" if noun[0] in "aeiou" else "a"
            raise BadInput(f"the task needs {article} {noun} for each image and found none with {kind_of(cfg)}; {cure}")
    return source


MAKERS = (*conditions.FUNCTIONS, *annotators.KINDS)
"""What can make a condition of an image."""


def _made(by: str, cfg: Data, name: str) -> conditions.By:
    """What makes conditions, as the setting `name` calls it.

    Raises:
        BadInput: nothing is called so, or its model is of another kind, or images are not made once.
    """
    require(by in MAKERS, name, by, f"one of {', '.join(MAKERS)}")
    if by in conditions.FUNCTIONS:
        return by
    functions = ", ".join(conditions.FUNCTIONS)
    once = f"one of {functions} with --data.stream, of whose images it would be made anew in every pass"
    require(cfg.stream is None, name, by, once)
    return annotators.named(by, cfg.conditioning_model)
