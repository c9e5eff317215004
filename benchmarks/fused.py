"""What the update in the backward pass saves: the peak memory and the CPU seconds of a step with it and without.

    python benchmarks/fused.py

A UNet from scratch, on a CPU, with AdamW and Adafactor, in float32 and in bf16 weights, without an EMA; each in a process of
its own. The peak is that after three whole steps, less what the interpreter holds before there is a model.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

CASES = {
    "AdamW": [],
    "Adafactor": ["--ddpm.optimizer", "adafactor"],
    "Adafactor, bf16 weights": ["--ddpm.optimizer", "adafactor", "--base.weights", "bf16", "--base.mixed-precision", "bf16"],
}
STEPS = 4
UNET = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [384, 768],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 2,
}


def measure(flags: list[str]) -> None:
    """Print [parameters, bytes at the peak, CPU seconds of a step] of a run with these flags."""
    from oneloop import loop
    from oneloop.machine.memory import peak_host
    from oneloop.settings import command_line
    from oneloop.tasks import ddpm

    _, cfg = command_line.parse(["ddpm", *flags])
    seen = []

    def loss_fn(*given):
        seen.append((peak_host(), time.process_time()))
        yield from ddpm.task.loss_fn(*given)

    before = peak_host()
    state = loop.run(dataclasses.replace(ddpm.task, loss_fn=loss_fn), cfg)
    count = sum(p.numel() for p in state.models["unet"].parameters())
    print(json.dumps([count, seen[-1][0] - before, (seen[-1][1] - seen[1][1]) / (STEPS - 2)]))


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "unet.json").write_text(json.dumps(UNET))
        run = f"--ddpm.model-config {place}/unet.json --ddpm.ddpm-num-inference-steps 1 --base.max-train-steps {STEPS}"
        run += " --base.no-use-ema --base.max-grad-norm 0 --base.logger none --base.validation-steps 0 --base.num-samples 1"
        run += " --data.num-shapes 8 --data.resolution 8 --data.train-batch-size 1"
        print("| | GiB | in the backward pass | bytes a parameter | | CPU s a step | |\n|---|---|---|---|---|---|---|")
        for name, flags in CASES.items():
            made = []
            for i, fused in enumerate(([], ["--base.fused-backward-pass"])):
                out = ["--base.output-dir", f"{place}/{len(name)}-{i}"]
                command = [sys.executable, __file__, "--measure", *run.split(), *flags, *fused, *out]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                made.append(json.loads(done.stdout.splitlines()[-1]))
            (count, plain, slow), (_, less, quick) = made
            numbers = " | ".join(f"{x * 2**30 / count:.1f}" for x in (plain, less))
            print(f"| {name} | {plain:.2f} | {less:.2f} | {numbers} | {slow:.2f} | {quick:.2f} |", flush=True)
        print(f"\n{count:,} parameters")


if __name__ == "__main__":
    measure(sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else main()
