"""The processes of a run among themselves: who does something alone, who does it first, and what all agree on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call on the main process; every process gets the result, or the exception."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def in_turns(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call on one process of each machine, then on the others, which find what it left on the disk. What one raises, all do."""
    result, raised = None, [None] * accelerator.num_processes
    patient = timedelta(days=7)  # the first may have a large set to decode
    for first in (True, False):
        error = None
        if accelerator.is_local_main_process is first:
            try:
                result = function()
            except Exception as trouble:
                error = trouble
        if accelerator.num_processes > 1:
            torch.distributed.all_gather_object(raised, error, group=_host_group(patient))
        if error := next(filter(None, (error, *raised)), None):
            raise error
    return result


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers, on each of them."""
    if accelerator.num_processes == 1:
        return number
    found = torch.tensor(number)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=_host_group())
    return int(found)


@functools.cache
def _host_group(timeout: timedelta | None = None) -> Any:
    """Processes talking from host to host, so that no GPU is waited for."""
    return torch.distributed.new_group(backend="gloo", timeout=timeout)
