"""What tests ask of a GPU, in a process of its own: python tests/gpu.py FOLDER"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from warm import digest, tiny

from oneloop import loop
from oneloop.settings import command_line


def nothing_waits(folder: Path) -> None:
    """In the third step of a run, CUDA raises where the host waits for the device."""
    module, cfg = command_line.parse(tiny(folder, steps=4, base__logging_steps=100))
    seen = []

    def loss_fn(*arguments):
        seen.append(arguments)
        torch.cuda.set_sync_debug_mode("error" if len(seen) == 3 else "default")
        yield from module.task.loss_fn(*arguments)

    loop.run(dataclasses.replace(module.task, loss_fn=loss_fn), cfg)
    assert len(seen) == 4 and digest(folder / "out")


if __name__ == "__main__":
    nothing_waits(Path(sys.argv[1]))
