"""Stable Diffusion 1.5 and SDXL at their full size, with random weights: what a step costs does not depend on their values.

    python -m benchmarks.models FOLDER sd15 sdxl     writes FOLDER/sd15 and FOLDER/sdxl, 2 and 7 GB

Folders that `from_pretrained` opens, in float16. The sizes are those of `stable-diffusion-v1-5/stable-diffusion-v1-5` (Rombach
et al. 2022, arXiv:2112.10752) and `stabilityai/stable-diffusion-xl-base-1.0` (Podell et al. 2023, arXiv:2307.01952), whose text
encoders are those of CLIP ViT-L/14 (Radford et al. 2021, arXiv:2103.00020) and OpenCLIP ViT-bigG/14 (Cherti et al. 2022,
arXiv:2212.07143). The tokenizers are the tests' own, of a few words; the tables of embeddings have their real number of rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    from torch import nn

ROWS, LENGTH = 49_408, 77  # words of CLIP's vocabulary, and tokens of a caption

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "attention_head_dim": 8,  # the number of heads, in spite of its name
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 768 + 1280,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
}
LEVELS = (128, 256, 512, 512)  # channels of either autoencoder
VAES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit_l": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
    "bigg": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}


def text_encoder(kind: str, words: int, projected: bool = False) -> nn.Module:
    """CLIP's text encoder; `words` is the size of the tokenizer, whose last two tokens begin and end a caption."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = ENCODERS[kind]
    config = CLIPTextConfig(
        vocab_size=ROWS,
        max_position_embeddings=LENGTH,
        intermediate_size=4 * sizes["hidden_size"],
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
        **sizes,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def modules(kind: str, words: int = ROWS) -> dict[str, nn.Module]:
    """The parts that have weights, on the meta device: their shapes alone, in no memory."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        made = {
            "unet": UNet2DConditionModel(layers_per_block=2, **UNETS[kind]),
            "vae": AutoencoderKL(
                block_out_channels=LEVELS,
                down_block_types=("DownEncoderBlock2D",) * len(LEVELS),
                up_block_types=("UpDecoderBlock2D",) * len(LEVELS),
                layers_per_block=2,
                latent_channels=4,
                **VAES[kind],
            ),
            "text_encoder": text_encoder("vit_l", words),
        }
        return made | ({"text_encoder_2": text_encoder("bigg", words, projected=True)} if kind == "sdxl" else {})


def write(module: nn.Module, folder: Path) -> None:
    """Give a module of the meta device small random weights in float16, and save it."""
    import torch

    module = module.half().to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(std=0.02)
        else:
            p.fill_(name.endswith(".weight"))  # of a norm; the rest are biases
    module.save_pretrained(folder)


def build(folder: Path, kind: str) -> Path:
    """The folder of the model, built unless it stands there whole: its index, which is written last, says so."""
    import tiny_models
    from diffusers import EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    path = folder / kind
    if (path / "model_index.json").exists():
        return path
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    others: dict[str, Any] = {"tokenizer": tiny_models.tokenizer(LENGTH)}
    parts = modules(kind, len(others["tokenizer"]))
    if kind == "sdxl":
        others |= {"tokenizer_2": tiny_models.tokenizer(LENGTH, "!"), "scheduler": EulerDiscreteScheduler(**betas)}
        pipeline = StableDiffusionXLPipeline(**parts, **others, add_watermarker=False)
    else:
        others["scheduler"] = PNDMScheduler(**betas, skip_prk_steps=True)
        without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **others, **without)
    for name, part in others.items():
        part.save_pretrained(path / name)
    for name in parts:
        write(parts[name], path / name)
        parts[name].to("meta")  # one part at a time is in memory
    pipeline.save_config(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="+", choices=list(UNETS))
    given = parser.parse_args()
    for kind in given.kinds:
        print(build(given.folder, kind))


if __name__ == "__main__":
    main()
