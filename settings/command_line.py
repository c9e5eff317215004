"""The command line and settings files: flags -> a task's module and its Config.

    python loop.py                                      the tasks, a line each
    python loop.py ddpm --base.num-epochs 10            flags
    python loop.py ddpm run.json --base.num-epochs 20   a file, and flags that win over it
    python loop.py run.json                             the file's own group names the task

A settings file is flags written down: it is parsed, and refused, like a command line. Nothing here imports torch, so `--help`
and mistakes answer at once.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

from oneloop.configs import BadInput, Part, group_type
from oneloop.settings.files import read_file
from oneloop.settings.ranges import Text, hints, nested

T = TypeVar("T")

COMMANDS = {
    "evaluate": "Judge what a run draws against images that it was not trained on.",
    "merge": "Put a finished LoRA into its base, or into one file of weights.",
    "ema": "Make an average of another length of a finished run.",
    "compare": "One page that shows several runs over each other.",
    "sample": "Draw images from a run's output folder, or from one of its checkpoints.",
}
"""Modules of views/ with `Settings` and a `main` of them: what can be done beside training."""


OLD_MODULES = ("configs", "tasks", "data", "loop", "checkpoint")
"""What task files of earlier versions imported without the package's name."""


def task_names() -> dict[str, str]:
    """Name -> first line of the docstring of every module in tasks/, read without importing any."""
    folder = Path(__file__).parent.parent / "tasks"
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("_") and "task = Task(" in path.read_text("utf-8")
    }


