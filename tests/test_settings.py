"""The command line and settings files: what is understood, what is refused, in one line and with exit code 2."""

import ast
import contextlib
import importlib
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_origin

import pytest
from warm import ROOT, cli, tiny

from oneloop import __main__ as program
from oneloop import configs
from oneloop.settings import command_line, ranges
from oneloop.tasks import ddpm, finetune, lora, vae
from oneloop.views import compare, sample


def refused(result, *words):
    """Exit code 2, and one line on standard error that has all the words."""
    assert result.code == 2, (result.code, result.err)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_tasks_are_listed(tmp_path):
    result = cli(tmp_path)
    assert result.code == 0 and re.search("ddpm +Train a diffusion model of images", result.out)


def test_help_is_quick_and_whole():
    """The whole process, in CPU seconds, which other processes do not lengthen; torch alone would cost three."""
    took = []
    for _ in range(3):
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        done = subprocess.run([sys.executable, ROOT / "loop.py", "ddpm", "--help"], capture_output=True, text=True)
        took.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before)
    assert done.returncode == 0 and min(took) < 1.0, took
    for group in (configs.Base, configs.Data, ddpm.Settings):
        for name in group.__dataclass_fields__:
            assert name.replace("_", "-") in done.stdout, name
    code = "import sys; from oneloop.settings import command_line; from oneloop.tasks import ddpm"
    code += "; command_line.build(ddpm.Config, []); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("group", [configs.Base, configs.Data, ddpm.Settings])
def test_every_setting_is_explained(group):
    tree = ast.parse(Path(sys.modules[group.__module__].__file__).read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == group.__name__).body
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and len(after.value.value) > 12, field.target.id


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"base": {"seed": 5, "num_epochs": 3}, "ddpm": {"learning_rate": 1e-2}}))
    module, cfg = command_line.parse([str(tmp_path / "run.json"), "--base.num-epochs", "4"])
    assert module is ddpm and (cfg.base.seed, cfg.base.num_epochs, cfg.ddpm.learning_rate) == (5, 4.0, 1e-2)


def test_yaml_and_every_kind_of_value(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "base: {mixed_precision: no, use_ema: false, logger: [tensorboard, wandb], max_train_steps: null}\nddpm: {}\n"
    )
    base = command_line.parse([str(tmp_path / "run.yaml")])[1].base
    assert (base.mixed_precision, base.use_ema, base.logger, base.max_train_steps) == (
        "no",
        False,
        ("tensorboard", "wandb"),
        None,
    )


def test_resolved_settings_repeat_the_run():
    cfg = ddpm.Config(base=configs.Base(seed=3, logger=("none",)), ddpm=ddpm.Settings(snr_gamma=5.0))
    flags = command_line.as_flags(configs.to_dict(cfg), ddpm.Config)
    assert command_line.build(ddpm.Config, flags) == cfg


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["dpm"], ["no task named 'dpm'", "Did you mean 'ddpm'?", "Tasks: "]),
        (["json"], ["the module json has no `task = Task(...)`"]),
        (["ddpm", "--base.num-epohcs", "3"], ["--base.num-epohcs is not a setting", "did you mean --base.num-epochs"]),
        (["ddpm", "--base.seed", "x"], ["--base.seed", "'x'"]),
        (["ddpm", "--base.lr-scheduler", "cosin"], ["--base.lr-scheduler", "cosin", "cosine"]),
        (["ddpm", "--data.train-batch-size", "-3"], ["--data.train-batch-size is -3; expected at least 1"]),
        (["ddpm", "--data.resolution", "0"], ["--data.resolution is 0; expected at least 1"]),
        (["ddpm", "--data.resolution", "30"], ["--data.resolution is 30; expected a multiple of"]),
        (["ddpm", "--base.num-epochs", "0"], ["--base.num-epochs is 0.0; expected more than 0"]),
        (["ddpm", "--ddpm.model-config", "nowhere.json"], ["--ddpm.model-config nowhere.json"]),
        (["ddpm", "missing.json"], ["missing.json"]),
        (["ddpm", "--base.logger", "excel"], ["--base.logger is 'excel'", "tensorboard"]),
        (["ddpm", "--base.logger", "wandb"], ["--base.logger wandb needs a login", "WANDB_API_KEY"]),
        (["ddpm", "--base.push-to-hub"], ["--base.push-to-hub needs a login", "HF_TOKEN"]),
        (["ddpm", "--base.mixed-precision", "fp16"], ["--base.mixed-precision is 'fp16', which needs a GPU"]),
        (["ddpm", "--base.lr-warmup-steps", "9", "--base.max-train-steps", "5"], ["--base.lr-warmup-steps is 9"]),
    ],
)
def test_mistakes(tmp_path, flags, words):
    refused(cli(tmp_path, *flags, env={"NETRC": str(tmp_path / "none"), "HF_HOME": str(tmp_path)}), *words)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} <= {"runs"}
    assert not (tmp_path / "runs" / "ddpm").exists()


