"""The command that fills the GPU's rows of docs/performance.md, at a tiny size on the pretended GPU: killed in the middle, it
goes on; what failed is measured again."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pretended_torch
import pytest
from warm import ROOT, fork, tiny

from benchmarks import __main__ as benchmark
from benchmarks import gpu, gpu_rows, step
from benchmarks.__main__ import Case, Process
from oneloop.configs import BadInput
from oneloop.machine import accelerator

LEFT_OUT = {"mnist_unet-compile", "sd15_lora-compile"}
"""Inductor compiles for no pretended GPU."""
LORA = "--data.resolution 32 --data.train-batch-size 2 --data.num-shapes 16 --data.center-crop --lora.rank 2"
SAID = {
    "stream": r"uniform numbers are the same bits; of normal ones 0.0% differ, by at most 0.0e\+00",
    "waits": "it does not",
    "repeats": (SAME := r"again the same bits, stopped and resumed the same bits; [\d.]+ ms a step"),
    "repeats-plain": SAME,
    "sdxl_lora-memory": r"\d+\.\d\d GiB computed, \d+\.\d\d taken",
}
STEP = r"[\d,]+ images/s(, \d+% of the limit)?; time over bare [\d.]+, outside the model -?[\d.]+%; peak memory [\d.]+ GiB"
CHANGED = r"[\d.]+ ms a step rather than [\d.]+; peak memory [\d.]+ GiB rather than [\d.]+"


def row(name, given):
    """In a fork, the process that measures a row."""
    accelerator.computes_bf16 = lambda: True
    step.BLOCKS, step.STEPS, step.matmul_speed = 2, 1, lambda dtype: 790e12
    gpu_rows.STEPS = 4
    sys.argv = ["benchmarks.gpu", "--alone", name, *(["--scripts", str(given.scripts)] if given.scripts else [])]
    with pretended_torch.gpu(str(ROOT)):
        gpu.main()


def life(folder, page, cases, dies=None):
    """In a fork, a call of the command, which may be killed when a row's process runs."""
    benchmark.CASES.update(cases)
    benchmark.has_gpu, gpu.where = lambda: True, lambda: "a card"

    def alone(name, given):
        with open(folder / "log", "a") as log:
            log.write(f"{name}\n")
        process = fork(lambda: row(name, given), folder / name)
        if name == dies:
            os.kill(process.pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        done = process.wait()
        return done.code == 0, ((done.out if done.code == 0 else done.err).strip().splitlines() or ["?"])[-1]

    gpu.alone = alone
    for name in LEFT_OUT:
        del gpu.ROWS[name]
    sys.argv = ["benchmarks.gpu", "--page", str(page)]
    gpu.main()


def test_rows_are_filled_and_a_killed_call_goes_on(tmp_path, built):
    page, log = tmp_path / "page.md", tmp_path / "log"
    ddpm = Case(shlex.join(tiny(tmp_path, steps=None)), 1000)
    lora = Case(f"lora --lora.pretrained-model-name-or-path {built('sd')} {LORA} --lora.num-inference-steps 1", 100)
    cases = {"smallest": ddpm, "mnist_unet": ddpm, "unet64": ddpm, "sd15_lora": lora, "sdxl_lora": lora}
    todo = [name for name, row in gpu.ROWS.items() if not row.scripts and name not in LEFT_OUT]
    ran = lambda: log.read_text().split()  # noqa: E731

    assert fork(lambda: life(tmp_path, page, cases, dies=todo[2]), tmp_path).wait().code == -signal.SIGKILL
    assert ran() == todo[:3]
    assert [gpu.cells(page.read_text(), name)[1] == "no" for name in todo] == [False] * 2 + [True] * (len(todo) - 2)

    broken = cases | {"smallest": Case("ddpm --ddpm.nonsense 1")}
    second = fork(lambda: life(tmp_path, page, broken), tmp_path).wait(300)
    assert second.code == 1 and ran()[3:] == todo[2:], second.err
    assert "failed: " in gpu.cells(page.read_text(), "smallest")[1] and "nonsense" in page.read_text()
    assert all(f"{name}: left out without --scripts" in second.err for name, row in gpu.ROWS.items() if row.scripts)

    third = fork(lambda: life(tmp_path, page, cases), tmp_path).wait()
    assert third.code == 0 and ran()[len(todo) + 1 :] == ["smallest"], third.err
    for name in todo:
        asked, measured, where = gpu.cells(page.read_text(), name)
        assert asked == gpu.ROWS[name].asks and where == "a card"
        assert re.fullmatch(SAID.get(name, CHANGED if "-" in name else STEP), measured), (name, measured)
    rows = "|".join(todo)
    others = lambda text: re.sub(rf"^\| `({rows})` \|.*$", "", text, flags=re.M)  # noqa: E731
    assert others(page.read_text()) == others(gpu.PAGE.read_text())  # nothing else of the page changes


def test_the_page_has_every_row_in_the_order_of_the_command():
    """Whoever adds a row adds it to both; the limits are those of the cases."""
    text = gpu.PAGE.read_text()
    found = [found[1] for found in re.finditer(r"^\| `([\w-]+)` \|.*\|.*\|.*\|$", text, re.M) if found[1] in gpu.ROWS]
    assert found == list(gpu.ROWS)
    for name, own in gpu.ROWS.items():
        assert gpu.cells(text, name)[0] == own.asks
        limit = benchmark.CASES[name].limit if name in benchmark.CASES else None
        assert (f"at most {limit:,} images/s" in own.asks) if limit else "at most" not in own.asks


def test_beside_the_official_script(tmp_path, monkeypatch):
    """Of made-up processes, at the lengths that a GPU has: what is said of each, and the script's path is one word."""
    monkeypatch.setattr(benchmark, "has_gpu", lambda: True)
    asked = []

    def side_by_side(arms, repeats, lengths, values, gpu):
        asked.append((arms, lengths))
        return {arm: [{n: Process(3, n / 100, 1, 2) for n in lengths}] * repeats for arm in arms}

    monkeypatch.setattr(gpu_rows, "side_by_side", side_by_side)
    given = gpu.make_parser().parse_args(["--scripts", str(tmp_path / "a folder")])
    said = gpu.ROWS["mnist_unet-official"].measure(given, tmp_path)
    one = "time to first step 3.0 s, a step 10.00 ms, images/s 6,400, peak memory 2.00 GiB"
    assert said == "; ".join(f"{arm}: {one}" for arm in ("oneloop", "bare loop", "the other"))
    (arms, lengths), script = asked[0], "a folder/unconditional_image_generation/train_unconditional.py"
    assert lengths == [200, 2200] and arms["the other"].words[:2] == ["{python}", str(tmp_path / script)]


def test_mistakes_are_a_line(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("| `stream` | | no | |\n" * 2)
    for has, words, said in (
        (False, [], "there is no GPU here"),
        (True, ["nope"], "no row named 'nope'; expected stream, "),
        (True, ["--page", str(page)], "--page has 2 rows `stream`"),
        (True, ["--page", str(tmp_path)], f"--page {tmp_path}: "),
        (True, ["--page", str(tmp_path / "none" / "page.md")], "--page "),
        (True, ["--scripts", str(page)], f"--scripts is {page}; expected the folder"),
    ):
        monkeypatch.setattr(benchmark, "has_gpu", lambda has=has: has)
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *words])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and said in lines[0], lines


