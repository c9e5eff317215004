"""The loss of a run against its steps, as an SVG: python benchmarks/curve.py runs/mnist loss.svg

Needs matplotlib.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def main(out: str, svg: str) -> None:
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.semilogy([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="optimizer steps", ylabel="loss", title=Path(out).name)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(svg, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
