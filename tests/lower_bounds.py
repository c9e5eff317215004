"""Run the tests with the oldest versions that pyproject.toml allows, in an environment of its own (6 GB to download).

python tests/lower_bounds.py FOLDER [arguments of pytest]
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lowest(requirements: list[str]) -> list[str]:
    """`name>=1.2` as `name==1.2.*`: the first versions that are allowed, with their repairs."""
    return [f"{name}=={version}.*" for name, _, version in (line.partition(">=") for line in requirements)]


def main(folder: str, *arguments: str) -> int:
    """Make the environment, unless it is there, and run the tests in it; returns their exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = lowest(project["dependencies"]) + project["optional-dependencies"]["test"]
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