@pytest.mark.parametrize(("setting", "value"), [("num_epohcs", 3), ("seed", "x"), ("lr_scheduler", "cosin")])
def test_a_file_is_refused_like_a_command_line(tmp_path, setting, value):
    (tmp_path / "bad.json").write_text(json.dumps({"base": {setting: value}, "ddpm": {}}))
    typed = cli(tmp_path, "ddpm", f"--base.{setting}", value).err.removeprefix("error: ")
    refused(cli(tmp_path, "bad.json"), f"bad.json: {typed.strip()}")


def test_a_file_that_names_no_task(tmp_path):
    (tmp_path / "bad.json").write_text('{"base": {"seed": 1}}')
    refused(cli(tmp_path, "bad.json"), "bad.json: names no task")
    (tmp_path / "bad.yaml").write_text("base: [")
    refused(cli(tmp_path, "bad.yaml"), "bad.yaml: not valid JSON or YAML")


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    flags = tiny(tmp_path, "file/out")
    refused(cli(tmp_path, *flags), "--base.output-dir", "file/out cannot be written")


# ---------------------------------------------------------------------------------------------------------------------
# Every value there is, and every file.


def ended(monkeypatch, *argv):
    """The exit code of a command line that does not come as far as a run, in this process."""
    monkeypatch.setattr(sys, "argv", ["loop.py", *argv])
    handlers = {number: signal.getsignal(number) for number in configs.SIGNALS}
    try:
        with pytest.raises(SystemExit) as end:
            program.main()
        return end.value.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


GROUPS = {"base": configs.Base, "data": configs.Data, "finetune": finetune.Settings}
GROUPS |= {"ddpm": ddpm.Settings, "lora": lora.Settings, "vae": vae.Settings}
NUMBERS = [math.nan, math.inf, -math.inf, -1, -1e-300, 1e300, 10**30, 2**63, "3", None]
TEXTS = ["", " ", "\0", "a\0b", "\udcff", "\ud800", "x" * 256, "a/" * 3000, "x" * 100_000, "~nobody-here/x", 3, None]
TYPED = [
    "",
    "\0",
    "\udcff",
    "x" * 5000,
    "nan",
    "-inf",
    "1e999",
    "9" * 5000,
    "-x",
    "--",
    "None",
    "yes",
    "\x1b[31m",
    "{path}",
    "a=b",
]


def limited(group):
    """Field of a settings class -> its range, or None, for each that is a number or a text."""
    for name, hint in ranges.hints(group).items():
        parts = list(ranges.nested(hint))
        if {int, float, str} & {part for part in parts if isinstance(part, type)}:
            yield name, next((part for part in parts if isinstance(part, (ranges.Range, ranges.Text))), None), parts


@pytest.mark.parametrize("group", [*GROUPS.values(), compare.Settings, sample.Settings])
def test_every_number_and_text_has_a_range(group):
    missing = [name for name, limit, _ in limited(group) if limit is None]
    assert list(limited(group)) and not missing


