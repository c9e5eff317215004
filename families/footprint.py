"""The memory that training adapters takes on a device, computed from shapes: nothing is run, and no weight is needed.

A model on the meta device has shapes and no memory. What its backward pass would keep is counted as autograd hands it over,
with attention that keeps its inputs, its output and a row of sums, as fused kernels do. Left out are what lasts a moment (a
layer's own scratch, the gradient that passes through), CUDA's own half GiB, and what autocast keeps in float32.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneloop.machine import internals
from oneloop.training.optimizers import state_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Footprint:
    """Bytes on a device."""

    weights: int
    """The frozen model, as it is stored."""
    adapters: int
    """In float32."""
    gradients: int
    optimizer: int
    ema: int
    activations: int
    """What the backward pass keeps, with bf16 copies of weights that are stored narrower."""
    recomputed: int
    """The same with gradient checkpointing: the inputs of all blocks, and the largest block's own."""

    def peak(self, recompute: bool, beside: int = 0) -> int:
        """With gradient checkpointing or without; `beside`: encoders that stay on the device, as without a cache they do."""
        lasting = self.weights + self.adapters + self.gradients + self.optimizer + self.ema
        return lasting + (self.recomputed if recompute else self.activations) + beside


def of(module: nn.Module, kept: Kept, precision: str = "bf16", optimizer: str = "adamw", ema: bool = True) -> Footprint:
    """Of a model with adapters, on whatever device: what takes a gradient is adapters. The model itself is not quantized:
    `precision` is as families.precision names it. `kept` is what `activations` counts of it."""
    adapters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    copied = stored_narrow(module, precision) if precision in ("float8", "int8") else ()
    narrow = [module.get_submodule(name).weight for name in copied]
    activations = kept.with_copies({internals.storage_id(p.untyped_storage()): 2 * p.numel() for p in narrow})
    numbers = sum(p.numel() for p in adapters.values())
    state = sum(state_bytes(optimizer, tuple(p.shape), "lora_B" in name) for name, p in adapters.items())
    return Footprint(weight_bytes(module, precision), 4 * numbers, 4 * numbers, state, 4 * numbers * ema, *activations)


def stored_narrow(module: nn.Module, precision: str) -> frozenset[str]:
    """Names of the linear layers that a precision stores in less than bf16: all, but those that diffusers' layerwise casting
    leaves with everything inside what its patterns match."""
    import torch
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *(getattr(module, "_skip_layerwise_casting_patterns", None) or ()))
    patterns += tuple(getattr(module, "_keep_in_fp32_modules", None) or ())

    def skipped(name: str) -> bool:
        parts = name.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(re.search(pattern, prefix) for pattern in patterns for prefix in around)

    linear = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
    frozen = [name for name in linear if not module.get_submodule(name).weight.requires_grad]
    return frozenset(name for name in frozen if precision != "float8" or not skipped(name))


def weight_bytes(module: nn.Module, precision: str) -> int:
    """Bytes of the frozen parameters, the scales of quantized ones with them."""
    narrow = frozenset() if precision in ("auto", "bf16") else stored_narrow(module, precision)
    total = 0
    for name, p in module.named_parameters():
        layer, _, kind = name.rpartition(".")
        n = p.numel()
        if p.requires_grad:
            continue
        if layer in narrow and precision == "float8":
            total += n
        elif layer in narrow and kind == "weight":
            groups = math.ceil(n / 64)  # of nf4: a byte each, and a float32 for 256 of them
            scales = 5 * p.shape[0] if precision == "int8" else groups + 4 * math.ceil(groups / 256)
            total += (n if precision == "int8" else n // 2) + scales
        else:
            total += 2 * n
    return total


@dataclass(frozen=True)
class Kept:
    """What the backward pass of a call keeps, in bytes, and which weights it reads, by the address of their storage."""

    every: int
    inputs: int
    """What is kept where blocks are computed again: their inputs, and all from outside them."""
    inside: tuple[tuple[int, frozenset[int]], ...]
    """Of each block."""
    outside: frozenset[int]

    def with_copies(self, copies: dict[int, int]) -> tuple[int, int]:
        """Bytes without and with recomputation, where the weights of `copies` (storage -> bytes) are cast as they are used."""
        more = lambda read: sum(copies.get(weight, 0) for weight in read)  # noqa: E731
        read = self.outside.union(*(weights for _, weights in self.inside))
        largest = max((own + more(weights) for own, weights in self.inside), default=0)
        return self.every + more(read), self.inputs + more(self.outside) + largest


def activations(module: nn.Module, blocks: Iterable[nn.Module], call: Callable[[], Tensor]) -> Kept:
    """What the backward pass of a call keeps; `blocks` are those that gradient checkpointing computes again. Where the model is
    on the meta device nothing is computed but shapes."""
    import torch

    weights = {internals.storage_id(p.untyped_storage()) for p in module.parameters()}
    every: dict[int, Any] = {}  # address -> storage, which stays, so that no other one gets its address
    inputs: dict[int, Any] = {}
    inside: list[tuple[dict[int, Any], set[int]]] = []
    outside: set[int] = set()
    opened = [False]

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        into, read = inside[-1] if opened[0] else (inputs, outside)
        if internals.storage_id(storage) in weights:
            read.add(internals.storage_id(storage))
        else:
            every[internals.storage_id(storage)] = into[internals.storage_id(storage)] = storage
        return x

    def begin(block: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():  # nothing is kept of this call
            return
        given = [y for x in (*args, *kwargs.values()) for y in (x if isinstance(x, (tuple, list)) else (x,))]
        inputs.update({internals.storage_id(s := y.untyped_storage()): s for y in given if isinstance(y, torch.Tensor)})
        inside.append(({}, set()))
        opened[0] = True

    def end(*_: Any) -> None:
        opened[0] = False

    listeners = [listener for block in blocks for listener in _around(block, begin, end)]
    attention = fused() if next(module.parameters()).is_meta else contextlib.nullcontext()
    try:
        with attention, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            call()
    finally:
        for listener in listeners:
            listener.remove()
    size = lambda storages: sum(storage.nbytes() for storage in storages.values())  # noqa: E731
    own = [({k: v for k, v in storages.items() if k not in inputs}, read) for storages, read in inside]
    return Kept(size(every), size(inputs), tuple((size(s), frozenset(read)) for s, read in own), frozenset(outside))


def _around(block: nn.Module, begin: Any, end: Any) -> tuple[Any, Any]:
    return block.register_forward_pre_hook(begin, with_kwargs=True), block.register_forward_hook(end)


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """Attention on the meta device as fused kernels do it, whatever the mask."""
    import torch
    import torch.nn.functional as F

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = query.new_empty(*query.shape[:-1], value.shape[-1])
            ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
            return out

    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: Attention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual
