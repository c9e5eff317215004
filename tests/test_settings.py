"""The command line and settings files: what is understood, what is refused, in one line and with exit code 2."""

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from warm import ROOT, cli, tiny

from oneloop import configs
from oneloop.tasks import ddpm


def refused(result, *words):
    """Exit code 2, and one line on standard error that has all the words."""
    assert result.code == 2, (result.code, result.err)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_tasks_are_listed(tmp_path):
    result = cli(tmp_path)
    assert result.code == 0 and "ddpm   Train a diffusion model of pictures" in result.out


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
    code = "import sys; from oneloop import configs; from oneloop.tasks import ddpm; configs.build(ddpm.Config, [])"
    code += "; sys.exit('torch' in sys.modules)"
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
    module, cfg = configs.parse([str(tmp_path / "run.json"), "--base.num-epochs", "4"])
    assert module is ddpm and (cfg.base.seed, cfg.base.num_epochs, cfg.ddpm.learning_rate) == (5, 4.0, 1e-2)


def test_yaml_and_every_kind_of_value(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "base: {mixed_precision: no, use_ema: false, logger: [tensorboard, wandb], max_train_steps: null}\nddpm: {}\n"
    )
    base = configs.parse([str(tmp_path / "run.yaml")])[1].base
    assert (base.mixed_precision, base.use_ema, base.logger, base.max_train_steps) == (
        "no",
        False,
        ("tensorboard", "wandb"),
        None,
    )


def test_resolved_settings_repeat_the_run():
    cfg = ddpm.Config(base=configs.Base(seed=3, logger=("none",)), ddpm=ddpm.Settings(snr_gamma=5.0))
    flags = configs.as_flags(configs.to_dict(cfg), ddpm.Config)
    assert configs.build(ddpm.Config, flags) == cfg


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


LAYERS = {  # room or file -> what of the project it may import
    "configs": set(),
    "tasks/__init__": set(),
    "maths": {"configs", "tasks", "maths"},
    "families": {"configs", "tasks", "maths", "families"},
    "tasks": {"configs", "tasks", "maths", "families"},
    "inputs": {"configs", "tasks", "data", "inputs"},
    "data": {"configs", "tasks", "inputs", "machine"},
    "machine/internals": {"configs"},  # below everything: any file may import it
    "machine": {"configs", "tasks", "machine"},
    "checkpoint": {"configs", "tasks", "machine"},
    "training": {"configs", "tasks", "data", "inputs", "machine", "training"},
    "views": {"configs", "tasks", "data", "inputs", "machine", "checkpoint", "training", "views"},
    "__init__": set(),
    "__main__": {"configs", "checkpoint", "loop", "machine", "training"},
}


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
        rooms = {module.partition(".")[0] for module in imports(path) if not module.startswith("machine.internals")}
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