@pytest.mark.parametrize("name", GROUPS)
def test_no_value_passes_that_is_outside_its_range(name):
    """Every number and text x every nasty value: refused by its flag in one line, or one that the range allows."""
    refusals = 0
    for field, limit, parts in limited(GROUPS[name]):
        many = any(get_origin(part) is tuple for part in parts)
        for value in NUMBERS if isinstance(limit, ranges.Range) else TEXTS:
            if value is None and type(None) in parts:
                continue
            try:
                GROUPS[name](**{field: (value,) if many else value})
                passes = limit.fits(value) and value not in (math.inf, -math.inf) and value == value
                assert passes and len(str(value)) <= 10_000, (field, value)
            except configs.BadInput as error:
                refusals += 1
                assert f"--{name}.{field}".replace("_", "-") in str(error), (field, value, error)
    assert refusals > 4 * len(list(limited(GROUPS[name])))


@pytest.mark.parametrize(
    "flag", [f"{name}.{field}" for name in ("base", "ddpm") for field in GROUPS[name].__dataclass_fields__]
)
def test_whatever_is_typed_is_a_setting_or_one_line(flag):
    """Every flag x values that are drawn from a list, in turn."""
    every = list(itertools.product(TYPED, (True, False)))
    start = sum(map(ord, flag))
    for value, apart in (every[(start + i * 7) % len(every)] for i in range(5)):
        typed = [f"--{flag}", value] if apart else [f"--{flag}={value}"]
        with contextlib.suppress(configs.BadInput):
            command_line.build(ddpm.Config, typed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["ddpm", "--base.num-epochs", "inf"], ["--base.num-epochs is inf; expected more than 0 and at most 1,000,000"]),
        (["ddpm", "--base.num-epochs", "nan"], ["--base.num-epochs is nan; expected"]),
        (
            ["ddpm", "--data.num-shapes", "1000000000000"],
            ["--data.num-shapes is 1000000000000; expected at least 1 and"],
        ),
        (["ddpm", "--data.resolution", "1000000000"], ["--data.resolution", "at most 16,384"]),
        (["ddpm", "--data.dataloader-num-workers", "100000"], ["--data.dataloader-num-workers", "at most 1,024"]),
        (["ddpm", "--base.seed", str(2**63)], ["--base.seed", "at most 9,223,372,036,854,775,807"]),
        (["ddpm", "--ddpm.adam-beta1", "1"], ["--ddpm.adam-beta1 is 1.0; expected at least 0 and below 1"]),
        (["sample", ".", "--num", "1000000000"], ["--num is 1000000000; expected at least 1 and at most 65,536"]),
        (["ddpm", "--base.output-dir", ""], ["--base.output-dir is ''; expected the path of a folder"]),
        (["ddpm", "--base.output-dir", "file"], ["--base.output-dir is 'file'; expected the path of a folder"]),
        (["ddpm", "--data.example-cache", "file"], ["--data.example-cache is 'file'"]),
        (["ddpm", "--base.output-dir", "x" * 256], ["--base.output-dir", "255 in each part"]),
        (["ddpm", "--base.seed", "1", "2"], ["'2' is one value too many for --base.seed"]),
        (["ddpm", "--base.use-ema", "2"], ["'2' is one value too many for --base.use-ema"]),
        (["ddpm", "--base.max-train-steps", "x"], ["--base.max-train-steps", "'x'; expected {None}|INT"]),
        (["sample", ".", "--to", "folder.png"], ["folder.png cannot be written: it is a folder; --to names another file"]),
        (["sample", ".", "--to", "file/a.png"], ["file/a.png cannot be written", "file is not a folder"]),
        (["compare", "run", "run", "--to", "folder.html"], ["folder.html cannot be written: it is a folder"]),
    ],
)
def test_settings_alone_decide(tmp_path, flags, words, capsys, monkeypatch):
    """In less than a second, before torch is imported; nothing is written."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.png", "folder.html", "run"):
        (tmp_path / folder).mkdir()
    for file in ("file", "run/run.json"):
        (tmp_path / file).write_text("{}")
    before, started = sorted(tmp_path.rglob("*")), time.process_time()
    assert ended(monkeypatch, *flags) == 2 and time.process_time() - started < 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and len(line) <= 2000 and all(word in line for word in words), line
    assert sorted(tmp_path.rglob("*")) == before


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
FILES = {
    "empty.json": ("", ["not valid JSON or YAML"]),
    "empty.yaml": ("", ["names no task"]),
    "list.json": ("[1]", ["expected groups of settings"]),
    "scalar.yaml": ("3", ["expected groups of settings"]),
    "group.json": ('{"base": 3, "ddpm": {}}', ["the group 'base' is 3; expected its settings by name"]),
    "groups.json": ('{"ddpm": {}, "base": [1, 2]}', ["the group 'base' is [1, 2]; expected its settings by name"]),
    "other.json": ('{"task": "ddpm", "ddmp": {}}', ["the group 'ddmp' is {}; expected some of base, data, ddpm"]),
    "task.json": ('{"task": 5, "ddpm": {}}', ["the task is 5; expected the name of one: ", "ddpm"]),
    "tasks.json": ('{"task": ["ddpm"], "ddpm": {}}', ["the task is ['ddpm']; expected the name of one: ", "ddpm"]),
    "deep.json": ("[" * 50_000, ["not valid JSON or YAML"]),
    "deep.yaml": ("[" * 50_000, ["not valid JSON or YAML"]),
    "deeper.json": ('{"ddpm": {}, "base": {"seed": {"a": {}}}}', ["--base.seed is {'a': {}}; expected text, a number"]),
    "bomb.yaml": (BOMB + "ddpm: {}\nbase: {seed: *i}\n", ["it has aliases (*name)"]),
    "surrogate.json": (
        '{"ddpm": {}, "base": {"output_dir": "\\ud800"}}',
        ["--base.output-dir is '\\ud800'; expected"],
    ),
    "name.json": ('{"ddpm": {}, "base": {"\\ud800": 1}}', ["--base.\\ud800 is not a setting"]),
    "nul.json": ('{"ddpm": {}, "data": {"trigger": "a\\u0000"}}', ["--data.trigger is 'a\\x00'; expected", "without NUL"]),
    "many.json": ('{"ddpm": {}, "base": {"seed": [1, 2]}}', ["--base.seed is [1, 2]; expected one value"]),
    "none.json": ('{"ddpm": {}, "base": {"seed": []}}', ["--base.seed is []; expected one value"]),
    "null.json": ('{"ddpm": {}, "base": {"use_ema": null}}', ["--base.use-ema is None; expected true or false"]),
    "number.yaml": ("ddpm: {}\nbase: {use_ema: 2}", ["--base.use-ema is 2; expected true or false"]),
    "nulls.json": ('{"ddpm": {}, "base": {"logger": [null]}}', ["--base.logger is [None]; expected text, a number"]),
    "required.json": ('{"ddpm": {}, "base": {"seed": null}}', ["--base.seed is None; expected text, a number"]),
    "date.yaml": ("ddpm: {}\nbase: {output_dir: 2024-01-01}", ["--base.output-dir is datetime.date", "expected text"]),
    "twice.json": ('{"ddpm": {}, "base": {"seed": 1, "seed": 2}}', ["'seed' is given more than once"]),
    "twice.yaml": ("ddpm: {}\nbase: {seed: 1}\nbase: {seed: 2}", ["'base' is given more than once"]),
    "range.json": ('{"ddpm": {}, "base": {"num_epochs": NaN}}', ["--base.num-epochs is nan; expected more than 0"]),
    "huge.json": ('{"ddpm": {}, "data": {"trigger": "' + "x" * 200_000 + '"}}', ["more than 100,000 bytes"]),
    "long.json": ('{"ddpm": {}, "base": {"' + "x" * 90_000 + '": 1}}', ["--base.xxx", "is not a setting"]),
    "slow.yaml": ("ddpm: {}\nbase: {logger: [" + "a, " * 30_000 + "]}\nbase: 3", ["'base' is given more than once"]),
    "junk.yaml": ("!!python/object/apply:os.system [touch hacked]", ["not valid JSON or YAML"]),
    "int.yaml": ("ddpm: {}\nbase: {seed: !!int ''}", ["not valid JSON or YAML"]),
    "latin.json": (b'{"base": {"output_dir": "\xe9"}}', ["not valid JSON or YAML"]),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files(tmp_path, name):
    """One line that names the file, in less than a second of CPU."""
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(configs.BadInput) as refusal:
        command_line.parse([str(tmp_path / name)])
    line = configs.one_line(str(refusal.value))
    assert line.startswith(f"{tmp_path / name}: ") and all(word in line for word in words), line
    assert time.process_time() - started < 1 and [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["deep.yaml", "bomb.yaml"])
def test_broken_files_without_libyaml(tmp_path, name, monkeypatch):
    monkeypatch.delattr("yaml.CSafeLoader")
    test_broken_files(tmp_path, name)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("folder.json", "pipe.json"):
        with pytest.raises(configs.BadInput, match=r"not a file; expected a settings file"):
            command_line.parse([str(tmp_path / name)])


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "run.json").write_text('{"base": {"seed": 5}, "ddpm": {}}', "utf-8-sig")
    assert command_line.parse([str(tmp_path / "run.json")])[1].base.seed == 5


def test_values_that_look_like_flags_survive(tmp_path):
    """What a run wrote into run.json is what it reads from there, whatever its texts and numbers begin with."""
    cfg = lora.Config(
        data=configs.Data(trigger="--base.seed", caption_column="-c", resolution=512),
        lora=lora.Settings(
            negative_prompt="-x", validation_prompts=("-a", "b", "--help", "-1", "c=d"), rescale_betas_zero_snr=True
        ),
        base=configs.Base(num_samples=5, lr_power=1e-7, hub_model_id="=", logger=("none",)),
    )
    (tmp_path / "run.json").write_text(json.dumps(configs.run_file(cfg)))
    assert command_line.parse([str(tmp_path / "run.json")])[1] == cfg


def test_no_code_runs_on_the_word_of_a_file(tmp_path, monkeypatch):
    """A settings file that names another's task says what to type; typed, it runs."""
    (tmp_path / "their_task.py").write_text("open('hacked', 'w')\nfrom oneloop.tasks.ddpm import task\n")
    (tmp_path / "run.json").write_text('{"task": "their_task", "base": {"seed": 3}, "ddpm": {}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(configs.BadInput, match=r"python loop.py their_task run.json"):
        command_line.parse(["run.json"])
    assert not (tmp_path / "hacked").exists() and "their_task" not in sys.modules
    assert command_line.parse(["their_task", "run.json"])[1].base.seed == 3 and (tmp_path / "hacked").exists()
    del sys.modules["their_task"]


def test_python_m_imports_nothing_from_the_working_folder(tmp_path):
    (tmp_path / "tyro.py").write_text("open('hacked', 'w')\n")
    done = subprocess.run(
        [sys.executable, "-m", "oneloop", "ddpm", "--base.nope"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--base.nope is not a setting" in done.stderr and not (tmp_path / "hacked").exists()


def test_a_line_is_short_and_plain():
    line = configs.one_line("--a is " + "\x1b[31m\n\ud800" * 9000 + "; expected b")
    assert len(line) <= 2000 and line.isprintable() and line.startswith("--a is") and line.endswith("; expected b")


def test_a_bug_keeps_its_traceback_and_says_that_it_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "find_task", lambda name: 1 / 0)
    code, said = ended(monkeypatch, "ddpm"), capsys.readouterr().err
    assert code == 1 and "ZeroDivisionError" in said and said.splitlines()[-1] == f"error: {program.BUG}"


def test_what_is_not_installed_is_said(tmp_path, monkeypatch, capsys):
    """A package that the project needs in a line; another, which a task of one's own imports, as the bug that it is."""
    listed = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    needed = re.findall('"([a-z]+)', listed)
    assert {*needed, "numpy", "PIL"} == set(program.NEEDED)
    for name, code, words in (("tyro", 2, "the package tyro is not installed in "), ("other", 1, program.BUG)):
        monkeypatch.setattr(command_line, "find_task", lambda _, name=name: lost(name))
        assert ended(monkeypatch, "ddpm") == code
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {words}")


def lost(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_exit_codes_are_of_exceptions_there_are():
    for name in program.CODES:
        module, _, kind = name.rpartition(".")
        found = getattr(importlib.import_module(module), kind)
        assert issubclass(found, Exception) and f"{found.__module__}.{found.__qualname__}" == name


def test_a_closed_pipe_is_silent(tmp_path):
    code = f"{sys.executable} {ROOT}/loop.py ddpm --help | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(2):
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert done.stderr == "" and done.returncode in (0, 141)


def test_the_loop_is_imported_without_the_large_libraries():
    """They take seconds, and mistakes in the data are told before them."""
    seen = "{'diffusers', 'peft', 'transformers'} & {*sys.modules}"
    code = f"import sys, oneloop.loop, oneloop.views.estimate; print({seen})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Who may know whom.


LAYERS = {  # room or file -> what of the project it may import
    "configs": {"settings"},
    "settings/command_line": {"configs", "settings"},
    "settings": {"settings"},
    "tasks/__init__": set(),
    "maths": {"configs", "tasks", "maths"},
    "families": {"configs", "settings", "tasks", "maths", "families"},
    "tasks": {"configs", "tasks", "maths", "families"},
    "inputs": {"configs", "tasks", "data", "inputs", "machine"},
    "data": {"configs", "tasks", "inputs", "machine"},
    "machine/internals": {"configs"},
    "training/optimizers": {"configs", "training"},
    "machine": {"configs", "tasks", "machine"},
    "checkpoint": {"configs", "tasks", "machine"},
    "training": {"configs", "tasks", "data", "inputs", "machine", "training"},
    "evaluation": {"configs", "tasks", "data", "inputs", "evaluation"},
    "views": {
        "configs",
        "tasks",
        "data",
        "evaluation",
        "families",
        "inputs",
        "machine",
        "checkpoint",
        "settings",
        "training",
        "views",
    },
    "__init__": set(),
    "__main__": {"configs", "checkpoint", "loop", "machine", "settings", "training"},
}

ANYWHERE = ("machine.internals", "machine.addition", "training.optimizers", "families.hub")
"""Below everything: any file may import them."""


def imports(path):
    """The rooms and files of the project that a file imports from, and the modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "oneloop":
            inside = ".".join(node.module.split(".")[1:])
            yield from (f"{inside}.{alias.name}".strip(".") for alias in node.names)


def test_imports_run_one_way():
    """Every file knows only what stands below it, and nothing knows `loop`; parts of the data plane that open nothing never
    import the data plane, so there is no circle."""
    for path in [*ROOT.glob("*.py"), *(p for room in LAYERS for p in ROOT.glob(f"{room}/**/*.py"))]:
        name = str(path.relative_to(ROOT).with_suffix(""))
        if name == "loop":
            continue
        allowed = LAYERS.get(name, LAYERS.get(name.partition("/")[0]))
        rooms = {module.partition(".")[0] for module in imports(path) if not module.startswith(ANYWHERE)}
        assert rooms <= allowed, (name, rooms - allowed)


def test_there_is_no_circle():
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", "docs", "examples")]
    module = lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")  # noqa: E731
    modules = {module(p): p for p in files if p.name != "__main__.py"}  # which `loop.py`, run as a file, hands over to
    defines = lambda wanted: wanted if wanted in modules else wanted.rpartition(".")[0]  # noqa: E731
    graph = {name: {defines(wanted) for wanted in imports(path)} - {name} for name, path in modules.items()}
    while leaves := [name for name, to in graph.items() if not to & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize(
    "env",
    [
        {"LOCAL_RANK": "x"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_DYNAMO_BACKEND": "x"},
    ],
)
def test_an_environment_that_cannot_be_set_up(tmp_path, env):
    name, value = next(reversed(env.items()))
    refused(cli(tmp_path, *tiny(tmp_path), env=env), "the environment asks for what cannot be set up", f"{name}={value}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "least, most, says",
    [
        (0, 1e6, "at least 0 and at most 1,000,000"),
        (-2.5, 0.1, "at least -2.5 and at most 0.1"),
        (0.0, 3e38, "at least 0 and at most 3e+38"),
        (1, 2**63 - 1, "at least 1 and at most 9,223,372,036,854,775,807"),
    ],
)
def test_a_range_reads_alike_however_its_numbers_are_written(least, most, says):
    """typing may give a setting an equal range that another setting wrote with floats."""
    assert str(ranges.Range(least, most)) == says
    assert str(ranges.Range(float(least), most)) == says
