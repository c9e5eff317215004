"""The lines that load what a run made: load.py beside each checkpoint, and the same lines for a reader elsewhere."""

from __future__ import annotations

from pathlib import Path

HERE = "from pathlib import Path\n\npath = str(Path(__file__).parent)\n"


def load_file(lines: str) -> str:
    """What load.py holds, from the lines of a task's `export_fn`: it runs from anywhere, and in a folder of any name."""
    return HERE + lines.replace('"{path}"', "{path}").format(path="path") + "\n"


def load_lines(saved: Path, path: Path | str) -> str:
    """The lines of a checkpoint's load.py, for a folder at `path`."""
    return (
        f"path = {str(path)!r}\n"
        + (saved / "load.py").read_text("utf-8").removeprefix(HERE).replace('"{path}"', "path").strip()
    )
