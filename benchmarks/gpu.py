"""Fill the GPU's rows of docs/performance.md, the most important first.

    python -m benchmarks.gpu                                   those that are not there yet
    python -m benchmarks.gpu --scripts ../diffusers/examples   and those beside the official scripts of a checkout
    python -m benchmarks.gpu stream sdxl_lora                  these, whatever is there

Each row is a process of its own, and is written into the page when it is done, with the card, torch's version and the commit. A
call that was stopped, at any instant, goes on where it was: a row that says `no`, or that it failed, is measured. SD 1.5 and
SDXL of full size and random weights (benchmarks/models.py) are built when a row first asks, and kept in `--models`: 9 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import __main__ as benchmark
from benchmarks.__main__ import ROOT
from benchmarks.gpu_rows import ROWS, Row
from oneloop import configs
from oneloop.configs import BadInput
from oneloop.machine.files import write

PAGE = ROOT / "docs" / "performance.md"


def cells(page: str, name: str) -> list[str]:
    """What the page says in the row: what is asked, measured, and on what.

    Raises:
        BadInput: it has no such row, or two.
    """
    found = re.findall(rf"^\| `{name}` \|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|$", page, re.M)
    if len(found) != 1:
        raise BadInput(f"--page has {len(found)} rows `{name}` of four cells; expected one, as docs/performance.md has")
    return [cell.strip() for cell in found[0]]


def line(name: str, row: Row, measured: str = "no", where: str = "") -> str:
    """A row of the page."""
    return f"| `{name}` | {row.asks} | {measured} | {where} |"


def written(page: Path, name: str, measured: str, where: str) -> None:
    """Put what was measured into the page, which is whole at any instant."""
    text = page.read_text("utf-8")
    cells(text, name)
    kept = measured.replace("|", "/").replace("\n", " ")
    write(page, re.sub(rf"^\| `{name}` \|.*$", lambda _: line(name, ROWS[name], kept, where), text, flags=re.M))


def alone(name: str, given: argparse.Namespace) -> tuple[bool, str]:
    """Measure a row in a process of its own: whether it could be measured, and what was, or why not."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--alone", name, "--models", str(given.models)]
    command += ["--scripts", str(given.scripts)] if given.scripts else []
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    row = subprocess.Popen(command, cwd=ROOT, **both, start_new_session=True)
    try:
        out, err = row.communicate(timeout=60 * given.minutes)
    except subprocess.TimeoutExpired:
        return False, f"more than {given.minutes:g} minutes (--minutes)"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(row.pid, signal.SIGKILL)  # with what the row started
        row.wait()
    said = (out if row.returncode == 0 else err).strip().splitlines() or [f"exit code {row.returncode}"]
    return row.returncode == 0, said[-1][:300]


def where() -> str:
    """The card, torch and the commit, marked where files beside the page, which changes with each row, differ from it."""
    hardware, versions, _ = benchmark.machine()
    card = hardware.removeprefix("hardware: ").split(",")[0]
    asked = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno", ".", f":!{PAGE.relative_to(ROOT)}"])
    commit, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip() for words in asked
    )
    return f"{card}, {re.search(r'torch [^,]+', versions)[0]}, {commit}{'-dirty' if changed else ''}"


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; those not measured where none is given")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; a copy of docs/performance.md where it is not there")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "models", help="folder that keeps the full-size models")
    parser.add_argument("--scripts", type=Path, help="diffusers' examples, for the rows beside them")
    parser.add_argument("--minutes", type=float, default=30, help="that a row may take")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    given, failed = make_parser().parse_args(), []
    try:
        if not benchmark.has_gpu():
            raise BadInput("there is no GPU here that torch can use; expected one")
        if unknown := [name for name in given.rows if name not in ROWS]:
            raise BadInput(f"no row named {unknown[0]!r}; expected {', '.join(ROWS)}")
        if given.scripts and not given.scripts.is_dir():
            raise BadInput(f"--scripts is {given.scripts}; expected the folder `examples` of a checkout of diffusers")
        if given.alone:
            with tempfile.TemporaryDirectory() as folder:
                print(ROWS[given.alone].measure(given, Path(folder)))
            return
        try:
            if not given.page.exists():
                shutil.copyfile(PAGE, given.page)
            write(given.page, text := given.page.read_text("utf-8"))  # what cannot be written is known before the first row
        except (OSError, ValueError) as error:
            raise BadInput(f"--page {given.page}: {error}; expected a page of text") from None
        open_rows = [name for name in ROWS if re.match(r"no$|failed: ", cells(text, name)[1])]
    except BadInput as error:
        configs.fail(error, 2)
    for name in given.rows or open_rows:
        if ROWS[name].scripts and not given.scripts:
            print(f"{name}: left out without --scripts", file=sys.stderr)
            continue
        fine, said = alone(name, given)
        failed += [] if fine else [name]
        written(given.page, name, said if fine else f"failed: {said}", where())
        print(f"{name}: {said}", file=sys.stderr, flush=True)
    raise SystemExit(int(bool(failed)))


if __name__ == "__main__":
    main()
