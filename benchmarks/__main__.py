"""The project's speed in one table: what it is, what a step costs over a bare loop, and whole processes side by side.

    python -m benchmarks                                            the smallest model, the 24 M UNet, a tiny LoRA
    python -m benchmarks smallest --repeats 5 --out table.md
    python -m benchmarks --case 'ddpm run.json' --precision no bf16
    python -m benchmarks mnist_unet --steps 5 205 --versus 'python train_unconditional.py --output_dir {out} ...'

On a GPU the first of these measures the 24 M UNet at 64x64 and LoRAs on a full-size SD 1.5 and SDXL too.

Steps are measured by benchmarks/step.py. Whole processes are measured from outside, from their start to the end of their first
step and to their exit, taking turns; a figure is the median of its repetitions, a ratio that of the ratios within a
repetition. With two numbers of `--steps` each process runs at both lengths, and a step is the difference over the steps
between: what happens once cancels. (On a GPU both are ten times as many for the small cases, whose steps take milliseconds.)
Peak memory is the machine's; on a GPU it is what the GPU has in use beyond what it had.

The other command's first step is over when its output shows 1/{steps}, as a progress bar does, or what `--versus-first`
matches. Its settings are its own: give it the same model, batch and number of steps. In it stand for

    {python}      this interpreter
    {steps}       the number of steps
    {out}         a folder that is new in each run
    {cache}       a folder that stays from run to run, for what it prepares
    {images}    a folder of PNGs with captions in metadata.jsonl, the embedded shapes at the case's resolution: as many as its
                  steps take in one pass, or as {images:64} says
    {parquet}     the same in one parquet file, since to list a folder takes longer the more images are in it
    {model}       the folder of the case's Stable Diffusion
    {unet}        a folder with the config.json of the case's UNet

The commands of diffusers' own scripts are in benchmarks/gpu_rows.py, which fills docs/performance.md on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from oneloop import configs
from oneloop.configs import BadInput
from oneloop.inputs import shapes
from oneloop.settings import command_line

FIRST = r"\b1/{steps}\b"
SPEED = 790e12
"""FLOP/s of a product of matrices in bf16 on an H100, for which the limits are stated."""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    arguments: str
    """Of loop.py; {tiny}, {sd15} and {sdxl} stand for the folders of Stable Diffusions of random weights."""
    limit: float | None = None
    """Images a second that the model's FLOPs allow at SPEED, captions and latents cached."""
    gpu: bool = False
    """It takes hours on a CPU, where it is measured only if named."""
    times: int = 1
    """What a pair of `--steps` is multiplied by on a GPU, so that the starts' variation is small beside the steps between."""

    def lengths(self, steps: list[int], gpu: bool) -> list[int]:
        """Steps of its processes."""
        return [n * (self.times if gpu and len(steps) > 1 else 1) for n in steps]


UNET = "ddpm --ddpm.model-config examples/mnist_unet.json --data.train-batch-size 64"
LORA = "--data.num-shapes 64 --data.center-crop --base.num-samples 1 --lora.num-inference-steps 1"
CASES = {
    "smallest": Case("ddpm --data.train-batch-size 16", times=10),
    "mnist_unet": Case(f"{UNET} --data.resolution 32", limit=62_700, times=10),
    "unet64": Case(f"{UNET} --data.resolution 64", gpu=True, times=10),
    "lora": Case(
        f"lora --lora.pretrained-model-name-or-path {{tiny}} {LORA} --data.resolution 32 --data.train-batch-size 4", times=10
    ),
    "sd15_lora": Case(
        f"lora --lora.pretrained-model-name-or-path {{sd15}} {LORA} --data.resolution 512 --data.train-batch-size 8", 461, True
    ),
    "sdxl_lora": Case(
        f"lora --lora.pretrained-model-name-or-path {{sdxl}} {LORA} --data.resolution 1024 --data.train-batch-size 4", 56, True
    ),
}


class Failed(SystemExit):
    """A program that was to be measured did not run to its end."""


# ---------------------------------------------------------------------------------------------------------------------
# What a command's placeholders stand for.


def fill(text: str, values: Mapping[str, Callable[[int | None], object]]) -> str:
    """The text with {name} and {name:64} replaced by what `values` makes of None and of 64.

    Raises:
        BadInput: a name that is not among them.
    """

    def value(found: re.Match[str]) -> str:
        name, count = found.groups()
        if name not in values:
            expected = ", ".join(f"{{{known}}}" for known in values)
            raise BadInput(f"{found[0]} stands for nothing here, in {text!r}; expected {expected}")
        return str(values[name](int(count) if count else None))

    return re.sub(r"\{([a-z]\w*)(?::(\d+))?\}", value, text)


