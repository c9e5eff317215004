"""What a run costs as its data set grows: its start, memory, steps and resume, on generated images.

    python benchmarks/scale.py                            1,000, 10,000 and 100,000
    python benchmarks/scale.py 1000 1000000 --steps 100

Streamed sets, of 1e3 to 1e9 rows, are measured by benchmarks/streaming.py.

Whole processes, watched from outside: a run of `--steps` steps of the smallest model, and the same command made as long again,
which resumes. The first start decodes all images, checks them and keeps them; the resumed one finds them. 'A image' is what
one more of them adds to the time of the first row, 'beside the pixels' is the peak memory without the decoded set. Peak memory
is the machine's, of the first run; the time of a step is the median of the run's own metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.__main__ import Process, machine, table, watch

SIDE, BATCH = 16, 16


def run(out: Path, steps: int, data: dict[str, object]) -> Process:
    """One start of a run on this data, to its end after `steps` steps."""
    flags = {
        **data,
        "data.resolution": SIDE,
        "data.train-batch-size": BATCH,
        "base.max-train-steps": steps,
        "base.validation-steps": 0,
        "base.checkpointing-steps": steps,
        "base.logging-steps": 1,
        "base.logger": "none",
        "base.output-dir": out,
    }
    command = [sys.executable, "loop.py", "ddpm", *(str(word) for flag in flags.items() for word in (f"--{flag[0]}", flag[1]))]
    return watch(command, rf"step \d+/{steps}, ")  # the first logged step


def step_seconds(out: Path) -> float:
    """The median time of a step, over all but the first."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(BATCH / line["images_per_second"] for line in lines[1:] if "images_per_second" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[1000, 10_000, 100_000], help="images")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    rows, first = [], None
    for count in given.counts:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            begun = run(out, given.steps, {"data.num-shapes": count})
            step = step_seconds(out)
            resumed = run(out, 2 * given.steps, {"data.num-shapes": count})
        first = first or (count, begun.first, resumed.first)
        each = [
            "" if count == first[0] else f" ({1e3 * (now - then) / (count - first[0]):.2f} ms a image)"
            for now, then in ((begun.first, first[1]), (resumed.first, first[2]))
        ]
        beside = begun.gib - count * 3 * SIDE**2 / 2**30
        rows.append(
            [
                f"{count:,}",
                f"{begun.first:.1f} s{each[0]}",
                f"{begun.gib:.2f} GiB",
                f"{beside:.2f} GiB",
                f"{1e3 * step:.1f} ms",
                f"{resumed.first:.1f} s{each[1]}",
            ]
        )
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    head = ["examples", "start, to the first step", "peak memory", "beside the pixels", "a step", "resume, to the first step"]
    print("  \n".join(machine()), table(head, rows), sep="\n\n")


if __name__ == "__main__":
    main()
