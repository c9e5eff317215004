"""A ControlNet on outlines of the embedded shapes, beside a text-to-image model that was trained from scratch.

    python -m benchmarks.outlines FOLDER [--judge]

The model is the teacher of benchmarks/few_steps.py, by `finetune`, in the folder's `teacher`; a ControlNet is trained on it by
`controlnet`, and draws held-out outlines with their captions. An exact reader (evaluation/drawings.py) says of how many samples
the shape, its size and its place are the outline's, and the colours the caption's; and the same with the condition zeroed.
The same command goes on from where it stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

from benchmarks.few_steps import COMMON, GUIDANCE, ROOT, run, teacher
from benchmarks.pixels import SIDE

FAR = 0.02
"""How far a centre may lie from the outline's, as a share of the side, in x and in y: a third of a pixel. Centres lie within
0.06 of the middle."""
STEPS = 800
HELD_OUT, COUNT = 2 * 10**6, 128
"""The first of the drawings that are judged, of which none was trained on, and their number."""


def control(folder: Path) -> None:
    """The ControlNet, in `control-run`."""
    own = ("--controlnet.pretrained-model-name-or-path", folder / "teacher", "--controlnet.learning-rate", 1e-3)
    own += ("--controlnet.adam-beta2", 0.99, "--controlnet.snr-gamma", 1, "--controlnet.num-inference-steps", 25)
    own += ("--controlnet.guidance-scale", 1, "--data.num-shapes", 16384, "--data.train-batch-size", 16)
    run("controlnet", *COMMON, *own, "--base.max-train-steps", STEPS, "--base.output-dir", folder / "control-run")


def judged(folder: Path) -> dict[str, float]:
    """Shares of the held-out outlines, with the condition and with it zeroed."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    from oneloop.evaluation import drawings
    from oneloop.inputs import shapes

    steps = [int(path.name.partition("-")[2]) for path in (folder / "control-run").glob("checkpoint-*")]
    net = ControlNetModel.from_pretrained(folder / "control-run" / f"checkpoint-{max(steps)}")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder / "teacher", controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    looks = [shapes.describe_shape(HELD_OUT + i) for i in range(COUNT)]
    conditions = torch.stack([torch.from_numpy(shapes.draw_outline(HELD_OUT + i, SIDE)) for i in range(COUNT)])
    conditions = conditions.permute(0, 3, 1, 2) / 255  # [N, 3, H, W]
    centres, shares = torch.tensor([look[4:] for look in looks]), {"step": max(steps)}
    for name, given in (("with the outline", conditions), ("condition zeroed", torch.zeros_like(conditions))):
        made = pipeline(
            [shapes.caption_shape(*look[:4]) for look in looks],
            image=given,
            generator=[torch.Generator().manual_seed(i) for i in range(COUNT)],
            num_inference_steps=25,
            guidance_scale=GUIDANCE,
            output_type="pt",
        ).images
        reading = drawings.read((255 * made).round().to(torch.uint8))
        read = [drawings.KINDS[kind] for kind in reading.kind.tolist()]
        near = ((reading.place - centres).abs() <= FAR).all(1).tolist()
        form = [a[:2] == b[:2] for a, b in zip(read, looks, strict=True)]
        colours = [a[2:] == b[2:4] for a, b in zip(read, looks, strict=True)]
        every = {"shape and size": form, "colours": colours, "place": near}
        every["outline"] = [a and b for a, b in zip(form, near, strict=True)]
        every["all"] = [a and b for a, b in zip(every["outline"], colours, strict=True)]
        shares |= {f"{name}: {what}": sum(hits) / COUNT for what, hits in every.items()}
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--judge", action="store_true", help="judge the last checkpoint that there is, and train nothing")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.judge:
        return print(json.dumps(judged(folder), indent=2))
    if not (folder / "teacher").exists():
        teacher(folder)
    control(folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps(judged(folder) | {"CPU minutes of this start": (used.ru_utime + used.ru_stime) / 60}, indent=2))


if __name__ == "__main__":
    main()
