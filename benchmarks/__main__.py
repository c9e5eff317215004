"""The project's speed in one table: what it is, what a step costs over a bare loop, and whole processes side by side.

    python -m benchmarks                                            the smallest model, the 24 M UNet, a tiny LoRA
    python -m benchmarks smallest --repeats 5 --out table.md
    python -m benchmarks --case 'ddpm run.json' --precision no bf16
    python -m benchmarks mnist_unet --versus 'python train_unconditional.py --train_data_dir pictures ...'

Steps are measured by benchmarks/step.py. Whole processes are measured from outside, from their start to the end of their first
step and to their exit, taking turns; a figure is the median of its repetitions, a ratio that of the ratios within a
repetition. The other command's first step is over when its output shows 1/N, as a progress bar does, or what
`--versus-first` matches. Its settings are its own: give it the same model, batch and number of steps (`--steps`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST = r"\b1/\d+"
CASES = {
    "smallest": "ddpm",
    "mnist_unet": "ddpm --ddpm.model-config examples/mnist_unet.json --data.resolution 32 --data.train-batch-size 64",
    "lora": "lora --lora.pretrained-model-name-or-path {tiny} --data.num-shapes 64 --data.train-batch-size 4",
}
"""name -> arguments of loop.py; {tiny} stands for a folder with a tiny Stable Diffusion of random weights."""


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
    """Its peak memory: of the GPU where it names it as our own do, else of the machine."""


def watch(command: list[str], first: str = FIRST, metrics: Path | None = None) -> Process:
    """Run a command. Its first step is over when its output matches `first`, or when `metrics` has a line."""
    seen: list[float] = []
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    output = bytearray()

    def listen() -> None:
        while part := os.read(process.stdout.fileno(), 65536):
            output.extend(part)
            if not metrics and not seen and re.search(first, output.decode(errors="replace")):
                seen.append(time.perf_counter())

    def look() -> None:
        while metrics and not seen and process.returncode is None:
            if metrics.exists() and metrics.stat().st_size:
                seen.append(time.perf_counter())
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
        raise SystemExit(f"{shlex.join(command)}: {what}\n{text[-2000:]}")
    said = re.search(r"peak memory ([\d.]+) GiB", text)
    gib = usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    return Process(seen[0] - began, whole, usage.ru_utime + usage.ru_stime, float(said[1]) if said else gib)


def measure_step(arguments: list[str], blocks: int) -> dict[str, float]:
    """The figures of benchmarks/step.py for these arguments of loop.py."""
    command = [sys.executable, "benchmarks/step.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"BLOCKS": str(blocks)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def side_by_side(arms: dict[str, tuple[list[str], str, bool]], repeats: int) -> dict[str, list[Process]]:
    """name -> (command, what ends its first step, whether it is ours), run in turns."""
    found: dict[str, list[Process]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name, (command, first, ours) in list(arms.items())[:: 1 if repeat % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                told = ["--base.output-dir", str(out), "--base.logging-steps", "1"] if ours else []
                found[name].append(watch(command + told, first, out / "metrics.jsonl" if ours else None))
    return found


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


def step_table(rows: dict[tuple[str, str], dict[str, float]], absolute: bool) -> str:
    """What a step costs, a line for each case and precision."""
    head = ["case", "precision", "batch", "time over bare", "CPU seconds over bare", "outside the model", "FLOPs a step", "MFU"]
    body = []
    for (case, _), r in rows.items():
        row = [case, r["precision"], str(r["batch"]), f"{r['over_bare']:.3f}", f"{r['over_bare_cpu']:.3f}"]
        row += [f"{r['outside_model']:.1%}", f"{r['flops']:.3g}", f"{r['mfu']:.1%}"]
        body.append(row + ([f"{r['steps_per_second']:.1f}", f"{r['pictures_per_second']:,.0f}"] if absolute else []))
    return table(head + (["steps/s", "pictures/s"] if absolute else []), body)


def process_table(found: dict[str, list[Process]], precisions: dict[str, str]) -> str:
    """Whole processes: medians, and ratios to the first row within each repetition."""
    base, body = next(iter(found)), []
    for name, runs in found.items():
        row, pairs = [name, precisions[name]], list(zip(runs, found[base], strict=True))
        for key, form in (("first", "{:.1f} s"), ("whole", "{:.1f} s"), ("cpu", "{:.1f} s"), ("gib", "{:.2f} GiB")):
            middle = statistics.median(getattr(run, key) for run in runs)
            ratio = statistics.median(getattr(a, key) / getattr(b, key) for a, b in pairs)
            row.append(form.format(middle) + ("" if name == base else f" ({ratio:.2f} x)"))
        other = precisions[name] != precisions[base]
        body.append([*row, f"a gain or loss of precision too: {precisions[name]} against {precisions[base]}" if other else ""])
    return table(["process", "precision", "time to first step", "whole", "CPU time", "peak memory", ""], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all where none is given")
    parser.add_argument("--case", action="append", default=[], help="arguments of loop.py, as one string")
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=("auto", "no", "bf16", "fp16"))
    parser.add_argument("--versus", help="another program's command, for one case; {python} is this interpreter")
    parser.add_argument("--versus-first", default=FIRST, help="what its output shows when its first step is over")
    parser.add_argument("--versus-precision", default="no", help="its precision, as its own command chose it")
    parser.add_argument("--steps", type=int, default=5, help="steps of a whole process")
    parser.add_argument("--blocks", type=int, default=12, help="interleaved blocks of five steps")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of whole processes; 0 for none")
    parser.add_argument("--out", type=Path, help="the table's file; it is printed in any case")
    given = parser.parse_args()
    if unknown := set(given.cases) - CASES.keys():
        parser.error(f"no case named {sorted(unknown)[0]!r}; expected {', '.join(CASES)}, or --case 'ARGUMENTS'")
    cases = {name: CASES[name] for name in given.cases or (() if given.case else CASES)} | {text: text for text in given.case}
    if given.versus and len(cases) != 1:
        parser.error(f"--versus is measured beside one case; given {len(cases)}")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny_models
    import torch

    from device import computes_bf16

    auto, absolute = "bf16" if computes_bf16() else "no", torch.cuda.is_available()
    steps: dict[tuple[str, str], dict[str, float]] = {}
    sections = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_models.build(Path(folder), "sd") if any("{tiny}" in text for text in cases.values()) else None
        for case, text in cases.items():
            arms, precisions = {}, {}
            for asked in given.precision:
                told = [*shlex.split(text.format(tiny=tiny)), "--base.mixed-precision", asked]
                steps[case, asked] = measure_step(told, given.blocks)
                short = ["--base.max-train-steps", str(given.steps), "--base.validation-steps", "0", "--base.logger", "none"]
                label = asked if asked != "auto" else auto
                for name, program in (("oneloop", "loop.py"), ("bare loop", "benchmarks/bare.py")):
                    key = name if len(given.precision) == 1 else f"{name}, {label}"
                    precisions[key] = label
                    arms[key] = ([sys.executable, program, *told, *short], FIRST, program == "loop.py")
            if given.versus:
                command = shlex.split(given.versus.format(python=sys.executable))
                arms["the other"], precisions["the other"] = (command, given.versus_first, False), given.versus_precision
            if given.repeats:
                found = side_by_side(arms, given.repeats)
                told = f"`loop.py {text}`, {given.steps} steps, {given.repeats} repetitions in turns"
                sections.append(f"{told}:\n\n{process_table(found, precisions)}")
    if given.versus:
        sections.append(f"The other: `{given.versus}`")
    note = "Over 1 is slower than the bare loop; MFU is of what a large product of matrices of the same type reaches here."
    note += "" if absolute else " Absolute speeds are quoted for a GPU only."
    text = "\n\n".join(["  \n".join(machine()), step_table(steps, absolute), note, *sections]) + "\n"
    if given.out:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
