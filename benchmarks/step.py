"""What the loop costs over a bare PyTorch loop of the same mathematics, in one interleaved run.

    python benchmarks/step.py examples/mnist.json --data.dataset-name ../shared/data/mnist
    BLOCKS=20 STEPS=4 python benchmarks/step.py ddpm

The arguments are those of loop.py, for the task ddpm. The run and the bare loop take turns in one process, STEPS steps each,
BLOCKS times; the figure is the median of the ratios of neighbours, so that a machine that others use too does not decide it.
The bare loop draws its pictures from memory and its noise from the global generator, and has the same model, precision, fused
AdamW, clipping, learning rates and EMA, and nothing else: no data order, no logging, no checks.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import configs
import data
import loop
from tasks import diffusion

BLOCKS, STEPS = int(os.environ.get("BLOCKS", 12)), int(os.environ.get("STEPS", 5))


def clock() -> tuple[float, float]:
    """Wall seconds, and seconds of all this process's threads."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def bare_loop(cfg, task, pictures, total):
    """The same mathematics with nothing around it: a generator that takes one optimizer step for each `next`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = task.make_models(cfg)["unet"].to(device).train()
    optimizer = task.make_optim({"unet": unet}, cfg)["unet"]
    params = list(unet.parameters())
    average = [p.detach().clone() for p in params]
    alphas = diffusion.alphas_cumprod(cfg.ddpm.ddpm_num_steps, cfg.ddpm.ddpm_beta_schedule, torch.device(device))
    rate, pictures = loop.schedule(cfg.base, total), pictures.to(device)
    bf16 = cfg.base.mixed_precision == "bf16" or (cfg.base.mixed_precision == "auto" and device.computes_bf16())
    for step in range(total):
        x = pictures[torch.randint(len(pictures), (cfg.data.train_batch_size,), device=device)].float() / 127.5 - 1
        noise, t = torch.randn_like(x), torch.randint(cfg.ddpm.ddpm_num_steps, (len(x),), device=device)
        a = alphas[t]
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            prediction = unet(diffusion.add_noise(x, noise, a), t, return_dict=False)[0]
        error = diffusion.mse(prediction, diffusion.target(cfg.ddpm.prediction_type, x, noise, a))
        (diffusion.loss_weight(cfg.ddpm.prediction_type, a, cfg.ddpm.snr_gamma) * error).mean().backward()
        torch.nn.utils.clip_grad_norm_(params, cfg.base.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.ddpm.learning_rate * rate(step)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.base.ema_decay, 1 - (1 + step) ** -cfg.base.ema_power)
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
        yield


def main() -> None:
    module, cfg = configs.parse(sys.argv[1:])
    total = (BLOCKS + 1) * STEPS  # the first block of each warms up
    base = dataclasses.replace(
        cfg.base, max_train_steps=total + 1, sample_steps=0, checkpointing_steps=10**9, output_dir=tempfile.mkdtemp(), logger=()
    )
    cfg = dataclasses.replace(cfg, base=base)
    examples = data.Examples(data.open_source(cfg.data), cfg.data, 0)
    bare = bare_loop(cfg, module.task, examples.cache, total)
    ours, theirs, begun = [], [], []

    def loss_fn(*arguments):
        """The task's own; between two blocks of the run it lets the bare loop have its turn."""
        if len(begun) % STEPS == 0:
            now = clock()
            if begun:
                ours.append([b - a for a, b in zip(begun[-STEPS], now, strict=True)])
            for _ in range(STEPS if len(ours) or not begun else 0):
                next(bare, None)
            then = clock()
            theirs.append([b - a for a, b in zip(now, then, strict=True)])
        begun.append(clock())
        return module.task.loss_fn(*arguments)

    loop.run(dataclasses.replace(module.task, loss_fn=loss_fn), cfg)
    ours, theirs = ours[1:], theirs[1 : len(ours)]
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {len(ours)} blocks of {STEPS} steps")
    print("| | wall ms a step | CPU ms a step |\n|---|---|---|")
    for name, rows in (("oneloop", ours), ("bare loop", theirs)):
        print(f"| {name} | " + " | ".join(f"{statistics.median(r[i] for r in rows) / STEPS * 1e3:.1f}" for i in (0, 1)) + " |")
    ratios = [statistics.median(o[i] / t[i] for o, t in zip(ours, theirs, strict=True)) for i in (0, 1)]
    print("| ratio, median of pairs | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
