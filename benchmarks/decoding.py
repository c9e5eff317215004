"""How fast images are read while training, of a set larger than the memory budget: images a CPU second, on one core.

python -m benchmarks.decoding FOLDER

512 x 512 JPEGs are made of the photographs in FOLDER. Whole batches as the stream makes them are measured in turns with a plain
loop that reads a file and decodes it to a tensor, by torchvision, by PIL, and by simplejpeg where it is installed; then the
same for JPEGs of 2048 x 2048, which the loops resize as `transforms.Resize` does.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as F

from oneloop import data
from oneloop.configs import Data
from oneloop.inputs import sources

SIDE, COUNT, ROUNDS = 512, 64, 5


def make(photos: Path, folder: Path, side: int) -> list[Path]:
    """COUNT crops of the photographs, as JPEGs of quality 92."""
    rng, files = np.random.default_rng(0), sorted(path for path in photos.iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
    folder.mkdir()
    for i in range(COUNT):
        image = Image.open(files[i % len(files)]).convert("RGB")
        edge = int(min(image.size) * rng.uniform(0.6, 1))
        left, top = (int(rng.integers(0, room - edge + 1)) for room in image.size)
        image.crop((left, top, left + edge, top + edge)).resize((side, side)).save(folder / f"{i:03}.jpg", quality=92)
    return sorted(folder.iterdir())


def loops() -> dict[str, Callable[[bytes], torch.Tensor]]:
    """Name -> bytes of a file to [3, H, W] uint8."""
    made = {
        "torchvision": lambda raw: decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8)),
        "PIL": lambda raw: torch.from_numpy(np.array(Image.open(io.BytesIO(raw)).convert("RGB"))).permute(2, 0, 1),
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        made["simplejpeg"] = lambda raw: torch.from_numpy(simplejpeg.decode_jpeg(raw)).permute(2, 0, 1)
    return made


def plain(files: list[Path], decode: Callable[[bytes], torch.Tensor]) -> None:
    """Every file once, in batches of 8."""
    for start in range(0, COUNT, 8):
        torch.stack([F.resize(decode(path.read_bytes()), [SIDE], antialias=True) for path in files[start : start + 8]])


def ours(examples: data.Examples) -> None:
    """As many batches of the stream."""
    for n in range(0, COUNT, 8):
        examples[range(n, n + 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="photographs")
    photos = parser.parse_args().folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for side in (SIDE, 4 * SIDE):
            files = make(photos, folder := Path(place, str(side)), side)
            cfg = Data(train_data_dir=str(folder), resolution=SIDE, train_batch_size=8, memory_budget=0, center_crop=True)
            examples = data.Examples(sources.open_source(cfg), cfg, 0)

            ways = {"oneloop": functools.partial(ours, examples)}
            ways |= {name: functools.partial(plain, files, decode) for name, decode in loops().items()}
            best = dict.fromkeys(ways, float("inf"))
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    began = time.process_time()
                    way()
                    best[name] = min(best[name], time.process_time() - began)
            for name, seconds in best.items():
                speed, share = COUNT / seconds, seconds / best["oneloop"]
                print(f"{side} x {side}: {name:<12} {speed:6.0f} images a CPU second; oneloop has {share:.2f} of that")


if __name__ == "__main__":
    main()
