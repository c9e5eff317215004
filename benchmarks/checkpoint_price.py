"""What the safety of a checkpoint costs: a state of 1 GiB written plainly, against a save that is flushed, hashed and renamed,
the latter beside the training.

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

    kinds = ("plain", "plain, on the disk", "safe, as the training waits", "safe, until it stands")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        with checkpoint.Saves(accelerator, folder, 1, lambda saved: None) as saves:
            for step in range(1, options.repeats + 1):
                for kind in kinds[:3]:
                    os.sync()
                    began = time.perf_counter()
                    if kind.startswith("safe"):
                        saves.save(step, {}, export)
                        times[kind].append(time.perf_counter() - began)
                        saves.settle()
                        kind = kinds[3]
                    else:
                        (folder / "plain" / "state").mkdir(parents=True)
                        accelerator.save_state(str(folder / "plain" / "state"))
                        export(folder / "plain")
                        for path in (folder / "plain").rglob("*") if kind != "plain" else ():
                            checkpoint._flush(path)
                    times[kind].append(time.perf_counter() - began)
                    shutil.rmtree(folder / "plain", ignore_errors=True)
    took = {kind: min(values) for kind, values in times.items()}  # what others do on the machine only adds
    for kind, seconds in took.items():
        print(f"{kind:<28} {seconds:7.2f} s   {options.mib / seconds:7.0f} MiB/s   {[round(t, 2) for t in times[kind]]}")
    plain, disk, waits, stands = took.values()
    print(
        f"{options.mib} MiB: the training waits {waits / plain - 1:+.0%} over the plain write; until it stands "
        f"{stands / plain - 1:+.0%}, and {stands / disk - 1:+.0%} over one that is on the disk"
    )


if __name__ == "__main__":
    main()
