"""Which kernels compute: those of attention (`--base.attention`), those whose sums have one order (`--base.deterministic`), and
none where diffusers divides by 1."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor

from oneloop.configs import BadInput, Base
from oneloop.tasks import Models


@contextlib.contextmanager
def kernels(base: Base) -> Iterator[None]:
    """While a run lasts: deterministic kernels where they are asked for, by the switches that PyTorch documents
    (docs.pytorch.org/docs/stable/notes/randomness.html). A process that has called cuBLAS before keeps its workspace.

    Raises:
        BadInput: the run needs an operation that the kernels which are asked for do not have.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if base.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(before or base.deterministic)
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        unordered = re.match(r"(\S+) does not have a deterministic implementation", said)
        if base.deterministic and unordered:
            raise BadInput(f"--base.deterministic: {unordered[1]} has no such kernel on this device") from None
        places = {frame.filename.rpartition(os.sep)[2] for frame in traceback.extract_tb(error.__traceback__)}
        if base.attention != "auto" and "attention_dispatch.py" in places:
            raise BadInput(f"--base.attention {base.attention} does not suit this model or device: {said}") from None
        raise
    finally:
        torch.use_deterministic_algorithms(before)


def choose_attention(models: Models, name: str) -> None:
    """Have models compute attention by the kernels of this name, where they ask diffusers' dispatcher; `auto` leaves them as
    they are.

    Raises:
        BadInput: its package is missing, or no model asks: UNets and autoencoders call PyTorch's own attention.
    """
    if name == "auto":
        return
    from diffusers.models.attention_dispatch import attention_backend

    asks = lambda layer: hasattr(getattr(layer, "processor", None), "_attention_backend")  # noqa: E731
    ask = [module for module in models.values() if any(map(asks, module.modules()))]
    if not ask:
        kinds = ", ".join(sorted({type(module).__name__ for module in models.values()}))
        raise BadInput(f"--base.attention is {name!r}; expected auto: none of the models ({kinds}) has a choice")
    with attention_backend("native"):  # what it sets for all models of the process is as before afterwards
        for module in ask:
            try:
                module.set_attention_backend(name)
            except (RuntimeError, ValueError, ImportError) as error:
                raise BadInput(f"--base.attention {name}: {' '.join(str(error).split())}") from None


FACTORS = {
    ("diffusers.models.attention_processor", "Attention"): "rescale_output_factor",
    ("diffusers.models.resnet", "ResnetBlock2D"): "output_scale_factor",
}
"""Classes -> what they divide their output by."""


class One:
    """A divisor of 1: `x / One()` is x itself, for a tensor x, by no kernel."""

    def __rtruediv__(self, x: Tensor) -> Tensor:
        return x

    def __repr__(self) -> str:
        return "1"


def undivide(models: Models) -> None:
    """Have attention and residual blocks of diffusers, in place, not divide what they return by a factor that is 1: the same
    bits. torch.compile does not trace it, and needs it not."""
    for part in (part for module in models.values() for part in module.modules()):
        name = FACTORS.get((type(part).__module__, type(part).__name__))
        if name and getattr(part, name, None) == 1:
            setattr(part, name, One())
