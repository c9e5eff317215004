"""The processes of a run among themselves: who does something alone, who does it first, and what all agree on.

Whatever one process does alone (decode, draw, export, upload), the others wait for as long as it takes: over a group of their
own, from host to host, whose timeout is a week. The default group's, 10 minutes with NCCL and 30 with gloo, is for steps.
"""

from __future__ import annotations

import atexit
import contextlib
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.configs import SIGNALS

PATIENCE = timedelta(days=7)


class ProcessLost(RuntimeError):
    """Another process of the run, or one that reads its images, ended or stopped answering. Exit code 1."""


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call on the main process; every process gets the result, or the exception. All processes call this."""
    outcome: list[Any] = [None, None]
    group = _patient_group() if accelerator.num_processes > 1 else None  # made first: making it has the default's patience
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if group is not None:
        torch.distributed.broadcast_object_list(outcome, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def in_turns(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call on one process of each machine, then on the others, which find what it left on the disk. What one raises, all do."""
    result = None
    for first in (True, False):
        error = None
        if accelerator.is_local_main_process is first:
            try:
                result = function()
            except Exception as trouble:
                error = trouble
        if error := next(filter(None, (error, *gather(accelerator, error))), None):
            raise error
    return result


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks, on each of them. All processes call this."""
    if accelerator.num_processes == 1:
        return [value]
    values = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(values, value, group=_patient_group())
    return values


def share(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Give all processes the main one's values, in place."""
    for tensor in tensors if accelerator.num_processes > 1 else ():
        torch.distributed.broadcast(tensor, 0)


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers, on each of them. All processes call this; no GPU is waited for."""
    if accelerator.num_processes == 1:
        return number
    most = torch.tensor(number)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=_patient_group())
    return int(most)


_GROUPS: dict[Any, Any] = {}
"""The default group -> the patient one beside it."""


def _patient_group() -> Any:
    default = torch.distributed.group.WORLD
    if default not in _GROUPS:
        atexit.register(_leave)
        _GROUPS[default] = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _GROUPS[default]


def _leave() -> None:
    """Join gloo's threads while there still is an interpreter. One that is about to let go of a tensor needs it; right after
    the last exchange it may be gone, and torch then ends the process with SIGABRT."""
    default = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    groups = [_GROUPS[default], default] if default in _GROUPS else []
    _GROUPS.clear()
    for group in groups:
        if torch.distributed.get_backend(group) == "gloo":
            torch.distributed.destroy_process_group(group)


@contextlib.contextmanager
def company(accelerator: Accelerator) -> Iterator[None]:
    """Turns what the backends raise when a process is gone into `ProcessLost`, a line that says so."""
    try:
        yield
    except RuntimeError as error:
        gone = r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|DistBackendError|NCCL|ProcessGroup|[Tt]imed out waiting"
        text = f"{type(error).__name__}: {error}"
        if "DataLoader worker" in text:
            raise ProcessLost(
                f"a process that reads images is gone: {error}; where memory was short, fewer --data.dataloader-num-workers "
                "take less; the same command resumes from the last checkpoint"
            ) from None
        if accelerator.num_processes == 1 or isinstance(error, torch.OutOfMemoryError) or not re.search(gone, text):
            raise
        raise ProcessLost(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another one, which ended or stopped "
            f"answering: its own message says why; the same command resumes from the last checkpoint"
        ) from None


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started in here never see the signals that stop a run: a signal to the whole group reaches them too, and they
    have to live until the run has saved."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
