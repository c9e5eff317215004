"""What a run shows of itself: the console, metrics.jsonl, trackers, sample grids, and the card of its export.

Only the main process shows anything; the others hold a `Report` that does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from oneloop import checkpoint, configs
from oneloop.tasks import Images
from oneloop.views import page

SILENCE = 10.0
"""Seconds between two lines of the log where there is no terminal; those between them are merged into the last."""


class Report:
    """One for each start of a run. `say` works from the start; `open` begins the bar, the metrics file and the trackers.

    What only looks on stops nothing: a console that went away is silent, and what a tracker raises is said once.
    """

    def __init__(self, accelerator: Accelerator, out: Path, cfg: Any):
        self.accelerator, self.out, self.cfg = accelerator, out, cfg
        self.main, self.bar = accelerator.is_main_process, None
        self.metrics, self.spoken, self.writing = None, -math.inf, None
        self.pending, self.timer, self.complained = None, None, set()

    def say(self, text: str) -> None:
        """A line on the console, above the bar; what is waiting for it comes first."""
        if self.main:
            with contextlib.suppress(OSError):
                tqdm.write("\n".join(filter(None, (self._taken(), text))), sys.stderr)

    def _taken(self) -> str | None:
        """The line of the log that waits, which waits no more."""
        if self.timer:
            self.timer.cancel()
        text, self.pending, self.timer = self.pending, None, None
        return text

    def _say_soon(self, text: str) -> None:
        """A line of the log: now, or when SILENCE is over, unless a later one takes its place."""
        left = self.spoken + SILENCE - time.perf_counter()
        if left <= 0:
            self._taken()
            self.spoken = time.perf_counter()
            self.say(text)
        else:
            self.pending = text
            if not self.timer:
                self.timer = threading.Timer(left, self._overdue)
                self.timer.daemon = True
                self.timer.start()

    def _overdue(self) -> None:
        self.timer = None
        if text := self._taken():
            self.spoken = time.perf_counter()
            self.say(text)

    def _track(self, name: str, call: Callable[[], Any]) -> bool:
        """Call a tracker; what it raises, whatever it is, becomes a warning, the first time. Returns whether it went well."""
        try:
            call()
            return True
        except Exception as error:
            if name not in self.complained:
                self.complained.add(name)
                what = configs.one_line(f"{type(error).__name__}: {error}", 300)
                self.say(f"warning: {name} failed, and training goes on: {what}")
            return False

    def open(self, step: int, total: int, data: str, models: dict[str, str]) -> None:
        """Go on with the records after `step`: what an earlier start wrote beyond it is dropped, since it is written again.

        `data` says what is trained on, `models` what each model is; both are for the page.
        """
        plain = {f"{g}.{k}": _plain(v) for g, values in configs.to_dict(self.cfg).items() for k, v in values.items()}
        named = configs.trackers(self.cfg.base)
        options = {
            "tensorboard": {"purge_step": step + 1},
            "wandb": {
                "name": self.out.name,
                "dir": str(self.out),
                "id": self._identity() if "wandb" in named else None,
                "resume": "allow",
            },
        }
        begin = lambda: self.accelerator.init_trackers("oneloop", plain, {k: v for k, v in options.items() if k in named})  # noqa: E731
        if named and not self._track(" ".join(named), begin):
            self.accelerator.trackers = []
        if not self.main:
            return
        path, starts = self.out / "metrics.jsonl", self.out / page.STARTS
        checkpoint.write(path, "".join(line for line, values in page.lines(path, self.say) if values["step"] <= step))
        earlier = "".join(line for line, _ in page.lines(starts, self.say)) if step else ""
        now = json.dumps({"step": step, "total": total} | start(self.accelerator, self.cfg, data, models))
        checkpoint.write(starts, f"{earlier}{now}\n")
        self.metrics = open(path, "a", buffering=1)  # noqa: SIM115
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=step, desc=self.out.name, unit="step", dynamic_ncols=True, smoothing=0.05)
        self.total, self.started, self.first = total, time.perf_counter(), step

    def _identity(self) -> str:
        """The run's name with wandb, the same in each of its starts."""
        if not self.main:
            return ""
        path = self.out / "wandb.id"
        known = path.read_bytes().decode("ascii", "replace").strip() if path.is_file() else None
        if known is None or not re.fullmatch("[0-9a-f]{16}", known):
            if known is not None:
                self.say(f"warning: {path} is damaged; wandb shows this run as another from here on")
            checkpoint.write(path, known := os.urandom(8).hex())
        return known

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update()

    def log(self, values: dict[str, float], step: int) -> None:
        """Metrics of one moment, to every place they go."""
        for tracker in self.accelerator.trackers:
            self._track(tracker.name, functools.partial(tracker.log, values, step=step))
        if not self.main:
            return
        self.metrics.write(json.dumps({"step": step} | values) + "\n")
        first = ("loss", "lr", "images_per_second", "validation/loss", "evaluate/")
        shown = {k: f"{v:.4g}" for k, v in values.items() if k.startswith(first)}
        if self.bar is not None:
            self.bar.set_postfix(shown)
        else:  # a pipe or a file
            left = (time.perf_counter() - self.started) / max(step - self.first, 1) * (self.total - step)
            line = f"step {step}/{self.total}, {', '.join(f'{k} {v}' for k, v in shown.items())}, {clock(left)} left"
            merged = step < self.total and not any(key.startswith(("validation/", "evaluate/")) for key in values)
            (self._say_soon if merged else self.say)(line)

    def images(self, images: Images, step: int) -> None:
        """Each set of images as a PNG grid in samples/, and to the trackers."""
        paths = save_grids(images, self.out / "samples" / str(step))
        if paths:
            self.say(f"step {step}: drew {', '.join(map(str, paths))}")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                for name, drawn in images.items():
                    shown = drawn.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()  # [N, H, W, 3]
                    self._track(tracker.name, functools.partial(tracker.log_images, {name: shown}, step=step, **layout))
        self.page()

    def page(self) -> None:
        """Write report.html anew, beside the training."""
        if self.main:
            if self.writing is not None:
                self.writing.join()
            self.writing = threading.Thread(target=self._write)
            self.writing.start()

    def _write(self) -> None:
        """The page; where it cannot be written, a line on the console, and training goes on."""
        try:
            page.write(self.out)
        except Exception as error:
            self.say(f"{self.out}/report.html was not written: {type(error).__name__}: {' '.join(str(error).split())}")

    def close(self) -> None:
        """Write the page a last time; let go of the bar, the file and the trackers."""
        if self.bar is not None:
            self.bar.close()
        if text := self._taken():
            self.say(text)
        if self.metrics is not None:
            self.page()
            self.writing.join()
            with contextlib.suppress(OSError):  # of a line that failed and was reported; what follows must not hide it
                self.metrics.close()
        for tracker in self.accelerator.trackers:
            self._track(tracker.name, tracker.finish)


