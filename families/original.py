"""A Stable Diffusion or SDXL as one file in the names of the code that it was first trained with, which ComfyUI and other
programs read as a checkpoint: github.com/CompVis/stable-diffusion and github.com/Stability-AI/generative-models.

The names are those that `from_single_file` of diffusers turns into its own; tests hold the one against the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput

if TYPE_CHECKING:
    from torch import Tensor

Names = Iterable[tuple[str, str]]
"""Pairs of a regular expression for a part of a name, and what stands in its place; all that match apply, in order."""

RESNET = (
    (r"norm1\.", "in_layers.0."),
    (r"conv1\.", "in_layers.2."),
    (r"time_emb_proj\.", "emb_layers.1."),
    (r"norm2\.", "out_layers.0."),
    (r"conv2\.", "out_layers.3."),
    (r"conv_shortcut\.", "skip_connection."),
)
"""Inside a UNet's residual block; its attention blocks have the same names."""

UNET = (
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
)

VAE = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)", r".down.\1.block.\2"),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0", r".down.\1.downsample"),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)", r".up.\1.block.\2"),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0", r".up.\1.upsample"),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)

OPEN_CLIP = (
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])", r".ln_\1"),
    (r"\.mlp\.fc1", ".mlp.c_fc"),
    (r"\.mlp\.fc2", ".mlp.c_proj"),
    (r"\.self_attn\.", ".attn."),
)


def renamed(key: str, names: Names) -> str:
    """A name after all replacements."""
    for pattern, instead in names:
        key = re.sub(pattern, instead, key)
    return key


def unet(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Its levels are counted through: the first input block is the first convolution, then come each level's layers and its
    downsampling; output blocks are a level's layers, of which the last has the upsampling behind its attention."""
    layers = config["layers_per_block"] + 1
    for key, x in state.items():
        key = renamed(key, UNET)
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key):
            way, level, part, layer, rest = found.groups()
            number = int(level) * layers + int(layer) + (way == "down")
            attends = any(other.startswith(f"{way}_blocks.{level}.attentions") for other in state)
            if part == "downsamplers":
                key = f"input_blocks.{number + layers - 1}.0.{rest.replace('conv.', 'op.')}"
            elif part == "upsamplers":
                key = f"output_blocks.{number + layers - 1}.{1 + attends}.{rest}"
            else:
                key = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(part == 'attentions')}.{rest}"
        residual = re.match(r"((in|out)put_blocks\.\d+\.0|middle_block\.[02])\.", key) and "op." not in key
        yield f"model.diffusion_model.{renamed(key, RESNET) if residual else key}", x


def vae(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Its decoder's levels count from the last, and its attention's matrices are convolutions of 1x1."""
    last = max(int(found[1]) for key in state if (found := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    for key, x in state.items():
        key = renamed(key, VAE)
        key = re.sub(r"\.up\.(\d+)", lambda found: f".up.{last - int(found[1])}", key)
        yield f"first_stage_model.{key}", x[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key) else x


def clip(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """OpenAI's, in the names of transformers."""
    yield from ((f"{prefix}transformer.{key}", x) for key, x in state.items())


def open_clip(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """OpenCLIP's, whose queries, keys and values are one matrix and one bias, and whose projection is transposed."""
    import torch

    for key, x in state.items():
        name = f"{prefix}model.{renamed(key, OPEN_CLIP)}"
        if found := re.search(r"(.*)\.([qkv])_proj\.(weight|bias)", name):
            if found[2] == "q":
                three = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                yield f"{found[1]}.in_proj_{found[3]}", torch.cat(three)
        else:
            yield name, x.T if key == "text_projection.weight" else x


def check(config: Mapping[str, Any]) -> None:
    """Refuse a UNet that the original code cannot have.

    Raises:
        BadInput: with what it has.
    """
    layers = config["layers_per_block"]
    has = {f"layers_per_block {layers}": not isinstance(layers, int)}
    has |= {name: bool(config.get(name)) for name in ("time_cond_proj_dim", "encoder_hid_dim_type", "class_embed_type")}
    if found := [name for name, there in has.items() if there]:
        raise BadInput(f"--original: this UNet has {', '.join(found)}, which has no name in the original code; leave it out")


def state(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a pipeline of Stable Diffusion or SDXL, by their original names. A Stable Diffusion 2 has 23 of its text
    encoder's 24 layers, as diffusers has: the last is read by nothing. An SDXL says whether it predicts v, and down to no
    signal, as ComfyUI looks for it (comfy/supported_models.py: read, not run)."""
    import torch

    second = getattr(pipeline, "text_encoder_2", None)
    made = [*unet(pipeline.unet.state_dict(), pipeline.unet.config), *vae(pipeline.vae.state_dict())]
    for i, encoder in enumerate([pipeline.text_encoder] + [second] * (second is not None)):
        words = {key if key.startswith("text_") else f"text_model.{key}": x for key, x in encoder.state_dict().items()}
        prefix = "cond_stage_model." if second is None else f"conditioner.embedders.{i}."
        openai = encoder.config.hidden_act == "quick_gelu" and "text_projection.weight" not in words
        made += (clip if openai else open_clip)(words, prefix)
    said = getattr(getattr(pipeline, "scheduler", None), "config", {})
    if second is not None and said.get("prediction_type") == "v_prediction":
        made += [(name, torch.tensor([])) for name in ("v_pred", *["ztsnr"] * bool(said.get("rescale_betas_zero_snr")))]
    return dict(made)
