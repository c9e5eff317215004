"""The update in the backward pass (`--base.fused-backward-pass`): a parameter steps when its gradient is complete, and lets go
of it, so that the gradients of all are never there at once (Lv et al. 2023, Full Parameter Fine-tuning for Large Language
Models with Limited Resources, arXiv:2306.09782).

The steps have the same bits as those that are taken after the backward pass without clipping, by optimizers that look at each
parameter by itself. Clipping, accumulation, skipped updates and several processes need all gradients before a weight changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from oneloop.configs import BadInput, Base, require
from oneloop.tasks import Loss


class Fused:
    """An optimizer whose parameters step in the backward pass."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.stepping = optimizer, False
        self.norms: dict[Tensor, Tensor] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self._take)

    def _take(self, p: Tensor) -> None:
        """Step one parameter, whose gradient is complete."""
        if not self.stepping:
            return
        if p in self.norms:
            parts = "its gradient comes in parts, as reentrant recomputation has it"
            raise BadInput(f"--base.fused-backward-pass: a parameter of shape {[*p.shape]} would step twice at once: {parts}")
        self.norms[p] = torch.linalg.vector_norm(p.grad)
        groups = self.optimizer.param_groups
        lists = [group["params"] for group in groups]
        try:
            for group, params in zip(groups, lists, strict=True):
                group["params"] = [p] if any(q is p for q in params) else []
            self.optimizer.step()
        finally:
            for group, params in zip(groups, lists, strict=True):
                group["params"] = params
        p.grad = None

    def norm(self) -> Tensor:
        """The norm of the whole gradient of the backward pass that ended."""
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        norms, self.norms = self.norms, {}
        return torch.nn.utils.get_total_norm([norms[p] for p in order if p in norms])


def check(base: Base, accelerator: Accelerator) -> None:
    """Refuse several processes, whose gradients are summed when all of them are there.

    Raises:
        BadInput: there are several, and the settings ask for this.
    """
    alone = accelerator.num_processes == 1 or not base.fused_backward_pass
    require(alone, "base.fused_backward_pass", True, f"false on {accelerator.num_processes} processes")


@contextlib.contextmanager
def stepping(optimizers: Mapping[str, Fused], loss: Loss) -> Iterator[None]:
    """Around a loss's backward pass: the parameters of its optimizer step in it, where that is one of these.

    Raises:
        BadInput: the optimizer steps after another loss, to whose gradient this one's would be added.
    """
    own = optimizers.get(loss.name)
    if own is None:
        yield
        return
    if not loss.step:
        raise BadInput(f"--base.fused-backward-pass: the task adds up the gradients of several losses for {loss.name!r}")
    own.stepping = True
    try:
        yield
    finally:
        own.stepping = False
