"""What streaming costs as a set grows, and what resuming costs beside `datasets`: examples alone, without a model.

    python benchmarks/streaming.py                                1,000 and 1,000,000 rows, and 1,000,000,000 simulated ones
    python benchmarks/streaming.py 1000 --tars 1000000            and as WebDataset tars
    python benchmarks/streaming.py 1000 --runs                    and whole runs of 20 steps of the smallest model on each set
    python benchmarks/streaming.py 1000 --datasets 0 100000       and `datasets`, at these examples of 200,000 rows

Rows are JPEGs of 16x16 with a caption, below 1 kB each, in parquet with row groups of 1,000 rows and files of up to a million,
or in tars of 1,000 samples without an index; simulated ones are a file of a million rows under a thousand names. Each is
measured in a process of its own, its figure the median of three, but for the first start and `datasets`; the time begins after
the imports, but for whole runs, whose time has them. The first start reads footers or members' headers, the others the cache.
'Memory' is what the process has more than after its imports, 32 row groups in memory among it.
`datasets` streams the same file: `load_dataset(streaming=True)`, shuffled with a buffer of 1,000, `skip(n)`, which is what
the position of an example alone allows; with `state_dict` it resumes in another order, since its buffer is not saved.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

SIDE, BATCH, GROUP, FILE = 16, 16, 1000, 10**6
STEPS, REPEATS = 20, 3


def jpegs() -> list[bytes]:
    """The images of a shard."""
    import numpy as np
    from PIL import Image

    made = []
    for i in range(GROUP):
        noise = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file := io.BytesIO(), "JPEG")
        made.append(file.getvalue())
    assert max(map(len, made)) <= 1000
    return made


def write_tars(folder: Path, count: int) -> Path:
    """A set of so many samples."""
    images = jpegs()
    folder.mkdir(parents=True)
    for start in range(0, count, GROUP):
        with tarfile.open(folder / f"{start // GROUP:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, image in zip(range(start, min(start + GROUP, count)), images, strict=False):
                for ending, content in (("jpg", image), ("txt", f"image {row}".encode())):
                    member = tarfile.TarInfo(f"{row:09}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def write(folder: Path, count: int) -> Path:
    """A set of so many rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([{"bytes": image, "path": None} for image in jpegs()])
    folder.mkdir(parents=True)
    for first in range(0, count, FILE):
        writer = None
        for start in range(first, min(first + FILE, count), GROUP):
            captions = pa.array([f"image {row}" for row in range(start, min(start + GROUP, count))])
            table = pa.table({"image": column[: len(captions)], "text": captions})
            writer = writer or pq.ParquetWriter(folder / f"{first // FILE:04}.parquet", table.schema)
            writer.write_table(table)
        writer.close()
    return folder


def resident() -> float:
    """MiB of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 2**10


def ours(folder: Path, cache: Path, times: int, n: int) -> dict[str, float]:
    """Open a set, `times` over as if it were larger, and read from example n on."""
    import datasets  # noqa: F401
    import torch  # noqa: F401

    from oneloop.configs import Data
    from oneloop.data import opened
    from oneloop.inputs import shards, sources

    if times > 1:
        made = shards.opened(str(folder), cache, print)
        shards.opened = lambda *_: made * times
    cfg = Data(stream=str(folder), resolution=SIDE, train_batch_size=BATCH)
    before, began = resident(), time.perf_counter()
    examples = opened(sources.open_source(cfg, folder=cache), cfg, 0, None)
    ready = time.perf_counter() - began
    examples[range(n, n + BATCH)]
    first, took = time.perf_counter() - began, []
    for i in range(1, 101):
        start = time.perf_counter()
        examples[range(n + i * BATCH, n + (i + 1) * BATCH)]
        took.append(time.perf_counter() - start)
    mean = statistics.mean(took)
    return {"open": ready, "first": first, "batch": mean, "memory": resident() - before}


def theirs(folder: Path, n: int) -> dict[str, float]:
    """The same of `datasets`."""
    import datasets

    began = time.perf_counter()
    rows = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)
    next(iter(rows.shuffle(seed=0, buffer_size=1000).skip(n).batch(BATCH)))
    return {"first": time.perf_counter() - began}


def measured(name: str, *given: object) -> dict[str, float]:
    """One of the functions above, in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, *map(str, given)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def median(made: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(one[name] for one in made) for name in made[0]}


