"""One page that shows several runs over each other.

    python loop.py compare runs/a runs/b

Their curves in the same charts, their samples side by side under one slider, and the settings in which they differ.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from oneloop.configs import BadInput, Name, check, require
from oneloop.views import check_writable, page


@dataclass(frozen=True)
class Settings:
    """Compare runs."""

    folders: Positional[tuple[Name, ...]]
    """Output folders of runs, finished or not."""
    to: Name | None = None
    """The page to write. None: compare.html beside the runs, in the folder that has them all."""

    def __post_init__(self):
        check(self)
        require(self.to is None or self.to.endswith(".html"), "to", self.to, "the name of a .html file")
        if len(self.folders) < 2:
            raise BadInput(f"compare was given {len(self.folders)} folder; expected the output folders of two runs or more")


def main(settings: Settings) -> None:
    """Write the page, and say where it is.

    Raises:
        BadInput: a folder holds no run, or the page cannot be written.
    """
    folders = [Path(folder).expanduser() for folder in settings.folders]
    for folder in folders:
        if not (folder / "run.json").is_file():
            raise BadInput(f"{folder}: holds no run.json; expected the output folder of a run")
    common = os.path.commonpath([folder.absolute().parent for folder in folders])
    to = Path(settings.to).expanduser() if settings.to else Path(os.path.relpath(common), "compare.html")
    check_writable(to)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        page.compare(folders, to, lambda text: print(text, file=sys.stderr))
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read or written: {error.strerror}") from None
    print(f"{len(folders)} runs compared: {to}")
