"""What the safety of a checkpoint costs: a state of 1 GiB written plainly, against a save that is flushed, hashed and renamed,
the latter beside the training.

    python benchmarks/checkpoint_price.py --mib 1024 --folder somewhere/on/the/disk

'Plain' writes the same files and leaves them to the operating system; 'plain, on the disk' waits until they are there, which
is the least that anything safe can cost. 'Copied' clones the same tensors in the machine's memory, which is the least that any
save beside the training has to wait for. The last line is the table's.
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

from oneloop import checkpoint


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

    facts = {"task": "none", "examples": 0, "skipped": 0, "settings": {}}

    def export(folder: Path) -> None:
        save_file({"weight": model.weight.detach()}, folder / "model.safetensors")

    def copied() -> list[torch.Tensor]:
        (moments,) = optimizer.state.values()
        own = (model.weight.detach(), ema["model.weight"], moments["exp_avg"], moments["exp_avg_sq"], model.weight.detach())
        return [x.clone() for x in own]

    kinds = ("copied", "plain", "plain, on the disk", "safe, as the training waits", "safe, until it stands")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        with checkpoint.Saves(accelerator, folder, 1, lambda saved: None) as saves:
            for step in range(1, options.repeats + 1):
                for kind in kinds[:4]:
                    os.sync()
                    began = time.perf_counter()
                    if kind == "copied":
                        copied()
                    elif kind.startswith("safe"):
                        saves.save(step, facts, export)
                        times[kind].append(time.perf_counter() - began)
                        saves.settle()
                        kind = kinds[4]
                    else:
                        (folder / "plain" / "state").mkdir(parents=True)
                        accelerator.save_state(str(folder / "plain" / "state"))
                        export(folder / "plain")
                        for path in (folder / "plain").rglob("*") if kind != "plain" else ():
                            checkpoint.flush(path)
                    times[kind].append(time.perf_counter() - began)
                    shutil.rmtree(folder / "plain", ignore_errors=True)
    took = {kind: min(values) for kind, values in times.items()}  # what others do on the machine only adds
    for kind, seconds in took.items():
        print(f"{kind:<28} {seconds:7.2f} s   {options.mib / seconds:7.0f} MiB/s   {[round(t, 2) for t in times[kind]]}")
    copy, plain, disk, waits, stands = took.values()
    print(
        f"{options.mib} MiB: the training waits {waits / copy:.2f} times as long as a copy in memory takes, and "
        f"{waits / plain - 1:+.0%} over the plain write; until it stands {stands / plain - 1:+.0%}, "
        f"and {stands / disk - 1:+.0%} over one that is on the disk"
    )


if __name__ == "__main__":
    main()
