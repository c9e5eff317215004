"""docs/how-training-works.md speaks of the code as it is: quoted blocks, names and flags are looked up in the files."""

import ast
import dataclasses
import re

import pytest
from warm import ROOT

from oneloop import configs
from oneloop.tasks import ddpm

PAGE = ROOT / "docs" / "how-training-works.md"
QUOTE = r"^`([\w/]+\.py)`, in `([\w.]+)`:\n```python\n(.*?)^```$"


def definition(file, name):
    """The source of a function, class or method, `name` or `Class.name`, in a file of the project; None if there is none."""
    text = (ROOT / file).read_text("utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((inner for inner in node.body if isinstance(inner, kinds) and inner.name == part), None)
        if node is None:
            return None
    return ast.get_source_segment(text, node)


def words(code):
    return " ".join(code.split())


def missing(code, quoted):
    """The first part of a quoted block that the code does not have, in the block's order; `...` leaves lines out."""
    code, start = words(code), 0
    for part in re.split(r"^\s*\.\.\.$", quoted, flags=re.M):
        at = code.find(words(part), start)
        if at < 0:
            return words(part)
        start = at + len(words(part))
    return None


def test_every_block_is_quoted():
    text = PAGE.read_text("utf-8")
    quotes = re.findall(QUOTE, text, re.S | re.M)
    assert len(quotes) == text.count("```python") >= 15
    for file, name, quoted in quotes:
        code = definition(file, name)
        assert code is not None, f"{file} has no {name}"
        assert (gone := missing(code, quoted)) is None, f"{file}, {name}: not there any more: {gone}"


@pytest.mark.parametrize("quoted, gone", [("a = 1\n...\nc = 3", None), ("c = 3\n...\na = 1", "a = 1"), ("a = 2", "a = 2")])
def test_what_a_quote_is(quoted, gone):
    assert missing("a  = 1\nb = 2\n    c = 3", quoted) == gone


def test_every_name_exists():
    text = PAGE.read_text("utf-8")
    named = re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", text)
    assert len(named) > 30
    assert [(name, file) for name, file in named if definition(file, name) is None] == []
    files = set(re.findall(r"`([\w/]+\.py)`", text)) - {"train_unconditional.py"}
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_diagram():
    """Its boxes close, and what it names at the right is there."""
    (diagram,) = re.findall(r"```text\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    assert {len(line) for line in diagram.splitlines() if line[0] in "│┌└"} == {94}
    named = set(re.findall(r"\b([a-z_]+)\.([A-Za-z_]+)\b", diagram))
    assert len(named) > 15
    for module, name in named:
        files = [path for path in ROOT.rglob("*.py") if module in (path.stem, path.parent.name) and "tests" not in path.parts]
        assert any(definition(path.relative_to(ROOT), name) for path in files), (module, name)


def test_every_flag_exists():
    groups = {"base": configs.Base, "data": configs.Data, "ddpm": ddpm.Settings}
    fields = {name: {field.name for field in dataclasses.fields(group)} for name, group in groups.items()}
    flags = re.findall(r"--(base|data|ddpm)\.([\w-]+)", PAGE.read_text("utf-8"))
    assert len(flags) > 10
    assert [(group, flag) for group, flag in flags if flag.replace("-", "_") not in fields[group]] == []
