"""Checkpoints: one folder that appears whole or not at all, and that is verified before it is believed.

    OUT/checkpoint-N/                 the task's export after N optimizer steps: diffusers opens it
    OUT/checkpoint-N/state/           what `accelerator.save_state` wrote: `accelerator.load_state` opens it
    OUT/checkpoint-N/manifest.json    the step, the settings, and every file's size and xxh3

A save is staged in OUT/.oneloop (machine/files.py), flushed, renamed in one step, and only then are older ones removed. What is
removed is proven by its manifest to be this program's. A checkpoint is valid when its state is: the export beside it can be
made anew. Nothing is loaded but safetensors, JSON and torch files under `weights_only`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneloop.configs import BadInput
from oneloop.machine import internals
from oneloop.machine.files import (
    FULL,
    WORK,
    discard,
    erase,
    flaws,
    flush,
    listed,
    read_text,
    size,
    steps,
    strangers,
    take,
    write,
)
from oneloop.machine.memory import is_out_of_memory
from oneloop.machine.processes import gather, on_main
from oneloop.tasks import Models, unwrap

MANIFEST = "manifest.json"
FACTS = {"step": int, "examples": int, "skipped": int, "task": str, "settings": dict, "files": dict, "sha256": str}
"""What a manifest holds at least."""
MORE = {"stream": str, "module": str, "data": str, "block": int, "models": dict, "made_of": dict}
"""What those of today hold too."""
LOADED = {".safetensors", ".bin", ".pkl", ".pt", ".json"}
"""Kinds of files that a training state is loaded from."""


class Damaged(Exception):
    """A checkpoint that cannot be believed; the message names the file and what is wrong with it."""


class StorageError(Exception):
    """Something that the storage, or the hub, refused; what was committed before is as it was. Exit code 4."""


# ---------------------------------------------------------------------------------------------------------------------
# The output folder.


@contextlib.contextmanager
def lock(folder: Path, accelerator: Any, flag: str = "--base.output-dir") -> Iterator[None]:
    """Make the folder, which `flag` names, and lock it for this run; afterwards it is gone again if nothing was written.

    Raises:
        BadInput: the folder cannot be written, or another run has locked it.
        StorageError: later, something in it could not be written.
    """
    locked = contextlib.ExitStack()
    with locked:
        on_main(accelerator, lambda: _take(folder, locked, flag))
        try:
            yield
        except OSError as error:
            if not _refuses(error, folder):
                raise
            apart = isinstance(error.filename, str) and not Path(error.filename).is_relative_to(folder)  # such as class images
            place = Path(error.filename).parent if apart else folder
            raise refused(error.filename or folder, error, place, 0) from None


def _take(folder: Path, locked: contextlib.ExitStack, flag: str) -> None:
    take(folder, flag, locked)
    for old in (folder / WORK).glob("checkpoint-*.replaced"):  # killed between two renames
        if not os.path.lexists(folder / old.stem):
            os.rename(old, folder / old.stem)


def _abandoned(folder: Path) -> bool:
    """Whether a process locked this folder and is gone."""
    with contextlib.suppress(OSError), open(folder / WORK / "lock", "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Save.


def attach(accelerator: Accelerator, models: Models, ema: dict[str, Tensor]) -> None:
    """Have the accelerator's own save and load write and read what trains, and only that, under plain names.

    Frozen weights come from where they came from the first time; the persistent buffers of all these models are written. `ema`
    is filled in place when loading. Called before the first step: what the optimizers' groups hold now is what the settings
    gave them.
    """
    optimizers = internals.prepared(accelerator)
    given = [_groups(optimizer) for optimizer in optimizers]

    def save(wrapped: list, weights: list[dict[str, Tensor]], output_dir: str) -> None:
        for module, state in zip(models.values(), weights, strict=bool(weights)):
            trained = _trained(module)
            for key in list(state):
                value = state.pop(key)
                if (name := key.removeprefix("module.")) in trained:  # as it is called without DDP, so that layouts agree
                    state[name] = value
        if ema and accelerator.is_main_process:
            save_file({k: v.detach().cpu().contiguous() for k, v in ema.items()}, Path(output_dir) / "ema.safetensors")
        if accelerator.is_main_process:
            pairs = zip(map(_content, optimizers), given, strict=True)
            records = [{"content": content, "given": groups} for content, groups in pairs]
            (Path(output_dir) / "optimizers.json").write_text(json.dumps(records, indent=1), "utf-8")

    def load(wrapped: list, input_dir: str) -> None:
        for i, module in enumerate(models.values()):
            own = unwrap(module).state_dict()
            expected = {name: own[name] for name in _trained(module)}
            saved = _fitting(Path(input_dir) / f"model{f'_{i}' if i else ''}.safetensors", expected)
            unwrap(module).load_state_dict(saved, strict=False)
        wrapped.clear()
        for key, value in _fitting(Path(input_dir) / "ema.safetensors", ema).items() if ema else ():
            ema[key].copy_(value)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _trained(module: torch.nn.Module) -> set[str]:
    """Names in the state dict that training may change: parameters that require a gradient, and buffers."""
    module = unwrap(module)
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return set(module.state_dict()) & (trained | buffers)  # beside them there is what quantized layers say of themselves


def _fitting(file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which have the names and shapes of the expected ones."""
    saved = load_file(file)
    shapes = [{name: list(x.shape) for name, x in tensors.items()} for tensors in (saved, expected)]
    for name in sorted(saved.keys() | expected.keys()):
        was, now = (each.get(name, "missing") for each in shapes)
        if was != now:
            raise BadInput(f"{file} does not fit the model: {name} is {was}; expected {now}")
    return saved


