"""Short runs on the embedded shapes, by how well they denoise: what is worth a run that is judged by its samples.

    python -m benchmarks.denoising base rate-4e-3 --steps 400
    python -m benchmarks.denoising batch-8 --steps 700
    python -m benchmarks.denoising best

A line of JSON for each variant: the CPU seconds of its training alone, in a bare loop on one thread, and the root mean square
error of the clean image, in levels of 255, at ten noise levels, over 256 drawings that were not trained on: it varies far less
than what samples score. `best` trains nothing: it is the least error that there can be, of the mean over all drawings that may
lie under the noise. The schedule is squaredcos_cap_v2, and the EMA is what denoises.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from oneloop.inputs.shapes import draw_shape
from oneloop.maths import diffusion
from oneloop.training.ema import decay_at

SIDE, SIZE, LEVELS = 16, 2560, (50, 200, 400, 500, 600, 700, 800, 850, 900, 950)
USUAL: dict[str, Any] = {"unet": {}, "batch": 16, "rate": 2e-3, "predicts": "sample", "gamma": 1.0}
USUAL |= {"betas": (0.9, 0.99), "falls": "cosine", "power": 0.75}
PLAIN = {"down_block_types": [*2 * ["DownBlock2D"], "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", *2 * ["UpBlock2D"]]}
UNET = {  # the default when these were measured
    "layers_per_block": 1,
    "block_out_channels": [24, 48, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "rate-4e-3": {"rate": 4e-3},
    "scale-shift": {"unet": {"resnet_time_scale_shift": "scale_shift"}},
    "wide": {"unet": {"block_out_channels": [16, 64, 128], **PLAIN}},
    "batch-8": {"batch": 8},
    "batch-8-v": {"batch": 8, "predicts": "v_prediction"},
    "today": {"batch": 8, "betas": (0.8, 0.95), "falls": "linear", "power": 0.6},
    "batch-8-small": {"batch": 8, "unet": {"block_out_channels": [16, 32, 64], **PLAIN}},
}
"""Variant -> what it changes of USUAL, and of the UNet."""


def drawings(first: int, count: int) -> Tensor:
    """Embedded shapes from number `first` on, [count, 3, SIDE, SIDE] in [-1, 1]."""
    images = [torch.from_numpy(draw_shape(i, SIDE)[0]) for i in range(first, first + count)]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(
    steps: int, seed: int, unet: dict, batch: int, rate: float, predicts: str, gamma: float, **optimizer: Any
) -> UNet2DModel:
    """The EMA of a run of so many steps."""
    drawn, data, order = torch.Generator().manual_seed(seed), drawings(0, SIZE), []
    torch.manual_seed(seed)
    model = UNet2DModel(**(UNET | unet), sample_size=SIDE).train()
    params, alphas = list(model.parameters()), diffusion.alphas_cumprod(1000, "squaredcos_cap_v2", "cpu")
    optim = torch.optim.AdamW(params, rate, betas=optimizer["betas"], weight_decay=1e-2, fused=True)
    average, warmup = [p.detach().clone() for p in params], steps // 20
    for step in range(steps):
        if len(order) < batch:
            order += torch.randperm(SIZE, generator=drawn).tolist()
        x, order = data[order[:batch]], order[batch:]
        rising, passed = step / warmup if warmup else 1.0, (step - warmup) / (steps - warmup)
        falling = math.cos(math.pi * passed) / 2 + 0.5 if optimizer["falls"] == "cosine" else 1 - passed
        optim.param_groups[0]["lr"] = rate * (rising if step < warmup else falling)
        noise, t = torch.randn(x.shape, generator=drawn), (torch.rand(batch, generator=drawn) * 1000).long()
        a = alphas[t]
        error = model(diffusion.add_noise(x, noise, a), t, return_dict=False)[0] - diffusion.target(predicts, x, noise, a)
        (diffusion.loss_weight(predicts, a, gamma) * error.square().flatten(1).mean(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optim.step()
        optim.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - decay_at(step + 1, 0.9999, optimizer["power"]))
    with torch.no_grad():
        torch._foreach_copy_(params, average)
    return model.eval()


@torch.no_grad()
def errors(denoise: Callable[[Tensor, int, Tensor], Tensor]) -> list[float]:
    """Root mean square error at each of LEVELS of (x_t, t, alpha-bar) -> the clean image."""
    drawn, x, found = torch.Generator().manual_seed(5), drawings(3000, 256), []
    for t in LEVELS:
        a = diffusion.alphas_cumprod(1000, "squaredcos_cap_v2", "cpu")[t]
        x_t = diffusion.add_noise(x, torch.randn(x.shape, generator=drawn), a.expand(len(x)))
        found.append(round((denoise(x_t, t, a).clamp(-1, 1) - x).square().mean().sqrt().item() * 127.5, 1))
    return found


def denoiser(model: UNet2DModel, predicts: str) -> Callable[[Tensor, int, Tensor], Tensor]:
    """What a model says of the clean image."""

    def denoise(x_t: Tensor, t: int, a: Tensor) -> Tensor:
        y, signal, rest = model(x_t, torch.full((len(x_t),), t)).sample, a.sqrt(), (1 - a).sqrt()
        return {"sample": y, "v_prediction": signal * x_t - rest * y, "epsilon": (x_t - rest * y) / signal}[predicts]

    return denoise


def best(count: int = 40_000) -> Callable[[Tensor, int, Tensor], Tensor]:
    """The posterior mean, with so many other drawings for all that there may be."""
    every = drawings(10**7, count)
    flat, size = every.flatten(1), every.square().sum((1, 2, 3))

    def denoise(x_t: Tensor, t: int, a: Tensor) -> Tensor:
        likely = (a.sqrt() * x_t.flatten(1) @ flat.T - a / 2 * size) / (1 - a)  # its logarithm, up to what is the same for all
        return (likely.softmax(1) @ flat).view_as(x_t)

    return denoise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=[*VARIANTS, "best"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed in itertools.product(given.variants, given.seeds):
        line = {"variant": name, "seed": seed}
        if name == "best":
            denoise = best()
        else:
            settings, before = USUAL | VARIANTS[name], time.process_time()
            denoise = denoiser(trained(given.steps, seed, **settings), settings["predicts"])
            line |= {"steps": given.steps, "CPU seconds": round(time.process_time() - before, 1)}
        print(json.dumps(line | {"errors": errors(denoise)}), flush=True)


if __name__ == "__main__":
    main()
