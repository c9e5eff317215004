"""The command line: `python loop.py`, `oneloop` and `python -m oneloop` are this.

Settings are read before anything heavy is imported, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import gc
import os
import sys

from oneloop import configs


def main() -> int:
    """Run what the command line asks for; what goes wrong becomes one line and an exit code."""
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
    from oneloop.training.guard import NonFinite

    codes = {configs.BadInput: 2, NonFinite: 3, checkpoint.StorageError: 4, OutOfMemory: 5}
    try:
        loop.run(module.task, cfg)
    except tuple(codes) as error:
        configs.fail(error, next(code for kind, code in codes.items() if isinstance(error, kind)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
