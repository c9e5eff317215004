"""The command line: `python loop.py`, `oneloop` and `python -m oneloop` are this.

Settings are read before anything heavy is imported, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

from oneloop import configs


def main() -> int:
    """Run what the command line asks for; what goes wrong becomes one line and an exit code."""
    if sys.platform == "win32":
        configs.fail(configs.BadInput("oneloop runs on Linux and macOS; on Windows, in WSL"), 2)
    for number, code in configs.SIGNALS.items():  # before and after a run, which has its own, there is nothing to save
        signal.signal(number, lambda *_, code=code: os._exit(code))
    gc.set_threshold(50_000, 10, 10)  # imports make half a million objects that stay: collecting them was a fifth of the start
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see loop.py
    try:
        module, cfg = configs.parse(sys.argv[1:])
        if hasattr(module, "main"):  # one of configs.COMMANDS
            module.main(cfg)
            return 0
    except configs.BadInput as error:
        configs.fail(error, 2)

    from oneloop import checkpoint, loop
    from oneloop.machine.memory import OutOfMemory
    from oneloop.machine.processes import ProcessLost
    from oneloop.training.guard import NonFinite

    codes = {configs.BadInput: 2, NonFinite: 3, checkpoint.StorageError: 4, OutOfMemory: 5, ProcessLost: 1}
    try:
        loop.run(module.task, cfg)
    except tuple(codes) as error:
        configs.fail(
            error,
            next(code for kind, code in codes.items() if isinstance(error, kind)),
            everywhere=isinstance(error, ProcessLost),
        )
    finally:
        for number in configs.SIGNALS:  # what comes now is over in a moment, and the exit code is known
            signal.signal(number, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
