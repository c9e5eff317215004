"""A teacher of the embedded shapes, a student that draws in four steps, and a preference for red: what the exact reader says.

    python -m benchmarks.few_steps FOLDER [teacher student preference judge]

Trains in the folder, with the tasks as they are, a Stable Diffusion of 16x16 pixels (benchmarks/pixels.py): `finetune
--finetune.from-scratch` on captioned shapes, `lcm` with it as the teacher, and `dpo` on pairs of shapes of which the red one is
preferred, under captions of the other. Then 256 samples of each are read (evaluation/drawings.py). What is there is kept, and
runs are resumed.

    named       share of samples that clearly are one of the 180 drawings
    coverage    share of the 180 kinds that are named at least once; of as many drawings, the interval beside it
    kinds       of shape and size, of which there are six
    red         share whose shape is nearest to a red one
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.pixels import SIDE, build

ROOT = Path(__file__).parent.parent
SAMPLES, UNSEEN = 256, 10**6
"""Captions of samples are those of shapes from this number on, which were not trained on."""
GUIDANCE = 2.0
COMMON = ("--base.logger", "none", "--base.validation-steps", "0", "--base.num-samples", "16", "--data.resolution", str(SIDE))


def run(*argv: Any) -> None:
    """A command of the program."""
    subprocess.run([sys.executable, str(ROOT / "loop.py"), *map(str, argv)], check=True)


def teacher(folder: Path) -> None:
    """Until it is a pipeline, in `teacher`."""
    build(folder / "random") if not (folder / "random").exists() else None
    own = ("--finetune.pretrained-model-name-or-path", folder / "random", "--finetune.from-scratch", "--finetune.snr-gamma", 1)
    own += ("--finetune.learning-rate", 2e-3, "--finetune.adam-beta2", 0.99, "--finetune.num-inference-steps", 25)
    own += ("--finetune.train-text-encoder", "--finetune.text-encoder-learning-rate", 2e-3)
    own += ("--finetune.guidance-scale", GUIDANCE, "--data.num-shapes", 16384, "--data.train-batch-size", 16)
    own += ("--data.caption-dropout", 0.3, "--base.max-train-steps", 4500, "--base.no-validate-first")
    run("finetune", *COMMON, *own, "--base.output-dir", folder / "teacher-run")
    if not (folder / "teacher").exists():
        run("merge", folder / "teacher-run", "--to", folder / "teacher", "--dtype", "float32")


def student(folder: Path) -> None:
    """In `student-run`."""
    own = ("--lcm.pretrained-model-name-or-path", folder / "teacher", "--lcm.trains", "all", "--lcm.learning-rate", 5e-4)
    own += ("--lcm.w-min", GUIDANCE - 1, "--lcm.w-max", GUIDANCE - 1, "--lcm.adam-beta2", 0.99, "--data.num-shapes", 16384)
    own += ("--data.train-batch-size", 16, "--base.max-train-steps", 800, "--base.no-validate-first")
    run("lcm", *COMMON, *own, "--base.output-dir", folder / "student-run")


def preference(folder: Path) -> None:
    """In `preference-run`."""
    draw_pairs(folder)
    own = ("--dpo.pretrained-model-name-or-path", folder / "teacher", "--dpo.rejected-data-dir", folder / "worse")
    own += ("--data.train-data-dir", folder / "better", "--dpo.learning-rate", 1e-3, "--dpo.beta", 500, "--dpo.rank", 8)
    own += ("--data.train-batch-size", 16, "--base.max-train-steps", 240, "--base.no-validate-first")
    own += ("--dpo.num-inference-steps", 25, "--dpo.guidance-scale", GUIDANCE, "--dpo.target-modules", "all-linear")
    run("dpo", *COMMON, *own, "--base.output-dir", folder / "preference-run")


def draw_pairs(folder: Path, count: int = 1024) -> None:
    """Shapes that are not red, each under its caption in `worse`, and in `better` the same in red."""
    import numpy as np
    from PIL import Image

    from oneloop.inputs.shapes import COLOURS, caption_shape, cover_shape, describe_shape

    if (folder / "better").exists():
        return
    for name in ("better", "worse"):
        (folder / name).mkdir()
    seen = (describe_shape(index) for index in range(UNSEEN))
    for number, (shape, size, front, back, x, y) in zip(range(count), (d for d in seen if "red" not in d[2:4]), strict=False):
        cover = cover_shape(shape, size, x, y, SIDE)[..., None]
        for name, colour in (("better", "red"), ("worse", front)):
            image = cover * np.array(COLOURS[colour]) + (1 - cover) * np.array(COLOURS[back])
            Image.fromarray(image.round().astype(np.uint8)).save(folder / name / f"{number:04}.png")
        (folder / "better" / f"{number:04}.txt").write_text(caption_shape(shape, size, front, back))


def judge(folder: Path) -> None:
    """A line for each."""
    import torch
    from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    opened = lambda **parts: StableDiffusionPipeline.from_pretrained(folder / "teacher", **parts)  # noqa: E731
    models = {"teacher, 25 steps": (opened(), 25), "teacher, 4 steps": (opened(), 4)}
    if (path := folder / "student-run" / "export").exists():
        made = opened(unet=UNet2DConditionModel.from_pretrained(path, subfolder="unet"))
        made.scheduler = LCMScheduler.from_config(made.scheduler.config)
        models["student, 4 steps"] = (made, 4)
    if (path := folder / "preference-run" / "export").exists():
        made = opened()
        made.load_lora_weights(path)
        models["preference, 25 steps"] = (made, 25)
    print("| | named | coverage | kinds | red | as asked |\n|---|---|---|---|---|---|")
    for name, (pipeline, steps) in models.items():
        pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            print(f"| {name} | {' | '.join(read(draw(pipeline, steps)))} |", flush=True)


def captions() -> list[str]:
    """Those of the samples."""
    from oneloop.inputs.shapes import caption_shape, describe_shape

    return [caption_shape(*describe_shape(UNSEEN + i)[:4]) for i in range(SAMPLES)]


def draw(pipeline: Any, steps: int) -> Any:
    """Samples [N, 3, 16, 16] uint8, the n-th with the seed n."""
    import torch

    images = []
    for start in range(0, SAMPLES, 64):
        some = range(start, start + 64)
        told = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "height": SIDE, "width": SIDE, "output_type": "np"}
        generators = [torch.Generator().manual_seed(i) for i in some]
        images.append(torch.from_numpy(pipeline(captions()[start : start + 64], generator=generators, **told).images))
    return (torch.cat(images) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def read(images: Any) -> list[str]:
    """The cells of a line."""
    from oneloop.evaluation import drawings
    from oneloop.inputs.shapes import caption_shape

    reading = drawings.read(images)
    found, kinds = drawings.judged(reading), [drawings.KINDS[i] for i in reading.kind.tolist()]
    covered = found["coverage"]
    likely = f" (drawings: {covered['expected low']:.2f} to {covered['expected high']:.2f})"
    looks = {kind[:2] for kind, named in zip(kinds, reading.named.tolist(), strict=True) if named}
    red = sum(kind[2] == "red" for kind in kinds) / len(kinds)
    asked = sum(caption_shape(*kind) == caption for kind, caption in zip(kinds, captions(), strict=True)) / len(kinds)
    share = found["named"]
    named = f"{share['value']:.3f} ({share['low']:.2f} to {share['high']:.2f})"
    return [named, f"{covered['value']:.3f}{likely}", f"{len(looks)} of 6", f"{red:.3f}", f"{asked:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    stages = {function.__name__: function for function in (teacher, student, preference, judge)}
    parser.add_argument("stages", nargs="*", choices=[*stages, []], default=[*stages])
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests")]
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        stages[name](folder)


if __name__ == "__main__":
    main()
