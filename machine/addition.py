"""The same bits by fewer kernels: what peft and diffusers launch for a factor of 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn


class Added(LoraVariant):
    """y = W x + s B A x, scaled in the addition where the scale s is a power of two: peft's bits by one kernel fewer, forward
    and, at a scale of 1, backward. (Not in float16, where what is scaled first may be too small or too large.) It has no state,
    so that a layer that has one can be copied and pickled."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        out, scale = up(down(module.lora_dropout[active_adapter](x))), module.scaling[active_adapter]
        if scale == 1 or (math.frexp(scale)[0] == 0.5 and out.dtype != torch.float16):
            return torch.add(result, out, alpha=scale)
        return result + out * scale

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, weight: Tensor) -> Tensor:
        return weight + module.get_delta_weight(active_adapter).to(weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, weight: Tensor) -> None:
        weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, weight: Tensor) -> Tensor:
        return weight.data - module.get_delta_weight(active_adapter).to(weight.dtype)


class One:
    """A divisor of 1: `x / One()` is x itself, for a tensor x, by no kernel."""

    def __rtruediv__(self, x: Tensor) -> Tensor:
        return x

    def __repr__(self) -> str:
        return "1"


def undivide(module: nn.Module) -> None:
    """Have diffusers' attention and residual blocks, in place, not divide what they return by a factor that is 1."""
    for part in module.modules():
        name = {Attention: "rescale_output_factor", ResnetBlock2D: "output_scale_factor"}.get(type(part))
        if name and getattr(part, name, None) == 1:
            setattr(part, name, One())