def line(folder: Path, name: str, count: int, times: int, runs: bool) -> list[str]:
    """A row of the table."""
    cache = folder.parent / "cache"
    anew = measured("ours", folder, cache, times, 0)
    begun, resumed = (
        median([measured("ours", folder, cache, times, n) for _ in range(REPEATS)]) for n in (0, count * times // 2)
    )
    made = [
        f"{count * times:,} {name}",
        f"{anew['first']:.2f} s",
        f"{begun['first']:.2f} s",
        f"{resumed['first']:.2f} s",
        f"{1e3 * begun['batch']:.1f} ms",
        f"{begun['memory']:.0f} MiB",
    ]
    return made + (whole(folder) if runs else [])


def whole(folder: Path) -> list[str]:
    """Of runs on a set: the start to the first step, a step, the peak memory of the machine, and the start of a resumed one."""
    from benchmarks import scale

    made = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            begun = scale.run(out, STEPS, {"data.stream": folder})
            step = scale.step_seconds(out)
            resumed = scale.run(out, 2 * STEPS, {"data.stream": folder})
            made.append({"first": begun.first, "step": step, "gib": begun.gib, "resumed": resumed.first})
    one = median(made)
    return [f"{one['first']:.1f} s", f"{one['resumed']:.1f} s", f"{1e3 * one['step']:.1f} ms", f"{one['gib']:.2f} GiB"]


HEAD = ["rows", "to the first batch", "at a second start", "of a resume in the middle", f"a batch of {BATCH}", "memory"]
RUNS = ["a run, to its first step", "resumed", "a step", "peak memory"]


def rows(counts: list[int], simulated: int, tars: list[int], runs: bool) -> list[list[str]]:
    """The table's rows."""
    made = []
    sets = [("parquet", count, 1) for count in counts] + [("in tars", count, 1) for count in tars]
    if simulated:
        sets.append(("simulated", FILE, simulated // FILE))
    for name, count, times in sets:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (write_tars if name == "in tars" else write)(Path(scratch) / "set", count)
            made.append(line(folder, name, count, times, runs and times == 1))
        print(*made[-1], sep=" | ", file=sys.stderr, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[1000, 1_000_000], help="rows")
    parser.add_argument("--simulated", type=int, default=10**9, help="rows; 0: none")
    parser.add_argument("--tars", nargs="*", type=int, default=[], help="samples")
    parser.add_argument("--runs", action="store_true", help="whole runs too, but for simulated rows")
    parser.add_argument("--datasets", nargs="*", type=int, default=[], help="examples to resume at")
    parser.add_argument("--alone", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        name, folder, *more = given.alone
        made = ours(Path(folder), Path(more[0]), *map(int, more[1:])) if name == "ours" else theirs(Path(folder), int(more[0]))
        print(json.dumps(made))
        return
    from benchmarks.__main__ import machine, table

    made = rows(given.counts, given.simulated, given.tars, given.runs)
    made = [row + [""] * (len(made[0]) - len(row)) for row in made]
    print("  \n".join(machine()), table(HEAD + RUNS * given.runs, made), sep="\n\n")
    if given.datasets:
        with tempfile.TemporaryDirectory() as scratch:
            folder, made = write(Path(scratch) / "set", 200_000), []
            for n in given.datasets:
                both = measured("theirs", folder, n)["first"], measured("ours", folder, Path(scratch) / "cache", 1, n)["first"]
                made.append([f"{n:,}", *(f"{seconds:.2f} s" for seconds in both)])
        print("", table(["resumed at example", "`datasets`", "here"], made), sep="\n")


if __name__ == "__main__":
    main()
