"""What `python loop.py evaluate` left in an output folder, as the pages show it: a table, and curves over the checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oneloop.machine import files

Figure = tuple[str, dict[str, float], float | None]
"""Its name, as "frechet/classifier"; `value` and the ends of its interval; its value for images of the data (the floor)."""


def results(folder: Path, say: Callable[[str], Any] = lambda text: None) -> dict[int, list[Figure]]:
    """Step -> the figures of its evaluation, by step; a damaged file is left out with a word to `say`."""
    found = {}
    for path in (folder / "evaluation").glob("*.json"):
        if re.fullmatch("[0-9]{1,15}", path.stem):
            try:
                found[int(path.stem)] = list(figures(json.loads(files.read_text(path))))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                say(f"{path}: damaged; left out")
    return dict(sorted(found.items()))


def figures(result: dict[str, Any]) -> Iterator[Figure]:
    """The figures of a result."""
    for judge, kind in result["features"].items():
        for name, value in kind["samples"].items():
            yield f"{name}/{judge}", *_checked(value, kind["floor"].get(name))
    drawn = result.get("drawings", {"samples": {}})
    for name, value in drawn["samples"].items():
        yield name, *_checked(value, drawn["held out"][name])
    if "copies" in result:
        yield "copies", *_checked(result["copies"], {"value": result["copies"]["held out"]})


def _checked(value: dict[str, Any], floor: dict[str, Any] | None) -> tuple[dict[str, float], float | None]:
    """Numbers alone.

    Raises:
        ValueError, TypeError: something else.
    """
    numbers = {key: float(value[key]) for key in ("value", "low", "high") if key in value}
    if not abs(numbers["value"]) < 1e300:  # which NaN is not
        raise ValueError(value)
    return numbers, None if floor is None else float(floor["value"])


def curves(folder: Path, say: Callable[[str], Any] = lambda text: None) -> dict[str, list[tuple[int, float]]]:
    """Figure -> (step, value) of every checkpoint that was judged."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, every in results(folder, say).items():
        for name, value, _ in every:
            found.setdefault(name, []).append((step, value["value"]))
    return found


def table(folder: Path) -> tuple[int, list[list[str]]]:
    """The last step that was judged, and a row for each figure: name, value, interval, floor."""
    step, every = max(results(folder).items())
    ends = lambda v: f"{v['low']:.4g} to {v['high']:.4g}" if "low" in v else ""  # noqa: E731
    return step, [[name, f"{v['value']:.4g}", ends(v), "" if floor is None else f"{floor:.4g}"] for name, v, floor in every]


def neighbours(folder: Path, step: int) -> Path:
    """The image of samples above the training images nearest to them."""
    return folder / "evaluation" / f"{step}.png"
