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

Pair = tuple[nn.Parameter, Tensor]


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
        frozen = [p for p in block.parameters() if not p.requires_grad]
        held = [(p, p.data.pin_memory() if pinned else p.data) for p in frozen]
        block.forward = functools.partial(checkpoint, functools.partial(brought, held, block.forward), use_reentrant=False)


def brought(held: list[Pair], forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """A call with these parameters on the device of what it is given; they are back afterwards, however it ends: checkpointing
    leaves a block in the midst when it has what it needs, and what it has are the tensors of then."""
    device = next(x.device for x in (*args, *more.values()) if isinstance(x, Tensor))
    try:
        for p, home in held:
            p.data = home.to(device, non_blocking=True, copy=True)
        return forward(*args, **more)
    finally:
        for p, home in held:
            p.data = home
