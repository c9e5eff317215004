"""Class images that were drawn, in the folder of class images: which of them are there, of what, and how one is written.

    DIR/drawn-00007.png     number 7; in its PNG text, what it is of and how it was drawn, as JSON
    DIR/...                 whatever else is there is its owner's

An image says itself what it is of, so that copies and moved files are known too, and no list can disagree with the folder. It
is there whole or not at all. What has another name is its owner's alone.
"""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from oneloop.configs import BadInput
from oneloop.inputs.files import endings, opened, reason, shown
from oneloop.inputs.folder import METADATA, ending, files_in
from oneloop.machine import files

FLAG = "--data.class-data-dir"
TEXT = "oneloop"
"""The keyword of the PNG text."""
OTHERWISE = f"give another {FLAG}, or --data.num-class-images 0 to train on its images as they are"


@dataclass(frozen=True)
class Wanted:
    """The class images that a run asks for."""

    folder: Path
    count: int
    """Of all of them, its owner's among them."""
    of: Mapping[str, Any]
    how: Mapping[str, Any]
    """As of `tasks.Prior`, in values of JSON."""

    def path(self, number: int) -> Path:
        """The file of a number."""
        return self.folder / name_of(number)

    def text(self, number: int) -> str:
        """What the image of this number says of itself."""
        return json.dumps({"number": number, "of": self.of, "how": self.how}, sort_keys=True)


def name_of(number: int) -> str:
    """The file of a number."""
    return f"drawn-{number:05d}.png"


def number_of(path: str) -> int | None:
    """The number of a file, by its path in the folder; None: it is its owner's."""
    match = re.fullmatch(r"drawn-(\d{5,9})\.png", path)
    return int(match[1]) if match and name_of(int(match[1])) == path else None


def chosen(paths: Sequence[str], count: int) -> list[int]:
    """Which of the folder's images are those of a run that asks for `count`, by their places: its owner's, all of them, and as
    many drawn ones, from number 0 on, as these lack. So a folder may hold more, for other runs."""
    numbers = list(map(number_of, paths))
    lacking = count - numbers.count(None)
    return [i for i, number in enumerate(numbers) if number is None or number < lacking]


def look(wanted: Wanted) -> tuple[list[int], str | None]:
    """The numbers that are still to be drawn, ascending: they are not there, or damaged. And what there is to say of those that
    are there.

    Raises:
        BadInput: images in it are of something else, or some are missing and would be drawn otherwise, or one does not say;
            or there are metadata, which would have no row for what is missing.
    """
    flag = f"{FLAG} {shown(wanted.folder)}"
    paths, _ = files_in(wanted.folder, FLAG) if wanted.folder.is_dir() else ([], None)
    images = [path for path in paths if ending(path) in endings()]
    there = {number_of(path) for path in images}
    missing, other = [], None
    for path in (path for path in images if "/" in path and number_of(path.rpartition("/")[2]) is not None):
        of = (_said(wanted.folder / path, flag) or {}).get("of", wanted.of)
        if differ := _differences(of, wanted.of) if isinstance(of, dict) else "":
            raise BadInput(f"{flag} has images of something else: {differ} ({shown(path)}); {OTHERWISE}")
    for number in range(wanted.count - sum(number_of(path) is None for path in images)):
        said = _said(wanted.path(number), flag) if number in there else None
        if said is None:
            missing.append(number)
            continue
        if said.get("number") != number or not isinstance(said.get("of"), dict) or not isinstance(said.get("how"), dict):
            raise BadInput(
                f"{flag}: {name_of(number)} is named as a drawn image, and does not say of what; rename or remove it"
            )
        if differ := _differences(said["of"], wanted.of):
            raise BadInput(f"{flag} has images of something else: {differ} ({name_of(number)}); {OTHERWISE}")
        other = other or _differences(said["how"], wanted.how)
    if missing and other:
        raise BadInput(f"{flag} lacks {len(missing):,} images, and has some that were drawn otherwise: {other}; {OTHERWISE}")
    if missing and (metadata := [path for path in paths if path.rpartition("/")[2] in METADATA]):
        raise BadInput(f"{flag}: images that are drawn into it would have no row in {shown(metadata[0])}; {OTHERWISE}")
    return missing, f"class images are as they were drawn: {other}" if other else None


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two descriptions differ."""
    names = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    return "; ".join(f"{shown(n, 40)} was {shown(repr(was.get(n)))} and is now {shown(repr(now.get(n)))}" for n in names)


def _said(path: Path, flag: str) -> dict[str, Any] | None:
    """What an image says of itself, nothing if it is no drawn one; None: it is damaged.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{flag}: {path.name} cannot be read: {reason(error)}") from None
    try:
        with opened(raw) as image:
            text = image.info.get(TEXT, "{}")
            image.verify()
    except Exception:  # whatever PIL raises of a broken file
        return None
    try:
        said = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def write(wanted: Wanted, number: int, image: np.ndarray) -> None:
    """The image of a number, [H, W, 3] uint8, there whole or not at all: the same bytes for the same pixels.

    Raises:
        OSError: the disk is full. BadInput: the folder cannot be written.
    """
    content, text, path = io.BytesIO(), PngImagePlugin.PngInfo(), wanted.path(number)
    text.add_text(TEXT, wanted.text(number))
    Image.fromarray(image).save(content, "PNG", pnginfo=text)
    try:
        wanted.folder.mkdir(parents=True, exist_ok=True)  # on a machine that does not share it
        files.write(path, content.getvalue())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise BadInput(f"{FLAG}: {shown(path)} cannot be written: {reason(error)}") from None
