"""What the README shows works as it stands there."""

import re
import tomllib

from warm import ROOT, checkpoints, cli, tiny

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_a_task_of_your_own(tmp_path):
    """The example, complete, from a folder of its own."""
    (code,) = (block for block in blocks("python") if "task = Task(" in block)
    (tmp_path / "flow.py").write_text(code)
    flags = tiny(tmp_path)[1:]
    keep = [i for i in range(0, len(flags), 2) if not flags[i].startswith("--ddpm")]
    flags = [word for i in keep for word in flags[i : i + 2]]
    result = cli(tmp_path, "flow", *flags)
    assert result.code == 0, result.err
    assert "UNet2DModel.from_pretrained" in result.err and checkpoints(tmp_path / "out") == [6]
    assert (tmp_path / "out" / "samples" / "6.png").exists()
    again = cli(tmp_path, "flow", str(tmp_path / "out" / "run.json"))
    assert again.code == 0 and "already done, 6 of 6 steps" in again.err, again.err
    drawn = cli(tmp_path, "sample", str(tmp_path / "out"), "--task", "flow", "--num", "2", "--to", str(tmp_path / "two.png"))
    assert drawn.code == 0 and (tmp_path / "two.png").exists(), drawn.err
    listed = cli(tmp_path, "flow", "--help")
    assert listed.code == 0 and "--flow.learning-rate" in listed.out


def test_every_room_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.rglob("*/__init__.py")} - {
        "benchmarks"
    }
    assert sorted(listed) == ["oneloop", *sorted(f"oneloop.{room}" for room in rooms)]


def test_its_size():
    """As short as promised, counted without blanks, imports and docstrings."""
    (code,) = (block for block in blocks("python") if "task = Task(" in block)
    lines = [line for line in code.splitlines() if line.strip() and not re.match(r'\s*(""".*"""|from|import|@)', line)]
    assert len(lines) <= 28, len(lines)


def test_commands_name_what_there_is():
    for path in re.findall(r"(?:examples|benchmarks)/[\w.]+", README):
        assert (ROOT / path).exists(), path
