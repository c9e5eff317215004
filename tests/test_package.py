"""What is installed, and that it is imported as `oneloop` in anyone's folder."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from warm import ROOT

NAMES = ("data", "configs", "loop", "tasks", "sample", "checkpoint")
CODE = """
from oneloop import loop
from oneloop.configs import Base, Data
from oneloop.tasks import Loss, Task, ddpm
import data, configs, tasks, sample
assert data.MINE and configs.MINE and tasks.MINE and sample.MINE
print(loop.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist of this checkout."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), files.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def crowded(folder):
    """A folder with modules and packages of all the common names, each the user's own."""
    for name in NAMES[:3]:
        (folder / f"{name}.py").write_text("MINE = True")
    for name in NAMES[3:]:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("MINE = True")
    return folder


def installed(built, tmp_path, kind):
    """An environment in which the package is installed, from the wheel or editable, and what lies beside it as here."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    what = [built[0]] if kind == "wheel" else ["-e", ROOT]
    done = subprocess.run([*command, *what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # A .pth file in a --target folder is read by site.addsitedir alone, as that of a real site-packages is.
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(target)!r})")
    return env | {"PYTHONPATH": str(tmp_path / "start")}


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_it_is_imported_in_anyones_folder(built, tmp_path, kind):
    (tmp_path / "work").mkdir()
    env, folder = installed(built, tmp_path, kind), crowded(tmp_path / "work")
    done = subprocess.run([sys.executable, "-c", CODE], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site" if kind == "wheel" else ROOT) in done.stdout
    script = tmp_path / "site" / "bin" / "oneloop"
    flags = [
        "ddpm",
        "--base.max-train-steps",
        "2",
        "--data.num-shapes",
        "32",
        "--base.logger",
        "none",
        "--base.num-samples",
        "2",
    ]
    done = subprocess.run([sys.executable, script, *flags], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / "runs" / "ddpm" / "checkpoint-2").is_dir(), done.stderr[-3000:]


def test_what_is_packed(built):
    with zipfile.ZipFile(built[0]) as wheel, tarfile.open(built[1]) as sdist:
        wheel, sdist = wheel.namelist(), sdist.getnames()
    for name in ("loop.py", "tasks/ddpm.py", "views/page/page.css", "inputs/sources.py"):
        assert f"oneloop/{name}" in wheel and any(path.endswith(f"/{name}") for path in sdist), name
    for path in (*wheel, *(name.partition("/")[2] for name in sdist)):
        parts = Path(path).parts
        assert not {"tests", "benchmarks", "docs", "examples", ".ci"} & set(parts) and not path.endswith(".png"), path


def test_a_task_with_the_old_imports(tmp_path):
    """One line says what to change, whether the old names are missing or somebody else's."""
    (tmp_path / "mine.py").write_text("from configs import Base\nfrom tasks import Task\n")
    command = [sys.executable, ROOT / "loop.py", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "imported as oneloop.configs" in done.stderr and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    (tmp_path / "configs.py").write_text("")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "imported as oneloop.configs" in done.stderr, done.stderr
