"""`edit` on the embedded shapes: "make it red", and the exact reader (evaluation/drawings.py) says whether it was done.

    python -m benchmarks.edit_shapes [--steps 1200] [--folder FOLDER]

Sources are shapes of 16x16 pixels, targets the same ones in the colour that the instruction names; 64 further shapes, which are
not trained on, are edited by the export's own pipeline. An edit is right where the reader names the drawing, and its shape, its
size, its ground and its new colour are those that were asked for.

The base is made here, as large as the task is: an autoencoder that is trained first, a text encoder of random weights
and a UNet of random weights. So this measures the task from nothing, and not what a pretrained base brings.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from oneloop.evaluation import drawings
from oneloop.inputs.shapes import COLOURS, cover_shape, describe_shape

SIDE, TRAINED, JUDGED = 16, 2000, 64
ASKED = ("red", "green", "blue")


def pair(index: int) -> tuple[np.ndarray, np.ndarray, str, tuple[str, str, str, str]]:
    """Source and target [H, W, 3] uint8, the instruction, and what the target is: shape, size, front and back colour."""
    shape, size, front, back, x, y = describe_shape(index)
    wanted = [colour for colour in ASKED if colour not in (front, back)][index % 2 - 1]
    cover = cover_shape(shape, size, x, y, SIDE)[..., None]
    drawn = lambda colour: (cover * np.array(COLOURS[colour]) + (1 - cover) * np.array(COLOURS[back])).round()  # noqa: E731
    return drawn(front).astype(np.uint8), drawn(wanted).astype(np.uint8), f"make it {wanted}", (shape, size, wanted, back)


def autoencoder(steps: int = 300) -> Any:
    """Of half the images' size and four channels, trained on them."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
    )
    optim = torch.optim.AdamW(vae.parameters(), 2e-3)
    images = torch.from_numpy(np.stack([pair(i)[i % 2] for i in range(TRAINED)])).permute(0, 3, 1, 2) / 127.5 - 1
    for step in range(steps):
        x = images[torch.arange(32 * step, 32 * step + 32) % TRAINED]
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + 0.02 * torch.randn_like(posterior.mean)
        (vae.decode(z).sample - x).square().mean().add(1e-4 * posterior.mean.square().mean()).backward()
        optim.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optim.step(), optim.zero_grad()
    with torch.no_grad():
        spread = vae.encode(images[:256]).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    with torch.no_grad():  # it has no posterior to speak of: the second half of the channels is the logarithm of the variance
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -12
    return vae.eval()


def base(folder: Path) -> Path:
    """A Stable Diffusion that has seen nothing."""
    import tiny_models
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    words = tiny_models.tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=16,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=tiny_models.text_encoder(len(words), 32, False, 1),
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(**schedule, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "base")
    return folder / "base"


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
        "edit.pretrained-model-name-or-path": base(folder),
        "edit.learning-rate": 1e-3,
        "edit.guidance-scale": 2.0,
        "edit.num-inference-steps": 20,
        "data.train-data-dir": folder / "after",
        "data.conditioning-data-dir": folder / "before",
        "data.resolution": SIDE,
        "data.train-batch-size": 16,
        "base.output-dir": folder / "run",
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

    unet = UNet2DConditionModel.from_pretrained(folder / "run" / "export", subfolder="unet")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder / "base", unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    sources, targets, words, wanted = zip(*(pair(TRAINED + i) for i in range(JUDGED)), strict=True)
    generators = [torch.Generator().manual_seed(i) for i in range(JUDGED)]
    seen = {"image": [*map(Image.fromarray, sources)], "generator": generators}
    images = pipeline(prompt=[*words], **seen, num_inference_steps=20, output_type="np", **call).images
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
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        folder = args.folder or Path(own)
        folder.mkdir(exist_ok=True)
        train(folder, args.steps)
        print(f"trained {args.steps} steps; {time.process_time():.0f} s of CPU")
        print(f"| guidance | right | {' | '.join(PARTS)} | distance to the target, of 255 |\n{'|---' * 7}|")
        for text, image in ((1.0, 1.0), (2.0, 1.5)):
            print(judge(folder, guidance_scale=text, image_guidance_scale=image), flush=True)


if __name__ == "__main__":
    main()
