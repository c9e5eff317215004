"""diffusers' train_unconditional.py and the task `ddpm`, trained on the same digits and judged by the same classifier.

    python -m benchmarks.unconditional CHECKOUT_OF_DIFFUSERS --data-dir path/to/mnist --epochs 3 --seeds 0 1 2

The script itself runs, of the checkout's examples: with its defaults, and with the rate of `ddpm`, a warm-up of 42 steps and
an EMA. Both train the default UNet of `ddpm` at 16x16 in batches of 32. A line of JSON for each program and seed: the CPU
seconds of its training (all threads, from the first import to the export), and what its samples scored: of the script 256 that
its pipeline draws in --draw steps of its own schedule, judged by `python loop.py evaluate RUN --images`. What is complete is
not done again, so a call that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from oneloop.benchmarks.defaults import evaluate, scores, train
from oneloop.families.scratch import DEFAULT_UNET

SCRIPT = "examples/unconditional_image_generation/train_unconditional.py"
PROGRAMS: dict[str, list[str] | None] = {
    "ours": None,
    "script": [],
    "script, 2e-3": ["--learning_rate", "2e-3", "--lr_warmup_steps", "42", "--use_ema"],
}
"""Program -> what it changes of the script's defaults; None: it is not the script."""
SEEDED = """
import runpy, sys
import diffusers.utils, torch
diffusers.utils.check_min_version = lambda version: None
torch.manual_seed(int(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The script has no seed, and its checkout may ask for a diffusers that is not released yet."""
DRAW = """
import os, sys
import torch
from diffusers import DDPMPipeline
folder, to, steps, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
os.makedirs(to, exist_ok=True)
pipeline = DDPMPipeline.from_pretrained(folder)
for first in range(0, 256, 64):
    drawn = torch.Generator().manual_seed(1000 * seed + first)
    images = pipeline(batch_size=64, generator=drawn, num_inference_steps=steps).images
    for n, image in enumerate(images, first):
        image.save(f"{to}/{n:03}.png")
"""


def script(checkout: str, out: Path, seed: int, given: argparse.Namespace, flags: list[str]) -> float:
    """Train by the script; the CPU seconds that it took, those of an earlier call where it is complete."""
    kept = out.with_name(f"{out.name}.cpu")
    if not kept.is_file():
        shutil.rmtree(out, ignore_errors=True)
        config = out.with_name("unet")
        config.mkdir(parents=True, exist_ok=True)
        unet = DEFAULT_UNET | {"_class_name": "UNet2DModel", "sample_size": 16}
        (config / "config.json").write_text(json.dumps(unet))
        usual = ["--dataset_name", given.data_dir, "--model_config_name_or_path", str(config), "--output_dir", str(out)]
        usual += ["--resolution", "16", "--train_batch_size", "32", "--num_epochs", str(given.epochs)]
        usual += ["--eval_batch_size", "1", "--ddpm_num_inference_steps", "1", "--checkpointing_steps", "1000000"]
        usual += [
            "--save_model_epochs",
            "1000",
            "--save_images_epochs",
            "1000",
        ]  # at the first and the last epoch it draws in any case
        before = sum(os.times()[2:4])
        subprocess.run([sys.executable, "-c", SEEDED, str(seed), str(Path(checkout) / SCRIPT), *usual, *flags], check=True)
        kept.write_text(f"{sum(os.times()[2:4]) - before:.0f}")
    return float(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="of diffusers, with its folder examples")
    parser.add_argument("--data-dir", default="ylecun/mnist", help="a data set with the splits train and test")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=PROGRAMS)
    parser.add_argument("--draw", type=int, default=250, help="steps in which the script's samples are drawn")
    parser.add_argument("--to", default="runs/unconditional", help="the folder of the runs")
    given = parser.parse_args()
    digits = ["--data.dataset-name", given.data_dir, "--data.validation-split", "test", "--data.train-batch-size", "32"]
    judge = Path(given.to) / f"ours-{given.epochs}-{given.seeds[0]}"
    for seed in given.seeds:
        for name, flags in PROGRAMS.items():
            out = Path(given.to) / f"{name.replace(', ', '-')}-{given.epochs}-{seed}"
            if flags is None:
                if given.only and name not in given.only and out != judge:
                    continue
                cpu = train("ddpm", out, ["--base.num-epochs", str(given.epochs), "--base.seed", str(seed), *digits])
                result = evaluate(out, [])
            elif given.only and name not in given.only:
                continue
            else:
                cpu, images = script(given.checkout, out, seed, given, flags), Path(f"{out}-{given.draw}")
                if not (images / "255.png").is_file():
                    drawn = [str(out), str(images), str(given.draw), str(seed)]
                    subprocess.run([sys.executable, "-c", DRAW, *drawn], check=True)
                result = evaluate(judge, ["--images", str(images)])
            print(json.dumps({"program": name, "seed": seed, "cpu seconds": cpu} | scores(result)), flush=True)


if __name__ == "__main__":
    main()
