"""Every case of every row of the promise that a run can be killed at any instant, as a table.

python tests/campaign.py                           all of it: hours on one core
python tests/campaign.py --only kill --cases 50    the rows whose name has `kill`, 50 cases of each
python tests/campaign.py --jobs 4                  four cases at a time
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: F401  one thread, nothing from the network


def machine() -> str:
    """What this runs on, in a few words."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores ({model}), {platform.system()}, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="run the rows whose name has this")
    parser.add_argument("--cases", type=int, help="run at most this many cases of a row, spread evenly over all")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    options = parser.parse_args()

    import cases

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=cases.ROOT, capture_output=True, text=True
    ).stdout.strip()
    print(f"{datetime.date.today()}, commit {commit or 'unknown'}\nhardware: {machine()}\n", flush=True)
    print("| row | cases | result | seconds |\n|---|---|---|---|", flush=True)
    red = 0
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, row) in enumerate(cases.ROWS.items()):
            if options.only not in name:
                continue
            started = time.monotonic()
            count, words, failures = cases.run(row, options.cases, Path(folder) / str(i), options.jobs)
            said = ", ".join(f"{n} {word}" for word, n in sorted(words.items()) if word)
            result = (f"{len(failures)} failed" if failures else "all hold") + (f" ({said})" if said else "")
            print(f"| {name} | {count} | {result} | {time.monotonic() - started:.0f} |", flush=True)
            for failure in failures:
                print(failure, file=sys.stderr, flush=True)
            red += len(failures)
    return min(red, 1)


if __name__ == "__main__":
    sys.exit(main())
