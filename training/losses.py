"""What the losses of a task must not do; the mistakes that would train on silently."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.configs import BadInput
from oneloop.machine.processes import gather
from oneloop.tasks import Loss


@contextlib.contextmanager
def no_leak(loss: Loss, params: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Around a loss's backward pass: refuse it where the gradient of another optimizer's parameter changes.

    Every loss, every time: a loss may come late, or look at another model from some step on.

    Raises:
        ValueError: it does, or no optimizer has its name.
    """
    if loss.name not in params:
        raise ValueError(f"the task yields a loss {loss.name!r}, and its optimizers are: {', '.join(params)}")
    others = [(name, p, p.grad) for name, group in params.items() if name != loss.name for p in group]
    versions = [None if grad is None else grad._version for _, _, grad in others]  # others may have accumulated theirs
    yield
    for (name, p, grad), version in zip(others, versions, strict=True):
        if p.grad is not grad or (grad is not None and grad._version != version):
            raise ValueError(
                f"the loss {loss.name!r} put gradients on the parameters of {name!r}, which are not its own; "
                f"look at that model through tasks.frozen(...), or at what it made through .detach()"
            )


def same_gradients(accelerator: Accelerator, name: str, params: Iterable[Tensor]) -> None:
    """Refuse an optimizer whose gradient is not the same on all processes, whose weights would part. This waits for the device.

    Raises:
        ValueError: it is not, by more than a thousandth of its norm.
    """
    if accelerator.num_processes == 1:
        return
    norms = gather(accelerator, torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]).item())
    if max(norms) - min(norms) > 1e-3 * max(norms):
        raise ValueError(
            f"the gradient of {name!r} was not reduced across processes (norms {', '.join(f'{x:.4g}' for x in norms)}): "
            "call what trains as models[name](...), once for each loss, after the loss before it was yielded"
        )


def in_order(losses: Iterable[Loss], accumulated: int) -> Iterator[Loss]:
    """The losses of a batch, of which each name steps last.

    Raises:
        BadInput: two of one name step, and `accumulated` batches would have one step of both.
        ValueError: none of a name steps, and its gradient would be left for the next batch.
    """
    stepped, left = set(), set()
    for loss in losses:
        if loss.step and loss.name in stepped and accumulated > 1:
            once = f"1, since the task steps {loss.name!r} more than once in a batch"
            raise BadInput(f"--base.gradient-accumulation-steps is {accumulated}; expected {once}")
        if loss.step:
            stepped.add(loss.name)
            left.discard(loss.name)
        else:
            left.add(loss.name)
        yield loss
    if left:
        raise ValueError(
            f"the task yields {', '.join(map(repr, sorted(left)))} with step=False and no loss after it that steps"
        )
