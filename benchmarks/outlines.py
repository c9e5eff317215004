"""A ControlNet on outlines of the embedded shapes, beside a text-to-image model that is trained from scratch before it.

    python -m benchmarks.outlines FOLDER

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
RUN = {"base.num-samples": 8, "base.validation-steps": 400, "base.checkpointing-steps": 400, "base.logger": "none"}
DATA = {"data.dataset-name": "shapes", "data.resolution": SIDE, "data.train-batch-size": 16, "data.interpolation": "bilinear"}
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "timestep_spacing": "trailing"}
SCHEDULE |= {"clip_sample": False, "steps_offset": 1}
STEPS = {"finetune": 2400, "controlnet": 1200}
TASKS: dict[str, dict[str, Any]] = {
    "finetune": {"learning-rate": 2e-3, "snr-gamma": 1, "adam-beta2": 0.99},
    "controlnet": {"learning-rate": 1e-3, "snr-gamma": 1, "adam-beta2": 0.99},
}


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
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_models

    words = tiny_models.tokenizer()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 64),
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