def _groups(optimizer: Any) -> list[dict[str, str]]:
    """What an optimizer's groups hold beside parameters, in words that can be compared exactly."""
    exact = lambda x: repr(x.tolist() if isinstance(x, Tensor) else x)  # noqa: E731
    return [{k: exact(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _content(optimizer: Any) -> str:
    """How many tensors an optimizer's state has, and a hash of their names and shapes."""
    state = {i: values for i, values in optimizer.state_dict()["state"].items() if isinstance(values, dict)}
    shapes = [(i, k, list(x.shape)) for i, values in state.items() for k, x in values.items() if isinstance(x, Tensor)]
    return f"{len(shapes):,} tensors ({hashlib.sha256(repr(sorted(shapes, key=repr)).encode()).hexdigest()[:8]})"


class Saves(contextlib.AbstractContextManager):
    """The saves of a run. The training waits while the files are written, which is a copy into the system's memory; a thread
    flushes, hashes, renames and prunes while it goes on. Leaving the context waits for the thread."""

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int | None, say: Callable[[str], Any]):
        """Keep the newest `limit` checkpoints, None: all. The thread says what it has committed."""
        self.accelerator, self.folder, self.limit, self.say = accelerator, folder, limit, say
        self.thread, self.last, self.spared = ThreadPoolExecutor(1), None, set()

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def tidy(self, step: int) -> None:
        """Finish what a killed process began, in a run that resumes after `step`: remove what it staged or was removing, the
        checkpoints over the limit, and the folders of dry runs. For the main process, which has the lock."""
        for left in (self.folder / WORK).iterdir():
            if left.name != "lock":
                erase(left)
        self._prune(step)
        here = self.folder.absolute()
        with contextlib.suppress(OSError):
            for left in (left for parent in here.parents for left in parent.glob(".dry-run-*")):
                if left not in here.parents and _abandoned(left):
                    erase(left)

    def save(self, step: int, facts: dict[str, Any], export: Callable[[Path], Any]) -> Path:
        """Write what becomes checkpoint-`step`, once the one before is committed; every process calls this. `export` fills the
        folder and runs on the main process alone; what it raises itself, every process raises.

        Raises:
            StorageError: the storage refused. What was staged is removed; what was committed is as it was.
        """
        self.settle()
        final, staging = self.folder / f"checkpoint-{step}", self.folder / WORK / f"checkpoint-{step}"
        main, error = self.accelerator.is_main_process, None
        try:
            if main:
                erase(staging)
                (staging / "state").mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(staging / "state"))
            if main:
                export(staging)
        except Exception as trouble:
            error = trouble
        if errors := [e for e in gather(self.accelerator, error) if e]:
            outcome = on_main(self.accelerator, lambda: self._failed(final, staging, errors[0]))
            raise outcome if error is None or isinstance(outcome, StorageError) else error
        if main:
            self.last = final, staging, self.thread.submit(self._finish, final, staging, facts | {"step": step})
        return final

    def settle(self) -> None:
        """Wait until the last save is committed; every process calls this.

        Raises:
            StorageError: the storage refused it, as above.
        """

        def outcome() -> Exception | None:
            (final, staging, thread), self.last = self.last or (None, None, None), None
            error = thread and thread.exception()
            return error and self._failed(final, staging, error)

        if error := on_main(self.accelerator, outcome):
            raise error

    def _finish(self, final: Path, staging: Path, facts: dict[str, Any]) -> None:
        manifest = facts | {"files": listed(staging)}
        manifest["sha256"] = _digest(manifest)
        write(staging / MANIFEST, json.dumps(manifest, indent=1))
        flush(staging)
        replaced = self.folder / WORK / f"{final.name}.replaced"
        if os.path.lexists(final) and not _proven(final):
            replaced = final.with_name(f"replaced-{final.name}-{os.urandom(4).hex()}")
            self.say(f"warning: {final} is not as this program wrote it; it is {replaced} now")
        if os.path.lexists(final):  # one that was passed over, or whose export is made anew
            os.rename(final, replaced)
        os.rename(staging, final)
        flush(self.folder)
        erase(self.folder / WORK / f"{final.name}.replaced")
        self._prune(facts["step"])
        self.say(f"saved {final}; {final}/load.py loads it")

    def _prune(self, step: int) -> None:
        """Remove checkpoints over the limit, of those up to `step`: later ones are damaged. What this program did not write
        stays, and is said once."""
        old = [s for s in steps(self.folder) if s <= step][: -self.limit if self.limit else 0]
        for path in (self.folder / f"checkpoint-{s}" for s in old):
            reason = "it is not as this program wrote it"
            with contextlib.suppress(OSError):
                if _proven(path):
                    reason = "no permission"
                    discard(path)
            if os.path.lexists(path) and path not in self.spared:
                self.spared.add(path)
                self.say(f"warning: {path} is over --base.checkpoints-total-limit and was not removed: {reason}")

    def _failed(self, final: Path, staging: Path, error: Exception) -> Exception:
        """What a save that failed raises, with what it staged removed."""
        if _refuses(error, self.folder):
            committed = (size(self.folder / f"checkpoint-{step}") for step in steps(self.folder))
            error = refused(final, error, self.folder, max([size(staging), *committed]))
        erase(staging)
        return error


def _refuses(error: Exception, folder: Path) -> bool:
    """Whether this error is the storage's, which refused a write; others come from reading, computing, or a mistake."""
    if isinstance(error, shutil.Error):
        return True
    if isinstance(error, OSError):
        named = isinstance(error.filename, (str, bytes))
        if named and Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute()):
            return True
        return error.errno in FULL or (error.errno in (errno.EIO, errno.ESTALE) and not named)
    wrote = r"\bserializing: I/O|inline_container|PytorchStreamWriter|iostream|Parent directory .* does not exist"
    return isinstance(error, (SafetensorError, RuntimeError)) and bool(re.search(wrote, str(error)))


