"""Settings: what a run is told, and how the command line and settings files tell it.

    python loop.py                                      the tasks, a line each
    python loop.py ddpm --base.num-epochs 10            flags
    python loop.py ddpm run.json --base.num-epochs 20   a file, and flags that win over it
    python loop.py run.json                             the file's own group names the task

`Base` is the run and `Data` the examples; each task adds a group of its own. Nothing here imports torch, so `--help` and
mistakes answer at once. Groups are frozen and check themselves; they never change what they were given.
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
import signal
import sys
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_type_hints

T = TypeVar("T")
Live = Annotated[T, "live"]
"""A setting that may differ between two lives of one run. A change in any other would make another run: it is refused."""


class BadInput(ValueError):
    """A mistake of the user's, in one line: what was given, what was expected, which flag to change. Exit code 2."""


def require(condition: bool, flag: str, given: Any, expected: str) -> None:
    """Raise `BadInput` in the house form unless `condition` holds."""
    if not condition:
        raise BadInput(f"--{flag.replace('_', '-')} is {given!r}; expected {expected}")


@dataclass(frozen=True)
class Base:
    """The run: its length, its precision, what it writes and where."""

    output_dir: Live[str | None] = None
    """Folder for checkpoints, samples, logs and the export. None: runs/<task>. The same folder again continues the run."""
    seed: int = 0
    """Together with the settings this decides everything: weights, order, crops, noise."""
    num_epochs: Live[float] = 10.0
    """Length as passes over the data; fractions are allowed. Ignored where max_train_steps is given."""
    max_train_steps: Live[int | None] = None
    """Length as optimizer steps."""
    gradient_accumulation_steps: Live[int] = 1
    """Batches added up for one optimizer step."""
    mixed_precision: Live[Literal["auto", "no", "fp16", "bf16"]] = "auto"
    """auto: bf16 where the hardware computes it, else no."""
    compile: Live[bool] = False
    """Compile what trains, by torch.compile: quicker steps after a start that says what it cost and when it is repaid. Sums
    have another order: the weights end close to those of a run without it, not equal to them."""
    gradient_checkpointing: Live[bool] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_grad_norm: Live[float] = 1.0
    """Gradients are scaled down to this norm, for each optimizer; 0 leaves them."""
    scale_lr: Live[bool] = False
    """Multiply the learning rate by batch x accumulation x processes."""
    lr_scheduler: Live[
        Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    ] = "cosine"
    """Shape of the learning rate over the run: a function of the optimizer step alone."""
    lr_warmup_steps: Live[int | None] = None
    """Optimizer steps from zero to the full rate; unused by `constant`. None: a twentieth of the run, at most 500."""
    lr_num_cycles: Live[int] = 1
    """Restarts of cosine_with_restarts."""
    lr_power: Live[float] = 1.0
    """Power of polynomial."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights; samples and exports use it."""
    ema_decay: Live[float] = 0.9999
    """Largest decay of the average."""
    ema_power: Live[float] = 0.75
    """The decay after k updates is 1 - (1 + k) ** -ema_power: short memory early, long memory late."""
    logger: Live[tuple[str, ...]] = ("tensorboard",)
    """Trackers known to accelerate, such as tensorboard wandb; several may be named, and `none` is none."""
    logging_steps: Live[int] = 10
    """Optimizer steps between two lines of metrics."""
    validation_steps: Live[int] = 500
    """Optimizer steps between two validations, a grid of samples and the loss on data.validation_split; 0: only at the end."""
    num_samples: Live[int] = 16
    """Pictures in a grid; the same seeds each time."""
    checkpointing_steps: Live[int] = 500
    """Optimizer steps between two checkpoints; there is always one at the end."""
    checkpoints_total_limit: Live[int | None] = 3
    """Checkpoints kept; older ones are removed after the new one stands. None: all."""
    resume_from_checkpoint: Live[str] = "latest"
    """latest, none (start over: refused where the folder holds a run), or the path of a checkpoint."""
    max_skipped_updates: Live[int] = 0
    """Updates with a non-finite loss or gradient that are skipped before the run stops with exit code 3."""
    check: Live[bool] = False
    """Only open every picture and say what is found: sizes, captions, labels, duplicates, broken files."""
    dry_run: Live[bool] = False
    """Only say what the run would take in time, memory and disk, from a few real steps; nothing is left behind."""
    push_to_hub: Live[bool] = False
    """Upload the export at the end; the login is taken from the environment or `hf auth login`."""
    hub_model_id: Live[str | None] = None
    """Repository to upload to. None: the output folder's name, in your own account."""

    def __post_init__(self):
        require(self.num_epochs > 0, "base.num_epochs", self.num_epochs, "more than 0")
        for name in ("max_train_steps", "checkpoints_total_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"base.{name}", value, "at least 1, or None")
        for name in ("gradient_accumulation_steps", "logging_steps", "checkpointing_steps", "num_samples", "lr_num_cycles"):
            require(getattr(self, name) >= 1, f"base.{name}", getattr(self, name), "at least 1")
        for name in ("seed", "max_grad_norm", "validation_steps", "max_skipped_updates", "ema_power"):
            require(getattr(self, name) >= 0, f"base.{name}", getattr(self, name), "at least 0")
        warmup = self.lr_warmup_steps
        require(warmup is None or warmup >= 0, "base.lr_warmup_steps", warmup, "at least 0, or None")
        require(0 <= self.ema_decay < 1, "base.ema_decay", self.ema_decay, "at least 0 and below 1")


@dataclass(frozen=True)
class Data:
    """The examples: where they come from, how they are cut, how many make a batch."""

    dataset_name: Live[str] = "shapes"
    """`shapes` (drawn by the program itself, nothing to download), a name on the hub, or a local data set's folder."""
    dataset_config_name: Live[str | None] = None
    """Configuration of the data set, where it has several."""
    split: Live[str] = "train"
    """Split to train on."""
    validation_split: Live[str | None] = None
    """What is held out of the training to measure the loss on: the name of another split, or a fraction, such as 0.1, whose
    pictures are chosen by their row and never change. None: nothing."""
    train_data_dir: Live[str | None] = None
    """Folder of pictures, instead of dataset_name: captions from metadata.jsonl, metadata.csv or a .txt beside each picture,
    labels from subfolders."""
    cache_dir: Live[str | None] = None
    """Where downloads and prepared data sets are kept. None: the library's own place."""
    max_train_samples: Live[int | None] = None
    """Train on as many pictures, spread evenly over the set. None: all."""
    num_shapes: int = 2560
    """Pictures in the embedded `shapes`."""
    image_column: Live[str | None] = None
    """Column of pictures. None: found by its type."""
    caption_column: Live[str | None] = None
    """Column of captions, one or a list for each picture. None: found by its usual names."""
    trigger: str | None = None
    """Words put in front of every caption, with a space between; alone where a picture has no caption. `{label}` in them is the
    name of the picture's class."""
    caption_dropout: float = 0.0
    """Share of the examples whose caption is replaced by the empty one, which guidance compares with."""
    label_column: Live[str | None] = None
    """Column of class labels. None: found by its type or usual names."""
    resolution: int = 32
    """Side of the square pictures in pixels: the shorter side is resized to it, then a square is cut. Transparent pictures
    are laid on white."""
    center_crop: bool = False
    """Cut the square from the middle rather than from a random place."""
    random_flip: bool = False
    """Mirror every second picture, at random."""
    train_batch_size: Live[int] = 32
    """Examples in a batch, for each process."""
    dataloader_num_workers: Live[int] = 0
    """Processes that read pictures beside the training, where the decoded set is larger than memory_budget."""
    skip_broken: Live[bool] = False
    """Leave out pictures that cannot be read, and list them in the output folder's broken.txt. The run's length counts them."""
    memory_budget: Live[float] = 2.0
    """GiB for decoded pictures, and as much for encoded ones. A set that fits is decoded once and kept; of a larger one every
    batch is read from the disk."""
    example_cache: Live[str] = "auto"
    """Where what is made of the examples once is kept for the next start: decoded pictures, and what frozen encoders make of
    pictures and captions. A folder, which several runs may share; auto: `examples` in cache_dir, or else in the output folder;
    no: pictures are decoded at each start and encoded in every step. Pictures that are cut at random are encoded in every step
    anyway (center_crop cuts from the middle)."""

    def __post_init__(self):
        for name in ("resolution", "train_batch_size", "num_shapes"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        most = self.max_train_samples
        require(most is None or most >= 1, "data.max_train_samples", most, "at least 1, or None")
        for name in ("dataloader_num_workers", "memory_budget"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "at least 0")
        require(0 <= self.caption_dropout <= 1, "data.caption_dropout", self.caption_dropout, "0 to 1")
        share, expected = fraction(self.validation_split), "the name of a split, or a fraction between 0 and 1"
        require(share is None or 0 < share < 1, "data.validation_split", self.validation_split, expected)


def fraction(given: str | None) -> float | None:
    """The number in a setting that may as well be a name."""
    with contextlib.suppress(TypeError, ValueError):
        return float(given)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# From the command line and settings files to (task's module, its Config).


COMMANDS = {
    "compare": "One page that shows several runs over each other.",
    "sample": "Draw images from a run's output folder, or from one of its checkpoints.",
}
"""Modules of views/ with `Settings` and a `main` of them: what can be done beside training."""


OLD_MODULES = ("configs", "tasks", "data", "loop", "checkpoint")
"""What task files of earlier versions imported without the package's name."""


def task_names() -> dict[str, str]:
    """Name -> first line of the docstring of every module in tasks/, read without importing any."""
    folder = Path(__file__).parent / "tasks"
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


def task_group(config: Any) -> str:
    """The name of the task's own group in its `Config` (a class or an instance): the one beside `base` and `data`."""
    return next(f.name for f in fields(config) if f.name not in ("base", "data"))


def read_file(path: str) -> dict[str, Any]:
    """A settings file, JSON or YAML, as nested dicts."""
    import yaml

    try:
        text = Path(path).read_text("utf-8")
        settings = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise BadInput(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: not valid JSON or YAML: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(group, dict) for k, group in settings.items() if k != "task"):
        raise BadInput(f'{path}: expected groups of settings, such as {{"base": {{"num_epochs": 10}}}}')
    return settings


def read_model_config(path: str, flag: str, kind: str) -> dict[str, Any]:
    """The diffusers config of a `kind` of model at a path: a JSON file, or a folder with a config.json.

    Raises:
        BadInput: there is none, or it is of another class.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--{flag} {path}: cannot read {file} as JSON: {error}") from None
    if not isinstance(config, dict) or config.get("_class_name", kind) != kind:
        raise BadInput(f"--{flag} {path}: expected the config of a model of class {kind}")
    return config


RENAMED = {"sample_steps": "validation_steps", "encode_cache": "example_cache"}
"""Names that older settings files have -> today's."""


def as_flags(settings: dict[str, Any], config: type) -> list[str]:
    """Nested settings as the flags that say the same, so that a file is parsed, and refused, like a command line."""
    flags: list[str] = []
    for group, values in settings.items():
        types = get_type_hints(group_type(config, group)) if group in get_type_hints(config) else {}
        for name, value in values.items():
            flag = f"--{group}.{RENAMED.get(name, name)}"
            if isinstance(value, bool) and types.get(name, bool) is bool:
                flags.append(flag if value else f"--{group}.no-{name}")
            elif isinstance(value, bool):
                flags += [flag, "yes" if value else "no"]  # YAML reads a bare no as false
            elif isinstance(value, (list, tuple)):
                flags += [flag, *map(str, value)]
            else:
                flags += [flag, str(value)]
    return flags


def build(config: type[T], flags: list[str], prog: str = "python loop.py", source: str = "") -> T:
    """`config` from flags.

    Raises:
        BadInput: a flag nobody knows, a value of the wrong type or outside its range. `source` stands before the message.
        SystemExit: with code 0 after `--help`.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            result, unknown = tyro.cli(config, args=flags, prog=prog, return_unknown_args=True)
    except SystemExit as end:
        if not end.code:
            raise
        # tyro draws a box: the sentence stands before its first rule.
        drawn = re.sub("-{5,}", "─────", complaint.getvalue())  # where the terminal is not in UTF-8
        sentence = re.split(r"\n\W*─{3,}\W*\n", drawn.partition("\n")[2])[0]
        sentence = " ".join(re.sub(r"[│╭╮╰╯─]", " ", sentence).split()).replace("') .", "')")
        raise BadInput(source + re.sub(r"^Error parsing (?!--)\S+: ", "", sentence)) from None
    if unknown:
        known = [f"--{name}".replace("_", "-") for name in setting_names(config)]
        close = difflib.get_close_matches(unknown[0].partition("=")[0].replace("_", "-"), known, 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"{prog} --help lists the settings"
        raise BadInput(f"{source}{unknown[0]} is not a setting; {hint}")
    return result


def setting_names(config: type) -> list[str]:
    """The settings of a Config as group.name; of a command, whose settings are in no groups, as name."""
    groups = {f.name: group_type(config, f.name) for f in fields(config)}
    if not all(map(is_dataclass, groups.values())):
        return list(groups)
    return [f"{group}.{f.name}" for group, kind in groups.items() for f in fields(kind)]


def group_type(config: type, name: str) -> type:
    """The dataclass behind one group of a `Config`."""
    return get_type_hints(config)[name]


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
        named = settings.pop("task", None)
        groups = [group for group in settings if group not in ("base", "data")]
        name = name or named or (groups[0] if len(groups) == 1 else None)
        if name is None:
            raise BadInput(f"{file}: names no task (a group beside base and data); python loop.py TASK {file} names one")
    module = find_task(name)
    config, prog = module.task.config, f"python loop.py {name}"
    if settings:
        build(config, as_flags(settings, config), prog, source=f"{file}: ")  # so that its mistakes carry its name
    return module, build(config, as_flags(settings, config) + flags, prog)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain settings."""
    return json.loads(json.dumps(asdict(cfg)))


def portable(value: T, cfg: Any) -> T:
    """Settings or a text, as others may read them: each path of this machine in the settings of `cfg` is its last name.

    `value` is made of dicts, lists and texts, such as `to_dict(cfg)`; in a text a path may stand as Python or JSON quotes it.
    """
    pairs: dict[str, str] = {}
    for path in filter(is_path, texts(to_dict(cfg))):
        for form in (path, os.path.expanduser(path), os.path.abspath(os.path.expanduser(path))):
            name = os.path.basename(os.path.abspath(os.path.expanduser(path)))
            pairs |= {quote(form): quote(name) for quote in (str, lambda x: repr(x)[1:-1], lambda x: json.dumps(x)[1:-1])}

    def shorten(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: shorten(x) for key, x in inner.items()}
        if isinstance(inner, list):
            return list(map(shorten, inner))
        for path in sorted(pairs, key=len, reverse=True) if isinstance(inner, str) else ():
            inner = inner.replace(path, pairs[path]) if os.sep in path or inner == path else inner
        return inner

    return shorten(value)


def texts(value: Any) -> list[str]:
    """Every text in nested dicts and lists."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for x in inner for text in texts(x)]


def is_path(setting: str) -> bool:
    """Whether a text names a place on this machine: it is absolute, and its first folder is there, or it has several parts and
    is there. A name on the hub and a name alone are no paths."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = Path(setting).expanduser()
        return len(path.parts) > 1 and (Path(*path.parts[:2]) if path.is_absolute() else path).exists()
    return False


def run_file(cfg: Any) -> dict[str, Any]:
    """What run.json holds: the settings, and the import path of a task outside tasks/."""
    module = type(cfg).__module__
    return ({} if module.startswith("oneloop.tasks.") else {"task": module}) | to_dict(cfg)


def example_cache(cfg: Any) -> Path | None:
    """The folder for what is made of the examples once; None: nothing is kept."""
    given = cfg.data.example_cache
    if given == "no":
        return None
    return (Path(cfg.data.cache_dir or cfg.base.output_dir) / "examples" if given == "auto" else Path(given)).expanduser()


def trackers(base: Base) -> list[str]:
    """The trackers that the settings name."""
    return [logger for logger in base.logger if logger != "none"]


def changes(old: dict[str, Any], cfg: Any) -> list[str]:
    """The settings in which `old` (as `to_dict` wrote it) and `cfg` would be two different runs, as 'flag: old -> new'."""
    new, found = to_dict(cfg), []
    for group in new:
        hints = get_type_hints(group_type(type(cfg), group), include_extras=True)
        for name, value in new[group].items():
            before = old.get(group, {}).get(name, value)  # a setting that a newer version brought
            if before != value and "live" not in getattr(hints[name], "__metadata__", ()):
                found.append(f"--{group}.{name}".replace("_", "-") + f" was {before!r} and is now {value!r}")
    return found


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143} | ({signal.SIGUSR1: 75} if hasattr(signal, "SIGUSR1") else {})
"""Signal -> the exit code of a run that it stopped; 75 is: saved, wants to be run again."""


def fail(error: BaseException, code: int, everywhere: bool = False) -> NoReturn:
    """One line on standard error, from one process of several unless it is not of all, and out."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(code)