def model_folders(folder: Path, kept: Path | None) -> dict[str, Callable[[int | None], Path]]:
    """For `fill`: each model is built when it is first asked for; the large ones in `kept`, where they are found again."""
    where = (kept or folder / "models").resolve()

    def tiny(_: int | None) -> Path:
        import tiny_models

        return folder / "sd" if (folder / "sd").exists() else tiny_models.build(folder, "sd")

    def full(kind: str) -> Path:
        # By itself, since a process reports the memory of the one that started it as its own, if that was more.
        done = subprocess.run([sys.executable, "-m", "benchmarks.models", str(where), kind], cwd=ROOT, stdout=subprocess.PIPE)
        if done.returncode:
            raise Failed(f"the model {kind} could not be built in {where}")
        return where / kind

    return {"tiny": tiny, "sd15": lambda _: full("sd15"), "sdxl": lambda _: full("sdxl")}


def draw(count: int, side: int) -> list[tuple[bytes, str]]:
    """The first embedded shapes: PNG and caption of each."""
    from PIL import Image

    drawn = []
    for index in range(count):
        image, caption, _ = shapes.draw_shape(index, side)
        Image.fromarray(image).save(file := io.BytesIO(), "PNG")
        drawn.append((file.getvalue(), caption))
    return drawn


def images(folder: Path, count: int, side: int) -> Path:
    """A folder of PNGs with their captions, drawn unless it is there."""
    path = folder / f"images-{count}-{side}"
    if not path.exists():
        path.mkdir()
        with (path / "metadata.jsonl").open("w") as lines:
            for i, (png, caption) in enumerate(draw(count, side)):
                (path / f"{i:06}.png").write_bytes(png)
                lines.write(json.dumps({"file_name": f"{i:06}.png", "text": caption}) + "\n")
    return path


def parquet(folder: Path, count: int, side: int) -> Path:
    """A folder with one parquet file of the same, in the columns `image` and `text`, drawn unless it is there."""
    path = folder / f"parquet-{count}-{side}"
    if not path.exists():
        import datasets

        path.mkdir()
        images, texts = zip(*draw(count, side), strict=True)
        columns = {"image": [{"bytes": png, "path": None} for png in images], "text": list(texts)}
        kinds = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        datasets.Dataset.from_dict(columns, kinds).to_parquet(path / "train.parquet")
    return path


def stand_for(cfg: Any, folder: Path, steps: int, out: Path) -> dict[str, Callable[[int | None], object]]:
    """For `fill`: what a command beside a case is told, in one run of it."""
    own, whole, side = getattr(cfg, configs.task_group(cfg)), steps * cfg.data.train_batch_size, cfg.data.resolution
    values: dict[str, Callable[[int | None], object]] = {
        "python": lambda _: sys.executable,
        "steps": lambda _: steps,
        "out": lambda _: out,
        "cache": lambda _: folder / "cache",
        "images": lambda count: images(folder, count or whole, side),
        "parquet": lambda count: parquet(folder, count or whole, side),
    }
    if hasattr(own, "pretrained_model_name_or_path"):
        values["model"] = lambda _: own.pretrained_model_name_or_path
    if configs.task_group(cfg) == "ddpm":

        def unet(_: int | None) -> Path:
            from oneloop.tasks import ddpm

            (path := folder / f"unet-{side}").mkdir(exist_ok=True)
            config = {"_class_name": "UNet2DModel", **ddpm.model_config(cfg), "sample_size": side}
            (path / "config.json").write_text(json.dumps(config))
            return path

        values["unet"] = unet
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.


@dataclass(frozen=True)
class Process:
    """A whole process, seen from outside."""

    first: float
    """Seconds from its start to the end of its first step."""
    whole: float
    """Seconds from its start to its exit."""
    cpu: float
    """CPU seconds of all its threads and children."""
    gib: float
    """Its peak memory: what the GPU had in use beyond what it had before, or else the machine's."""


