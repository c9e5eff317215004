"""SIGINT, SIGTERM and SIGUSR1: a run saves after its step and leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

from accelerate import Accelerator

from oneloop.machine.processes import largest


class Signals(contextlib.AbstractContextManager):
    """A first signal asks the loop to save after the current step and to leave; a second one leaves at once."""

    CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
    """Signal -> exit code; 75 is: saved, wants to be run again."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.code, self.before = accelerator, 0, {}
        self.training = False
        """Whether there is something to save; before that a signal leaves at once."""

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.receive) for number in self.CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        if self.code:
            os._exit(self.CODES[number])
        self.code = self.CODES[number]
        if not self.training:
            raise SystemExit(self.code)

    def agreed(self) -> int:
        """The exit code that a signal to any process asks for, the same on all; 0 for none. All processes call this."""
        return largest(self.accelerator, self.code)
