"""A ControlNet on outlines of the embedded shapes, beside a text-to-image model that is trained from scratch before it.

    python -m benchmarks.outlines FOLDER [--judge]

Makes a checkpoint of Stable Diffusion's kind for 16x16 pixels, trains its UNet by `finetune`, a ControlNet on it by
`controlnet`, and draws held-out outlines with their captions. An exact reader (evaluation/drawings.py) says of how many samples
the shape, its size and its place are the outline's, and the colours the caption's; and the same with the condition zeroed.
The same command goes on from where it stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIDE, WIDTH = 16, 64
FAR = 0.02
"""How far a centre may lie from the outline's, as a share of the side, in x and in y: a third of a pixel. Centres lie within
0.06 of the middle."""
STEPS = {"finetune": 1000, "controlnet": 800}
HELD_OUT, COUNT = 100_000, 128
"""The first of the drawings that are judged, of which none was trained on, and their number."""
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "timestep_spacing": "trailing"}
SCHEDULE |= {"clip_sample": False, "steps_offset": 1}
COMMON = {
    "base.num-samples": 8,
    "base.validation-steps": 0,
    "base.checkpointing-steps": 200,
    "base.logging-steps": 100,
    "base.logger": "none",
    "data.dataset-name": "shapes",
    "data.resolution": SIDE,
    "data.train-batch-size": 16,
}
OWN = {"snr-gamma": 1, "adam-beta2": 0.99, "num-inference-steps": 20, "guidance-scale": 1}


def pixels() -> Any:
    """An autoencoder whose latents are the pixels, to 1e-4: with large constant channels a group norm divides by a constant,
    and silu(z) - silu(-z) = z."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        latent_channels=3, block_out_channels=(8,), norm_num_groups=1, layers_per_block=1, scaling_factor=1.0, sample_size=SIDE
    )
    large = 1000.0
    with torch.no_grad():
        for part, out in ((vae.encoder, 6), (vae.decoder, 3)):
            for name, p in part.named_parameters():
                if "norm" not in name:
                    p.zero_()
            for i in range(3):  # channels 0 to 2 are x, 3 to 5 are -x, 6 and 7 constants
                part.conv_in.weight[i, i, 1, 1], part.conv_in.weight[3 + i, i, 1, 1] = 1, -1
                scale = large / 2
                part.conv_out.weight[i, i, 1, 1], part.conv_out.weight[i, 3 + i, 1, 1] = scale, -scale
            part.conv_in.bias[6], part.conv_in.bias[7] = large, -large
            if out == 6:
                part.conv_out.bias[3:] = -30  # no variance
        for conv, count in ((vae.quant_conv, 6), (vae.post_quant_conv, 3)):
            conv.weight.copy_(torch.eye(count)[..., None, None])
            conv.bias.zero_()
    return vae.eval()


def make_base(folder: Path) -> None:
    """The checkpoint, its UNet without training."""
    import tiny_models
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tiny_models.LENGTH = 32  # tokens, enough for every caption
    words = tiny_models.tokenizer(tiny_models.LENGTH)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=pixels(),
        text_encoder=tiny_models.text_encoder(len(words), WIDTH, False, 1),
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def run(*words: Any) -> None:
    """`python loop.py`, in a process of its own."""
    subprocess.run([sys.executable, str(ROOT / "loop.py"), *map(str, words)], check=True)


def train(task: str, base: Path, out: Path, rate: float, *more: str) -> None:
    """One step of the chain."""
    flags = COMMON | {"base.output-dir": out, "base.max-train-steps": STEPS[task]}
    flags |= {f"{task}.{key}": value for key, value in OWN.items()}
    flags |= {f"{task}.learning-rate": rate, f"{task}.pretrained-model-name-or-path": base}
    run(task, *(word for key, value in flags.items() for word in (f"--{key}", value)), *more)


def judged(folder: Path) -> dict[str, float]:
    """Shares of the held-out outlines, with the condition and with it zeroed."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    from oneloop.evaluation import drawings
    from oneloop.inputs import shapes

    steps = [int(path.name.partition("-")[2]) for path in (folder / "control").glob("checkpoint-*")]
    net = ControlNetModel.from_pretrained(folder / "control" / f"checkpoint-{max(steps)}")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder / "trained", controlnet=net)
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
            num_inference_steps=20,
            guidance_scale=1.0,
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
    folder = args.folder
    if args.judge:
        return print(json.dumps(judged(folder), indent=2))
    if not (folder / "base").exists():
        make_base(folder / "base")
    train("finetune", folder / "base", folder / "run", 2e-3, "--finetune.from-scratch")
    if not (folder / "trained").exists():
        run("merge", folder / "run", "--to", folder / "trained", "--dtype", "float32")
    train("controlnet", folder / "trained", folder / "control", 1e-3)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps(judged(folder) | {"CPU minutes of this start": (used.ru_utime + used.ru_stime) / 60}, indent=2))


if __name__ == "__main__":
    main()