def gpu_memory() -> int:
    """Bytes in use on the GPU, whoever uses them."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def watch(command: list[str], first: str, metrics: Path | None = None, gpu: bool = False) -> Process:
    """Run a command. Its first step is over when its output matches `first`, or when `metrics` has a line."""
    seen: list[float] = []
    before = peak = gpu_memory() if gpu else 0
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    output = bytearray()

    def listen() -> None:
        while part := os.read(process.stdout.fileno(), 65536):
            output.extend(part)
            if not metrics and not seen and re.search(first, output.decode(errors="replace")):
                seen.append(time.perf_counter())

    def look() -> None:
        nonlocal peak
        while process.returncode is None:
            if metrics and not seen and metrics.exists() and metrics.stat().st_size:
                seen.append(time.perf_counter())
            peak = max(peak, gpu_memory()) if gpu else 0
            time.sleep(0.01)

    threads = [threading.Thread(target=target, daemon=True) for target in (listen, look)]
    for thread in threads:
        thread.start()
    _, status, usage = os.wait4(process.pid, 0)
    whole = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    for thread in threads:
        thread.join()
    text = output.decode(errors="replace")
    if process.returncode or not seen:
        what = f"exit code {process.returncode}" if process.returncode else f"no first step: nothing matches {first!r}"
        raise Failed(f"{shlex.join(command)}: {what}\n{text[-2000:]}")
    used = peak - before if gpu else usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Process(seen[0] - began, whole, usage.ru_utime + usage.ru_stime, used / 2**30)


def measure_step(arguments: list[str], blocks: int) -> dict[str, Any]:
    """The figures of benchmarks/step.py for these arguments of loop.py."""
    command = [sys.executable, "benchmarks/step.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"BLOCKS": str(blocks)}, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Arm:
    """One of the commands that run in turns."""

    words: list[str]
    """With placeholders."""
    precision: str
    first: str = FIRST
    """What its output shows when its first step is over."""
    ours: bool = False
    """Its metrics.jsonl says so instead."""


Runs = dict[int, Process]
"""One repetition of an arm: number of steps -> the process that took them."""


def side_by_side(
    arms: dict[str, Arm], repeats: int, lengths: list[int], values: Callable[[int, Path], Mapping[str, Any]], gpu: bool
) -> dict[str, list[Runs]]:
    """The repetitions of each arm, run in turns, at every length in each; `values` are the placeholders of a length and an
    output folder."""
    found: dict[str, list[Runs]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name, arm in list(arms.items())[:: 1 if repeat % 2 else -1]:
            runs = {}
            for steps in lengths:
                with tempfile.TemporaryDirectory() as folder:
                    told = values(steps, out := Path(folder) / "out")
                    command, first = [fill(word, told) for word in arm.words], fill(arm.first, told)
                    runs[steps] = watch(command, first, out / "metrics.jsonl" if arm.ours else None, gpu)
            found[name].append(runs)
    return found


def a_step(runs: Runs, key: str) -> float:
    """Seconds of one step: what the longer process took beyond the shorter one, over the steps between."""
    short, long = min(runs), max(runs)
    return (getattr(runs[long], key) - getattr(runs[short], key)) / (long - short)


# ---------------------------------------------------------------------------------------------------------------------
# The tables.


def machine() -> list[str]:
    """Hardware, versions, commit."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    with contextlib.suppress(OSError):
        named = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    processor = named[1] if named else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "diffusers", "accelerate")
    return [
        f"hardware: {gpu or processor}, {len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} threads",
        f"versions: Python {platform.python_version()}, " + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages),
        f"commit: {commit}",
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def share_of_limit(row: Mapping[str, Any], limit: float) -> float:
    """Images a second, over what the case's limit is at the speed that a product of matrices reaches here."""
    return row["images_per_second"] / (limit * row["limit"] / SPEED)


def step_table(rows: dict[tuple[str, str], dict[str, Any]], limits: dict[str, float | None], gpu: bool) -> str:
    """What a step costs, a line for each case and precision."""
    head = ["case", "precision", "batch", "time over bare", "CPU seconds over bare", "outside the model", "FLOPs a step", "MFU"]
    body = []
    for (case, _), r in rows.items():
        row = [case, r["precision"], str(r["batch"]), f"{r['over_bare']:.3f}", f"{r['over_bare_cpu']:.3f}"]
        row += [f"{r['outside_model']:.1%}", f"{r['flops']:.3g}", f"{r['mfu']:.1%}"]
        if gpu:
            row += [f"{r['steps_per_second']:.1f}", f"{r['images_per_second']:,.0f}"]
            row.append(f"{share_of_limit(r, limits[case]):.1%}" if limits[case] else "")
        body.append(row)
    return table(head + (["steps/s", "images/s", "of the limit"] if gpu else []), body)


Column = tuple[str, Callable[[Runs], float], str]
"""Title, figure of a repetition, and how it is written."""


