"""The bytes of an image file as a PIL image, and names and reasons as they are printed."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterable
from typing import Any

from PIL import Image, UnidentifiedImageError

UNREAD = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
"""Formats that PIL knows by name alone; for PostScript it would start an interpreter."""
HEIF = (".heic", ".heif", ".hif")
LISTED = 10


@functools.cache
def formats() -> tuple[str, ...]:
    """The image formats that are read: all that PIL decodes itself, and HEIC where pillow-heif is installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if name not in UNREAD)


@functools.cache
def endings() -> frozenset[str]:
    """What the names of image files end in, in lower case: of HEIC too, so that none is missed where it cannot be read."""
    known = {*formats(), "MPO"}  # read by the plugin of JPEG
    return frozenset(HEIF) | {ending for ending, name in Image.registered_extensions().items() if name in known}


def opened(raw: bytes) -> Image.Image:
    """The image in a file's content.

    Raises:
        ValueError: it is empty, no image, or HEIC without pillow-heif. What PIL raises of a broken one comes here or later.
    """
    if not raw:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(raw), formats=formats())
    except UnidentifiedImageError:
        heif = raw[4:8] == b"ftyp" and raw[8:11] in (b"hei", b"hev", b"mif", b"msf") and "HEIF" not in formats()
        raise ValueError("HEIC, which `pip install pillow-heif` reads" if heif else "not an image that PIL reads") from None


def shown(text: Any, most: int = 160) -> str:
    """Anything in one line that every terminal and file takes: what cannot be printed is escaped, the middle of a long one
    left out."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[1 - most // 2 :]}"


def reason(error: BaseException) -> str:
    """Why it failed, without the file's name."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(" ".join(said.split()) or type(error).__name__)


def listed(names: Iterable[str], rest: str = "") -> str:
    """The first LISTED of them, shortened, and how many more there are; `rest` says where those are."""
    names = list(names)
    more = f"; and {len(names) - LISTED:,} more{rest}" if len(names) > LISTED else ""
    return "; ".join(shown(name, 140) for name in names[:LISTED]) + more
