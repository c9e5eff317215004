"""One page for a run, and one for several: report.html and `python loop.py compare`, from what their output folders hold.

A page is a single file that needs no network: page.html filled in, with its styles, its script, Plotly and the sample grids
inside. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import datetime
import functools
import html
import io
import json
import re
import shlex
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oneloop.machine import files
from oneloop.views.loading import load_lines
from oneloop.views.page import evaluated

POINTS = 2000
"""Points a line has at most."""
GRIDS = 24
"""Steps of sample grids that a page shows at most, spread evenly."""
GRID_BYTES = 4_000_000
"""Bytes of all the grids together, as they are embedded."""


STARTS = "starts.jsonl"


@dataclass(frozen=True)
class Run:
    """What an output folder tells of its run."""

    folder: Path
    settings: dict[str, dict[str, Any]]
    task: str | None
    """Import path of a task outside oneloop."""
    starts: list[dict[str, Any]]
    """One for each time the run was started or resumed, oldest first; see `console.start`."""
    metrics: dict[str, list[tuple[int, float]]]
    """Name -> (step, value), in order."""
    grids: dict[int, dict[str, Path]]
    """Step -> the name of a set of images -> its grid."""

    @property
    def step(self) -> int:
        """The last step that the records know."""
        return max([0, *self.grids, *(points[-1][0] for points in self.metrics.values())])


Say = Callable[[str], Any]
RENAMED = {"pictures_per_second": "images_per_second"}
"""Metrics of earlier versions -> today's names."""


