"""What the safety of a checkpoint costs: a state of 1 GiB written plainly, against a save that is flushed, hashed and renamed.

    python benchmarks/checkpoint_price.py --mib 1024 --folder somewhere/on/the/disk

'Plain' writes the same files and leaves them to the operating system; 'plain, on the disk' waits until they are there, which
is the least that anything safe can cost. The last line is the table's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of a checkpoint")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the disk matters")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    # Weights, averages, two moments of the optimizer, and the export: five times the weights.
    count = options.mib * 2**20 // 4 // 5
    model = torch.nn.Linear(1024, count // 1024, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, optimizer)
    ema = {"model.weight": model.weight.detach().clone()}
    checkpoint.attach(accelerator, {"model": model}, ema)

    def export(folder: Path) -> None:
        save_file({"weight": model.weight.detach()}, folder / "model.safetensors")

    times: dict[str, list[float]] = {"plain": [], "plain, on the disk": [], "safe": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        for step in range(1, options.repeats + 1):
            for kind in times:
                os.sync()
                started = time.perf_counter()
                if kind == "safe":
                    checkpoint.save(accelerator, folder, step, {}, export, 1)
                else:
                    (folder / "plain" / "state").mkdir(parents=True)
                    accelerator.save_state(str(folder / "plain" / "state"))
                    export(folder / "plain")
                    if kind != "plain":
                        for path in (folder / "plain").rglob("*"):
                            checkpoint._flush(path)
                times[kind].append(time.perf_counter() - started)
                shutil.rmtree(folder / "plain", ignore_errors=True)
    took = {kind: min(values) for kind, values in times.items()}  # what others do on the machine only adds
    for kind, seconds in took.items():
        print(f"{kind:<20} {seconds:7.2f} s   {options.mib / seconds:7.0f} MiB/s   {[round(t, 2) for t in times[kind]]}")
    over, disk = took["safe"] / took["plain"] - 1, took["safe"] / took["plain, on the disk"] - 1
    print(f"{options.mib} MiB: {over:+.0%} over the plain write, {disk:+.0%} over one that is on the disk")


if __name__ == "__main__":
    main()