def refused(what: Path | str, error: Exception, folder: Path, needed: int) -> StorageError:
    """The error for something that could not be written into the output folder; where the space did not suffice, it takes more
    than `needed` bytes, and more than there are."""
    reason = error.args[0][0][2] if isinstance(error, shutil.Error) else getattr(error, "strerror", None) or error
    text = f"writing {what} failed: {reason}"
    if re.search(r"[Nn]o space left|os error 28|unexpected pos|iostream|failed writing", str(reason)) and folder.exists():
        free = shutil.disk_usage(folder).free + size(folder / WORK)  # what is staged is removed
        text += f"; it needs more than {max(needed, free):,} bytes, and {free:,} are free"
    return StorageError(text)


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Find, verify, load.


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which is what was written, of this step, and names files in its folder.

    Raises:
        Damaged: it is not.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_text(path))
        wrong = [name for name, kind in FACTS.items() if type(manifest[name]) is not kind]
        wrong += [name for name, kind in MORE.items() if type(manifest.get(name, kind())) is not kind]
        wrong += [name for name, kind in (FACTS | MORE).items() if kind is int and not wrong and manifest.get(name, 0) < 0]
        made_of = (part for made in manifest.get("made_of", {}).values() for part in (made, made.get("config", {})))
        wrong += ["made_of" for part in made_of if not isinstance(part, dict)]
        entries = [(Path(name), entry["size"], entry["xxh3"]) for name, entry in manifest["files"].items()]
        wrong += [str(name) for name, length, xxh3 in entries if (type(length), type(xxh3)) != (int, str)]
        wrong += [name for name, group in manifest["settings"].items() if not isinstance(group, dict)]
        digest = _digest(manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: {getattr(error, 'strerror', None) or 'not a manifest'}") from None
    if wrong:
        raise Damaged(f"{path}: not a manifest: {wrong[0]} is of another type, or negative")
    if manifest["sha256"] != digest:
        raise Damaged(f"{path}: its content does not have its sha256")
    if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{manifest['step']}":
        raise Damaged(f"{path}: is of step {manifest['step']}")
    for name, *_ in entries:
        if ".." in name.parts or name.is_absolute():
            raise Damaged(f"{path}: names {name}, which is elsewhere")
    return manifest


def _proven(folder: Path) -> bool:
    """Whether this program wrote all there is in a checkpoint's folder."""
    with contextlib.suppress(Damaged):
        return not strangers(folder, {MANIFEST, *read(folder)["files"]})
    return False


def part(manifest: dict[str, Any], state: bool) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint's training state, or of the export beside it."""
    return {name: entry for name, entry in manifest["files"].items() if name.startswith("state/") is state}


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, once every file of its training state is what it says.

    Raises:
        Damaged: naming the first file that is not.
    """
    manifest = read(folder)
    for name in strangers(folder / "state", {name.removeprefix("state/") for name in part(manifest, True)}):
        if Path(name).suffix in LOADED:
            raise Damaged(f"{folder / 'state' / name}: is not in the manifest")
    for flaw in flaws(folder, part(manifest, True)):
        raise Damaged(flaw)
    return manifest


def find(folder: Path, choice: str, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its manifest; None to start.

    `choice` is latest, none, or a path. With latest, a damaged checkpoint is passed over with one warning.

    Raises:
        BadInput: the path is not a valid checkpoint, starting over would mix two runs, no checkpoint there is valid, or a run
            that starts would replace what is not this program's.
    """
    flag, there = "--base.resume-from-checkpoint", steps(folder)
    if choice == "none" and there:
        raise BadInput(f"{flag} none starts over, but {folder} holds a run; give another --base.output-dir or remove it")
    if choice not in ("latest", "none"):
        path = Path(choice).expanduser()
        try:
            manifest = verify(path)
        except Damaged as error:
            raise BadInput(f"{flag} {choice}: not a valid checkpoint: {error}") from None
        if there and there[-1] > manifest["step"]:
            raise BadInput(f"{flag} {choice}: {folder} holds a later checkpoint-{there[-1]}; give another --base.output-dir")
        return path, manifest
    damaged = []
    for step in reversed(there):
        path = folder / f"checkpoint-{step}"
        try:
            manifest = verify(path)
        except Damaged as error:
            damaged.append(str(error))
            continue
        if damaged:
            warn(f"resuming from {path}: damaged: {'; '.join(damaged)}")
        for flaw in flaws(path, part(manifest, False))[:1]:
            warn(f"warning: {flaw}; training needs only its state, and resumes from that")
        return path, manifest
    if damaged:
        raise BadInput(f"no checkpoint in {folder} is valid ({'; '.join(damaged)}); another --base.output-dir starts anew")
    others = [name for name in ("metrics.jsonl", "report.html") if (folder / name).is_file() and (folder / name).stat().st_size]
    if others and not any((folder / name).exists() for name in ("starts.jsonl", "lives.jsonl")):
        raise BadInput(f"{folder / others[0]} is not of a run, which would replace it; give another --base.output-dir")
    return None


def load(accelerator: Accelerator, path: Path, say: Callable[[str], Any] = lambda text: None) -> None:
    """Read the training state of a verified checkpoint into what was prepared and attached.

    What the settings gave to an optimizer's groups (betas, decay) is as today's settings give it; what was written into them
    since (a step size that the optimizer estimates, its counts) is state.

    Raises:
        BadInput: its files, though they are what was saved, do not hold the state of these models and optimizers.
    """
    state, scaler, optimizers = path / "state", accelerator.scaler, internals.prepared(accelerator)
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    if scaler is not None and not (state / "scaler.pt").exists():
        accelerator.scaler = None
        say(f"{path} was not saved in fp16: the scale of the loss starts anew")
    if optimizers and not (state / "optimizer.bin").exists():
        raise BadInput(f"{path} has no optimizer's state: what `python loop.py ema` made cannot be trained on")
    try:
        accelerator.load_state(str(state))
        records = [{"content": _content(optimizer), "given": _groups(optimizer)} for optimizer in optimizers]
        loaded, file = records, state / "optimizers.json"
        if optimizers and file.exists():
            records = json.loads(file.read_text("utf-8"))
        for i, (optimizer, own, record, now) in enumerate(zip(optimizers, settings, records, loaded, strict=True)):
            if record["content"] != now["content"]:
                file = state / f"optimizer{f'_{i}' if i else ''}.bin"
                raise BadInput(f"{file} does not fit its optimizer: {now['content']}; expected {record['content']}")
            for group, values, given, saved in zip(optimizer.param_groups, own, record["given"], now["given"], strict=True):
                group.update({k: v for k, v in values.items() if saved.get(k) == given.get(k)})
    except BadInput:
        raise
    except Exception as error:  # whatever a reader makes of a file that is none
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{getattr(error, 'filename', None) or state} cannot be loaded: {str(error)[:500]}") from None
    finally:
        accelerator.scaler = scaler
    accelerator.step = 0  # an update begins: batches are counted from here, whatever was accumulated before
