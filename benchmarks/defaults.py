"""What default settings were chosen by: variants trained, and judged by `python loop.py evaluate`.

    python -m benchmarks.defaults shapes --steps 600 --only base gamma-0.1
    python -m benchmarks.defaults mnist --steps 100 --data-dir path/to/mnist
    python -m benchmarks.defaults classes --steps 1125 --data-dir path/to/mnist

A line of JSON for each variant and seed: the CPU seconds of its training (all threads, from the first import to the export),
and what its samples scored. Variants run one after another in processes of their own; a run that is complete is not trained
again, so a call that was stopped goes on. CPU seconds depend on the machine and on what else it does: compare those of one
call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

BEFORE = ["--ddpm.adam-beta1", "0.9", "--ddpm.adam-beta2", "0.99", "--base.lr-scheduler", "cosine", "--base.ema-power", "0.75"]
"""The defaults before these: how the rate falls, how long the EMA is, AdamW's betas."""
SHAPES = {
    "base": [],
    "v": ["--ddpm.prediction-type", "v_prediction", "--ddpm.snr-gamma", "5"],
    "gamma-0.1": ["--ddpm.snr-gamma", "0.1"],
    "rate-4e-3": ["--ddpm.learning-rate", "4e-3"],
    "beta1-0.6": ["--ddpm.adam-beta1", "0.6"],
    "before": BEFORE,
    "betas": ["--base.lr-scheduler", "cosine", "--base.ema-power", "0.75"],
    "ema": [*BEFORE, "--base.ema-power", "0.6"],
    "batch-16": [*BEFORE, "--data.train-batch-size", "16"],
}
OFFICIAL = [*BEFORE, "--ddpm.prediction-type", "epsilon", "--ddpm.ddpm-beta-schedule", "linear", "--ddpm.snr-gamma", "None"]
MNIST = {
    "ours": [],
    "before": BEFORE,
    "official, 1e-4": [*OFFICIAL, "--ddpm.learning-rate", "1e-4"],
    "official, 2e-3": [*OFFICIAL, "--ddpm.learning-rate", "2e-3"],
}
"""Variant -> what it changes of the defaults of `ddpm`."""
EDM, DIT = ([flag.replace("ddpm", task) for flag in BEFORE] for task in ("edm", "dit"))
CLASSES = {
    "ddpm": ["--ddpm.class-conditional"],
    "ddpm, gamma 0.3": ["--ddpm.class-conditional", "--ddpm.snr-gamma", "0.3"],
    "edm": ["--edm.class-conditional"],
    "edm, p-mean -0.4": ["--edm.class-conditional", "--edm.p-mean", "-0.4"],
    "edm, p-mean -1.2": ["--edm.class-conditional", "--edm.p-mean", "-1.2"],
    "edm, before": ["--edm.class-conditional", *EDM, "--edm.p-mean", "-1.2"],
    "dit": [],
    "dit, before": DIT,
    "dit, muon": ["--dit.optimizer", "muon", "--dit.learning-rate", "3e-3"],
}
"""Task -> what it changes of its defaults, to train by class."""
QUIET = ["--base.logger", "none", "--base.validation-steps", "0", "--base.checkpointing-steps", "1000000"]


def train(task: str, out: Path, flags: list[str]) -> float:
    """Train in a process of its own; the CPU seconds that it took, those of an earlier call where the run is complete."""
    kept = out.with_name(f"{out.name}.cpu")
    if not kept.is_file():
        before = sum(os.times()[2:4])
        done = subprocess.run([sys.executable, "-m", "oneloop", task, "--base.output-dir", str(out), *QUIET, *flags])
        if done.returncode:
            raise SystemExit(done.returncode)
        kept.write_text(f"{sum(os.times()[2:4]) - before:.0f}")
    return float(kept.read_text())


def evaluate(out: Path, flags: list[str]) -> dict:
    """What `python loop.py evaluate` says of the run."""
    done = subprocess.run([sys.executable, "-m", "oneloop", "evaluate", str(out), *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(Path(done.stdout.rstrip().rpartition("judged: ")[2]).read_text())


def scores(result: dict) -> dict[str, float]:
    """The figures of a result, without their intervals."""
    features = {f"{k}/{n}": v["value"] for k, kind in result["features"].items() for n, v in kind["samples"].items()}
    floors = {f"{k}/frechet floor": kind["floor"]["frechet"]["value"] for k, kind in result["features"].items()}
    drawn = {name: value["value"] for name, value in result.get("drawings", {}).get("samples", {}).items()}
    return {k: float(f"{v:.4g}") for k, v in (features | floors | drawn | {"copies": result["copies"]["value"]}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shapes", "mnist", "classes"))
    parser.add_argument("--steps", type=int, help="of each run; none: as many as are usual")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--only", nargs="+", help="some of the variants")
    parser.add_argument("--data-dir", default="ylecun/mnist", help="mnist, classes: a data set with the splits train and test")
    parser.add_argument("--to", default="runs/defaults", help="the folder of the runs")
    given = parser.parse_args()
    variants: dict[str, list[str]] = {"shapes": SHAPES, "mnist": MNIST, "classes": CLASSES}[given.what]
    if unknown := set(given.only or ()) - variants.keys():
        parser.error(f"--only: {', '.join(unknown)}; expected some of {', '.join(variants)}")
    size = "32" if given.what == "mnist" else "8"
    digits = ["--data.dataset-name", given.data_dir, "--data.validation-split", "test", "--data.train-batch-size", size]
    for name in given.only or variants:
        for seed in given.seeds:
            out = Path(given.to) / f"{given.what}-{name.replace(', ', '-')}-{given.steps or 'usual'}-{seed}"
            length = ["--base.max-train-steps", str(given.steps)] if given.steps else []
            flags = [*length, "--base.seed", str(seed), *variants[name], *(digits if given.what != "shapes" else [])]
            cpu = train(name.partition(",")[0] if given.what == "classes" else "ddpm", out, flags)
            result = evaluate(out, ["--num", str(given.num)])
            line = {"variant": name, "steps": result["step"], "seed": seed, "cpu seconds": cpu}
            print(json.dumps(line | scores(result)), flush=True)


if __name__ == "__main__":
    main()
