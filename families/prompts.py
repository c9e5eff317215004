"""Sample prompts: what a grid shows, an entry for each of its images in turn.

An entry is a prompt, or a prompt and its own settings after ` --`, `a dog in snow --seed 7 --width 768 --strength 0.5`; in a
settings file it may be an object with the same keys, `{"prompt": "a dog in snow", "seed": 7}`. A text file has an entry in each
line; empty lines and those that begin with # are none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from oneloop.configs import Amount, BadInput, Range, Seed, Words, check
from oneloop.settings.ranges import hints, nested


@dataclass(frozen=True)
class Prompt:
    """One image of a grid; None is what the run's settings say."""

    prompt: Words
    """What to draw."""
    negative: Words | None = None
    """What it shall not look like."""
    width: Annotated[int, Range(8, 16_384)] | None = None
    """Width in pixels."""
    height: Annotated[int, Range(8, 16_384)] | None = None
    """Height in pixels."""
    seed: Seed | None = None
    """Seed of its noise, alone. None: the run's, which differs from image to image."""
    steps: Annotated[int, Range(1, 1000)] | None = None
    """Steps of the sampler."""
    guidance: Amount | None = None
    """Strength of guidance."""
    strength: Annotated[float, Range(-100, 100)] = 1.0
    """Factor on what the adapters do; 0 is the base model."""
    reference: Words | None = None
    """Image to draw after; no family takes one yet."""

    def __post_init__(self):
        check(self)
        if self.reference is not None:
            raise BadInput("--reference: no family draws after a reference image; leave it out")


def read(entries: Iterable[str], flag: str, multiple: int = 1) -> list[Prompt]:
    """The entries of a setting.

    Raises:
        BadInput: with the number of the entry, from 1 on, and the key at fault. Sizes must be multiples of `multiple`.
    """
    made = []
    for number, entry in enumerate(entries, 1):
        try:
            made.append(Prompt(**_values(entry)))
            for key in ("width", "height"):
                if (size := getattr(made[-1], key)) and size % multiple:
                    raise BadInput(f"--{key} is {size}; expected a multiple of {multiple}")
        except (BadInput, ValueError) as error:
            raise BadInput(f"{flag}, entry {number}: {error}") from None
    return made


def read_file(path: str, flag: str) -> list[str]:
    """The entries of a text file.

    Raises:
        BadInput: it cannot be read, or has none.
    """
    try:
        lines = map(str.strip, Path(path).expanduser().read_text("utf-8-sig").split("\n"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{flag} {path} cannot be read: {error}; expected a text file, a prompt in each line") from None
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise BadInput(f"{flag} {path} has no prompt; expected one in each line")
    return entries


def _values(entry: str) -> dict[str, Any]:
    """The keys of an entry and their values, which are numbers where they should be."""
    if entry.startswith("{") and entry.endswith("}"):
        try:
            pairs = json.loads(entry, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"no JSON, which a text in braces is read as: {error}") from None
        given = dict(pairs)
        if len(given) < len(pairs):
            raise BadInput("a key is given more than once")
    else:
        prompt, *options = re.split(r"\s--(?=[a-z])", entry)
        given = {"prompt": prompt.strip()}
        for option in options:
            key, _, value = option.strip().partition(" ")
            if key in given:
                raise BadInput(f"--{key} is given more than once")
            given[key] = value.strip()
    known, values = [field.name for field in fields(Prompt)], {}
    for key, value in given.items():
        if key not in known:
            raise BadInput(f"--{key} is none of {', '.join(known[1:])}")
        kinds = [kind for kind in nested(hints(Prompt)[key]) if kind in (int, float, str)]
        try:
            values[key] = kinds[0](value) if kinds[0] is not str and isinstance(value, str) else value
        except ValueError:
            raise BadInput(f"--{key} is {value!r}; expected a number{' without a fraction' * (kinds[0] is int)}") from None
        right = type(values[key]) is kinds[0] or (kinds[0] is float and type(values[key]) is int)
        if not right and not (value is None and key != "prompt"):
            raise BadInput(f"--{key} is {value!r}; expected {'text' if kinds[0] is str else 'a number'}")
    if "prompt" not in values:
        raise BadInput("has no prompt")
    return values
