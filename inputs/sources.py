"""Data sets, opened but not read: the embedded shapes, a folder of images, a local data set, one on the hub.

Each source gives the same: the number of its rows, an image by its row, captions and labels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oneloop.configs import BadInput, Data, fraction, require
from oneloop.inputs.shapes import SHAPES, caption_shape, describe_shape, draw_shape
from oneloop.machine import internals
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
    """Row -> (the picture, the bytes that identify it). Raises whatever a broken file raises."""
    name: Callable[[int], str]
    """Row -> what to call it in a message."""
    captions: list[list[str]] | None
    """Of each row; empty where it has none, which is trained on as the empty one."""
    labels: list[int] | None
    summary: str
    """One line: what there is, and where."""
    identity: Callable[[], Any]
    """What tells its pictures from all others without reading them."""
    classes: list[str] | None = None
    """Label -> its name."""
    held_out: Source | None = None
    """What the loss is measured on and never trained on."""


def select(source: Source, rows: list[int]) -> Source:
    """These rows of a source, by themselves."""
    captions, labels = (values and [values[row] for row in rows] for values in (source.captions, source.labels))
    read, name = (lambda i: source.read(rows[i])), (lambda i: source.name(rows[i]))
    identity = lambda: content_hash(source.identity(), np.array(rows).data)  # noqa: E731
    return replace(source, size=len(rows), read=read, name=name, captions=captions, labels=labels, identity=identity)


def _open_shapes(cfg: Data) -> Source:
    def read(row: int) -> tuple[Image.Image, bytes]:
        picture = draw_shape(row, cfg.resolution)[0]
        return Image.fromarray(picture), picture.tobytes()

    captions, labels, lists, numbers = [], [], {}, {name: i for i, name in enumerate(SHAPES)}
    for row in range(cfg.num_shapes):
        text = caption_shape(*(looks := describe_shape(row)[:4]))
        captions.append(lists.setdefault(text, [text]))
        labels.append(numbers[looks[0]])
    summary = f"{cfg.num_shapes} embedded shapes, captions, {len(SHAPES)} labels"

    def identity() -> str:
        drawn = (draw_shape(row, cfg.resolution)[0].tobytes() for row in range(8))  # numpy's streams may change
        return content_hash("shapes", cfg.num_shapes, *drawn)

    return Source(cfg.num_shapes, read, "shape {}".format, captions, labels, summary, identity, list(SHAPES))


@functools.cache
def formats() -> list[str]:
    """The picture formats that are read: all that PIL decodes itself. For PostScript it would start an interpreter."""
    Image.init()
    return [name for name in Image.ID if name not in ("EPS", "WMF")]


def _load(cfg: Data, setting: str) -> Any:
    """The rows of a picture folder, a local data set or one on the hub, in the split that `setting` names, as a
    `datasets.Dataset`."""
    import datasets

    if not os.isatty(2):
        datasets.disable_progress_bars()
    if cfg.train_data_dir is not None:
        folder = Path(cfg.train_data_dir).expanduser()
        if not folder.is_dir():
            raise BadInput(f"--data.train-data-dir {folder}: there is no such folder; expected a folder of pictures")
        if not any(p.suffix.lower() in Image.registered_extensions() for p in folder.rglob("*") if p.is_file()):
            raise BadInput(f"--data.train-data-dir {folder}: holds no pictures; expected PNG, JPEG, WebP, TIFF, ... files")
        # Named outright: by default a picture called test_1.png would land in a split of its own and be dropped.
        files, kwargs = {"train": "**"}, {"cache_dir": cfg.cache_dir, "split": "train"}
        return datasets.load_dataset("imagefolder", data_dir=str(folder), data_files=files, **kwargs)
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
        raise BadInput(f"{flag}: expected `shapes`, a folder that holds a data set, or a name on the hub ({error})") from None
    except (ValueError, RuntimeError) as error:  # an unknown split or configuration, or a script: the library says which
        raise BadInput(f"{flag}, {asked} {split}, --data.dataset-config-name {cfg.dataset_config_name}: {error}") from None


def _column(rows: Any, given: str | None, flag: str, fits: Callable[[Any], bool], names: tuple[str, ...]) -> str | None:
    """The column a flag names, or the one that fits, preferring the usual names."""
    if given is not None:
        if given not in rows.column_names:
            raise BadInput(f"--data.{flag} is {given!r}; the data set has the columns {', '.join(rows.column_names)}")
        return given
    fitting = [name for name, feature in rows.features.items() if fits(feature)]
    return next((name for name in names if name in fitting), None)


def _outside(chunk: Any) -> list[str]:
    """The files that a part of an arrow column of pictures names, rather than holds."""
    return [path for path in chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist() if path]


def _stamp(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written or another takes its place: its size, and its times in nanoseconds. None: no file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return None


def _open_rows(cfg: Data, setting: str = "split") -> Source:
    import datasets

    rows = _load(cfg, setting)
    images = tuple(name for name, feature in rows.features.items() if isinstance(feature, datasets.Image))
    usual = tuple(n for n in ("image", "img", "picture", "pixel_values", "jpg", "png", "webp") if n in images)
    image = _column(rows, cfg.image_column, "image-column", lambda f: isinstance(f, datasets.Image), usual + images)
    if image is None:
        raise BadInput(f"no column of pictures among {', '.join(rows.column_names)}; --data.image-column names one")
    texts = ("text", "caption", "captions", "prompt", "description", "sentence", "txt")
    caption = _column(rows, cfg.caption_column, "caption-column", lambda f: "string" in str(f).lower(), texts)
    is_label = lambda f: isinstance(f, datasets.ClassLabel) or getattr(f, "dtype", "").startswith("int")  # noqa: E731
    classes = tuple(name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel))
    label = _column(rows, cfg.label_column, "label-column", is_label, (*classes, "label", "labels", "class"))
    try:
        encoded = rows.cast_column(image, datasets.Image(decode=False)).select_columns([image])
    except (ValueError, TypeError) as error:
        raise BadInput(f"--data.image-column {image} does not hold pictures: {error}") from None

    def read(row: int) -> tuple[Image.Image, bytes]:
        value = encoded[row][image]
        if value is None:
            raise ValueError("the picture is missing")
        raw = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        return Image.open(io.BytesIO(raw), formats=formats()), raw

    def name(row: int) -> str:
        return (encoded[row][image] or {}).get("path") or f"row {row}"

    @functools.cache
    def identity() -> str:
        outside = [path for chunk in encoded.data.column(image).chunks for path in _outside(chunk)]
        fingerprint, chosen = internals.fingerprint(encoded)
        if len(outside) == len(rows) and not chosen:  # a folder: whatever else is in it, these are the pictures
            return content_hash([(os.path.abspath(path), _stamp(path)) for path in outside])
        outside += [file["filename"] for file in encoded.cache_files]
        return content_hash(fingerprint, [(path, _stamp(path)) for path in outside])

    captions, source = None, caption
    if caption is not None:
        captions = [[c] if isinstance(c, str) else [str(x) for x in c or ()] for c in rows[caption]]
    elif cfg.train_data_dir is not None:
        beside = [Path(name(row)).with_suffix(".txt") for row in range(len(rows))]
        if any(path.is_file() for path in beside):
            captions = [[path.read_text("utf-8").strip()] if path.is_file() else [] for path in beside]
            source = "the .txt beside each picture"
    labels, names = None, None
    if label is not None:
        values = np.asarray(rows[label])
        kinds, order = np.unique(values, return_inverse=True)
        labels = (values if values.dtype.kind in "iu" else order).tolist()
        numbered = [str(i) for i in range(max(labels) + 1)] if values.dtype.kind in "iu" else [str(kind) for kind in kinds]
        names = getattr(rows.features[label], "names", None) or numbered
    where = cfg.train_data_dir or f"{cfg.dataset_name} ({getattr(cfg, setting)})"
    summary = f"{len(rows)} pictures of {where}: image column {image!r}, captions {source!r}, labels {label!r}"
    return Source(len(rows), read, name, captions, labels, summary, identity, names)


def open_source(cfg: Data, needs: tuple[str, ...] = ()) -> Source:
    """Open what the settings name, without reading pictures: what is trained on, and in its `held_out` what is not.

    Raises:
        BadInput: there is no such data set, folder, split or column, it is empty, smaller than a batch, or lacks a column
            that the task `needs`.
    """
    embedded = cfg.dataset_name == "shapes" and cfg.train_data_dir is None
    source = described(_open_shapes(cfg) if embedded else _open_rows(cfg), cfg, needs)
    given, share, held = cfg.validation_split, fraction(cfg.validation_split), None
    if share is not None:
        chosen = [hash64("validation", row) < share * 2**64 for row in range(source.size)]
        held = select(source, [row for row, out in enumerate(chosen) if out])
        source = select(source, [row for row, out in enumerate(chosen) if not out])
    elif given is not None:
        if embedded or cfg.train_data_dir is not None or given == cfg.split:
            there = "which is trained on" if given == cfg.split else "and these pictures have no splits"
            raise BadInput(f"--data.validation-split is {given!r}, {there}; expected another split or a fraction, such as 0.1")
        held = described(_open_rows(cfg, "validation_split"), cfg, needs)
    if cfg.max_train_samples is not None and cfg.max_train_samples < source.size:
        source = select(source, [i * source.size // cfg.max_train_samples for i in range(cfg.max_train_samples)])
    if held is not None:
        require(held.size >= 4, "data.validation_split", given, f"at least 4 pictures, one for each quarter, not {held.size}")
        source = replace(source, held_out=held, summary=f"{source.summary}; {held.size} held out")
    if source.size < cfg.train_batch_size:
        beside = f" beside the {held.size} of --data.validation-split {given}" if share else ""
        raise BadInput(f"--data.train-batch-size is {cfg.train_batch_size}; the data set has {source.size} pictures{beside}")
    return source


def described(source: Source, cfg: Data, needs: tuple[str, ...]) -> Source:
    """A source with the captions that its trigger makes, and all that the task needs."""
    if cfg.trigger:
        if "{label}" in cfg.trigger and source.labels is None:
            raise BadInput(
                f"--data.trigger is {cfg.trigger!r}, and the pictures have no labels; --data.label-column names them"
            )
        captions, labels = source.captions or [[]] * source.size, source.labels or [0] * source.size
        front = [cfg.trigger.replace("{label}", (source.classes or [""])[label]) for label in labels]
        made = [[f"{f} {t}".strip() for t in ts or [""]] for f, ts in zip(front, captions, strict=True)]
        source = replace(source, captions=made)
    for column, there in (("caption", source.captions), ("label", source.labels)):
        if column in needs and there is None:
            raise BadInput(
                f"the task needs a {column} for each picture and found none; --data.{column}-column names their column"
            )
    return source