def columns(lengths: list[int], batch: int | None) -> list[Column]:
    """What is said of processes of these lengths; `batch` images a step, where images a second are quoted."""
    short, long = min(lengths), max(lengths)
    told = f", {long} steps" if short < long else ""
    listed: list[Column] = [
        ("time to first step", lambda runs: runs[short].first, "{:.1f} s"),
        (f"whole{told}", lambda runs: runs[long].whole, "{:.1f} s"),
        (f"CPU time{told}", lambda runs: runs[long].cpu, "{:.1f} s"),
        ("peak memory", lambda runs: runs[long].gib, "{:.2f} GiB"),
    ]
    if short < long:
        listed.append(("a step", lambda runs: 1e3 * a_step(runs, "whole"), "{:.2f} ms"))
        listed.append(("its CPU time", lambda runs: 1e3 * a_step(runs, "cpu"), "{:.2f} ms"))
        if batch:
            listed.append(("images/s", lambda runs: batch / a_step(runs, "whole"), "{:,.0f}"))
    return listed


def process_table(found: dict[str, list[Runs]], precisions: dict[str, str], listed: list[Column]) -> str:
    """Whole processes: medians, and ratios to the first row within each repetition."""
    base, body = next(iter(found)), []
    for name, repeats in found.items():
        row, pairs = [name, precisions[name]], list(zip(repeats, found[base], strict=True))
        for _, figure, form in listed:
            ratio = statistics.median(figure(a) / figure(b) for a, b in pairs)
            row.append(form.format(statistics.median(map(figure, repeats))) + ("" if name == base else f" ({ratio:.2f} x)"))
        other = precisions[name] != precisions[base]
        body.append([*row, f"a gain or loss of precision too: {precisions[name]} against {precisions[base]}" if other else ""])
    return table(["process", "precision", *(title for title, _, _ in listed), ""], body)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def choose(names: list[str], own: list[str], gpu: Callable[[], bool]) -> dict[str, Case]:
    """The cases of these names and of these arguments of loop.py; without either those that suit the machine.

    Raises:
        BadInput: a name that no case has.
    """
    if unknown := [name for name in names if name not in CASES]:
        raise BadInput(f"no case named {unknown[0]!r}; expected {', '.join(CASES)}, or --case 'ARGUMENTS OF loop.py'")
    if not names and not own:
        names = [name for name, case in CASES.items() if not case.gpu or gpu()]
    return {name: CASES[name] for name in names} | {text: Case(text) for text in own}


def beside(given: list[str], cases: Mapping[str, Case], lengths: list[int]) -> dict[str, str]:
    """Case -> the command to run beside it, from COMMAND or CASE=COMMAND.

    Raises:
        BadInput: the case is not measured, not named, or has one already; or the command has one length where two are asked.
    """
    found: dict[str, str] = {}
    for text in given:
        name, named, command = text.partition("=")
        if not (named and re.fullmatch(r"\w+", name)):
            if len(cases) != 1:
                raise BadInput(f"--versus {text!r} names none of {len(cases)} cases; expected --versus CASE='COMMAND'")
            name, command = next(iter(cases)), text
        if name not in cases:
            raise BadInput(f"--versus {name}=...: {name} is not measured; expected one of {', '.join(cases)}")
        if name in found:
            raise BadInput(f"--versus is given twice for {name}; expected one command for each case")
        if len(lengths) > 1 and not re.search(r"\{(steps|images|parquet)\}", command):
            raise BadInput(f"--versus {command!r} has one length, --steps two; expected {{steps}}, {{images}} or {{parquet}}")
        found[name] = command
    return found


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ", ".join(f"{name} (on a GPU)" if case.gpu else name for name, case in CASES.items())
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {every}; all where none is given")
    parser.add_argument("--case", action="append", default=[], help="arguments of loop.py, as one string")
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=("auto", "no", "bf16", "fp16"))
    parser.add_argument(
        "--versus", action="append", default=[], metavar="[CASE=]COMMAND", help="another program's command, one for each case"
    )
    parser.add_argument("--versus-first", default=FIRST, help="what its output shows when its first step is over")
    parser.add_argument("--versus-precision", default="no", help="its precision, as its own command chose it")
    parser.add_argument("--steps", type=int, nargs="+", default=[5], help="steps of a whole process: one number, or two")
    parser.add_argument("--blocks", type=int, default=12, help="interleaved blocks of five steps")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of whole processes; 0 for none")
    parser.add_argument("--models", type=Path, help="folder that keeps the full-size models for the next time")
    parser.add_argument("--out", type=Path, help="the table's file, written after each case; it is printed in any case")
    return parser


