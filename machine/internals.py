"""Every part of another package that it does not promise to keep, each behind one function here.

Such a part may be missing, or be another, after an upgrade: then one line says which versions work. Nothing is imported before
it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

WORKS = {
    "torch": "2.14",
    "accelerate": "1.12 to 1.15",
    "datasets": "4.8 to 5.2",
    "diffusers": "0.42",
    "peft": "0.21",
}
"""The versions that have these parts as they are used here."""
STREAM = "philox4x32-10, keys 1"
"""What makes the random numbers of a run: the generator, and how a seed, an example and a purpose become its keys
(tasks/__init__.py, `Rng`). It changes when any of these numbers does, and then no older run can be resumed."""


@contextlib.contextmanager
def part(package: str, name: str) -> Iterator[None]:
    """What is done with a private part of a package.

    Raises:
        BadInput: it is not there, or is called otherwise.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError, NotImplementedError) as error:
        raise BadInput(
            f"{package} {version(package)} has another {name} ({error}); install {package} {WORKS[package]}"
        ) from error


@functools.cache
def philox() -> ModuleType:
    """torch's stateless generator: `fold_in(keys, data)`, `normal(keys, shape)`, `uniform(keys, shape)`.

    What it makes of a key of zeros is compared with the published Philox4x32-10: another generator, or another way from its
    words to numbers, would change every run without a word.
    """
    with part("torch", "torch.func._random"):
        import torch
        from torch.func import _random

        zeros = torch.tensor([[0, 0]], dtype=torch.uint64)
        keys, u, x = _random.fold_in(zeros, 0), _random.uniform(zeros.view(1, 1, 2), (1, 4)), _random.normal(zeros[0], 4)
        words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        same = keys.tolist() == [[words[0] | words[1] << 32, words[2] | words[3] << 32]]
        same = same and (u * 2**24).tolist() == [[float(word % 2**24) for word in words]]
        if not same or abs(float(x[0]) - 0.9911) > 1e-3:
            raise NotImplementedError("its numbers are others")
        return _random


def stream() -> str:
    """The version of the random stream, once torch's generator has given its known answer.

    Raises:
        BadInput: it draws other numbers.
    """
    philox()
    return STREAM


def cpu_computes_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16; False where torch does not say."""
    import torch

    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@functools.cache
def widen_muon() -> None:
    """Let torch's Muon multiply in float32 on a CPU that does not multiply bfloat16: bfloat16 takes 27 times as long there.

    What it computes stays the same: with the Newton-Schulz iteration x <- a x + (b g + c g g) x, g = x x', the singular values
    of x come near 1 (Jordan et al. 2024).
    """
    with part("torch", "torch.optim.Muon"):
        from torch.optim import _muon

        own = _muon._zeropower_via_newtonschulz

        def orthogonal(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
            if gradient.device.type != "cpu" or cpu_computes_bf16():
                return own(gradient, coefficients, steps, eps)
            (a, b, c), tall = coefficients, gradient.shape[0] > gradient.shape[1]
            x = gradient.mT if tall else gradient
            x = x / x.norm().clamp(min=eps)
            for _ in range(steps):
                g = x @ x.mT
                x = a * x + (b * g + c * g @ g) @ x
            return x.mT if tall else x

        _muon._zeropower_via_newtonschulz = orthogonal


def forget_accelerator() -> None:
    """Let a process make another Accelerator: accelerate keeps the precision of the first."""
    with part("accelerate", "AcceleratorState._reset_state"):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state()
        GradientState._reset_state()


def prepared(accelerator: Any) -> list[Any]:
    """The optimizers that accelerate prepared, in that order."""
    with part("accelerate", "Accelerator._optimizers"):
        return accelerator._optimizers


def inject(module: nn.Module, config: Any) -> None:
    """Adapters into a module, in place, by peft itself: what diffusers and transformers call `add_adapter` demands versions of
    peft that may not be out yet. The module says that it has them, which both read before they recompute or save."""
    with part("peft", "inject_adapter_in_model"):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, module, "default")
        module._hf_peft_config_loaded = True
    with part("peft", "LoraLayer.lora_variant"):
        from peft.tuners.lora.layer import Linear

        from oneloop.machine.addition import Added

        for layer in module.modules():
            if type(layer) is Linear and "default" not in layer.lora_variant:  # quantized layers convert what they add
                layer.lora_variant["default"] = Added()


def injected(module: nn.Module) -> tuple[dict[str, Tensor], Any]:
    """The weights of a module's adapters under peft's names, and their LoraConfig; ({}, None) where it has none."""
    if not hasattr(module, "peft_config"):
        return {}, None
    with part("peft", "get_peft_model_state_dict"):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(module, save_embedding_layers=False), module.peft_config["default"]


def emptied(module: nn.Module) -> None:
    """Have a module whose adapters are gone say so: transformers would else save them, and nothing of its own."""
    module._hf_peft_config_loaded = False


def adapter_metadata_key() -> str:
    """Under which key of a weights file diffusers looks for the adapters' ranks and alphas."""
    with part("diffusers", "LORA_ADAPTER_METADATA_KEY"):
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

        return LORA_ADAPTER_METADATA_KEY


def fingerprint(dataset: Any) -> tuple[str, bool]:
    """What the package datasets calls the content of a data set, and whether its rows are a choice among those of its files."""
    with part("datasets", "Dataset._fingerprint"):
        return dataset._fingerprint, dataset._indices is not None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Have the hub's clients ask nobody meanwhile, and look into their caches alone."""
    with part("huggingface_hub", "HF_HUB_OFFLINE"):
        import datasets
        from huggingface_hub import constants

        places = (datasets.config, constants)
        before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def storage_id(storage: Any) -> int:
    """What tells a tensor's storage from all others while it lives, on the meta device too, where it has no address."""
    with part("torch", "StorageBase._cdata"):
        return storage._cdata
