"""A Stable Diffusion of the embedded shapes' pixels: a checkpoint in the real format whose autoencoder changes nothing.

What a task of latent diffusion does to it, the exact reader of the shapes (evaluation/drawings.py) can then judge. Its weights
are random; `finetune --finetune.from-scratch` trains its UNet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIDE = 16
FAR = 300.0
"""How much larger than a pixel the constants are that stand beside it: its error is the square of a pixel over this."""


def identity() -> Any:
    """An AutoencoderKL whose latents are the image, to less than a part in ten thousand.

    Its blocks add nothing. Of the norm and SiLU before the last layer of each half, the norm is a division by a constant where
    the pixels x stand beside -x and much larger constants; and SiLU(z) - SiLU(-z) = z.
    """
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if ".conv2." in name or "conv_in" in name or "conv_out" in name:
                p.zero_()
        for half in (vae.encoder, vae.decoder):
            for c in range(3):
                half.conv_in.weight[2 * c, c, 1, 1], half.conv_in.weight[2 * c + 1, c, 1, 1] = 1, -1
                half.conv_out.weight[c, 2 * c, 1, 1], half.conv_out.weight[c, 2 * c + 1, 1, 1] = FAR / 2, -FAR / 2
            half.conv_in.bias[6:] = torch.tensor([FAR, -FAR])
        vae.encoder.conv_out.bias[3:] = -30.0  # the logarithm of the variance
    return vae


def build(folder: Path, prediction_type: str = "sample") -> Path:
    """The checkpoint, in a folder that `from_pretrained` opens."""
    import tiny_models
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

    words = tiny_models.tokenizer(24)
    text = tiny_models.text_encoder(len(words), 64, False, 1, length=24)
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        addition_embed_type="text",  # each block is told of the caption, beside the attention of the deepest to its words
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        algorithm_type="sde-dpmsolver++",
        timestep_spacing="trailing",
        steps_offset=1,
        lambda_min_clipped=-20.0,
        thresholding=True,
    )
    StableDiffusionPipeline(
        vae=identity(),
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
