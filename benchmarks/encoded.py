"""What a start reads of a large cache of encodings: seconds, bytes and memory until every value can be found.

python -m benchmarks.encoded 100000

The cache has the shards of so many SDXL examples at 1024 x 1024 (mean and deviation of the latent, float32, and text states,
bfloat16), with the true sizes of everything: files of holes, in which only headers and marks are written.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

from oneloop.inputs import cache
from oneloop.inputs.cache import Cache

LATENT = {"latent_mean": ("F32", [4, 128, 128]), "latent_std": ("F32", [4, 128, 128])}
TEXT = {"prompt_embeds": ("BF16", [77, 2048]), "pooled_prompt_embeds": ("BF16", [1280])}
BYTES = {"F32": 4, "BF16": 2, "U8": 1}


def build(folder: Path, columns: dict[str, tuple[str, list[int]]], count: int, seed: int) -> None:
    """Shards of `count` values of these columns, as `Cache.fill` cuts them, with nothing in the values."""
    folder.mkdir()
    each = sum(BYTES[kind] * int(np.prod(shape)) for kind, shape in columns.values())
    rows = min(cache.SHARD_ROWS, -(-cache.SHARD_BYTES // each))
    marks = np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)
    for start in range(0, count, rows):
        own, header, end = marks[start : start + rows], {"__metadata__": {"hash": "0" * 32}}, 0
        for name, (kind, shape) in sorted(
            (columns | {cache.MARKS: ("U8", [16])}).items(), key=lambda item: item[0] != cache.MARKS
        ):
            begin, end = end, end + len(own) * BYTES[kind] * int(np.prod(shape))
            header[name] = {"dtype": kind, "shape": [len(own), *shape], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / f"{uuid.uuid4().hex}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + own.tobytes())
            file.truncate(8 + len(text) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", nargs="?", type=int, default=100_000, help="encoded examples")
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        for name, columns in (("pixel_values", LATENT), ("caption", TEXT)):
            build(Path(folder, name), columns, count, 0)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            began = time.perf_counter()
            opened = Cache(Path(folder, name)).refresh()
            seconds = time.perf_counter() - began
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            heads = sum(8 + int.from_bytes(path.open("rb").read(8), "little") for path in opened.shards)
            assert len(opened.keys) == count
            size, read = opened.nbytes / 2**30, (heads + 16 * count) / 2**20
            print(f"{name}: {count:,} values in {len(opened.shards):,} shards of {size:.1f} GiB")
            print(f"    {seconds:.2f} s, {read:.1f} MiB read, {grown:.0f} MiB of memory")


if __name__ == "__main__":
    main()
