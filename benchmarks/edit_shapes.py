"""`edit` on the embedded shapes: "make it red", and the exact reader (evaluation/drawings.py) says whether it was done.

    python -m benchmarks.edit_shapes FOLDER [--steps 1200]

Sources are shapes of 16x16 pixels, targets the same ones in the colour that the instruction names; 64 further shapes, which are
not trained on, are edited by the export's own pipeline. An edit is right where the reader names the drawing, and its shape, its
size, its ground and its new colour are those that were asked for.

The base is the teacher of benchmarks/few_steps.py, which draws shapes from captions, in the folder's `teacher`; where there is
none it is trained first.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.few_steps import teacher
from benchmarks.pixels import SIDE
from oneloop.evaluation import drawings
from oneloop.inputs.shapes import COLOURS, cover_shape, describe_shape

TRAINED, JUDGED = 2000, 64
ASKED = ("red", "green", "blue")


def pair(index: int) -> tuple[np.ndarray, np.ndarray, str, tuple[str, str, str, str]]:
    """Source and target [H, W, 3] uint8, the instruction, and what the target is: shape, size, front and back colour."""
    shape, size, front, back, x, y = describe_shape(index)
    wanted = [colour for colour in ASKED if colour not in (front, back)][index % 2 - 1]
    cover = cover_shape(shape, size, x, y, SIDE)[..., None]
    drawn = lambda colour: (cover * np.array(COLOURS[colour]) + (1 - cover) * np.array(COLOURS[back])).round()  # noqa: E731
    return drawn(front).astype(np.uint8), drawn(wanted).astype(np.uint8), f"make it {wanted}", (shape, size, wanted, back)


def train(folder: Path, steps: int) -> None:
    """What `python loop.py edit` does, on a folder of pairs."""
    from oneloop import loop
    from oneloop.settings import command_line

    for index in range(TRAINED):
        for part, image in zip(("before", "after"), pair(index)[:2], strict=True):
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / part / f"{index:04}.png")
        (folder / "after" / f"{index:04}.txt").write_text(pair(index)[2])
    flags = {
        "edit.pretrained-model-name-or-path": folder / "teacher",
        "edit.adam-beta2": 0.99,
        "edit.snr-gamma": 1,
        "edit.learning-rate": 1e-3,
        "edit.guidance-scale": 2.0,
        "edit.num-inference-steps": 25,
        "data.train-data-dir": folder / "after",
        "data.conditioning-data-dir": folder / "before",
        "data.resolution": SIDE,
        "data.train-batch-size": 16,
        "base.output-dir": folder / "edit-run",
        "base.max-train-steps": steps,
        "base.lr-scheduler": "cosine",
        "base.num-samples": 8,
        "base.logger": "none",
        "base.mixed-precision": "no",
        "base.logging-steps": 100,
        "base.checkpointing-steps": steps,
    }
    module, cfg = command_line.parse(["edit", *(word for name, x in flags.items() for word in (f"--{name}", str(x)))])
    loop.run(module.task, cfg)


def judge(folder: Path, **call: Any) -> str:
    """The share of right edits of shapes that were not trained on, with its parts."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "edit-run" / "export", subfolder="unet")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder / "teacher", unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    sources, targets, words, wanted = zip(*(pair(TRAINED + i) for i in range(JUDGED)), strict=True)
    generators = [torch.Generator().manual_seed(i) for i in range(JUDGED)]
    seen = {"image": [*map(Image.fromarray, sources)], "generator": generators}
    images = pipeline(prompt=[*words], **seen, num_inference_steps=25, output_type="np", **call).images
    made = torch.from_numpy((images * 255).round()).byte().permute(0, 3, 1, 2)
    reading = drawings.read(made)
    kinds = [drawings.KINDS[i] for i in reading.kind.tolist()]
    of = lambda right: sum(bool(x) for x in right) / JUDGED  # noqa: E731
    parts = {what: of(a[i] == b[i] for a, b in zip(kinds, wanted, strict=True)) for i, what in enumerate(PARTS)}
    whole = of(named and a == b for named, a, b in zip(reading.named, kinds, wanted, strict=True))
    target = torch.from_numpy(np.stack(targets)).permute(0, 3, 1, 2).float()
    distance = (made.float() - target).square().mean((1, 2, 3)).sqrt().median().item()
    cells = [f"{whole:.0%}", *(f"{x:.0%}" for x in parts.values()), f"{distance:.1f}"]
    return f"| {' | '.join([', '.join(f'{key} {x:g}' for key, x in call.items()), *cells])} |"


PARTS = ("shape", "size", "colour", "ground")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher").exists():
        teacher(folder)
    train(folder, args.steps)
    print(f"trained {args.steps} steps; {time.process_time():.0f} s of CPU")
    print(f"| guidance | right | {' | '.join(PARTS)} | distance to the target, of 255 |\n{'|---' * 7}|")
    for text, image in ((1.0, 1.0), (2.0, 1.5)):
        print(judge(folder, guidance_scale=text, image_guidance_scale=image), flush=True)


if __name__ == "__main__":
    main()