def has_gpu() -> bool:
    """Whether there is a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class Plan:
    """A case, ready to be measured."""

    case: Case
    cfg: Any
    told: dict[str, list[str]]
    """Precision as it was asked for -> arguments of loop.py."""
    arms: dict[str, Arm]
    values: Callable[[int, Path], Mapping[str, Any]]
    """Number of steps, output folder -> placeholders."""
    other: str | None
    """The command beside it."""
    lengths: list[int]
    """Steps of its processes."""


def prepare(case: Case, other: str | None, given: argparse.Namespace, folder: Path) -> Plan:
    """All that a case needs, models and images too: mistakes are said before anything is measured.

    Raises:
        BadInput: its arguments or the other command's placeholders are wrong.
    """
    from oneloop.machine.accelerator import computes_bf16

    words = [fill(word, model_folders(folder, given.models)) for word in shlex.split(case.arguments)]
    with contextlib.chdir(ROOT):
        cfg = command_line.parse(words)[1]
    told = {asked: [*words, "--base.mixed-precision", asked] for asked in given.precision}
    once = {"validation-steps": "0", "checkpointing-steps": "1000000", "logger": "none"}  # at the end of either length
    run = ["--base.max-train-steps", "{steps}", *(word for flag, value in once.items() for word in (f"--base.{flag}", value))]
    written = ["--base.output-dir", "{out}", "--base.logging-steps", "1"]
    arms: dict[str, Arm] = {}
    for asked, arguments in told.items():
        label = ("bf16" if computes_bf16() else "no") if asked == "auto" else asked
        more = "" if len(told) == 1 else f", {label}"
        arms[f"oneloop{more}"] = Arm(["{python}", "loop.py", *arguments, *run, *written], label, ours=True)
        arms[f"bare loop{more}"] = Arm(["{python}", "benchmarks/bare.py", *arguments, *run], label)
    values = lambda steps, out: stand_for(cfg, folder, steps, out)  # noqa: E731
    lengths = case.lengths(given.steps, has_gpu())
    if other:
        arms["the other"] = Arm(shlex.split(other), given.versus_precision, given.versus_first)
        for text in (*arms["the other"].words, given.versus_first):
            fill(text, values(min(lengths), folder / "out"))
    return Plan(case, cfg, told, arms, values, other, lengths)


def measure_processes(plan: Plan, repeats: int) -> str:
    """The section of a case's whole processes."""
    found = side_by_side(plan.arms, repeats, plan.lengths, plan.values, has_gpu())
    listed = columns(plan.lengths, plan.cfg.data.train_batch_size if has_gpu() else None)
    rows = process_table(found, {name: arm.precision for name, arm in plan.arms.items()}, listed)
    told = f"`loop.py {plan.case.arguments}`, {' and '.join(map(str, plan.lengths))} steps, {repeats} repetitions in turns"
    return f"{told}:\n\n{rows}" + (f"\n\nThe other: `{' '.join(plan.other.split())}`" if plan.other else "")


def main() -> None:
    given = make_parser().parse_args()
    note = "Over 1 is slower than the bare loop; MFU is of what a large product of matrices of the same type reaches here. "
    steps: dict[tuple[str, str], dict[str, Any]] = {}
    sections, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        try:
            cases = choose(given.cases, given.case, has_gpu)
            if len(given.steps) > 2 or given.steps != sorted({*given.steps}) or given.steps[0] < 1:
                told = " ".join(map(str, given.steps))
                raise BadInput(f"--steps is {told}; expected one number, or a smaller and a larger one")
            configs.require(given.blocks >= 2, "blocks", given.blocks, "at least 2, since the first warms up")
            others = beside(given.versus, cases, given.steps)
            plans = {name: prepare(case, others.get(name), given, Path(folder)) for name, case in cases.items()}
        except BadInput as error:
            configs.fail(error, 2)
        if has_gpu():
            note += f"The limit is what the model's FLOPs allow, stated for {SPEED / 1e12:.0f} TFLOP/s, at that speed."
        else:
            note += "Absolute speeds are quoted for a GPU only."
        for name, plan in plans.items():
            try:
                for asked, arguments in plan.told.items():
                    steps[name, asked] = measure_step(arguments, given.blocks)
                if given.repeats:
                    sections.append(measure_processes(plan, given.repeats))
            except Failed as failure:  # the other cases are measured all the same
                failed = True
                sections.append(f"`{name}` failed: {failure}")
                print(sections[-1], file=sys.stderr)
            limits = {key: case.limit for key, case in cases.items()}
            text = "\n\n".join(["  \n".join(machine()), step_table(steps, limits, has_gpu()), note, *sections])
            if given.out:
                given.out.write_text(text + "\n")
    print(text)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