def test_where_a_row_was_measured(tmp_path, monkeypatch):
    """The page itself makes no commit another."""
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True).stdout  # noqa: E731
    (tmp_path / "docs").mkdir()
    for name in ("docs/performance.md", "code.py"):
        (tmp_path / name).write_text("a")
    git("init"), git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "docs" / "performance.md")
    monkeypatch.setattr(benchmark, "machine", lambda: ["hardware: H, 2 CPU cores", "versions: torch 2.14, x 1", "commit: x"])
    gpu.PAGE.write_text("b")
    assert gpu.where() == f"H, torch 2.14, {git('rev-parse', '--short', 'HEAD').strip()}"
    (tmp_path / "code.py").write_text("b")
    assert gpu.where().endswith("-dirty")


def test_a_row_is_written_as_one_line(tmp_path):
    """Whatever a process said last; the page beside it stays."""
    page = tmp_path / "page.md"
    page.write_text(f"a\n{gpu.line('stream', gpu.ROWS['stream'])}\n| `streams` | x | no | |\n")
    gpu.written(page, "stream", r"failed: a | b \1 \g<0>", "card")
    row = gpu.line("stream", gpu.ROWS["stream"], r"failed: a / b \1 \g<0>", "card")
    assert page.read_text() == f"a\n{row}\n| `streams` | x | no | |\n"
    with pytest.raises(BadInput, match="0 rows `waits`"):
        gpu.written(page, "waits", "x", "")
    assert list(Path(tmp_path).iterdir()) == [page]


def test_a_row_has_its_own_process_and_its_time(tmp_path, monkeypatch):
    """What it says last is the row, or why there is none."""
    given = gpu.make_parser().parse_args(["--minutes", "0.05"])
    process = tmp_path / "process"
    process.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(process))
    for script, wanted in (
        ("echo one; echo two", (True, "two")),
        ("echo no; echo why >&2; exit 3", (False, "why")),
        ("exit 3", (False, "exit code 3")),
        ("exec sleep 9", (False, "more than 0.05 minutes (--minutes)")),
    ):
        process.write_text(f"#!/bin/sh\n{script}\n")
        assert gpu.alone("stream", given) == wanted
