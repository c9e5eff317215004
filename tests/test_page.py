"""report.html and compare: what they say, that they stay small, and that they work in a browser without a network."""

import html
import io
import json
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_settings import refused
from warm import cli, metrics, tiny

from oneloop import checkpoint
from oneloop.views import console, page
from oneloop.views.console import Report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of nine steps, continued after six, with grids at 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("run")
    every = {"base__validation_steps": 3, "base__checkpointing_steps": 3, "base__logging_steps": 1}
    for steps in (6, 9):
        result = cli(folder, *tiny(folder, steps=steps, **every, data__trigger="</script><b>"))
        assert result.code == 0, result.err
    assert "checkpoint-9; " in result.err and "step 9: drew" in result.err
    with open(folder / "out" / "metrics.jsonl", "a") as file:
        for key in ("loss", "loss_ema", "q1", "q2", "q3", "q4"):
            file.write(json.dumps({"step": 9, f"validation/{key}": 0.5}) + "\n")
    page.write(folder / "out")
    return folder / "out"


def embedded(path):
    """The data of a page's script."""
    text = path.read_text()
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_what_a_report_says(run):
    text, data = embedded(run / "report.html")
    assert [chart["title"] for chart in data["charts"]][:3] == [
        "Loss",
        "Validation loss",
        "Validation loss by quarter of the timesteps",
    ]
    loss = data["charts"][0]["lines"][0]
    assert loss["x"] == list(range(1, 10))
    assert loss["y"] == pytest.approx([m["loss"] for m in metrics(run) if "loss" in m], rel=1e-5)
    assert data["steps"] == [3, 6, 9] and data["runs"][0]["resumed"] == [6]
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text[: text.index('<script type="application/json"')]))
    for words in (
        "24 embedded shapes",
        "9 of 9 optimizer steps",
        f"path = '{run}/export'",
        "DDPMPipeline.from_pretrained(path)",
        f"python loop.py {run}/run.json --base.output-dir",
        "base.max_train_steps 9 None",
        "torch 2.",
    ):
        assert words in re.sub(r"\s+", " ", shown), words
    (_, start) = map(json.loads, (run / "starts.jsonl").read_text().splitlines())
    assert start["changed"]["base.max_train_steps"] == {"value": 9, "default": None}
    assert "<b>" not in text and shown.count("</script><b>") == 2
    assert [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()] == [0, 6]


def test_a_page_that_fails_stops_nothing(tmp_path):
    def broken():
        def write(folder):
            raise ZeroDivisionError("a flaw")

        page.write = write

    result = cli(tmp_path, *tiny(tmp_path), patch=broken)
    assert result.code == 0 and "report.html was not written: ZeroDivisionError: a flaw" in result.err, result.err


def test_long_runs_stay_small_and_quick(tmp_path, run):
    """100,000 lines with one spike, 60 grids of a megabyte."""
    shutil.copytree(run, tmp_path / "long")
    spiked = ({"step": step, "loss": 9.0 if step == 51_234 else 1 / step} for step in range(1, 100_001))
    (tmp_path / "long" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spiked))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8))
    noise.save(tmp_path / "grid.png", compress_level=0)
    for step in range(1000, 61_000, 1000):
        shutil.copy(tmp_path / "grid.png", tmp_path / "long" / "samples" / f"{step}.png")
    page.write(tmp_path / "long")
    started = time.process_time()
    page.write(tmp_path / "long")
    assert time.process_time() - started < 1
    text, data = embedded(tmp_path / "long" / "report.html")
    assert len(text) < 10e6
    (line,) = data["charts"][0]["lines"]
    assert len(line["x"]) <= page.POINTS and (line["x"][0], line["x"][-1]) == (1, 100_000) and 9.0 in line["y"]
    assert line["x"] == sorted(line["x"])
    assert len(data["steps"]) == page.GRIDS and data["steps"][0] == 3 and data["steps"][-1] == 60_000
    assert all(next(iter(grid.values())).startswith("data:image/") for grid in data["grids"][0].values())


