"""Run the program in forks of this warm process: a case costs a second, not an interpreter's start.

Forking is safe because torch runs on one thread here (conftest.py): there are no worker threads to lose.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Process:
    """A fork that runs."""

    pid: int
    folder: Path

    def wait(self, timeout: float = 120) -> Result:
        """The result; a process that outlives the timeout is killed, and its code is None-like -9."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        texts = [(self.folder / name).read_text(errors="replace") for name in ("out", "err")]
        return Result(os.waitstatus_to_exitcode(status), *texts)


_count = 0


def fork(function: Callable[[], object], folder: Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Process:
    """Run `function` in a fork, its output into files in `folder`."""
    global _count
    _count += 1
    place = folder / f".fork-{_count}"
    place.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, place)
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            fd = os.open(place / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(fd, number)
        os.close(0)
        os.open(os.devnull, os.O_RDONLY)
        own = {"closefd": False}  # a fork of this fork will replace these in its turn
        sys.stdin, sys.stdout, sys.stderr = open(0, **own), open(1, "w", 1, **own), open(2, "w", 1, **own)  # noqa: SIM115
        os.environ.update(env or {})
        AcceleratorState._reset_state(reset_partial_state=True)  # a test may have run something in this process
        tqdm.set_lock(threading.RLock())  # its own is a semaphore of all forks, which one that is killed may hold
        os.chdir(cwd or folder)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def start(folder: Path, *argv: str, env: dict[str, str] | None = None, cwd: Path | None = None, patch=lambda: None) -> Process:
    """`python loop.py *argv` in a fork that works in `folder`; `patch` runs in it first."""

    def command() -> None:
        patch()
        sys.argv = ["loop.py", *map(str, argv)]
        runpy.run_path(str(ROOT / "loop.py"), run_name="__main__")

    return fork(command, folder, env, cwd)


def cli(folder: Path, *argv: str, timeout: float = 120, **kwargs) -> Result:
    """`python loop.py *argv`, to its end."""
    return start(folder, *argv, **kwargs).wait(timeout)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_many(folder: Path, count: int, *argv: str, env: dict[str, str] | None = None, **kwargs) -> list[Process]:
    """What `accelerate launch --cpu --num_processes count` starts."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
    }
    own = lambda rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} | (env or {})  # noqa: E731
    return [start(folder, *argv, env=own(rank), **kwargs) for rank in range(count)]


def cli_many(folder: Path, count: int, *argv: str, timeout: float = 180, **kwargs) -> list[Result]:
    """The same, to the end of all."""
    return [process.wait(timeout) for process in start_many(folder, count, *argv, **kwargs)]


# ---------------------------------------------------------------------------------------------------------------------
# Small things to train, and ways to look at what came of it.

UNET = {
    "_class_name": "UNet2DModel",
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "dropout": 0.1,
}


VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}


DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "patch_size": 2,
}


def tiny(folder: Path, out: str = "out", steps: int | None = 6, task: str = "ddpm", **more: object) -> list[str]:
    """A command line that trains in a second: 24 shapes of 8x8, a model of a few thousand weights, UNets with dropout."""
    (folder / "unet.json").write_text(json.dumps(UNET))
    (folder / "vae.json").write_text(json.dumps(VAE))
    (folder / "dit.json").write_text(json.dumps(DIT))
    own = {
        "ddpm": {"ddpm.model_config": folder / "unet.json", "ddpm.ddpm_num_inference_steps": 2},
        "consistency": {"consistency.model_config": folder / "unet.json"},
        "edm": {"edm.model_config": folder / "unet.json", "edm.num_inference_steps": 3},
        "dit": {"dit.model_config": folder / "dit.json", "dit.num_inference_steps": 2},
        "vae": {
            "vae.model_config": folder / "vae.json",
            "vae.disc_channels": 4,
            "vae.disc_layers": 1,
            "vae.disc_start": 2,
        },
    }
    settings = {
        "base.output_dir": folder / out,
        "base.num_samples": 2,
        "base.logger": "none",
        "base.validation_steps": 0,
        "base.checkpointing_steps": 1000,
        "data.num_shapes": 24,
        "data.resolution": 8,
        "data.train_batch_size": 4,
    } | own[task]
    if steps is not None:
        settings["base.max_train_steps"] = steps
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    return flags(task, settings)


def brief(folder: Path, out: str, photos: Path, side: int) -> dict[str, object]:
    """Settings of two steps on photographs, for a task on a text-to-image checkpoint."""
    return {
        "base.output_dir": folder / out,
        "base.max_train_steps": 2,
        "base.num_samples": 1,
        "base.logger": "none",
        "base.validation_steps": 0,
        "base.lr_scheduler": "constant",
        "data.train_data_dir": photos,
        "data.resolution": side,
        "data.train_batch_size": 2,
    }


def flags(task: str, settings: dict[str, object]) -> list[str]:
    """A command line from settings named as flags are; a tuple is several values."""
    made = [task]
    for name, value in settings.items():
        if isinstance(value, bool):
            group, _, leaf = name.partition(".")
            made.append(f"--{group}.{'' if value else 'no-'}{leaf}")
        else:
            made += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return made


def checkpoints(out: Path) -> list[int]:
    """Steps of the checkpoints there are."""
    return sorted(int(p.name.removeprefix("checkpoint-")) for p in out.glob("checkpoint-*"))


def tensors(out: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Everything a checkpoint's state holds: weights, averages, optimizer state and rates, under flat names."""
    from safetensors.torch import load_file

    state = out / f"checkpoint-{step if step is not None else checkpoints(out)[-1]}" / "state"
    found: dict[str, torch.Tensor] = {}
    for path in sorted(state.glob("*.safetensors")):
        found |= {f"{path.stem}/{k}": v for k, v in load_file(path).items()}
    for path in sorted(state.glob("optimizer*.bin")):
        saved = torch.load(path, weights_only=True)
        for i, values in saved["state"].items():
            values |= values.pop("__bnb_optimizer_quant_state__", {})  # where 8-bit optimizers write theirs
            found |= {f"{path.stem}/{i}/{k}": torch.as_tensor(v) for k, v in values.items()}
        for i, group in enumerate(saved["param_groups"]):
            found[f"{path.stem}/lr/{i}"] = torch.tensor(group["lr"], dtype=torch.float64)
    return found


def digest(out: Path, step: int | None = None) -> str:
    """sha256 over all of that: two runs are Equal when their digests are."""
    h = hashlib.sha256()
    for key, value in sorted(tensors(out, step).items()):
        h.update(key.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def distance(a: Path, b: Path, part: str = "model") -> float:
    """The largest difference between two runs' last weights."""
    x, y = tensors(a), tensors(b)
    keys = [k for k in x if k.startswith(part)]
    assert keys and x.keys() == y.keys()
    return max((x[k] - y[k]).abs().max().item() for k in keys)


def shown(path: Path, side: int) -> np.ndarray:
    """The square images of a grid's first row, side by side at their own size, [side, count * side, 3] floats."""
    grid, scale = np.asarray(Image.open(path)).astype(float), max(1, 96 // side)
    starts = range(4, grid.shape[1] - 4, side * scale + 4)
    return np.concatenate([grid[4 : 4 + side * scale : scale, x : x + side * scale : scale] for x in starts], 1)


def metrics(out: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
