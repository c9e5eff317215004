"""What a person looks at: console, report page, estimate, data report, samples, comparison, export."""

from __future__ import annotations

import os
from pathlib import Path

from oneloop.configs import BadInput


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before anything is made for it.

    Raises:
        BadInput: it is a folder, or lies in a file or in a folder that may not be written.
    """
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    reasons = {
        "it is a folder": path.is_dir(),
        f"{parent} is not a folder": not parent.is_dir(),
        "no permission": not os.access(parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise BadInput(f"{path} cannot be written: {reason}; --to names another file")