def find_task(name: str) -> Any:
    """The module of a task: one of ours by its name, anyone's by its import path (seen from the working folder too).

    Raises:
        BadInput: there is no such module, or it has no `task`.
    """
    if name in task_names():
        return importlib.import_module(f"oneloop.tasks.{name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    spec = None
    with contextlib.suppress(ModuleNotFoundError, ValueError):  # a parent package may be missing
        spec = re.fullmatch(r"[A-Za-z_][\w.]*", name) and importlib.util.find_spec(name)
    if spec:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            if error.name not in OLD_MODULES:
                raise
            raise BadInput(f"{spec.origin}: {error}; everything is imported as oneloop.{error.name} now") from None
        if hasattr(module, "task"):
            return module
        raise BadInput(f"the module {name} has no `task = Task(...)`; see 'A task of your own' in the README")
    close = difflib.get_close_matches(name, task_names(), 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise BadInput(f"no task named {name!r}.{hint} Tasks: {', '.join(task_names())}")


def own_task(named: Any, file: str, typed: str) -> str:
    """The task of ours that a file names: on the word of a file nothing else is imported.

    Raises:
        BadInput: it names none of ours; `typed` is what to type to have another one's code run.
    """
    name = named.removeprefix("oneloop.tasks.") if isinstance(named, str) else None
    if name in task_names():
        return name
    if name is None or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        raise BadInput(f"{file}: the task is {named!r}; expected the name of one: {', '.join(task_names())}")
    close = difflib.get_close_matches(name, task_names(), 1)
    hint = f"did you mean {close[0]!r}? Else" if close else "if you trust it,"
    raise BadInput(f"{file}: {name!r} is no task of oneloop, and a file's word is not enough to run code; {hint} {typed}")


RENAMED = {"sample_steps": "validation_steps", "encode_cache": "example_cache"}
"""Names that older settings files have -> today's."""


MARK = "\0"
"""Before an item of a list that would else be read as a flag; no command line and no text that is accepted holds it."""


def as_flags(settings: dict[str, Any], config: type, source: str = "") -> list[str]:
    """Nested settings as the flags that say the same, so that a file is parsed, and refused, like a command line.

    Raises:
        BadInput: a group, a name or a kind of value that no flag can say; `source` stands before the message.
    """
    flags: list[str] = []
    for group, values in settings.items():
        if group not in hints(config) or not isinstance(values, dict):
            expected = f"some of {', '.join(hints(config))}" if group not in hints(config) else "its settings by name"
            raise BadInput(f"{source}the group {group!r} is {values!r}; expected {expected}")
        for name, value in values.items():
            today = str(RENAMED.get(name, name)).replace("-", "_")
            if today not in (known := hints(group_type(config, group))):
                raise not_a_setting(f"--{group}.{name}", config, source)
            parts = list(nested(known[today]))
            scalars, types = value if isinstance(value, (list, tuple)) else (value,), [bool, int, float, str]
            many, switch = any(get_origin(part) is tuple for part in parts), bool in parts and type(None) not in parts
            if many and (Text() in parts or Part in parts):  # an object is read as JSON, where a text or a source is
                scalars = [json.dumps(v) if type(v) is dict else v for v in scalars]
            fits = {
                "one value": many or not isinstance(value, (list, tuple)),
                "true or false": not switch or isinstance(value, bool),
                "text, a number, true or false": all(type(v) in types or (v is None and type(None) in parts) for v in scalars),
            }
            for expected in (words for words, fit in fits.items() if not fit):
                raise BadInput(f"{source}--{group}.{today.replace('_', '-')} is {value!r}; expected {expected}")
            if switch:
                flags.append(f"--{group}.{today}" if value else f"--{group}.no-{today}")
            elif many:
                flags += [f"--{group}.{today}", *(MARK * str(v).startswith("-") + str(v) for v in scalars)]
            elif isinstance(value, bool) and bool not in parts:
                flags.append(f"--{group}.{today}={'yes' if value else 'no'}")  # YAML reads a bare no as false
            else:
                flags.append(f"--{group}.{today}={value}")
    return flags


def not_a_setting(flag: str, config: type, source: str = "", prog: str = "python loop.py TASK") -> BadInput:
    """What to say of a flag that nobody knows."""
    known = [f"--{name}".replace("_", "-") for name in setting_names(config)]
    close = difflib.get_close_matches(flag.replace("_", "-")[:100], known, 1, 0.5)
    hint = f"did you mean {close[0]}?" if close else f"{prog} --help lists the settings"
    return BadInput(f"{source}{flag} is not a setting; {hint}")


def build(config: type[T], flags: list[str], prog: str = "python loop.py", source: str = "") -> T:
    """`config` from flags.

    Raises:
        BadInput: a flag nobody knows, a value of the wrong type or outside its range. `source` stands before the message.
        SystemExit: with code 0 after `--help`.
    """
    import tyro

    complaint, registry, wrong = io.StringIO(), tyro.constructors.ConstructorRegistry(), []

    @registry.primitive_rule
    def unmarked(given: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        spec = tyro.constructors.PrimitiveConstructorSpec
        read = lambda args: args[0].removeprefix(MARK)  # noqa: E731
        return spec(1, "STR", read, lambda v: isinstance(v, str), lambda v: [v]) if given.type is str else None

    @registry.primitive_rule
    def as_json(given: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        def read(args: list[str]) -> Part:
            try:
                return from_json(Part, args[0])
            except BadInput as error:  # of which tyro would say that it is wrong, and no more
                wrong.append(error)
                raise

        write = lambda part: [json.dumps(asdict(part))]  # noqa: E731
        spec = tyro.constructors.PrimitiveConstructorSpec
        return spec(1, "JSON", read, lambda v: isinstance(v, Part), write) if given.type is Part else None

    wide = {} if {"-h", "--help"} & set(flags) else {"COLUMNS": "100000"}  # no line of a complaint is broken in two
    try:
        with contextlib.redirect_stderr(complaint), patched_environment(**wide):
            result, unknown = tyro.cli(config, args=flags, prog=prog, return_unknown_args=True, registry=registry)
    except BadInput as error:
        raise BadInput(f"{source}{error}") from None
    except SystemExit as end:
        if not end.code:
            raise
        if wrong:
            raise BadInput(f"{source}{wrong[0]}") from None
        # tyro draws a box: the sentence stands before its first rule.
        drawn = re.sub("-{5,}", "─────", complaint.getvalue())  # where the terminal is not in UTF-8
        sentence = re.split(r"\n\W*─{3,}\W*\n", drawn.partition("\n")[2])[0]
        sentence = " ".join(re.sub(r"[│╭╮╰╯─]", " ", sentence).split()).replace("') .", "')")
        sentence = re.sub(r"no type matching (.+?) could be instantiated from \[(.*?)\]\. .*", r"\2; expected \1", sentence)
        raise BadInput(source + re.sub(r"^Error parsing (?!--)\S+: ", "", sentence)) from None
    if unknown:
        flag = unknown[0].partition("=")[0]
        if flag.startswith("--"):
            raise not_a_setting(flag, config, source, prog)
        at = next(i for i, given in enumerate(flags) if given == unknown[0] or given.endswith(f"={unknown[0]}"))
        before = next((given for given in flags[at::-1] if given.startswith("--")), prog).partition("=")[0]
        raise BadInput(f"{source}{unknown[0]!r} is one value too many for {before}")
    return result


def from_json(kind: type[T], text: str) -> T:
    """A dataclass of settings from an object in JSON.

    Raises:
        BadInput: it is none, or has a name or a value that `kind` has not.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    known = {f.name: list(nested(hint)) for f, hint in zip(fields(kind), hints(kind).values(), strict=True)}
    if not isinstance(given, dict):
        raise BadInput(f'--data.mixture is {text[:200]!r}; expected objects in JSON, such as \'{{"train_data_dir": "cats"}}\'')
    for name, value in given.items():
        fits = [t for t in (bool, int, float, str, type(None)) if t in known.get(name, ())]
        fits += [int] * (float in fits)
        if type(value) not in fits:
            expected = "one of " + ", ".join(known) if name not in known else " or ".join(t.__name__ for t in fits)
            raise BadInput(f"--data.mixture has {name!r}: {str(value)[:100]!r}; expected {expected}")
    return kind(**given)


@contextlib.contextmanager
def patched_environment(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def setting_names(config: type) -> list[str]:
    """The settings of a Config as group.name; of a command, whose settings are in no groups, as name."""
    groups = {f.name: group_type(config, f.name) for f in fields(config)}
    if not all(map(is_dataclass, groups.values())):
        return list(groups)
    return [f"{group}.{f.name}" for group, kind in groups.items() for f in fields(kind)]


def parse(argv: list[str]) -> tuple[Any, Any]:
    """The command line -> (the task's module, its Config); or (a command's module, its Settings).

    Raises:
        BadInput: something about it is wrong. SystemExit: it asked for help.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.partition("\n\n")[2].partition("\n\n")[0].rstrip())
        for title, listed in (("tasks", task_names()), ("to look at runs", COMMANDS)):
            width = max(map(len, listed))
            print(f"\n{title}:", *(f"    {name:<{width}}   {line}" for name, line in listed.items()), sep="\n")
        print("\npython loop.py NAME --help lists the settings of each.")
        raise SystemExit(0)
    if argv[0] in COMMANDS:
        module = importlib.import_module(f"oneloop.views.{argv[0]}")
        return module, build(module.Settings, argv[1:], f"python loop.py {argv[0]}")
    is_file = [a.endswith((".json", ".yaml", ".yml")) for a in argv[:2]] + [False]
    settings: dict[str, Any] = {}
    if is_file[0]:
        name, file, flags = None, argv[0], argv[1:]
    else:
        name, file, flags = argv[0], (argv[1] if is_file[1] else None), argv[2 if is_file[1] else 1 :]
    if file:
        settings = read_file(file)
        groups = [group for group in settings if group not in ("base", "data", "task")]
        named = settings.pop("task", None) or (groups[0] if len(groups) == 1 else None)
        if name is None and named is None:
            raise BadInput(f"{file}: names no task (a group beside base and data); python loop.py TASK {file} names one")
        name = name or own_task(named, file, f"python loop.py {named} {file}")
    module = find_task(name)
    config, prog = module.task.config, f"python loop.py {name}"
    read = as_flags(settings, config, f"{file}: ")
    if settings:
        build(config, read, prog, source=f"{file}: ")  # so that its mistakes carry its name
    return module, build(config, read + flags, prog)
