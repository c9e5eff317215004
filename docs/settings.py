"""Write settings.md, the reference of every setting, from the dataclasses and the strings under their fields.

python docs/settings.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from oneloop import configs
from oneloop.settings import command_line
from oneloop.settings.ranges import Range, hints, nested


def explained(kind: type) -> dict[str, str]:
    """Field of a dataclass -> the string under it, there or where it is inherited from."""
    bodies = [ast.parse(inspect.getsource(base)).body[0].body for base in reversed(kind.__mro__[:-1])]
    strings = {}
    for field, below in itertools.chain(*map(itertools.pairwise, bodies)):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            strings[field.target.id] = " ".join(below.value.value.split())
    return strings


def shown(value: Any) -> str:
    """A default as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def group(name: str, default: Any) -> str:
    """The settings of one group, as a table."""
    kind, lines = type(default), ["| setting | default | |", "|---|---|---|"]
    words = explained(kind)
    for field in fields(kind):
        parts = list(nested(hints(kind)[field.name]))
        live, choices = "live" in parts, [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        named = f" One of {', '.join(choices)}." if choices else ""
        named += "".join(f" {str(part)[0].upper()}{str(part)[1:]}." for part in parts if isinstance(part, Range))
        text = words[field.name].replace("|", "\\|").replace("<", "&lt;") + named + ("" if live else " *Fixed for a run.*")
        lines.append(f"| `{flag(name, field.name)}` | `{shown(getattr(default, field.name))}` | {text} |")
    return "\n".join(lines)


def flag(name: str, field: str) -> str:
    """A setting as it is typed."""
    return f"--{name}.{field}".replace("_", "-")


def reference() -> str:
    """The whole page."""
    parts = [
        "# Settings",
        "Written by `python docs/settings.py` from the code. A setting marked *fixed for a run* cannot change when a run is\n"
        "continued; all others may.",
    ]
    for name, default in (("base", configs.Base()), ("data", configs.Data())):
        parts += [f"## {name}: {inspect.getdoc(default)}", group(name, default)]
    for task, line in command_line.task_names().items():
        cfg = importlib.import_module(f"oneloop.tasks.{task}").task.config()
        parts += [f"## {task}: {line}", group(task, getattr(cfg, task))]
        others = [
            f"`{flag(name, field.name)}` is `{shown(given)}`"
            for name, default in (("base", configs.Base()), ("data", configs.Data()))
            for field in fields(default)
            if (given := getattr(getattr(cfg, name), field.name)) != getattr(default, field.name)
        ]
        parts += [f"Unless told otherwise, {', '.join(others)}."] if others else []
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (HERE / "settings.md").write_text(reference(), "utf-8")
