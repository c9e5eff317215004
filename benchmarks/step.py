"""What a step of the loop costs over a bare PyTorch loop of the same mathematics, in one interleaved run.

    python benchmarks/step.py ddpm examples/mnist.json --data.dataset-name ../shared/data/mnist
    BLOCKS=20 STEPS=4 python benchmarks/step.py ddpm

The arguments are those of loop.py. The run, the bare loop (benchmarks/bare.py) and that loop's forward and backward passes
alone take turns in one process, STEPS steps each, BLOCKS times; a figure is the median of the ratios of neighbours, so that a
machine that others use too does not decide it. The FLOPs of a step are counted by torch, and their limit is what a large
product of matrices of the same type reaches in the same minute. The last line has it all as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from oneloop.settings import command_line

if __name__ == "__main__":
    MODULE, CONFIG = command_line.parse(sys.argv[1:])

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare import bare_loop, precision
from oneloop import loop

BLOCKS, STEPS = int(os.environ.get("BLOCKS", 12)), int(os.environ.get("STEPS", 5))


def clock() -> tuple[float, float]:
    """Wall seconds, and seconds of all this process's threads."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def matmul_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices, the best of several."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    a, times = torch.randn(side, side, device=device).to(dtype), []
    for _ in range(12):
        began = clock()[0]
        a @ a
        times.append(clock()[0] - began)
    return 2 * side**3 / min(times)


def measure(task: Any, cfg: Any) -> dict[str, Any]:
    """The figures of one task and its settings."""
    total, size = (BLOCKS + 1) * STEPS, cfg.data.train_batch_size  # the first block of each warms up
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"validation_steps": 0, "num_samples": 1, "checkpointing_steps": 10**9, "logger": (), "output_dir": folder}
        cfg = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, max_train_steps=total + 1, **quiet))
        others = {"bare": bare_loop(cfg, task, total), "model": bare_loop(cfg, task, total, update=False)}
        rows: dict[str, list[tuple[float, ...]]] = {"oneloop": [], "bare": [], "model": []}
        begun: list[tuple[float, float]] = []

        def timed(name: str, began: tuple[float, float]) -> None:
            rows[name].append(tuple(b - a for a, b in zip(began, clock(), strict=True)))

        def loss_fn(*arguments: Any) -> Any:
            """The task's own; between two blocks of the run it lets the others have their turn."""
            if len(begun) % STEPS == 0 and len(begun) < total:
                if begun:
                    timed("oneloop", begun[-STEPS])
                for name, steps in others.items():
                    now = clock()
                    for _ in range(STEPS):
                        next(steps, None)
                    timed(name, now)
            begun.append(clock() if len(begun) % STEPS == 0 else (0.0, 0.0))
            return task.loss_fn(*arguments)

        loop.run(dataclasses.replace(task, loss_fn=loss_fn), cfg)
        others.clear()  # they hold a model each
        again = bare_loop(cfg, task, total, update=False)
        next(again)  # what is made once, such as encodings, is no part of a step
        with FlopCounterMode(display=False) as counter:
            next(again)
    ours, bare, model = (rows[name][1:BLOCKS] for name in rows)
    median = lambda i, a, b: statistics.median(x[i] / y[i] for x, y in zip(a, b, strict=True))  # noqa: E731
    wall = statistics.median(row[0] for row in ours) / STEPS
    chosen = precision(cfg)
    limit = matmul_speed({"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen])
    return {
        "precision": chosen,
        "batch": size,
        "blocks": len(ours),
        "steps": STEPS,
        "over_bare": median(0, ours, bare),
        "over_bare_cpu": median(1, ours, bare),
        "outside_model": 1 - median(0, model, ours),
        "steps_per_second": 1 / wall,
        "images_per_second": size / wall,
        "flops": counter.get_total_flops(),
        "limit": limit,
        "mfu": counter.get_total_flops() / wall / limit,
    }


def main() -> None:
    found = measure(MODULE.task, CONFIG)
    threads, chosen = torch.get_num_threads(), found["precision"]
    print(f"\ntorch {torch.__version__}, {threads} threads, precision {chosen}, {found['blocks']} blocks of {STEPS} steps")
    print(f"over the bare loop: wall {found['over_bare']:.3f}, CPU seconds {found['over_bare_cpu']:.3f}")
    print(f"outside the model {found['outside_model']:.1%}; {found['mfu']:.1%} of the FLOP/s of a product of matrices")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
