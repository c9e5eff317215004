"""SIGINT, SIGTERM and SIGUSR1: a run saves after its step and leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from accelerate import Accelerator

from oneloop.configs import SIGNALS
from oneloop.machine.processes import largest

ECHO = 5.0
"""Seconds in which a launcher repeats a signal that the whole process group had: torchrun sends its own to every process."""


class Signals(contextlib.AbstractContextManager):
    """A first signal asks the loop to save after the current step and to leave; a second one leaves at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.code, self.before, self.since = accelerator, 0, {}, 0.0
        self.training = False
        """Whether there is something to save; before that a signal leaves at once."""

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        if self.code:
            launched = "TORCHELASTIC_RUN_ID" in os.environ or self.accelerator.num_processes > 1
            if not launched or time.monotonic() - self.since > ECHO:
                os._exit(SIGNALS[number])
            return
        self.code, self.since = SIGNALS[number], time.monotonic()
        if not self.training:
            raise SystemExit(self.code)
        if self.accelerator.is_main_process:  # past Python's own buffers, which the signal may have interrupted
            with contextlib.suppress(OSError):
                text = f"\n{signal.Signals(number).name}: saving after this step; again leaves at once\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    def agreed(self) -> int:
        """The exit code that a signal to any process asks for, the same on all; 0 for none. All processes call this."""
        return largest(self.accelerator, self.code)
