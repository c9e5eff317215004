"""What adapters of each family take on a GPU, computed from the sizes that were published: the table of docs/lora.md.

    python benchmarks/lora_memory.py             the table
    python benchmarks/lora_memory.py --parts     where the bytes are

Nothing is downloaded and nothing is run: models are made on the meta device. Sizes are the defaults of diffusers' classes, or
differ from them as the published config.json of the checkpoint does; the numbers of parameters that come of them are printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_names = tempfile.mkdtemp()
Path(_names, "oneloop").symlink_to(Path(__file__).parent.parent)
sys.path[:0] = [_names, str(Path(__file__).parent.parent / "tests")]

import diffusers
import torch

from oneloop.families import adapters, flow, footprint
from oneloop.families.flow import FAMILIES

SIDE, RANK = 1024, 16
CARDS = (12, 24, 48, 80)
SPARE = 2.0
"""GiB of a card that a run cannot have: CUDA's own, fragments, what lasts a moment."""
PRECISIONS = ("bf16", "float8", "int8", "nf4")

SD3_SIZES = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16}
SD3_SIZES |= {"qk_norm": "rms_norm", "sample_size": 128}
SD3_TEXT = {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}
FLUX_TEXT = {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}
KLEIN = {"guidance_embeds": False}
MODELS: dict[str, tuple[str, dict[str, Any], int, int, dict[str, tuple[int, ...]]]] = {
    # name: pipeline, differences from the class's defaults, latent channels, pixels a latent pixel, columns of text
    "Z-Image": ("ZImagePipeline", {}, 16, 8, {"prompt_embeds": (512, 2560)}),
    "FLUX.2 klein 4B": (
        "Flux2KleinPipeline",
        KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        *(128, 16, {"prompt_embeds": (512, 7680)}),
    ),
    "FLUX.2 klein 9B": (
        "Flux2KleinPipeline",
        KLEIN | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        *(128, 16, {"prompt_embeds": (512, 12288)}),
    ),
    "FLUX.1 dev": ("FluxPipeline", {"guidance_embeds": True}, 16, 8, FLUX_TEXT),
    "Qwen-Image": ("QwenImagePipeline", {}, 16, 8, {"prompt_embeds": (512, 3584)}),
    "Krea 2": ("Krea2Pipeline", {}, 16, 8, {"prompt_embeds": (512, 12, 2560)}),
    "FLUX.2 dev": ("Flux2Pipeline", {}, 128, 16, {"prompt_embeds": (512, 15360)}),
    "SD 3.5 medium": (
        "StableDiffusion3Pipeline",
        SD3_SIZES
        | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
        | {"dual_attention_layers": tuple(range(13))},
        *(16, 8, SD3_TEXT),
    ),
    "SD 3.5 large": (
        "StableDiffusion3Pipeline",
        SD3_SIZES | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
        *(16, 8, SD3_TEXT),
    ),
    "Chroma": ("ChromaPipeline", {}, 16, 8, {"prompt_embeds": (512, 4096)}),
    "Lumina 2": ("Lumina2Pipeline", {"cap_feat_dim": 2304}, 16, 8, {"prompt_embeds": (256, 2304)}),
    "Sana 1.6B": ("SanaPipeline", {}, 32, 32, {"prompt_embeds": (300, 2304)}),
    "AuraFlow": ("AuraFlowPipeline", {}, 4, 8, {"prompt_embeds": (256, 2048)}),
    "CogView4": (
        "CogView4Pipeline",
        {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
        *(16, 8, {"prompt_embeds": (256, 4096)}),
    ),
    "HunyuanImage 2.1": ("HunyuanImagePipeline", {"text_embed_2_dim": 1472}, 64, 32, {}),
    "HiDream-I1": (
        "HiDreamImagePipeline",
        {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16, "num_single_layers": 32}
        | {"attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048}
        | {"num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128)}
        | {"llama_layers": [*range(32), *[31] * 16]},
        *(16, 8, {}),
    ),
}
"""The last two choose tokens by their values, which shapes do not say: their activations are not computed."""


def transformer(name: str) -> torch.nn.Module:
    """The family's transformer with its usual adapters, on the meta device."""
    kind, sizes, *_ = MODELS[name]
    family = FAMILIES[kind]
    made = {"StableDiffusion3": "SD3", "Flux2Klein": "Flux2"}.get(kind.removesuffix("Pipeline"), kind.removesuffix("Pipeline"))
    with torch.device("meta"):
        module = getattr(diffusers, f"{made}Transformer2DModel")(**sizes).requires_grad_(False)
        for p in module.parameters():
            p.data = p.data.to(torch.bfloat16)
        family.prepare(module)
        s = SimpleNamespace(
            rank=RANK,
            alpha=None,
            dropout=0.0,
            use_dora=False,
            use_rslora=False,
            base_precision="bf16",
            rank_pattern=(),
            alpha_pattern=(),
            use_lokr=False,
        )
        adapters.adapt(module, s, family.targets)
    return module


def velocity(name: str, module: torch.nn.Module) -> torch.Tensor:
    """One pass of an image of SIDE x SIDE in shapes."""
    kind, _, channels, factor, columns = MODELS[name]
    given = {key: torch.empty(1, *shape, dtype=torch.bfloat16, device="meta") for key, shape in columns.items()}
    whole = torch.ones(1, columns["prompt_embeds"][0], dtype=torch.bool)
    x = torch.empty(1, channels, SIDE // factor, SIDE // factor, dtype=torch.bfloat16, device="meta")
    given |= {"target_size": torch.full((1, 2), SIDE, device="meta")}
    given |= {"prompt_mask": whole.to("meta") if kind in ("QwenImagePipeline", "ChromaPipeline") else whole}
    sigma = torch.empty(1, device="meta", dtype=torch.bfloat16)
    trim, flow.trim = flow.trim, lambda columns: (columns["prompt_embeds"], columns["prompt_mask"])
    try:
        return FAMILIES[kind].velocity(module, x, sigma, given, 1.0)
    finally:
        flow.trim = trim


def footprints(name: str) -> dict[str, footprint.Footprint]:
    """Precision of the base -> its footprint; without activations where shapes do not say them."""
    module, known = transformer(name), bool(MODELS[name][-1])
    call = (lambda: velocity(name, module)) if known else (lambda: torch.empty(0))
    kept = footprint.activations(module, flow.recomputable(module), call)
    return {precision: footprint.of(module, kept, precision) for precision in PRECISIONS}


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def fits(card: int, peaks: dict[str, int]) -> str:
    """The widest precision that fits a card."""
    return next((p for p, peak in peaks.items() if peak / 2**30 <= card * 1e9 / 2**30 - SPARE), "no")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", action="store_true")
    parts = parser.parse_args().parts
    heads = ["weights", "adapters and gradients", "optimizer and EMA", "activations", "recomputed"] if parts else ()
    cards = [f"{card} GB" for card in CARDS]
    heads = ["family", "B", *(heads or [*PRECISIONS, "bf16 without checkpointing", *cards])]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name in MODELS:
        every = footprints(name)
        one = every["bf16"]
        count = f"{one.weights / 2e9:.1f}"
        if parts:
            cells = [
                gib(x)
                for x in (one.weights, one.adapters + one.gradients, one.optimizer + one.ema, one.activations, one.recomputed)
            ]
        else:
            peaks = {precision: each.peak(True) for precision, each in every.items()}
            known = bool(MODELS[name][-1])
            more = "" if known else " + ?"
            cells = [gib(peak) + more for peak in peaks.values()] + [gib(one.peak(False)) if known else "?"]
            cells += [fits(card, peaks) if known else "?" for card in CARDS]
        print(f"| {name} | {count} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
