"""What the precision does to a loss: `ddpm` on shapes in float32, in bf16 under autocast, and with weights in bf16.

    python benchmarks/precisions.py [steps]

Each seed trains the smallest model at 16x16 in the three precisions, on the same examples with the same noise; the last
validation's loss is on held-out shapes at fixed timesteps, of the weights and of their EMA.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from oneloop import loop
from oneloop.settings import command_line

KINDS = {
    "float32": ["--base.mixed-precision", "no"],
    "bf16, autocast": ["--base.mixed-precision", "bf16"],
    "bf16, weights bf16": ["--base.mixed-precision", "bf16", "--base.weights", "bf16"],
}
SEEDS = (0, 1, 2)


def main() -> None:
    steps = sys.argv[1] if sys.argv[1:] else "300"
    run = f"--base.max-train-steps {steps} --base.validation-steps 0 --base.num-samples 1 --base.logger none"
    run += " --data.resolution 16 --data.train-batch-size 16 --data.num-shapes 1000 --data.validation-split 0.2"
    run += " --ddpm.ddpm-num-inference-steps 1"
    print("| | " + " | ".join(f"seed {seed}: loss, of the EMA" for seed in SEEDS) + " |\n|---" + "|---" * len(SEEDS) + "|")
    for name, flags in KINDS.items():
        cells = []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as out:
                module, cfg = command_line.parse(
                    ["ddpm", *run.split(), *flags, "--base.seed", str(seed), "--base.output-dir", f"{out}/run"]
                )
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    loop.run(module.task, cfg)
                lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
            last = [line for line in lines if any("validation" in key or key.endswith("loss_ema") for key in line)][-1]
            cells.append(", ".join(f"{value:.5f}" for key, value in sorted(last.items()) if "loss" in key))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
