"""Low-rank adapters on the UNet or transformer of a latent diffusion model and on its text encoders: added, and written in the
forms that others read. Plain functions; `s` is a task's settings: rank, alpha, dropout, target_modules, use_dora, use_rslora,
base_precision, kohya.

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput
from oneloop.families import hub, precision, stable_diffusion
from oneloop.machine import internals
from oneloop.tasks import Models

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS, KOHYA = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def adapt(module: nn.Module, s: Any, **where: Any) -> None:
    """Give a frozen module adapters that train."""
    from peft import LoraConfig

    alpha = s.rank if s.alpha is None else s.alpha
    kind = {"use_dora": s.use_dora, "use_rslora": s.use_rslora, "init_lora_weights": "gaussian"}
    stored = s.base_precision if hasattr(module, "enable_layerwise_casting") else "auto"  # text encoders stay as they are
    precision.quantize(module, stored)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass")  # one for every layer: int8 adapters cannot be merged
        internals.inject(module, LoraConfig(r=s.rank, lora_alpha=alpha, lora_dropout=s.dropout, **kind, **where))
    precision.cast(module, stored)


def layers(module: nn.Module, targets: tuple[str, ...] | str) -> list[str]:
    """Names of a module's layers that targets mean: ends of names, a regular expression for the whole name, or ("all-linear",).
    Convolutions are layers, but not linear ones."""
    import torch

    kinds = torch.nn.Linear if targets == ("all-linear",) else (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, m in module.named_modules() if isinstance(m, kinds)]
    if targets == ("all-linear",):
        return names
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


def check_targets(s: Any, group: str, part: str) -> None:
    """Refuse targets that are no layer of this part of the checkpoint, before its weights are loaded."""
    import difflib

    import diffusers
    import torch

    if s.target_modules in (None, ("all-linear",)):
        return
    flag = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}: its {part}"
    kind = stable_diffusion.config(s, "")[part][1]
    with torch.device("meta"), hub.readable(flag, f"a {kind}", "one that diffusers can make"):
        module = getattr(diffusers, kind).from_config(stable_diffusion.config(s, part))
    for target in s.target_modules:
        if not layers(module, (target,)):
            ends = {".".join(name.split(".")[i:]) for name in layers(module, ".*") for i in range(-3, 0)}
            ends = sorted(end for end in ends if not end.partition(".")[0].isdigit())
            close = difflib.get_close_matches(target, ends, 1, 0) or ends[:1]
            raise BadInput(f"--{group}.target-modules: {target!r} is the end of no layer's name; the nearest is {close[0]!r}")


def silent(module: nn.Module, names: list[str], loss: Callable[[], Tensor]) -> list[str]:
    """Those of a module's layers whose output does not move the loss: no gradient reaches them, or all of it is zero.

    A zero that asks for its gradient is added to each output, so that no weight needs one.
    """
    import torch

    zeros: dict[str, list[Tensor]] = {name: [] for name in names}

    def add(name: str, output: Tensor) -> Tensor:
        zeros[name].append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[name][-1]

    listeners = [
        module.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: add(name, output)) for name in names
    ]
    try:
        with torch.enable_grad():
            value = loss()
    finally:
        for listener in listeners:
            listener.remove()
    every = [zero for several in zeros.values() for zero in several]
    grads = dict(zip(map(id, every), torch.autograd.grad(value, every, allow_unused=True), strict=True))
    reached = lambda zero: grads[id(zero)] is not None and bool(grads[id(zero)].any())  # noqa: E731
    return [name for name, several in zeros.items() if not any(map(reached, several))]


def save(models: Models, path: Path, s: Any, settings: str) -> None:
    """The adapters as `load_lora_weights` reads them, and, where asked, under kohya's names. Their ranks and alphas are in the
    file, and so is the text `settings`."""
    from safetensors.torch import save_file

    weights: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for name in ("unet", "transformer", *stable_diffusion.ENCODERS):
        state, adapter = internals.injected(models[name]) if name in models else ({}, None)
        if adapter:
            told |= {f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in adapter.to_dict().items()}
            # Recent versions of transformers leave `text_model` out of some names; every reader knows the names with it.
            inside = "" if name not in stable_diffusion.ENCODERS or hasattr(models[name], "text_model") else "text_model."
            for key, x in state.items():
                weights[f"{name}.{inside}{key}"] = x.detach().float().cpu().contiguous()
    about = {"format": "pt", "oneloop": settings}
    save_file(weights, path / WEIGHTS, about | {internals.adapter_metadata_key(): json.dumps(told, sort_keys=True)})
    if s.kohya:
        known = {"ss_network_module": "networks.lora", "ss_network_dim": str(s.rank), "ss_network_alpha": str(kohya_alpha(s))}
        save_file(kohya(weights, s), path / KOHYA, about | known)


def kohya_alpha(s: Any) -> float:
    """The alpha that gives the same scale where it is divided by the rank."""
    alpha = s.rank if s.alpha is None else s.alpha
    return alpha * s.rank**0.5 if s.use_rslora else alpha


def kohya(weights: dict[str, Tensor], s: Any) -> dict[str, Tensor]:
    """Adapters under the names of kohya's sd-scripts: lora_unet_..., and lora_te_..., SDXL's lora_te1_... and lora_te2_..."""
    import torch

    text = "lora_te1" if stable_diffusion.is_xl(s) else "lora_te"
    fronts, named = {"unet": "lora_unet", "text_encoder": text, "text_encoder_2": "lora_te2"}, {}
    for key, x in weights.items():
        module, _, end = key.rpartition(".lora_")  # end: A.weight, B.weight
        part, _, layer = module.partition(".")
        name = f"{fronts[part]}_{layer.replace('.', '_')}"
        named[f"{name}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = x
        named[f"{name}.alpha"] = torch.tensor(float(kohya_alpha(s)))
    return named
