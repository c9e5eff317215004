"""A frozen base in less memory than its run computes in, under adapters that are float32.

bf16    as it is loaded: 2 bytes a weight
float8  e4m3 storage by diffusers' layerwise casting, 1 byte: a linear layer is cast to bf16 as it is called. diffusers leaves
        norms as they are, and with them the layers of modulation inside; convolutions are left too, since the backward pass
        of one reads its weight when that is float8 again
int8    torchao's weight-only int8, 1 byte: every linear layer, a scale for each of its outputs
nf4     bitsandbytes' 4-bit NormalFloat (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3): every linear layer, half a
        byte and 0.016 for the scales, which are quantized too

Layers are quantized before adapters are added, since peft chooses the adapter's layer by the base's; float8 is cast after that:
diffusers' casting then knows the adapters and leaves them, while adapters that come after it would take its float8.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput, require
from oneloop.families.settings import Adapters, Precision

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Precision -> the package that it needs, of the extra `quantized`."""
APART = ("use_dora", "use_lokr", "init_lora", "preservation_weight")
"""Settings that read the base's own weights or layers, and were not tried with quantized ones."""
GGUF_APART = ("base_precision", "use_dora", "use_lokr", "group_offload")
"""The same of a base in a GGUF file, which is quantized as the file says."""


def check(s: Adapters, group: str, base: Any) -> None:
    """Refuse a precision that the run or the adapters do not fit, or whose package is not installed.

    Raises:
        BadInput: with the flag to change.
    """
    if (s.single_file or "").endswith(".gguf"):  # its matrices are blocks of bytes
        for name in GGUF_APART:
            if (value := getattr(s, name)) not in ("auto", False):
                given = f"--{group}.{name.replace('_', '-')}" + f" {value}" * (value is not True)
                raise BadInput(f"--{group}.single-file {s.single_file} with {given}: they do not go together; leave one out")
    if s.group_offload:
        flag = f"--{group}.group-offload"
        require(base.gradient_checkpointing, "base.gradient_checkpointing", False, f"true with {flag}")
        require(not base.compile, "base.compile", True, f"false with {flag}, which moves weights as they are called")
        fits = s.base_precision not in PACKAGES
        require(fits, f"{group}.base_precision", s.base_precision, f"auto, bf16 or float8 with {flag}")
    if s.base_precision == "auto":
        return
    flag = f"--{group}.base-precision {s.base_precision}"
    require(base.mixed_precision == "bf16", "base.mixed_precision", base.mixed_precision, f"bf16, in which {flag} computes")
    package = PACKAGES.get(s.base_precision)
    if package and importlib.util.find_spec(package) is None:
        raise BadInput(f"{flag} needs the package {package}: install oneloop[quantized], or choose bf16 or float8")
    for name in APART if s.base_precision != "bf16" else ():
        if getattr(s, name):
            raise BadInput(f"{flag} with --{group}.{name.replace('_', '-')}: they do not go together; leave one out")


def quantize(module: nn.Module, precision: Precision) -> None:
    """The linear layers of a model without adapters, in place: int8 or nf4; others stay as they are. On the module's device."""
    import torch

    if precision not in PACKAGES:
        return
    linear = {name: layer for name, layer in module.named_modules() if type(layer) is torch.nn.Linear}
    for layer in linear.values():
        layer.to(torch.bfloat16)
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(module, Int8WeightOnlyConfig(), lambda layer, name: name in linear)
    else:
        _to_nf4(module, linear)
    for name in linear:
        module.get_submodule(name).register_forward_pre_hook(_in_bf16)


def _in_bf16(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A quantized layer answers in the precision of what it is given, where autocast does not see to that."""
    import torch

    return (given[0].to(torch.bfloat16), *given[1:])


def _to_nf4(module: nn.Module, linear: dict[str, nn.Module]) -> None:
    """bitsandbytes' layers in the place of these."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in linear.items():
        with torch.device("meta"):
            made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4")
        made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = layer.bias
        # On some CPUs it would lay out its weights anew when it is first called in eval(), in a form without a backward pass.
        made.support_avx512bf16_for_cpu = False
        module.set_submodule(name, made.to(layer.weight.device))  # where it is moved it is quantized
    module.is_loaded_in_4bit = True  # by which peft knows


def cast(module: nn.Module, precision: Precision) -> None:
    """The frozen layers of a diffusers model that has its adapters to float8 storage, where that is asked."""
    import torch

    if precision == "float8":
        types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
        convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        module.enable_layerwise_casting(**types, skip_modules_classes=convolutions)


def remark(s: Adapters, base: Any) -> str | None:
    """What there is to say where the memory that is saved comes back in the backward pass."""
    if s.base_precision in ("float8", "int8") and not base.gradient_checkpointing:
        return (
            f"warning: --lora.base-precision {s.base_precision}: the backward pass keeps a bf16 copy of every layer's weights; "
            "with --base.gradient-checkpointing it has one block's at a time"
        )
    return None
