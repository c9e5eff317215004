"""Frozen blocks in the machine's memory, each on the device only while it computes: a base larger than the GPU trains.

A block's frozen weights come to the device of its input as it is called, and are let go as it returns. What the backward pass
needs of them is not kept but brought again, by gradient checkpointing, without which there would be nothing to save. Adapters,
whose gradients must be where they are, stay on the device; diffusers' own group offloading takes them along with their block,
and their optimizer would then find parameters on one device and gradients on another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Weight = tuple[nn.Module, str, nn.Parameter]
"""A module, the name of its parameter, and the parameter."""


def hold(module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Have `placement.place` leave the frozen weights of these blocks where they are, and gradient checkpointing bring them."""
    blocks = list(blocks)
    module.offloaded = frozenset(p for block in blocks for p in block.parameters() if not p.requires_grad)
    module.enable_gradient_checkpointing = functools.partial(recompute, blocks)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Compute each block again in the backward pass, its weights brought for either."""
    from torch.utils.checkpoint import checkpoint

    pinned = torch.cuda.is_available()  # from pinned memory a copy does not wait
    for block in blocks:
        every = [(module, name, p) for module in block.modules() for name, p in module.named_parameters(recurse=False)]
        held = [weight for weight in every if not weight[2].requires_grad]
        for *_, p in held if pinned else ():
            p.data = p.data.pin_memory()
        block.forward = functools.partial(checkpoint, functools.partial(brought, held, block.forward), use_reentrant=False)


def brought(held: list[Weight], forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """A call with these parameters on the device of what it is given. The modules have their own back afterwards, however it
    ends: checkpointing leaves a block in the midst when it has what it needs. What the backward pass reads is then still the
    tensors of the call, for which other parameters stand in: of a parameter whose own data came and went it would find those
    that came back."""
    device = next(x.device for x in (*args, *more.values()) if isinstance(x, Tensor))
    try:
        for module, name, p in held:
            there = p.data.to(device, non_blocking=True, copy=True)
            setattr(module, name, nn.Parameter(there, requires_grad=False))
        return forward(*args, **more)
    finally:
        for module, name, p in held:
            setattr(module, name, p)
