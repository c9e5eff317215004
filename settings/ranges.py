"""The range of every setting stands in its annotation, and one function checks it.

resolution: Annotated[int, Range(1, 16_384)] = 32
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints


class BadInput(ValueError):
    """A mistake of the user's, in one line: what was given, what was expected, which flag to change. Exit code 2."""


def require(condition: bool, flag: str, given: Any, expected: str) -> None:
    """Raise `BadInput` in the house form unless `condition` holds."""
    if not condition:
        raise BadInput(f"--{flag.replace('_', '-')} is {given!r}; expected {expected}")


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: finite, from `least` to `most`, but not `without`, which is one of them."""

    least: float
    most: float
    without: float | None = None

    def fits(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and self.least <= value <= self.most and value != self.without

    def __str__(self) -> str:
        # typing caches annotations by equality, so that a Range(0, 10) may come back as an equal Range(0.0, 10.0)
        least, most = (f"{int(x) if abs(x) < 1e16 and x == int(x) else x:,}" for x in (self.least, self.most))
        low = "more than" if self.without == self.least else "at least"
        return f"{low} {least} and {'below' if self.without == self.most else 'at most'} {most}"


@dataclass(frozen=True)
class Text:
    """The texts that a setting may be: all that a file in UTF-8 holds; as a name or the path of a folder what a disk takes."""

    kind: Literal["text", "name", "folder"] = "text"

    def fits(self, value: Any) -> bool:
        if not isinstance(value, str) or "\0" in value or re.search("[\ud800-\udfff]", value) or len(value) > 10_000:
            return False
        parts, home = value.encode().split(b"/"), os.path.expanduser(value)  # of nobody's home, ~nobody stays as it is
        named = 0 < sum(map(len, parts)) <= 3000 and max(map(len, parts)) <= 255 and value.strip() and home[0] != "~"
        return self.kind == "text" or bool(named and not (self.kind == "folder" and os.path.isfile(home)))

    def __str__(self) -> str:
        what = {"text": "text", "name": "a name or path that a disk takes", "folder": "the path of a folder"}[self.kind]
        most = "10,000 characters" if self.kind == "text" else "3,000 bytes, 255 in each part, and not empty"
        return f"{what}, in UTF-8, without NUL, of at most {most}"


Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Images = Annotated[int, Range(1, 65_536)]
Amount = Annotated[float, Range(0, 3e38)]  # what float32 holds
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, without=1)]
Words = Annotated[str, Text()]
Name = Annotated[str, Text("name")]
Folder = Annotated[str, Text("folder")]


def check(settings: Any, group: str = "") -> None:
    """Refuse the first value that is outside the `Range` or `Text` in its field's annotation.

    Raises:
        BadInput: naming the flag. Of a field without either every value passes.
    """
    for name, hint in hints(type(settings)).items():
        value, parts = getattr(settings, name), list(nested(hint))
        limit = next((part for part in parts if isinstance(part, (Range, Text))), None)
        optional = type(None) in parts
        for one in value if isinstance(value, tuple) else (value,):
            fits = limit is None or (optional and one is None) or limit.fits(one)
            require(fits, f"{group}.{name}".lstrip("."), one, f"{limit}{', or None' * optional}")


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Field of a dataclass -> its type, with what `Annotated` says of it."""
    return get_type_hints(kind, include_extras=True)


def nested(hint: Any) -> Iterator[Any]:
    """A type, and everything that it is made of."""
    yield hint
    for part in get_args(hint):
        yield from nested(part)
