"""What a step costs the host beside its model: CPU time of the thread that launches, which others on the machine leave alone.

    python benchmarks/host.py
    python benchmarks/host.py --batch 64 --weights 686 --profile 30

`ddpm` on the embedded shapes with its loss and noise, and in the place of its UNet `--weights` tensors of which one multiplies
the image. The forward pass, loss and backward pass are timed by themselves and subtracted; what is left is data, keys, checks,
clipping, AdamW, EMA and logging. Medians of `--steps` steps.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import io
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_names = tempfile.mkdtemp()
Path(_names, "oneloop").symlink_to(Path(__file__).parent.parent)
sys.path[:0] = [_names]

import torch

from oneloop import loop
from oneloop.settings import command_line

WARM = 50


class Multiplied(torch.nn.Module):
    """The image times one of the weights."""

    def __init__(self, weights: int):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(64)) for _ in range(weights)])

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        if len(self.weights) > 1:  # all have a gradient, at the cost of one operation
            x = x + 0 * torch.cat([*self.weights]).sum()
        return (x * self.weights[0][:1],)


def measure(given: argparse.Namespace, profiler: cProfile.Profile | None = None) -> tuple[float, float]:
    """CPU milliseconds of a step, and of its forward pass, loss and backward pass."""
    steps: list[float] = []
    passes: list[float] = []

    def loss_fn(*arguments: Any) -> Any:
        steps.append(time.thread_time())
        if profiler and len(steps) == WARM:
            profiler.enable()
        began = time.thread_time()
        for loss in module.task.loss_fn(*arguments):
            passes.append(time.thread_time() - began)
            yield loss

    def backward(*arguments: Any, **more: Any) -> None:
        began = time.thread_time()
        own(*arguments, **more)
        passes[-1] += time.thread_time() - began

    with tempfile.TemporaryDirectory() as folder:
        told = {"data.train-batch-size": given.batch, "base.max-train-steps": given.steps + WARM, "base.logger": "none"}
        told |= {"base.validation-steps": 0, "base.checkpointing-steps": 10**9, "base.output-dir": f"{folder}/out"}
        module, cfg = command_line.parse(["ddpm", *(str(word) for k, v in told.items() for word in (f"--{k}", v))])
        task = dataclasses.replace(
            module.task,
            make_models=lambda cfg: {"unet": Multiplied(given.weights)},
            loss_fn=loss_fn,
            sample_fn=lambda models, examples, rng, cfg: {"samples": torch.zeros(len(rng), 3, 8, 8)},
            export_fn=lambda models, examples, path, cfg: path.mkdir(exist_ok=True) or "",
            remarks=lambda models, cfg: (),
        )
        own, torch.Tensor.backward = torch.Tensor.backward, backward
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                loop.run(task, cfg)
        finally:
            torch.Tensor.backward = own
            if profiler:
                profiler.disable()
    whole = [1e3 * (b - a) for a, b in zip(steps[WARM:], steps[WARM + 1 :], strict=False)]
    return statistics.median(whole), 1e3 * statistics.median(passes[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--weights", type=int, default=1, help="tensors that train; a UNet of SD 1.5 has 686")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", type=int, default=0, help="functions to show, by their own time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    whole, passes = measure(given)
    print(
        f"{whole:.2f} ms a step, {passes:.2f} of it forward pass, loss and backward pass: {whole - passes:.2f} beside the model"
    )
    if given.profile:
        measure(given, profiler := cProfile.Profile())
        pstats.Stats(profiler).sort_stats("tottime").print_stats(given.profile)


if __name__ == "__main__":
    main()
