"""Tiny Stable Diffusion 1, 2 and XL folders in the real format: real classes and a real CLIP tokenizer, random small weights.

    python tests/tiny_models.py FOLDER     writes FOLDER/sd, FOLDER/sd2 and FOLDER/sdxl

An image of 32x32 is a latent of 4x8x8; a UNet has some ten thousand weights. Everything is seeded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

WORDS = "a an the on of with and in photo image dog sks black white red green blue yellow small large circle square background"
LENGTH = 16  # tokens, with the first and the last


def tokenizer(length: int = LENGTH, pad: str | None = None):
    """A CLIP tokenizer over a few words and single characters: byte-level BPE with its own merges."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        left = word[0] if len(word) > 1 else f"{word}</w>"
        for i, letter in enumerate(word[1:], 1):
            right = letter if i < len(word) - 1 else f"{letter}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    units = letters + [f"{c}</w>" for c in letters] + [a + b for a, b in merges]
    vocab = {unit: i for i, unit in enumerate([*dict.fromkeys(units), "<|startoftext|>", "<|endoftext|>"])}
    more = {"pad_token": pad} if pad else {}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, **more)


def text_encoder(words: int, width: int, projected: bool, seed: int, act: str = "quick_gelu", length: int = LENGTH):
    """A CLIP text encoder of two layers; with a projection as SDXL's second one has, or with OpenCLIP's `gelu` as SD 2 has."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(seed: int):
    """An autoencoder that halves an image twice."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.5,
    ).eval()


def unet(context: int, pooled: int | None, seed: int, **more):
    """A conditional UNet of two levels; with `pooled` the text and size conditioning of SDXL."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    if pooled:
        more |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": pooled + 6 * 4,
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context,
        norm_num_groups=4,
        **{"attention_head_dim": 4} | more,
    ).eval()


def build(folder: Path, kind: str = "sd", **scheduler: object) -> Path:
    """A folder that `from_pretrained` opens: `sd`, `sd2` or `sdxl`. More settings go into its scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    second = kind == "sd2"  # heads by level, linear projections, attention in float32; predicts v
    scheduler = ({"prediction_type": "v_prediction"} if second else {}) | scheduler
    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True} if second else {}
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    ddim = DDIMScheduler(**settings | {"set_alpha_to_one": False, "steps_offset": 1} | scheduler)
    words, path = tokenizer(), folder / kind
    if kind in ("sd", "sd2"):
        StableDiffusionPipeline(
            vae=vae(0),
            text_encoder=text_encoder(len(words), 16, False, 1, "gelu" if second else "quick_gelu"),
            tokenizer=words,
            unet=unet(16, None, 2, **heads),
            scheduler=ddim,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(path)
    else:
        StableDiffusionXLPipeline(
            vae=vae(0),
            text_encoder=text_encoder(len(words), 8, False, 1),
            text_encoder_2=text_encoder(len(words), 12, True, 2),
            tokenizer=words,
            tokenizer_2=tokenizer(pad="!"),
            unet=unet(20, 12, 3),
            scheduler=ddim,
            add_watermarker=False,
        ).save_pretrained(path)
    return path


def edit(path: Path, **values: object) -> None:
    """Change values of a JSON file of a built folder."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


if __name__ == "__main__":
    for kind in ("sd", "sd2", "sdxl"):
        print(build(Path(sys.argv[1]), kind))