def save_grids(images: Images, stem: Path) -> list[Path]:
    """Each set of images as a PNG grid, small ones enlarged: STEM.png for `samples`, STEM-NAME.png for others."""
    paths = []
    for name, grid in images.items():
        grid = grid.detach().float().cpu().clamp(0, 1)  # [N, 3, H, W]
        path = stem.with_name(f"{stem.name}.png" if name == "samples" else f"{stem.name}-{name}.png")
        path.parent.mkdir(exist_ok=True)
        large = grid.repeat_interleave(scale := max(1, 96 // grid.shape[-1]), -1).repeat_interleave(scale, -2)
        save_image(make_grid(large, nrow=math.ceil(len(large) ** 0.5), padding=4, pad_value=1.0), path)
        paths.append(path)
    return paths


def _plain(value: Any) -> Any:
    """A setting in a form that every tracker takes."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def start(accelerator: Accelerator, cfg: Any, data: str, models: dict[str, str]) -> dict[str, Any]:
    """What there is to know of one start of a run: a line of starts.jsonl."""
    task, settings, defaults = configs.task_group(cfg), configs.to_dict(cfg), configs.to_dict(type(cfg)())
    about = (sys.modules[type(cfg).__module__].__doc__ or task).partition("\n")[0]
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.processor() or platform.machine()
    processes = accelerator.num_processes
    packages = ("torch", "diffusers", "accelerate", "transformers", "peft", "datasets", "safetensors")
    return {
        "began": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "about": about,
        "data": data,
        "models": models,
        "changed": {
            f"{group}.{name}": {"value": value, "default": defaults[group][name]}
            for group, values in settings.items()
            for name, value in values.items()
            if value != defaults[group][name] and f"{group}.{name}" != "base.output_dir"
        },
        "hardware": {
            "device": f"{device}, {processes} process{'es' * (processes > 1)}, mixed precision {accelerator.mixed_precision}",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        },
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
    }


def clock(seconds: float) -> str:
    """Seconds as 5s, 12:05 or 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}" if m else f"{s}s"