@pytest.mark.parametrize("name", ["metrics.jsonl", "starts.jsonl", "run.json"])
def test_a_flipped_bit_costs_a_line(tmp_path, run, name, monkeypatch):
    """Every 97th bit of a record, one by one: the pages are written, and of a line that is none any more a word is said."""
    pages, said = [], []
    monkeypatch.setattr(page, "_fill", lambda path, title, lead, body, data: pages.append(json.dumps(data)))
    shutil.copytree(run, tmp_path / "out")
    whole = (run / name).read_bytes()
    for bit in range(0, len(whole) * 8, 97):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "out" / name).write_bytes(flipped)
        page.write(tmp_path / "out")
        page.compare([run, tmp_path / "out"], tmp_path / "both.html", said.append)
    assert len(pages) == 2 * len(range(0, len(whole) * 8, 97)) and any(f"out/{name}" in text for text in said)


RECORDS = {
    "{": False,
    "[]": False,
    "3": False,
    '{"loss": 1}': False,
    '{"step": "1", "loss": 1}': False,
    '{"step": 1.5, "loss": 1}': False,
    '{"step": -1, "loss": 1}': False,
    "[" * 5000: False,
    "\0\0\0": False,
    f'{{"step": 2, "loss": {"9" * 400}}}': True,
    '{"step": 2, "loss": NaN}': True,
    '{"step": 2, "\\ud800": 1}': True,
}


@pytest.mark.parametrize("row", RECORDS)
def test_damaged_lines_are_left_out_with_a_word(tmp_path, row):
    path, said = tmp_path / "metrics.jsonl", []
    path.write_text(
        f'{{"step": 1, "loss": 0.5, "pictures_per_second": 9}}\n{row}\n{{"step": 3, "loss": 0.25}}\n{{"step": 4, "lo'
    )
    (tmp_path / "run.json").write_text('{"ddpm": {}}')
    metrics = page.read(tmp_path, said.append).metrics
    assert metrics["loss"] == [(1, 0.5), (3, 0.25)] and metrics["images_per_second"] == [(1, 9)]
    assert said == ([] if RECORDS[row] else [f"{path}: 1 damaged line left out, the first is line 2"])
    page.write(tmp_path)


def test_damaged_records_do_not_stop_a_run(tmp_path, run):
    shutil.copytree(run, tmp_path / "out")
    for name in ("metrics.jsonl", "starts.jsonl", "check.json", "run.json"):
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes().replace(b'"', b"\xff", 1))
    result = cli(tmp_path, *tiny(tmp_path, steps=12, data__trigger="</script><b>"))
    assert result.code == 0 and "starts.jsonl: 1 damaged line left out" in result.err, result.err
    assert "check.json is damaged; it is made anew" in result.err
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "starts.jsonl").read_text().splitlines()] == [6, 9]


@pytest.mark.parametrize("known", [b"0123456789abcdef", b"0123456789abcdeF", b"\xff", b"", None])
def test_the_run_s_name_with_wandb(tmp_path, known, capsys):
    report = Report(SimpleNamespace(is_main_process=True, trackers=[]), tmp_path, None)
    if known is not None:
        (tmp_path / "wandb.id").write_bytes(known)
    name = report._identity()
    assert re.fullmatch("[0-9a-f]{16}", name) and name == report._identity()
    damaged = known not in (b"0123456789abcdef", None)
    assert (name.encode() == known) == (known == b"0123456789abcdef") and ("damaged" in capsys.readouterr().err) == damaged


