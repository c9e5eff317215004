"""What the encode cache saves: the same loss with it and without, in one interleaved run on the same tiny folder.

    python benchmarks/lora_cache.py [sd|sdxl] [--rounds 30]

Prints the time of a training step (loss, gradients, AdamW) with latents and text states read from the cache over that with
images and captions encoded in the step, medians over interleaved rounds, and the share of each step that is not the UNet.
The models are the random ones of tests/tiny_models.py, where what is small in a real model is large and the other way round:
the ratio says that the code saves what it should, not how much a real checkpoint gains.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models
import torch
from accelerate import Accelerator

from oneloop import data
from oneloop.configs import Base, Data
from oneloop.inputs import sources
from oneloop.tasks import Rng, lora


class Clock:
    """Seconds spent in a module's forward and backward pass."""

    def __init__(self, module: torch.nn.Module):
        self.total = self.since = 0.0
        module.register_forward_pre_hook(lambda *_: self.start())
        module.register_forward_hook(lambda *_: self.stop())

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.total += time.perf_counter() - self.since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", default="sd", choices=("sd", "sdxl"))
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny_models.build(Path(folder), given.kind))
        cfg = lora.Config(
            Base(output_dir=folder),
            Data(num_shapes=64, resolution=32, train_batch_size=4),
            lora.Settings(pretrained_model_name_or_path=model),
        )
        models, encodings = lora.make_models(cfg), lora.task.encodings
        (optimizer,) = lora.make_optim(models, cfg).values()
        live = data.Examples(sources.open_for(lora.task, cfg), cfg.data, 0)
        cached = data.Examples(live.source, cfg.data, 0)
        began = time.perf_counter()
        encodings.encode_once(cached, encodings, models, cfg, Accelerator(cpu=True), print)
        once = time.perf_counter() - began
        unet = Clock(models["unet"])

        def step(examples: data.Examples, n: int) -> tuple[float, float, float]:
            """Seconds of the step, of its part in the UNet, and the loss. The backward pass is the UNet's alone."""
            unet.total, began = 0.0, time.perf_counter()
            batch = encodings.encode(encodings, models, data.to_device(examples[range(n, n + 4)], "cpu"), cfg)
            (loss,) = lora.loss_fn(models, batch, Rng.of(0, range(n, n + 4)), cfg)
            back = time.perf_counter()
            loss.value.backward()
            unet.total += time.perf_counter() - back
            optimizer.zero_grad()
            return time.perf_counter() - began, unet.total, loss.value.item()

        times: dict[str, list[tuple[float, float, float]]] = {"cached": [], "live": []}
        for n in range(-3, given.rounds):
            for name, examples in (("cached", cached), ("live", live))[:: 1 if n % 2 else -1]:
                measured = step(examples, 4 * max(n, 0))
                if n >= 0:
                    times[name].append(measured)
        print(f"{given.kind}: 64 images encoded once in {once:.2f} s; {given.rounds} interleaved rounds of 4 images")
        for name, rows in times.items():
            whole, inside, loss = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{name:7} {whole * 1e3:7.2f} ms a step, {1 - inside / whole:5.1%} of it not the UNet, loss {loss:.6f}")
        ratio = statistics.median(a[0] / b[0] for a, b in zip(times["live"], times["cached"], strict=True))
        apart = max(abs(a[2] - b[2]) / a[2] for a, b in zip(times["live"], times["cached"], strict=True))
        print(f"live / cached {ratio:.2f}; the losses differ by at most {apart:.1e} of their size")


if __name__ == "__main__":
    main()
