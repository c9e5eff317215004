"""The command line: `python loop.py`, `oneloop` and `python -m oneloop` are this.

Settings are read before anything heavy is imported, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import traceback

if __name__ == "__main__" and not sys.flags.safe_path and os.path.realpath(sys.path[0]) == os.path.realpath("."):
    del sys.path[0]  # `python -m` puts the working folder first, and nothing is imported from there unless a task is named

from oneloop import configs
from oneloop.settings import command_line

CODES = {
    "oneloop.settings.ranges.BadInput": 2,
    "oneloop.families.hub.Unavailable": 2,
    "oneloop.training.guard.NonFinite": 3,
    "oneloop.checkpoint.StorageError": 4,
    "oneloop.machine.memory.OutOfMemory": 5,
    "torch.OutOfMemoryError": 5,
    "oneloop.machine.processes.ProcessLost": 1,
}
"""What may go wrong -> the exit code. By name, so that none of them is imported for a mistake in the settings."""
NEEDED = ("torch", "torchvision", "diffusers", "accelerate", "datasets", "fsspec", "transformers", "peft", "safetensors")
NEEDED += ("xxhash", "tyro", "plotly", "wandb", "tensorboard", "numpy", "PIL")
"""The packages without which the project was not installed: those of pyproject.toml, and two that come with them."""
BUG = "a bug of oneloop, or of a task of your own: no setting should end in the lines above; please report them whole"


def main() -> int:
    """Run what the command line asks for; what goes wrong becomes one line and an exit code, and a bug keeps its traceback."""
    if sys.platform == "win32":
        configs.fail(configs.BadInput("oneloop runs on Linux and macOS; on Windows, in WSL"), 2)
    for number, code in configs.SIGNALS.items():  # before and after a run, which has its own, there is nothing to save
        signal.signal(number, lambda *_, code=code: os._exit(code))
    gc.set_threshold(50_000, 10, 10)  # imports make half a million objects that stay: collecting them was a fifth of the start
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see loop.py
    try:
        start(sys.argv[1:])
        return 141 if nobody_reads() else 0
    except SystemExit as end:
        return 141 if nobody_reads() else end.code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return 141
        name = f"{type(error).__module__}.{type(error).__qualname__}"
        if isinstance(error, ModuleNotFoundError) and error.name in NEEDED:
            folder = os.path.dirname(os.path.realpath(__file__))
            needs = f"the package {error.name} is not installed in {sys.executable}; run `pip install -e {folder}`"
            configs.fail(configs.BadInput(needs), 2)
        if name not in CODES:
            traceback.print_exc()
            configs.fail(BUG, 1)
        configs.fail(error, CODES[name], everywhere=name.endswith(".ProcessLost"))


def start(argv: list[str]) -> None:
    """A command of `command_line.COMMANDS`, or a run."""
    module, cfg = command_line.parse(argv)
    if hasattr(module, "main"):
        return module.main(cfg)
    from oneloop import loop

    try:
        loop.run(module.task, cfg)
    finally:
        for number in configs.SIGNALS:  # what comes now is over in a moment, and the exit code is known
            signal.signal(number, signal.SIG_IGN)


def nobody_reads() -> bool:
    """Whether standard output has no reader left, as behind `| head`, which is nobody's mistake; then it is silenced."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # what is wrong with it is said unasked
    if broken := any(event & select.POLLERR for _, event in output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken


if __name__ == "__main__":
    sys.exit(main())