def test_no_line_of_validation_is_dropped(tmp_path, capsys, monkeypatch):
    """Without a terminal: log lines come one in SILENCE seconds, the last before a silence after it; validation at once."""
    monkeypatch.setattr(console, "SILENCE", 0.3)
    report = Report(SimpleNamespace(is_main_process=True, trackers=[]), tmp_path, None)
    report.metrics, report.total, report.first, report.started = io.StringIO(), 99, 0, time.perf_counter()
    for step in (1, 2, 3):
        report.log({"loss": step}, step)
    report.log({"validation/loss": 0.5}, 3)
    report.log({"validation/loss": 0.25}, 4)
    report.log({"loss": 5}, 5)
    said = capsys.readouterr().err
    assert re.findall(r"step (\d+)/99, (\S+)", said) == [
        ("1", "loss"),
        ("3", "loss"),
        ("3", "validation/loss"),
        ("4", "validation/loss"),
    ]
    time.sleep(0.6)
    assert "step 5/99, loss 5" in capsys.readouterr().err
    report.log({"loss": 6}, 6)
    report.log({"loss": 7}, 7)
    report.metrics = None
    report.close()
    assert "step 7/99" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["__init__", "add_scalar", "add_images", "finish"])
def test_a_tracker_that_fails_stops_nothing(tmp_path, part):
    """It is a warning, once; a storage error behind it stays one."""

    def broken():
        from accelerate.tracking import TensorBoardTracker
        from torch.utils.tensorboard import SummaryWriter

        def fails(*_, **__):
            raise OSError(28, "No space left on device")

        setattr(TensorBoardTracker if part == "finish" else SummaryWriter, part, fails)
        if part == "finish":
            checkpoint.Saves.save = lambda *_: (_ for _ in ()).throw(checkpoint.StorageError("the disk is full"))

    flags = tiny(tmp_path, base__logger="tensorboard", base__logging_steps=1)
    result = cli(tmp_path, *flags, patch=broken)
    assert result.code == (4 if part == "finish" else 0), result.err
    assert result.err.count("warning: tensorboard failed, and training goes on: OSError: [Errno 28]") == 1, result.err
    assert "Traceback" not in result.err and (part != "finish" or "error: the disk is full" in result.err)
    batch = next(line for line in result.err.splitlines() if line.startswith("first batch"))
    assert "pixel_values [4, 3, 8, 8] float32 in [-1, 1]" in batch and "uint8" not in batch


@pytest.mark.parametrize(
    ("starts", "marks"), [([0], []), ([0, 10, 20], [10, 20]), ([0, 10, 20, 15], [10, 15]), ([0, 5, 5], [5]), ([0, 5, 0], [])]
)
def test_resumes(starts, marks):
    assert page.resumed([{"step": step} for step in starts]) == marks


def test_compare(tmp_path, run):
    other = tiny(tmp_path, steps=3, base__logging_steps=1, ddpm__learning_rate=0.5, data__trigger="</script><b>")
    assert cli(tmp_path, *other).code == 0
    shutil.move(tmp_path / "out", tmp_path / "other")
    result = cli(tmp_path, "compare", run, "other", "--to", "both.html")
    assert result.code == 0 and "2 runs compared: both.html" in result.out, result.err
    text, data = embedded(tmp_path / "both.html")
    table = re.search(r"Settings that differ</h2>(.*?)</section>", text, re.S)[1]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", table)]
    assert ["ddpm.learning_rate", "0.002", "0.5"] in rows
    assert {row[0] for row in rows if row} >= {"base.max_train_steps", "base.checkpointing_steps"}
    assert "base.seed" not in table and "output_dir" not in table
    assert [run["name"] for run in data["runs"]] == ["out", "other"] and {len(grid) for grid in data["grids"]} == {3, 1}
    assert [line["name"] for line in data["charts"][0]["lines"]] == ["out", "other"]


def test_a_comparison_lies_beside_its_runs(tmp_path, run):
    for name in ("a", "deep/b"):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "here").mkdir()
    result = cli(tmp_path, "compare", "../runs/a", "../runs/deep/b", cwd=tmp_path / "here")
    assert result.code == 0 and "2 runs compared: ../runs/compare.html" in result.out, result.err
    assert (tmp_path / "runs" / "compare.html").is_file() and not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere", "nothing"], ["nowhere: holds no run.json; expected the output folder of a run"]),
        (["alone"], ["compare was given 1 folder; expected the output folders of two runs"]),
        (["a", "b", "--to", "page"], ["--to is 'page'; expected the name of a .html file"]),
    ],
)
def test_mistakes(tmp_path, argv, words):
    refused(cli(tmp_path, "compare", *argv), *words)
    assert not list(tmp_path.glob("*.html"))


