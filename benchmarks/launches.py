"""What a forward pass launches on a GPU, counted where there is none: operations that compute, casts among them, and what is
kept for the backward pass; in bf16 with float32 weights that train, under autocast, and with `--base.weights bf16`.

    python benchmarks/launches.py

Models have their full size and fake tensors on `cuda`, by which torch chooses operations and types and computes nothing. Views
and allocations launch nothing and are left out; attention counts as one kernel, as where it is fused. LoRAs have rank 16 in
the attention's four projections.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_names = tempfile.mkdtemp()
Path(_names, "oneloop").symlink_to(Path(__file__).parent.parent)
sys.path[:0] = [_names, str(Path(__file__).parent.parent)]

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from oneloop.families import footprint
from oneloop.machine import internals
from oneloop.machine.kernels import undivide
from oneloop.machine.narrow import narrow

SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
"""Where SDXL's UNet differs from the class's defaults, which are SD 1.5's but for the width of the text."""


class Launches(TorchDispatchMode):
    """Counts what computes."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **kwargs or {})
        first = next((x for x in args if isinstance(x, Tensor)), None)
        name = op._schema.name
        attention = name == "aten::new_empty" and made.ndim == 4  # the output of footprint.fused, in the place of a kernel
        views = op.is_view or "view" in name or "empty" in name or name.startswith("prim::")
        if attention or not views:
            self.seen["cast" if name == "aten::_to_copy" and made.dtype != first.dtype else "other"] += 1
        return made


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """With a LoRA, as the project makes it."""
    internals.inject(model, LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return model


def unet(text: int, side: int, **config: Any) -> tuple[Callable[[], torch.nn.Module], Callable[[Any], Tensor]]:
    """A UNet with a LoRA, and a call of it with latents of side x side."""

    def call(model: torch.nn.Module) -> Tensor:
        more = {"text_embeds": torch.empty(1, 1280, dtype=torch.bfloat16), "time_ids": torch.empty(1, 6)} if config else None
        states = torch.empty(1, 77, text, dtype=torch.bfloat16)
        return model(torch.empty(1, 4, side, side), torch.empty(1).long(), states, added_cond_kwargs=more).sample

    def make() -> torch.nn.Module:
        model = diffusers.UNet2DConditionModel(cross_attention_dim=text, **config).requires_grad_(False)
        return adapted(model)

    return make, call


def flux() -> tuple[Callable[[], torch.nn.Module], Callable[[Any], Tensor]]:
    """FLUX.1 dev's transformer with a LoRA, at 1024 x 1024."""

    def call(model: torch.nn.Module) -> Tensor:
        text = {"encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16)}
        text |= {"pooled_projections": torch.empty(1, 768, dtype=torch.bfloat16), "guidance": torch.empty(1)}
        ids = {"txt_ids": torch.empty(512, 3), "img_ids": torch.empty(4096, 3)}
        return model(torch.empty(1, 4096, 64), timestep=torch.empty(1), **text, **ids).sample

    def make() -> torch.nn.Module:
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True).requires_grad_(False)
        return adapted(model)

    return make, call


def from_scratch() -> tuple[Callable[[], torch.nn.Module], Callable[[Any], Tensor]]:
    """The UNet of examples/mnist_unet.json, all of which trains; a batch of 64."""
    config = json.loads((Path(__file__).parent.parent / "examples" / "mnist_unet.json").read_text())
    make = lambda: diffusers.UNet2DModel.from_config(config)  # noqa: E731
    return make, lambda model: model(torch.empty(64, 3, 32, 32), torch.empty(64).long()).sample


CASES = {
    "`mnist_unet`, all of it, batch 64": from_scratch(),
    "SD 1.5, LoRA, 512": unet(768, 64),
    "SDXL, LoRA, 1024": unet(2048, 128, **SDXL),
    "FLUX.1 dev, LoRA, 1024": flux(),
}


def count(make: Callable[[], torch.nn.Module], call: Callable[[Any], Tensor], low: bool) -> tuple[int, int, float]:
    """Kernels, casts among them, and GiB that are kept, of a forward pass."""
    with torch.device("meta"):
        model = make().train()
        undivide({"model": model})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), footprint.fused():
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    kind = torch.float32 if p.requires_grad and not low else torch.bfloat16
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=kind), p.requires_grad)
            for name, x in list(module._buffers.items()):
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype)
        if low:
            narrow(model)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast itself turns off where there is no GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            with Launches() as launches:
                kept = footprint.activations(model, [], lambda: call(model))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
    return launches.seen.total(), launches.seen["cast"], kept.every / 2**30


def main() -> None:
    print("| a forward pass | autocast | casts | kept, GiB | weights bf16 | casts | kept, GiB |\n" + "|---" * 7 + "|")
    for name, (make, call) in CASES.items():
        cells = [f"{n:,} | {casts:,} | {kept:.2f}" for n, casts, kept in (count(make, call, low) for low in (False, True))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
