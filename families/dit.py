"""The transformer of Peebles and Xie 2022, DiT (arXiv:2212.09748), as diffusers has it: made new, and begun as published.

diffusers' class is made for pretrained weights. Made new it begins with torch's own weights, and in train() every block leaves
out labels by itself, at random: an example's label may be there for one block and not for the next. Here blocks begin as the
identity, and labels are left out before the model sees them (classes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput
from oneloop.families import building

if TYPE_CHECKING:
    from torch import nn

DEFAULT = {  # 2.4 M parameters, fit for 16x16 on a CPU
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 6,
    "patch_size": 2,
}


def patch(config: Mapping[str, Any], what: str) -> int:
    """The side of a patch, of which the image's side is a multiple."""
    side = config.get("patch_size", 2)
    if not isinstance(side, int) or isinstance(side, bool) or not 0 < side <= 4096:
        raise BadInput(f"{what}: patch_size is {side!r}; expected an integer from 1 to 4096")
    return side


def make(config: Mapping[str, Any], what: str, size: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A new transformer for images or latents of this size [C, h, h], with an embedding for each class and one for no label.

    Raises:
        BadInput: none can be made of the config; `what`: the flag and the file, as messages begin.
    """
    import torch

    channels, side = size[:2]
    least = patch(config, what)
    if side % least:
        raise BadInput(f"--data.resolution: latents are {side} wide; expected a multiple of {least}, the patches of {what}")
    for key in ("in_channels", "out_channels"):
        if config.get(key, channels) not in (channels, None):
            raise BadInput(f"{what}: {key} is {config[key]!r}; expected {channels}, the channels of what is trained on")
    own = {"in_channels": channels, "out_channels": channels, "sample_size": side, "num_embeds_ada_norm": num_classes}

    def call(dit: nn.Module, x: Any) -> Any:
        labels = torch.zeros(len(x), dtype=torch.long)
        return dit(x, torch.zeros(len(x)), class_labels=labels, return_dict=False)[0]

    made = building.build("DiTTransformer2DModel", dict(config) | own, what, (2, *size), call)
    begin(made)
    return made


def begin(dit: nn.Module) -> None:
    """The weights of a new one (section 3.2, adaLN-Zero, and the published code): linear layers Xavier uniform, embeddings
    normal of deviation 0.02; what scales, shifts and gates, and the last layer, 0. No label is left out by the model."""
    import torch
    from torch.nn import init

    for module in dit.modules():
        if isinstance(module, torch.nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
    init.xavier_uniform_(dit.pos_embed.proj.weight.flatten(1))
    init.zeros_(dit.pos_embed.proj.bias)
    for block in dit.transformer_blocks:
        embedded = block.norm1.emb
        for layer in (embedded.timestep_embedder.linear_1, embedded.timestep_embedder.linear_2):
            init.normal_(layer.weight, std=0.02)
        init.normal_(embedded.class_embedder.embedding_table.weight, std=0.02)
        embedded.class_embedder.dropout_prob = 0.0
        init.zeros_(block.norm1.linear.weight)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        init.zeros_(layer.weight)
