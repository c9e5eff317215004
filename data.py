"""The examples: open a data set, and deal it out as an endless keyed stream of what decode.py made of it.

Example number n of a run (which picture, which crop, which flip) is a function of (seed, n) alone: each pass over the data is
a permutation keyed by its epoch, and batches are cut from the numbers by arithmetic. So nothing has to be skipped to
continue, and processes, batch sizes and loader workers change nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs import BadInput, Data, fraction, require
from decode import Pictures, content_hash, decode, keep, kept, pixels, place, to_rgb
from tasks import Batch, Rng, hash64

# ---------------------------------------------------------------------------------------------------------------------
# Sources. Each gives the same four things: how many, a picture by its row, captions and labels.


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
    found: str
    """One line: what was found where."""
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


COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (30, 70, 225),
    "yellow": (250, 205, 20),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SIZES = {"small": 0.28, "large": 0.4}  # the radius, as a fraction of the picture's side
SHAPES = {  # name -> signed distance from (x, y), in radii and y downwards, to the outline; negative inside
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": lambda x, y: np.maximum(0.894 * np.abs(x) - 0.447 * (y + 1), y - 0.86),
}


def describe_shape(index: int) -> tuple[str, str, str, str, float, float]:
    """Shape, size, front and back colour and centre (x, y) of the embedded example `index`: a function of the index alone."""
    rng = np.random.Generator(np.random.Philox(key=hash64("shapes", index)))
    shape, size = list(SHAPES)[rng.integers(len(SHAPES))], list(SIZES)[rng.integers(len(SIZES))]
    front, back = rng.choice(list(COLOURS), 2, replace=False)
    return shape, size, front, back, *0.5 + rng.uniform(-0.06, 0.06, 2)


def draw_shape(index: int, resolution: int) -> tuple[np.ndarray, str, int]:
    """Picture [H, W, 3] uint8, caption and label of the embedded example `index`."""
    shape, size, front, back, x0, y0 = describe_shape(index)
    radius, grid = SIZES[size], (np.arange(resolution) + 0.5) / resolution
    distance = radius * SHAPES[shape]((grid[None] - x0) / radius, (grid[:, None] - y0) / radius)
    cover = np.clip(0.5 - distance * resolution, 0, 1)[..., None]  # the share of each pixel inside the outline
    picture = cover * np.array(COLOURS[front]) + (1 - cover) * np.array(COLOURS[back])
    return picture.round().astype(np.uint8), caption_shape(shape, size, front, back), list(SHAPES).index(shape)


@functools.cache
def caption_shape(shape: str, size: str, front: str, back: str) -> str:
    """The caption of a shape; one string for all that look alike."""
    return f"a {size} {front} {shape} on a {back} background"


def _open_shapes(cfg: Data) -> Source:
    def read(row: int) -> tuple[Image.Image, bytes]:
        picture = draw_shape(row, cfg.resolution)[0]
        return Image.fromarray(picture), picture.tobytes()

    captions, labels, lists, numbers = [], [], {}, {name: i for i, name in enumerate(SHAPES)}
    for row in range(cfg.num_shapes):
        text = caption_shape(*(looks := describe_shape(row)[:4]))
        captions.append(lists.setdefault(text, [text]))
        labels.append(numbers[looks[0]])
    found = f"{cfg.num_shapes} embedded shapes, captions, {len(SHAPES)} labels"

    def identity() -> str:
        drawn = (draw_shape(row, cfg.resolution)[0].tobytes() for row in range(8))  # numpy's streams may change
        return content_hash("shapes", cfg.num_shapes, *drawn)

    return Source(cfg.num_shapes, read, "shape {}".format, captions, labels, found, identity, list(SHAPES))


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
        if len(outside) == len(rows) and encoded._indices is None:  # a folder: whatever else is in it, these are the pictures
            return content_hash([(os.path.abspath(path), _stamp(path)) for path in outside])
        outside += [file["filename"] for file in encoded.cache_files]
        return content_hash(encoded._fingerprint, [(path, _stamp(path)) for path in outside])

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
    found = f"{len(rows)} pictures of {where}: image column {image!r}, captions {source!r}, labels {label!r}"
    return Source(len(rows), read, name, captions, labels, found, identity, names)


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
        source = replace(source, held_out=held, found=f"{source.found}; {held.size} held out")
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


# ---------------------------------------------------------------------------------------------------------------------
# The data set made ready.

RESIDENT = 0.1
"""Share of a GPU's memory that the decoded set may take, so that only the places of the cuts travel in a step."""

Reader = Callable[[Iterable[str]], dict[str, Tensor]]
"""The marks of B values -> the columns that stand in their place, [B, ...] each."""


