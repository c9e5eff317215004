"""What a LoRA layer adds to its base's output, by one kernel fewer than peft's own. Imports peft."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor


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
