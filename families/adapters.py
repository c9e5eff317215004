"""Low-rank adapters on the UNet or transformer of a latent diffusion model and on its text encoders: added, and written in the
forms that others read. Plain functions; `s` are a task's settings (settings.py).

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput
from oneloop.families import precision, stable_diffusion
from oneloop.families.settings import Adapters
from oneloop.machine import internals
from oneloop.tasks import Models

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS, KOHYA = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"
ALL = ("all-linear",)
PATTERN = set("*+?[](){}|^$\\")
"""Characters that make a target a regular expression."""


def expression(target: str) -> str:
    """A target as a regular expression for a layer's whole name: the end of names, or such an expression itself, which has a
    character that no name has."""
    return rf"(?:{target})" if set(target) & PATTERN else rf"(?:.*\.)?{re.escape(target)}"


def text_target(numbers: Iterable[int]) -> str:
    """The attention of a text encoder's layers with these numbers, as a target."""
    return rf".*\.layers\.(?:{'|'.join(map(str, numbers))})\..*\.(?:q_proj|k_proj|v_proj|out_proj)"


def layers(module: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of a module's layers that any of the targets means: ends of names, patterns, or ("all-linear",).
    Convolutions are layers, but not linear ones."""
    import torch

    kinds = torch.nn.Linear if targets == ALL else (torch.nn.Linear, torch.nn.Conv2d)
    wanted = re.compile("" if targets == ALL else "|".join(map(expression, targets)))
    return [name for name, m in module.named_modules() if isinstance(m, kinds) and (targets == ALL or wanted.fullmatch(name))]


def by_pattern(entries: tuple[str, ...]) -> dict[str, float]:
    """Settings such as `attn=8`: a target -> its number, in the order given; the first target that means a layer counts."""
    return {target: float(number) for target, _, number in (entry.rpartition("=") for entry in entries)}


def check_pattern(flag: str, entries: tuple[str, ...], limit: Any) -> None:
    """Refuse what is not TARGET=NUMBER, with a number within the limit.

    Raises:
        BadInput: with the entry.
    """
    for entry in entries:
        target, _, number = entry.rpartition("=")
        with contextlib.suppress(ValueError, re.error):
            whole = float(number) == int(float(number)) or isinstance(limit.least, float)
            if target and whole and limit.fits(float(number)) and re.compile(expression(target)):
                continue
        raise BadInput(f"--{flag} {entry!r}: expected TARGET=NUMBER, such as to_q=8, with a number of {limit}")


def adapt(module: nn.Module, s: Adapters, targets: tuple[str, ...], silent: Iterable[str] = ()) -> None:
    """Give a frozen module adapters that train, on the layers that targets mean but the silent ones."""
    import peft

    # peft matches these keys at the end of a name; ^ makes one of a whole name.
    keyed = lambda entries: {rf"^{expression(target)}": x for target, x in by_pattern(entries).items()}  # noqa: E731
    ranks = {key: int(x) for key, x in keyed(s.rank_pattern).items()}
    alphas = keyed(s.alpha_pattern)
    alphas |= {key: x for key, x in ranks.items() if s.alpha is None and key not in alphas}
    alpha = s.rank if s.alpha is None else s.alpha
    names = layers(module, targets) if targets == ALL else ()
    where = {
        "target_modules": "|".join(map(re.escape, names) if names else map(expression, targets)),
        "exclude_modules": list(silent) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    if s.use_lokr:
        config = peft.LoKrConfig(r=s.rank, alpha=alpha, decompose_factor=s.lokr_factor, **where)
    else:
        kind = {"use_dora": s.use_dora, "use_rslora": s.use_rslora, "init_lora_weights": "gaussian"}
        config = peft.LoraConfig(r=s.rank, lora_alpha=alpha, lora_dropout=s.dropout, **kind, **where)
    stored = s.base_precision if hasattr(module, "enable_layerwise_casting") else "auto"  # text encoders stay as they are
    precision.quantize(module, stored)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass")  # one for every layer: int8 adapters cannot be merged
        internals.inject(module, config)
    precision.cast(module, stored)


def groups(module: nn.Module, rate: float, s: Adapters) -> list[dict[str, Any]]:
    """What trains of a module as an optimizer's groups, one for each learning rate that its layers have."""
    rates, made = by_pattern(s.learning_rate_pattern), {}
    for key, p in module.named_parameters():
        if p.requires_grad:
            name = re.split(r"\.(?:lora|lokr)_", key)[0]
            own = next((x for target, x in rates.items() if re.fullmatch(expression(target), name)), rate)
            made.setdefault(own, []).append(p)
    return [{"params": params, "lr": own} for own, params in made.items()]


def check_targets(s: Adapters, group: str, part: str) -> None:
    """Refuse targets that are no layer of this part of the checkpoint, before its weights are loaded."""
    import difflib

    patterns = ("rank_pattern", "alpha_pattern", "learning_rate_pattern")
    given = {name: tuple(by_pattern(getattr(s, name))) for name in patterns}
    given["target_modules"] = () if s.target_modules in (None, ALL) else s.target_modules
    if not any(given.values()) or (s.train_text_encoder and not given["target_modules"]):
        return
    module = stable_diffusion.skeleton(s, group, part)
    for name, target in ((name, target) for name, targets in given.items() for target in targets):
        if not layers(module, (target,)):
            what = f"--{group}.{name.replace('_', '-')}: {target!r}"
            if set(target) & PATTERN:
                raise BadInput(f"{what} is the name of no layer, such as {layers(module, ('.*',))[0]!r}")
            ends = {".".join(layer.split(".")[i:]) for layer in layers(module, (".*",)) for i in range(-3, 0)}
            ends = sorted(end for end in ends if not end.partition(".")[0].isdigit())
            close = difflib.get_close_matches(target, ends, 1, 0) or ends[:1]
            raise BadInput(f"{what} is the end of no layer's name; the nearest is {close[0]!r}")


def silent(module: nn.Module, names: list[str], loss: Callable[[], Tensor], zero: bool = True) -> list[str]:
    """Those of a module's layers whose output does not move the loss: no gradient reaches them, or, with `zero`, all of it is.

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
    every = [x for several in zeros.values() for x in several]
    grads = dict(zip(map(id, every), torch.autograd.grad(value, every, allow_unused=True), strict=True))
    reached = lambda x: grads[id(x)] is not None and (not zero or bool(grads[id(x)].any()))  # noqa: E731
    return [name for name, several in zeros.items() if not any(map(reached, several))]


def tuned(module: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Name -> layer of a module that has this adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: m for name, m in module.named_modules() if isinstance(m, BaseTunerLayer) and adapter in getattr(m, "scaling", {})
    }


@contextlib.contextmanager
def scaled(module: nn.Module, factors: Mapping[str, float]) -> Iterator[None]:
    """A module whose adapters count by these factors: 0 leaves one out, 1 changes nothing."""
    scales = [(m.scaling, name, m.scaling[name]) for name in factors for m in tuned(module, name).values()]
    try:
        for scaling, name, value in scales:
            scaling[name] = value * factors[name]
        yield
    finally:
        for scaling, name, value in scales:
            scaling[name] = value


def activate(module: nn.Module) -> None:
    """Have all adapters of a module count, and the one that trains be all that trains."""
    for adapter in getattr(module, "peft_config", {}):
        for layer in tuned(module, adapter).values():
            layer.set_adapter([name for name in ("default", "assistant") if name in layer.scaling])
    for key, p in module.named_parameters():
        p.requires_grad_(re.search(r"\.(?:lora|lokr)_", key) is not None and ".default" in key)


def drop(module: nn.Module, names: Iterable[str]) -> None:
    """Put the base layer in the place of each of these layers with adapters."""
    for name in names:
        module.set_submodule(name, module.get_submodule(name).get_base_layer())


def merge(module: nn.Module, strength: float = 1.0) -> None:
    """Add what the adapters do, times a strength, to the weights of the module, which has no adapters afterwards.

    The strength multiplies the difference of the weights: what DoRA does is no multiple of its scale.

    Raises:
        ValueError: the sum is not finite.
    """
    layers = tuned(module)
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        before = weight.detach().clone()
        layer.merge(safe_merge=True, adapter_names=["default"])
        weight.data = before.lerp_(weight.detach(), strength)
    drop(module, layers)
    internals.emptied(module)


def read(pipeline: Any, path: str, flag: str, adapter: str = "default") -> None:
    """Give the modules of a pipeline the adapters of a file, or of a folder that an export wrote, in every form that diffusers
    reads; their layers, ranks and alphas are the file's.

    Raises:
        BadInput: it cannot be read, or none of it is of these modules.
    """
    file, kind = Path(path).expanduser(), type(pipeline).__name__
    file = file / WEIGHTS if file.is_dir() else file
    try:
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter, low_cpu_mem_usage=False)
        else:
            names = {"weight_name": file.name, "adapter_name": adapter, "prefix": "transformer"}
            pipeline.transformer.load_lora_adapter(str(file.parent), **names)
    except Exception as error:  # whatever is wrong with someone's file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"{flag} {path}: cannot be loaded into a {kind}: {reason}") from None
    modules = [m for m in pipeline.components.values() if hasattr(m, "named_modules")]
    if not any(tuned(module, adapter) for module in modules):
        raise BadInput(f"{flag} {path}: holds no adapters of a {kind}")


def has_text(path: str) -> bool:
    """Whether a file of adapters, or the one in a folder that an export wrote, has some of a text encoder."""
    from safetensors import safe_open

    file = Path(path).expanduser()
    with contextlib.suppress(Exception), safe_open(file / WEIGHTS if file.is_dir() else file, "pt") as weights:
        return any(key.startswith(("text_encoder", "lora_te")) for key in weights.keys())  # noqa: SIM118
    return False


def save(models: Models, path: Path, s: Adapters, about: Mapping[str, str]) -> None:
    """The adapters as `load_lora_weights` reads them, and, where asked, as other programs do. Their ranks and alphas are in the
    file, and so are the texts `about`."""
    import safetensors.torch
    import torch
    from safetensors.torch import save_file

    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    told: dict[str, Any] = {}
    for name in ("unet", "transformer", *stable_diffusion.ENCODERS):
        state, adapter = internals.injected(models[name]) if name in models else ({}, None)
        if adapter:
            told |= {f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in adapter.to_dict().items()}
            # Recent versions of transformers leave `text_model` out of some names; every reader knows the names with it.
            inside = "" if name not in stable_diffusion.ENCODERS or hasattr(models[name], "text_model") else "text_model."
            for key, x in state.items():
                weights[f"{name}.{inside}{key}"] = x.detach().to("cpu", getattr(torch, s.save_dtype)).contiguous()
            for key, layer in tuned(models[name]).items():
                alphas[f"{name}.{inside}{key}"] = layer.scaling["default"] * layer.r["default"]
    raw = memoryview(safetensors.torch.save(weights))
    content = raw[8 + int.from_bytes(raw[:8], "little") :]  # behind the header and its length
    about = {"format": "pt", **about, "modelspec.hash_sha256": f"0x{hashlib.sha256(content).hexdigest()}"}
    save_file(weights, path / WEIGHTS, about | {internals.adapter_metadata_key(): json.dumps(told, sort_keys=True)})
    if s.kohya:
        rank, alpha = next(len(x) for key, x in weights.items() if ".lora_A." in key), next(iter(alphas.values()))
        known = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
        save_file(kohya(weights, alphas, s), path / KOHYA, about | known)


def kohya(weights: Mapping[str, Tensor], alphas: Mapping[str, float], s: Adapters) -> dict[str, Tensor]:
    """Adapters with an alpha beside each, which is divided by the rank. Those of Stable Diffusion under the names of kohya's
    sd-scripts: lora_unet_..., and lora_te_..., SDXL's lora_te1_... and lora_te2_...; those of transformers under diffusers' own
    names, which ComfyUI knows."""
    import torch

    flow = stable_diffusion.kind(s) not in stable_diffusion.PIPELINES
    text = "lora_te1" if stable_diffusion.is_xl(s) else "lora_te"
    fronts, named = {"unet": "lora_unet", "text_encoder": text, "text_encoder_2": "lora_te2"}, {}
    for key, x in weights.items():
        module, _, end = key.rpartition(".lora_")  # end: A.weight, B.weight
        part, _, layer = module.partition(".")
        name = module if flow else f"{fronts[part]}_{layer.replace('.', '_')}"
        named[f"{name}.lora_{end}" if flow else f"{name}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = x
        named[f"{name}.alpha"] = torch.tensor(float(alphas[module]))
    return named