def lines(path: Path, say: Say = lambda text: None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a record that are whole, and their values; each has a step. Records are advice: what is damaged is left out
    with a word to `say`. The last line may be half of one or the zeros of a power cut, and the file may be missing."""
    damaged = []
    rows = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.is_file() else []
    for number, row in enumerate(rows, 1):
        try:
            values = json.loads(row)
            good = type(values["step"]) is int and 0 <= values["step"] < 2**53
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            good = False
        if not row.endswith("\n"):
            break
        if good:
            yield row, values
        else:
            damaged.append(number)
    if damaged:
        say(f"{path}: {len(damaged)} damaged line{'s' * (len(damaged) > 1)} left out, the first is line {damaged[0]}")


def read(folder: Path, say: Say = lambda text: None) -> Run:
    """What an output folder tells of its run; what is damaged is left out with a word to `say`.

    Raises:
        OSError: its files cannot be read.
    """
    metrics: dict[str, list[tuple[int, float]]] = {}
    for _, values in lines(folder / "metrics.jsonl", say):
        for name, value in values.items():
            if name != "step" and type(value) in (int, float) and abs(value) < 1e300:  # which NaN is not
                metrics.setdefault(RENAMED.get(name, name), []).append((values["step"], value))
    metrics |= evaluated.curves(folder, say)
    grids: dict[int, dict[str, Path]] = {}
    for path in sorted((folder / "samples").glob("*.png")):
        if match := re.fullmatch(r"([0-9]{1,15})(?:-(.+))?", path.stem):
            grids.setdefault(int(match[1]), {})[match[2] or "samples"] = path
    try:
        settings = dict(json.loads(files.read_text(folder / "run.json")))
    except (ValueError, TypeError, RecursionError):
        say(f"{folder}/run.json: damaged; its settings are left out")
        settings = {}
    groups = {group: values for group, values in settings.items() if isinstance(values, dict)}
    starts = [start for name in ("lives.jsonl", STARTS) for _, start in lines(folder / name, say)]  # lives: of earlier versions
    return Run(folder, groups, settings.get("task"), starts, metrics, dict(sorted(grids.items())))


# ---------------------------------------------------------------------------------------------------------------------
# What the page's script draws.


def thinned(points: list[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """At most `most` of the points: of each stretch of them the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    points_shown, stretches = [], most // 2
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        points_shown += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return points_shown


def spread(values: list[int], most: int) -> list[int]:
    """At most `most` of the values, evenly, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]


def resumed(starts: list[dict[str, Any]]) -> list[int]:
    """The steps from which the run was continued; not those that a later start went back behind."""
    steps = [start["step"] for start in starts]
    return sorted({step for i, step in enumerate(steps) if step and step <= min(steps[i:])})


def drawn(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """What page.js draws: charts, each with its lines, and the grids of some steps."""
    charts: dict[str, list[dict[str, Any]]] = {}
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        for key, points in run.metrics.items():
            points_shown = thinned(points)
            line = {"run": index, "name": name if len(runs) > 1 else key, "key": key, "x": [step for step, _ in points_shown]}
            charts.setdefault(_chart(key), []).append(line | {"y": [float(f"{value:.6g}") for _, value in points_shown]})
    order = ["loss", "validation", "validation by timestep", "lr", "grad_norm", "images_per_second"]
    rank = {title: i for i, title in enumerate(order)}
    steps = spread(sorted({step for run in runs for step in run.grids}), GRIDS)
    shown = [run.grids[step] for run in runs for step in steps if step in run.grids]
    each = GRID_BYTES // max(1, sum(map(len, shown)))
    return {
        "runs": [{"name": name, "resumed": resumed(run.starts)} for run, name in zip(runs, names, strict=True)],
        "charts": [
            {"title": _title(title), "log": title.startswith(("loss", "validation", "grad_norm")), "lines": charts[title]}
            for title in sorted(charts, key=lambda title: rank.get(title, len(rank)))
        ],
        "steps": steps,
        "grids": [
            {
                step: {
                    kind: data
                    for kind, path in run.grids[step].items()
                    if (data := embedded(path, path.stat().st_mtime_ns, each))
                }
                for step in steps
                if step in run.grids
            }
            for run in runs
        ],
    }


def _chart(key: str) -> str:
    """The chart that a metric belongs to."""
    return "validation by timestep" if re.search(r"^validation/.*\bq\d$", key) else key.partition("/")[0]


def _title(chart: str) -> str:
    known = {
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "images_per_second": "Images per second",
        "data_wait": "Share of the time that waits for data",
        "validation": "Validation loss",
        "validation by timestep": "Validation loss by quarter of the timesteps",
        "ema_decay": "Decay of the EMA",
    }
    return known.get(chart, chart.replace("_", " ").capitalize())


@functools.lru_cache(maxsize=1024)
def embedded(path: Path, changed: int, most: int) -> str:
    """An image as a data URI of at most about `most` bytes: the file as it is, or made smaller until it fits; "" where it is
    damaged.

    `changed` is when the file was, so that a page that is written again encodes only what is new.
    """
    from PIL import Image

    raw, kind = path.read_bytes(), "png"
    side = 1600
    while len(raw) > most * 3 // 4 and side >= 100:  # base64 takes four bytes for three
        try:
            image, buffer = Image.open(path).convert("RGB"), io.BytesIO()
        except Exception:  # PIL has one for every kind of damage
            return ""
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=85)
        raw, kind, side = buffer.getvalue(), "jpeg", side * 3 // 4
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


# ---------------------------------------------------------------------------------------------------------------------
# The pages.


def write(folder: Path) -> None:
    """report.html of an output folder, whole or not at all."""
    run = read(folder)
    task = next((group for group in run.settings if group not in ("base", "data")), "a run")
    kinds = {"total": int, "models": dict, "changed": dict, "hardware": dict, "versions": dict, "about": str, "data": str}
    start = {name: value for name, value in (run.starts or [{}])[-1].items() if isinstance(value, kinds.get(name, object))}
    done = start.get("total", 0) and run.step >= start["total"]
    facts = {
        "trained": start.get("about"),
        "on": start.get("data"),
        "models": "; ".join(f"{name}: {what}" for name, what in start.get("models", {}).items()),
        "length": f"{run.step:,} of {start['total']:,} optimizer steps" if "total" in start else None,
        "resumed": ", ".join(f"after step {step:,}" for step in resumed(run.starts)),
    }
    lead = f"{task}, {'finished' if done else 'running'} at step {run.step:,}"
    flat = {f"{group}.{name}": value for group, values in run.settings.items() for name, value in values.items()}
    changed = [  # earlier versions wrote the default alone
        [name, *([both["value"], both["default"]] if isinstance(both, dict) else [flat.get(name, ""), both])]
        for name, both in start.get("changed", {}).items()
        if not isinstance(both, dict) or both.keys() >= {"value", "default"}
    ]
    named = f"{run.task} " if run.task else ""
    repeat = f"python loop.py {named}{shlex.quote(f'{folder}/run.json')} --base.output-dir {shlex.quote(f'{folder}-again')}"
    sections = [
        _section("Curves", '<div id="charts"></div>') if run.metrics else "",
        _section("Samples", '<div id="samples"></div>') if run.grids else "",
        _section("Evaluation", _evaluated(folder)) if evaluated.results(folder) else "",
        _section("Load the result", _code(_loads(run))),
        _section("Repeat the run", _code(repeat)),
        _section(
            "Settings",
            _table(["changed", "here", "default"], changed)
            + f"<details><summary>All {len(flat)} settings</summary>{_table(['setting', 'value'], flat.items())}</details>",
        ),
        _section("Made with", _table([], [*start.get("hardware", {}).items(), *start.get("versions", {}).items()])),
    ]
    alone = {name for name, points in evaluated.curves(folder).items() if len(points) == 1}  # which the table says
    charts = replace(run, metrics={name: points for name, points in run.metrics.items() if name not in alone})
    _fill(folder / "report.html", folder.name, lead, _facts(facts) + "".join(sections), drawn([charts], [folder.name]))


def compare(folders: list[Path], to: Path, say: Say = lambda text: None) -> None:
    """One page for the runs of several output folders.

    Raises:
        OSError: one of them cannot be read, or the page cannot be written.
    """
    runs, names = [read(folder, say) for folder in folders], _names(folders)
    flat = [{f"{g}.{k}": v for g, values in run.settings.items() for k, v in values.items()} for run in runs]
    every = dict.fromkeys(name for settings in flat for name in settings if name != "base.output_dir")
    differ = [name for name in every if any(s.get(name, "—") != flat[0].get(name, "—") for s in flat)]
    last = lambda run: {name: f"{points[-1][1]:.5g}" for name, points in run.metrics.items()}  # noqa: E731
    ends = [{"step": f"{run.step:,}"} | last(run) for run in runs]
    metrics = dict.fromkeys(name for values in ends for name in values)
    rows = lambda keys, of: ([key, *(values.get(key, "—") for values in of)] for key in keys)  # noqa: E731
    sections = [
        _section("Settings that differ", _table(["setting", *names], rows(differ, flat)) if differ else "<p>None.</p>"),
        _section("Curves", '<div id="charts"></div>'),
        _section("Samples", '<div id="samples"></div>') if any(run.grids for run in runs) else "",
        _section("At the end of the records", _table(["metric", *names], rows(metrics, ends))),
    ]
    _fill(to, "Runs compared", ", ".join(names), "".join(sections), drawn(runs, names))


def _names(folders: list[Path]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = next(n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-length:]) for p in parts]


def _loads(run: Run) -> str:
    """The lines that load the newest result."""
    numbers = files.steps(run.folder)
    if not numbers:
        return "# there is no checkpoint yet"
    saved = run.folder / f"checkpoint-{max(numbers)}"
    done = (run.folder / "export").is_dir() and max(numbers) == run.step
    if not (saved / "load.py").is_file():
        return f"# {saved / 'load.py'} is missing"
    return load_lines(saved, run.folder / "export" if done else saved)


def _evaluated(folder: Path) -> str:
    """The last evaluation: its figures, and samples above the training images nearest to them."""
    step, rows = evaluated.table(folder)
    path = evaluated.neighbours(folder, step)
    image = embedded(path, path.stat().st_mtime_ns, GRID_BYTES) if path.is_file() else ""
    said = f"step {step:,}: samples, above the training images nearest to them"
    shown = f'<figure><img src="{image}" alt="{said}"><figcaption>{said}</figcaption></figure>' if image else ""
    return _table(["figure", "samples", "95 % interval", "floor"], rows) + shown


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{inner}</section>"


def _code(text: str) -> str:
    return f"<pre><code>{html.escape(text)}</code></pre>"


def _facts(facts: dict[str, Any]) -> str:
    shown = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items() if v)
    return f"<dl>{''.join(shown)}</dl>"


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """Rows of plain values; without rows nothing."""
    cell = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)  # noqa: E731
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell(v))}</td>' for v in row)}</tr>" for row in rows)
    top = f"<thead><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>' if body else ""


def _fill(path: Path, title: str, lead: str, body: str, data: dict[str, Any]) -> None:
    """page.html with everything in it, written whole or not at all."""
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    text = string.Template((here / "page.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        body=body,
        style=(here / "page.css").read_text("utf-8"),
        script=(here / "page.js").read_text("utf-8"),
        data=json.dumps(data).replace("</", "<\\/"),
        plotly=get_plotlyjs() if data["charts"] else "",
    )
    files.write(path, text.encode("utf-8", "replace").decode("utf-8"))  # a record may hold half a character