class Examples(torch.utils.data.Dataset):
    """The training set: numbers of the run in, a batch out."""

    def __init__(self, source: Source, cfg: Data, seed: int, pictures: Pictures | None = None):
        """The examples of a source whose `pictures` were decoded and checked; None: they are here.

        Raises:
            BadInput: pictures that cannot be read, every one of them named.
        """
        pictures = decode(source, cfg) if pictures is None else pictures
        if pictures.broken:
            if not cfg.skip_broken:
                there = f"{len(pictures.broken)} of {source.size} pictures cannot be read: {'; '.join(pictures.broken)}"
                raise BadInput(f"{there}; --data.skip-broken leaves them out")
            source = select(source, pictures.columns["row"].tolist())
            size = cfg.train_batch_size
            require(source.size >= size, "data.train_batch_size", size, f"at most {source.size}")
        self.source, self.cfg, self.seed, self.size, self.pictures = source, cfg, seed, source.size, pictures
        self.encoded: dict[str, Reader] = {}  # column -> what stands in its place
        self.unheld = {"pixel_values"} if pictures.pixels is None else set()  # columns that every batch reads from the disk
        self.resident: Tensor | None = None  # the decoded set on the device
        self.place, self.kept = None, False  # where the pictures may be kept, and whether they came from there
        files = pictures.columns["file"].contiguous().numpy().tobytes()
        self.fingerprint = hashlib.blake2b(files + repr((source.captions, source.labels)).encode(), digest_size=16).hexdigest()

    def _pixels(self, row: int) -> Tensor:
        held = self.pictures.pixels
        return held[row] if held is not None else pixels(to_rgb(self.source.read(row)[0]), self.cfg)[0]

    @functools.lru_cache(maxsize=2)  # noqa: B019  a batch may touch two epochs
    def order(self, epoch: int) -> Tensor:
        """The permutation of the rows in this epoch."""
        seed = hash64(self.seed, "order", epoch) & 0xFFFFFFFF
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))

    def __getitem__(self, numbers: range) -> Batch:
        """The batch of these examples of the run; pictures still uint8."""
        n = torch.tensor(numbers)
        epochs = range(numbers[0] // self.size, numbers[-1] // self.size + 1)
        rows = torch.cat([self.order(e)[n[n // self.size == e] % self.size] for e in epochs])
        rng = Rng.of(self.seed, numbers, "data")
        flip = rng.uniform("flip") < (0.5 if self.cfg.random_flip else 0.0)
        texts = self._texts(rows, rng.uniform("caption"), rng.uniform("caption dropout") < self.cfg.caption_dropout)
        return self._batch(n, rows, rng.uniform("crop", 2), flip, texts, self.encoded)

    def fixed(self, size: int, count: int | None = None) -> Iterator[Batch]:
        """The data in order, `size` at a time, as `at` has them; or `count` spread evenly over it."""
        count = min(count or self.size, self.size)
        yield from map(self.at, (torch.arange(count) * self.size // count).split(size))

    def at(self, rows: Tensor) -> Batch:
        """These rows, [B]: cut from the middle, never mirrored, with their first captions."""
        never = torch.zeros(len(rows), dtype=torch.bool)
        return self._batch(rows, rows, None, never, self._texts(rows, torch.zeros(len(rows)), never), {})

    def _texts(self, rows: Tensor, choice: Tensor, dropped: Tensor) -> list[str] | None:
        """One of each row's captions, or the empty one."""
        if self.source.captions is None:
            return None
        texts = (self.source.captions[row] or [""] for row in rows.tolist())
        return ["" if d else t[int(u * len(t))] for t, u, d in zip(texts, choice.tolist(), dropped.tolist(), strict=True)]

    def _batch(
        self, n: Tensor, rows: Tensor, crop: Tensor | None, flip: Tensor, texts: list[str] | None, encoded: dict[str, Reader]
    ) -> Batch:
        size, room = (self.pictures.columns[name][rows] for name in ("size", "room"))  # [B, 2] each
        central = crop is None or self.cfg.center_crop
        corner = room // 2 if central else (crop * (room + 1)).long()  # [B, 2] top, left
        if "pixel_values" in encoded:
            x = encoded["pixel_values"]([self._mark(r, f) for r, f in zip(rows.tolist(), flip.tolist(), strict=True)])
        elif self.resident is not None and crop is not None:
            whole = self.resident.shape[-2:] == (self.cfg.resolution,) * 2  # cut when it was decoded
            x = {"window": torch.cat([rows[:, None], corner * (not whole), flip[:, None]], 1)}  # [B, 4], for `ready`
        else:
            x = {"pixel_values": torch.where(flip[:, None, None, None], (cut := self._cut(rows, corner)).flip(-1), cut)}
        # Mirroring the square is mirroring the picture and cutting at the mirrored corner.
        corner[:, 1] = torch.where(flip, room[:, 1] - corner[:, 1], corner[:, 1])
        batch = {"n": n, "index": rows, **x, "original_size": size, "crop_top_left": corner}
        if texts is not None:
            batch |= encoded["caption"](map(content_hash, texts)) if "caption" in encoded else {"caption": texts}
        if self.source.labels is not None:
            batch["label"] = torch.tensor([self.source.labels[row] for row in rows.tolist()])
        return batch

    def _cut(self, rows: Tensor, corner: Tensor) -> Tensor:
        """The squares at these corners, [B, 3, H, W] uint8; a central cut was made when the picture was decoded."""
        side = self.cfg.resolution
        held = self.pictures.pixels
        if isinstance(held, Tensor) and held.shape[-2:] == (side, side):
            return held[rows]
        whole = zip(map(self._pixels, rows.tolist()), corner.tolist(), strict=True)
        return torch.stack([x if self.cfg.center_crop else x[:, t : t + side, i : i + side] for x, (t, i) in whole])

    def _mark(self, row: int, flip: bool) -> str:
        """What tells a picture as the model sees it from every other."""
        return self.pictures.columns["mark"][row].numpy().tobytes().hex() + ("-mirrored" if flip else "")

    def distinct(self, column: str) -> dict[str, Callable[[], Any]] | None:
        """Every value of a column that the run may ask for, as its mark -> the function that makes it.

        None where they cannot be listed: pictures that are cut at random.
        """
        if column == "caption" and self.source.captions is not None:
            texts = {text for several in self.source.captions for text in several or [""]}
            if self.cfg.caption_dropout:
                texts.add("")
            return {content_hash(text): functools.partial(str, text) for text in texts}
        if column != "pixel_values" or (self.pictures.columns["room"].any() and not self.cfg.center_crop):
            return None

        def square(row: int, flip: bool) -> Tensor:
            x = self._pixels(row)
            return x.flip(-1) if flip else x

        flips = (False, True) if self.cfg.random_flip else (False,)
        every = ((row, flip) for row in range(self.size) for flip in flips)
        return {self._mark(row, flip): functools.partial(square, row, flip) for row, flip in every}

    def replace(self, column: str, read: Reader, held: bool) -> None:
        """From now on the stream has what `read` gives in place of this column, from memory or from the disk."""
        self.encoded[column] = read
        (self.unheld.discard if held else self.unheld.add)(column)
        if column == "pixel_values":
            self.pictures = replace(self.pictures, pixels=None)  # `fixed` reads the few that it shows

    def keep(self, say: Callable[[str], Any]) -> None:
        """Keep the pictures in their place, unless they are there."""
        if self.place and not self.kept:
            self.pictures = keep(self.pictures, self.place, self.cfg, say)

    def reside(self, device: torch.device, share: float = RESIDENT) -> bool:
        """Keep the decoded set on a GPU too, where it takes at most this share of its memory; returns whether it is there."""
        room = torch.cuda.get_device_properties(device).total_memory * share if device.type == "cuda" else 0
        held = self.pictures.pixels
        if isinstance(held, Tensor) and held.nbytes <= room:
            self.resident = held.to(device)
        return self.resident is not None

    def ready(self, batch: Batch, device: Any) -> Batch:
        """The batch on the device, its pictures float32 in [-1, 1]."""
        batch = to_device(batch, device)
        if "window" in batch:
            cut = cut_out(self.resident, batch.pop("window"), self.cfg.resolution)
            batch = to_device({"pixel_values": cut}, device) | batch
        return batch

    def stream(self, first: int, stride: int) -> Iterator[Batch]:
        """The endless stream of one process: a batch from example `first` on, then one every `stride` examples."""
        size = self.cfg.train_batch_size
        numbers = (range(n, n + size) for n in itertools.count(first, stride))
        processes = self.cfg.dataloader_num_workers if self.unheld else 0
        loader = torch.utils.data.DataLoader(
            self,
            sampler=numbers,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=processes,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        return iter(loader)


def opened(source: Source, cfg: Data, seed: int, shelf: Path | None) -> Examples:
    """The examples of a source, with the pictures that are kept on the shelf, or decoded here."""
    path = shelf and place(shelf, source, cfg)
    found = path and kept(path, cfg)
    examples = Examples(source, cfg, seed, found)
    examples.place, examples.kept = path, found is not None
    return examples


def _as_it_is(batch: Batch) -> Batch:
    """In place of the loader's own function, which would look at every caption."""
    return batch


@dataclass(frozen=True)
class Fixed:
    """The data as samples and exports see them: in order, cut from the middle, never mirrored, `size` at a time, on the
    device; all of them, or `count` spread evenly over the set. Nothing is read before it is iterated over."""

    examples: Examples
    size: int
    device: Any
    count: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        return (to_device(batch, self.device) for batch in self.examples.fixed(self.size, self.count))


def cut_out(pictures: Tensor, window: Tensor, side: int) -> Tensor:
    """Squares [B, C, side, side] of pictures [N, C, H, W]; window [B, 4] has row, top, left, and whether to mirror."""
    row, top, left, flip = (x[:, None, None, None] for x in window.unbind(1))
    across = torch.arange(side, device=pictures.device)
    channel = torch.arange(pictures.shape[1], device=pictures.device)[:, None, None]
    return pictures[row, channel, top + across[:, None], left + torch.where(flip > 0, side - 1 - across, across)]


def to_device(batch: Batch, device: Any) -> Batch:
    """The batch on the device; pictures, which travel as uint8, become float32 in [-1, 1] there."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {k: v.float() / 127.5 - 1 if isinstance(v, Tensor) and v.dtype == torch.uint8 else v for k, v in moved.items()}