def test_folders_of_one_name():
    folders = [page.Path("runs/a/out"), page.Path("runs/b/out"), page.Path("runs/b/out")]
    assert page._names(folders) == ["a/out", "b/out", "b/out"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser. The page is looked at in a frame of a given width, and tells the page around it what it saw.

PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
console.error = (...words) => errors.push(words.join(" "));
addEventListener("load", () => setTimeout(async () => {
  const pause = () => new Promise((done) => setTimeout(done, 200)), all = (what) => [...document.querySelectorAll(what)];
  const grid = () => all("#samples img").map((image) => image.src.length + image.src.slice(-200)).join();
  const root = document.documentElement, drawn = ".scatterlayer path.js-line, .scatterlayer path.point";
  const seen = { errors, width: innerWidth, needs: root.scrollWidth, background: getComputedStyle(root).backgroundColor };
  const sizes = (plot) => [plot.clientWidth, plot.querySelector("svg").clientWidth, plot.querySelectorAll(drawn).length];
  seen.plots = all(".plot").map(sizes);
  const slider = document.querySelector("#samples input"), label = () => document.querySelector("#samples output").textContent;
  seen.before = [label(), grid()];
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  await pause();
  seen.after = [label(), grid()];
  seen.images = all("#samples img").map((image) => image.naturalWidth);
  const ticks = () => all(".plot")[0].querySelector(".yaxislayer-above").textContent, scale = ticks();
  document.querySelector("#charts button").click();
  await pause();
  seen.rescaled = scale !== ticks();
  const names = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.fetched = names.filter((name) => !name.startsWith("data:"));
  parent.postMessage(JSON.stringify(seen), "*");
}, 500));
</script>"""


def looked_at(folder, path, width, scheme="light"):
    """What a headless browser without a network sees of a page."""
    (folder / "probed.html").write_text(path.read_text().replace("<head>", "<head>" + PROBE, 1))
    (folder / "around.html").write_text(
        f'<iframe src="probed.html" width="{width}" height="2000" style="border:0"></iframe><pre></pre>'
        '<script>onmessage = (event) => document.querySelector("pre").textContent = event.data</script>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    options += [f"--user-data-dir={folder}/profile", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    command = [CHROMIUM, *options, "--enable-logging=stderr", "--virtual-time-budget=10000", (folder / "around.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize(
    ("width", "scheme", "background"), [(1280, "light", "rgb(251, 250, 248)"), (390, "dark", "rgb(23, 22, 20)")]
)
def test_in_a_browser(tmp_path, run, width, scheme, background):
    seen = looked_at(tmp_path, run / "report.html", width, scheme)
    assert seen["errors"] == [] and seen["fetched"] == []
    assert seen["width"] == width and seen["needs"] <= width and seen["background"] == background
    assert len(seen["plots"]) == len(embedded(run / "report.html")[1]["charts"]) >= 7
    assert all(plot == svg > 200 and lines for plot, svg, lines in seen["plots"]), seen["plots"]
    (last, shown), (first, other) = seen["before"], seen["after"]
    assert (last, first) == ("step 9", "step 3") and shown != other and seen["images"][0] > 0
    assert seen["rescaled"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_comparison_in_a_browser(tmp_path, run):
    shutil.copytree(run, tmp_path / "again")
    (tmp_path / "again" / "samples" / "3.png").unlink()
    page.compare([run, tmp_path / "again"], tmp_path / "both.html")
    seen = looked_at(tmp_path, tmp_path / "both.html", 1000)
    assert seen["errors"] == [] and seen["before"] != seen["after"] and len(seen["images"]) == 1
    assert seen["plots"][0][2] == 2
