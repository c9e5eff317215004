"""What is measured in each of the GPU's rows of docs/performance.md, the most important first (benchmarks/gpu.py). Each has
a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import __main__ as benchmark
from benchmarks.__main__ import CASES, ROOT, columns, make_parser, prepare, side_by_side
from oneloop.settings import command_line

STEPS = 40  # of a run, times what the case says
OURS = "--dataset_name {parquet} --cache_dir {cache} --dataloader_num_workers 8 --lr_warmup_steps 0"
OURS += " --checkpointing_steps 1000000 --mixed_precision bf16 --output_dir {out}"
LORA = f"{OURS} --rank 16 --pretrained_model_name_or_path {{model}} --center_crop --max_train_steps {{steps}}"
OFFICIAL = {
    "mnist_unet": f"unconditional_image_generation/train_unconditional.py {OURS} --model_config_name_or_path {{unet}}"
    " --resolution 32 --train_batch_size 64 --num_epochs 1 --use_ema --ddpm_num_inference_steps 25",
    "sd15_lora": f"text_to_image/train_text_to_image_lora.py {LORA} --resolution 512 --train_batch_size 8",
    "sdxl_lora": f"text_to_image/train_text_to_image_lora_sdxl.py {LORA} --resolution 1024 --train_batch_size 4",
}
"""Case -> the official script beside it, with the placeholders of `python -m benchmarks`."""


@dataclass(frozen=True)
class Row:
    """A row of the page."""

    asks: str
    measure: Callable[[argparse.Namespace, Path], str]
    """(flags, an empty folder) -> what was measured, in words."""
    scripts: bool = False
    """Whether it needs the official scripts."""


def settings(case: str, given: argparse.Namespace, folder: Path, *flags: str) -> tuple[Any, Any]:
    """The task and settings of a case."""
    folders = benchmark.model_folders(folder, given.models)
    words = [benchmark.fill(word, folders) for word in shlex.split(CASES[case].arguments)]
    with contextlib.chdir(ROOT):
        module, cfg = command_line.parse([*words, *flags])
    return module.task, cfg


def train(
    case: str, given: argparse.Namespace, out: Path, *flags: str, steps: int = 0, watched: Callable[[Any], Any] | None = None
) -> dict[str, float]:
    """Milliseconds and images a second of a run's later steps, by its own metrics, and its peak memory in GiB."""
    import torch
    from warm import metrics

    from oneloop import loop

    steps = steps or STEPS * CASES[case].times
    told = {"max-train-steps": steps, "output-dir": out, "logging-steps": max(steps // 10, 1), "checkpointing-steps": 10**9}
    told |= {"validation-steps": 0, "num-samples": 1, "logger": "none", "lr-scheduler": "constant"}
    run = [str(word) for name, value in told.items() for word in (f"--base.{name}", value)]
    task, cfg = settings(case, given, out.parent, *run, *flags)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    loop.run(watched(task) if watched else task, cfg)
    speeds = [line["images_per_second"] for line in metrics(out) if "images_per_second" in line]
    speed = statistics.median(speeds[1:] or speeds)
    return {"ms": 1e3 * cfg.data.train_batch_size / speed, "images": speed, "gib": torch.cuda.max_memory_allocated() / 2**30}


def stream(given: argparse.Namespace, folder: Path) -> str:
    """The keyed random stream on the GPU against the CPU's."""
    import torch

    from oneloop.tasks import Rng

    here, there = (Rng.of(0, range(64), device=device) for device in ("cpu", "cuda"))
    uniform = torch.equal(here.uniform("u", 65536), there.uniform("u", 65536).cpu())
    a, b = here.normal("x", 65536), there.normal("x", 65536).cpu()
    said = f"uniform numbers are {'the same bits' if uniform else 'OTHERS'}"
    return f"{said}; of normal ones {(a != b).float().mean():.1%} differ, by at most {(a - b).abs().max():.1e}"


def waits(given: argparse.Namespace, folder: Path) -> str:
    """A step in which CUDA raises where the host waits for it."""
    from gpu import nothing_waits

    nothing_waits(folder)
    return "it does not"


def repeats(case: str, *flags: str) -> Callable[[argparse.Namespace, Path], str]:
    """Whether two runs end in the same bits, and a stopped one."""

    def measure(given: argparse.Namespace, folder: Path) -> str:
        from warm import digest

        a, b, c = (folder / part for part in "abc")
        ms = [train(case, given, out, *flags, steps=STEPS // 2)["ms"] for out in (a, b)]
        for steps in (STEPS // 4, STEPS // 2):
            train(case, given, c, *flags, steps=steps)
        again, resumed = ("the same bits" if digest(a) == digest(other) else "OTHER bits" for other in (b, c))
        return f"again {again}, stopped and resumed {resumed}; {min(ms):.2f} ms a step"

    return measure


def step(case: str) -> Callable[[argparse.Namespace, Path], str]:
    """What a step costs, over a bare loop and the limit."""

    def measure(given: argparse.Namespace, folder: Path) -> str:
        from benchmarks import step as steps

        memory = train(case, given, folder / "out", steps=5)["gib"]
        found, limit = steps.measure(*settings(case, given, folder)), CASES[case].limit
        share = f", {benchmark.share_of_limit(found, limit):.0%} of the limit" if limit else ""
        said = f"{found['images_per_second']:,.0f} images/s{share}; time over bare {found['over_bare']:.3f}"
        return f"{said}, outside the model {found['outside_model']:.1%}; peak memory {memory:.2f} GiB"

    return measure


def changed(case: str, *flags: str) -> Callable[[argparse.Namespace, Path], str]:
    """What flags do to a step."""

    def measure(given: argparse.Namespace, folder: Path) -> str:
        with_them, plain = train(case, given, folder / "a", *flags), train(case, given, folder / "b")
        said = f"{with_them['ms']:.2f} ms a step rather than {plain['ms']:.2f}"
        return f"{said}; peak memory {with_them['gib']:.2f} GiB rather than {plain['gib']:.2f}"

    return measure


def memory(case: str) -> Callable[[argparse.Namespace, Path], str]:
    """What was computed of a step's memory, and what it took."""

    def measure(given: argparse.Namespace, folder: Path) -> str:
        from oneloop.views import fits

        computed: list[float] = []

        def watched(task: Any) -> Any:
            def loss_fn(models: Any, batch: Any, rng: Any, cfg: Any) -> Any:
                losses = task.loss_fn(models, batch, rng, cfg)
                if not computed:
                    held, first = fits.watch(models, lambda: next(losses))
                    computed.append(fits.counted(held, task, cfg).peak(cfg.base.gradient_checkpointing) / 2**30)
                    yield first
                yield from losses

            return replace(task, loss_fn=loss_fn)

        taken = train(case, given, folder / "out", steps=5, watched=watched)["gib"]
        return f"{computed[0]:.2f} GiB computed, {taken:.2f} taken"

    return measure


def official(case: str) -> Callable[[argparse.Namespace, Path], str]:
    """Whole processes beside the official script."""

    def measure(given: argparse.Namespace, folder: Path) -> str:
        script, _, words = OFFICIAL[case].partition(" ")
        command = f"{{python}} {shlex.quote(str(given.scripts.resolve() / script))} {words}"
        flags = ["--precision", "bf16", "--versus-precision", "bf16", "--steps", "20", "220", "--models", str(given.models)]
        plan = prepare(CASES[case], command, make_parser().parse_args(flags), folder)
        found = side_by_side(plan.arms, 3, plan.lengths, plan.values, True)
        told = {title: (figure, form) for title, figure, form in columns(plan.lengths, plan.cfg.data.train_batch_size)}
        middle = lambda key, runs: told[key][1].format(statistics.median(map(told[key][0], runs)))  # noqa: E731
        keys = ("time to first step", "a step", "images/s", "peak memory")
        return "; ".join(f"{arm}: " + ", ".join(f"{key} {middle(key, runs)}" for key in keys) for arm, runs in found.items())

    return measure


BF16 = ("--base.mixed-precision", "bf16", "--base.weights", "bf16")
SHOWN = {
    "mnist_unet": "the UNet of `examples/mnist_unet.json`, 32x32, batch 64; at most 62,700 images/s",
    "sd15_lora": "SD 1.5, 512, batch 8, latents and captions cached; at most 461 images/s",
    "sdxl_lora": "SDXL, 1024, batch 4, latents and captions cached; at most 56 images/s",
    "unet64": "the UNet at 64x64",
    "smallest": "the default of `ddpm`, batch 16",
}
ROWS = {
    "stream": Row("the random stream beside that of a CPU", stream),
    "waits": Row("does the host wait for the device in a step", waits),
    **{case: Row(asks, step(case)) for case, asks in SHOWN.items()},
    "repeats": Row("`mnist_unet` with `--base.deterministic`: bits", repeats("mnist_unet", "--base.deterministic")),
    "repeats-plain": Row("`mnist_unet` without it", repeats("mnist_unet")),
    "sdxl_lora-weights": Row("`sdxl_lora` with `--base.weights bf16`", changed("sdxl_lora", *BF16)),
    "sd15_lora-weights": Row("`sd15_lora` with `--base.weights bf16`", changed("sd15_lora", *BF16)),
    "sdxl_lora-memory": Row("`sdxl_lora`: the memory that is computed for it, and what it takes", memory("sdxl_lora")),
    "mnist_unet-compile": Row("`mnist_unet` with `--base.compile`, in CUDA graphs", changed("mnist_unet", "--base.compile")),
    "sd15_lora-compile": Row("`sd15_lora` with `--base.compile`", changed("sd15_lora", "--base.compile")),
    **{f"{case}-official": Row(f"`{case}` beside diffusers' script", official(case), True) for case in OFFICIAL},
}
"""The most important first."""
