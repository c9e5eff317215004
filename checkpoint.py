"""Checkpoints: one folder that appears whole or not at all, and that is verified before it is believed.

    OUT/checkpoint-N/                 the task's export after N optimizer steps: diffusers opens it
    OUT/checkpoint-N/state/           what `accelerator.save_state` wrote: `accelerator.load_state` opens it
    OUT/checkpoint-N/manifest.json    the step, the settings, and every file's size and xxh3

A save is staged in a hidden sibling, flushed, renamed in one step, and only then are older ones removed. Nothing is loaded
but safetensors, JSON and torch files under `weights_only`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneloop.configs import BadInput
from oneloop.machine import internals
from oneloop.machine.processes import gather, on_main
from oneloop.tasks import Models, unwrap

MANIFEST = "manifest.json"
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


class Damaged(Exception):
    """A checkpoint that cannot be believed; the message names the file and what is wrong with it."""


class StorageError(Exception):
    """A save that the storage refused; earlier checkpoints stand as they were. Exit code 4."""


# ---------------------------------------------------------------------------------------------------------------------
# The output folder.


@contextlib.contextmanager
def lock(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make the folder and hold it for this run; afterwards it is gone again if nothing was written.

    The lock is the kernel's, so that of a dead process is free, and a forked worker does not inherit it.

    Raises:
        BadInput: the folder cannot be written, or another run holds it.
        StorageError: later, something in it could not be written.
    """
    held = contextlib.ExitStack()
    with held:
        on_main(accelerator, lambda: _take(folder, held))
        try:
            yield
        except OSError as error:
            if error.errno not in REFUSALS and not str(error.filename).startswith(str(folder)):
                raise
            raise refused(error.filename or folder, error, folder, 1) from None


def _take(folder: Path, held: contextlib.ExitStack) -> None:
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("a+"))
        except OSError as error:
            raise BadInput(f"--base.output-dir {folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise BadInput(f"--base.output-dir {folder} is in use by {file.read().strip() or 'another run'}") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break  # else the last holder removed the file in between: what is held keeps nobody out
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()

    def give_back() -> None:
        with contextlib.suppress(OSError):
            path.unlink()
            for parent in created:
                parent.rmdir()  # fails, as it should, where something was written

    held.callback(give_back)


def tidy(folder: Path) -> None:
    """Remove what a killed save, prune or writing left behind. For the holder of the lock."""
    forms = (".checkpoint-*", ".*.removed", ".*.writing", "examples/.*.writing")
    for left in (path for form in forms for path in folder.glob(form)):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in the folder, oldest first."""
    names = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    staged = path.with_name(f".{path.name}.writing")
    try:
        staged.write_text(text, "utf-8")
        _flush(staged)
        os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Save.


def attach(accelerator: Accelerator, models: Models, ema: dict[str, Tensor]) -> None:
    """Have the accelerator's own save and load write and read what trains, and only that, under plain names.

    Frozen weights come from where they came from the first time. `ema` is filled in place when loading.
    """

    def save(wrapped: list, weights: list[dict[str, Tensor]], output_dir: str) -> None:
        for module, state in zip(models.values(), weights, strict=bool(weights)):
            kept = _trained(module)
            for key in list(state):
                value = state.pop(key)
                if (name := key.removeprefix("module.")) in kept:  # as it is called without DDP, so that layouts agree
                    state[name] = value
        if ema and accelerator.is_main_process:
            save_file({k: v.detach().cpu().contiguous() for k, v in ema.items()}, Path(output_dir) / "ema.safetensors")

    def load(wrapped: list, input_dir: str) -> None:
        for i, (name, module) in enumerate(models.items()):
            file = Path(input_dir) / f"model{f'_{i}' if i else ''}.safetensors"
            saved, module = load_file(file), unwrap(module)
            missing = _trained(module) ^ saved.keys()
            if missing:
                raise BadInput(f"{file} does not fit the model {name!r}: {sorted(missing)[:3]} are in one of them only")
            module.load_state_dict(saved, strict=False)
        wrapped.clear()
        if ema:
            for key, value in load_file(Path(input_dir) / "ema.safetensors").items():
                ema[key].copy_(value)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _trained(module: torch.nn.Module) -> set[str]:
    """Names in the state dict that training may change: parameters that require a gradient, and buffers."""
    module = unwrap(module)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return set(module.state_dict()) - frozen


class Saves(contextlib.AbstractContextManager):
    """The saves of a run. The training waits while the files are written, which is a copy into the system's memory; a thread
    flushes, hashes, renames and prunes while it goes on. Leaving the context waits for the thread."""

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int | None, stands: Callable[[Path], Any]):
        """Keep the newest `limit` checkpoints, None: all. The thread calls `stands` with each that has come to stand."""
        self.accelerator, self.folder, self.limit, self.stands = accelerator, folder, limit, stands
        self.thread, self.last = ThreadPoolExecutor(1), None

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def save(self, step: int, facts: dict[str, Any], export: Callable[[Path], Any]) -> Path:
        """Write what becomes checkpoint-`step`, where the one before stands; every process calls this. `export` fills the
        folder and runs on the main process alone.

        Raises:
            StorageError: the storage refused. What was staged is removed; what stood before stands.
        """
        self.settle()
        final, staging = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.saving"
        main, error = self.accelerator.is_main_process, None
        try:
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                (staging / "state").mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(staging / "state"))
            if main:
                export(staging)
        except (OSError, SafetensorError, RuntimeError) as trouble:
            error = trouble
        if errors := [e for e in gather(self.accelerator, error) if e]:
            raise on_main(self.accelerator, lambda: self._refused(final, staging, errors[0]))
        if main:
            self.last = final, staging, self.thread.submit(self._finish, final, staging, facts | {"step": step})
        return final

    def settle(self) -> None:
        """Wait until the last save stands; every process calls this.

        Raises:
            StorageError: the storage refused it, as above.
        """

        def outcome() -> StorageError | None:
            (final, staging, thread), self.last = self.last or (None, None, None), None
            error = thread and thread.exception()
            if error and not isinstance(error, OSError):
                raise error
            return error and self._refused(final, staging, error)

        if refusal := on_main(self.accelerator, outcome):
            raise refusal

    def _finish(self, final: Path, staging: Path, facts: dict[str, Any]) -> None:
        _seal(staging, facts)
        if final.exists():  # only a damaged one: a run never saves a step twice
            os.rename(final, self.folder / f".{final.name}.removed")
        os.rename(staging, final)
        _flush(self.folder)
        for old in steps(self.folder)[: -self.limit if self.limit else 0]:
            os.rename(self.folder / f"checkpoint-{old}", self.folder / f".checkpoint-{old}.removed")
        for removed in self.folder.glob(".checkpoint-*.removed"):
            shutil.rmtree(removed, ignore_errors=True)
        self.stands(final)

    def _refused(self, final: Path, staging: Path, error: Exception) -> StorageError:
        standing = (size(self.folder / f"checkpoint-{step}") for step in steps(self.folder))
        needed = max([_needed(self.accelerator), size(staging), *standing])
        shutil.rmtree(staging, ignore_errors=True)
        return refused(final, error, self.folder, needed)


def refused(what: Path | str, error: Exception, folder: Path, needed: int) -> StorageError:
    """The error for something that could not be written into the output folder, and takes at least `needed` bytes."""
    reason = error.args[0][0][2] if isinstance(error, shutil.Error) else getattr(error, "strerror", None) or error
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return StorageError(f"writing {what} failed: {reason}; it needs at least {needed:,} bytes, and {free:,} are free")


def size(folder: Path) -> int:
    """Bytes in the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _needed(accelerator: Accelerator) -> int:
    """Bytes of the weights that train and the state of their optimizers, the least that a checkpoint takes."""
    models, optimizers = internals.prepared(accelerator)
    weights = [p for model in models for p in model.parameters() if p.requires_grad]
    state = [v for o in optimizers for values in o.state.values() for v in values.values()]
    return sum(t.nbytes for t in weights + state if isinstance(t, Tensor))


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file, with the modes that the umask leaves, and write the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:  # safetensors writes for the owner alone
        path.chmod(folder.stat().st_mode & 0o666)
    with ThreadPoolExecutor(4) as pool:
        flushes, hashes = pool.map(_flush, files), list(pool.map(_xxh3, files))
        list(flushes)
    listed = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "xxh3": found}
        for path, found in zip(files, hashes, strict=True)
    }
    manifest = facts | {"files": listed}
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(folder / MANIFEST)
    for path in {folder, *(path.parent for path in files)}:
        _flush(path)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _xxh3(path: Path) -> str:
    """128 bits that tell damage, fifteen times as fast as sha256. They do not tell malice: nothing that is loaded can run."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Find, verify, load.


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, once every file is what it says.

    Raises:
        Damaged: naming the first file that is not.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        told, files = manifest["sha256"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / MANIFEST}: {getattr(error, 'strerror', None) or 'not a manifest'}") from None
    if told != _digest(manifest):
        raise Damaged(f"{folder / MANIFEST}: its content does not have its sha256")
    if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{manifest['step']}":
        raise Damaged(f"{folder / MANIFEST}: is of step {manifest['step']}")
    for path in (folder / "state").rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in files:
            raise Damaged(f"{path}: is not in the manifest")
    for name, expected in files.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise Damaged(f"{folder / MANIFEST}: names {name}, which is elsewhere")
        if not path.is_file():
            raise Damaged(f"{path}: missing")
        if path.stat().st_size != expected["size"]:
            raise Damaged(f"{path}: {path.stat().st_size:,} bytes, expected {expected['size']:,}")

    def check(name: str) -> None:
        if _xxh3(folder / name) != files[name]["xxh3"]:
            raise Damaged(f"{folder / name}: its content is not what was saved (xxh3)")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, files))
    return manifest


def holds(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder has the export of the checkpoint with this manifest, rather than that of an earlier one, or none."""
    files = {k: v for k, v in manifest.get("files", {}).items() if not k.startswith("state/") and k != "load.py"}
    return all((folder / k).is_file() and _xxh3(folder / k) == v["xxh3"] for k, v in files.items())


def find(folder: Path, choice: str, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from and its manifest; None to start.

    `choice` is latest, none, or a path. With latest, a damaged checkpoint is passed over with one warning.

    Raises:
        BadInput: the path is not a valid checkpoint, starting over would mix two runs, or no checkpoint there is valid.
    """
    flag, there = "--base.resume-from-checkpoint", steps(folder)
    if choice == "none":
        if there:
            raise BadInput(f"{flag} none starts over, but {folder} holds a run; give another --base.output-dir or remove it")
        return None
    if choice != "latest":
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
            warn(f"continuing from {path}: damaged: {'; '.join(damaged)}")
        return path, manifest
    if damaged:
        raise BadInput(f"no checkpoint in {folder} is valid ({'; '.join(damaged)}); another --base.output-dir starts anew")
    return None


def load(accelerator: Accelerator, path: Path) -> None:
    """Read the training state of a verified checkpoint into what was prepared and attached.

    Hyper-parameters in the optimizers' groups (rates, betas, decay) stay as the settings made them.

    Raises:
        BadInput: its files, though they are what was saved, do not hold a training state.
    """
    _, optimizers = internals.prepared(accelerator)
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    try:
        accelerator.load_state(str(path / "state"))
    except BadInput:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise BadInput(f"{getattr(error, 'filename', None) or path / 'state'} cannot be loaded: {error}") from None
    accelerator.step = 0  # an update begins: batches are counted from here, whatever was accumulated before
    for optimizer, kept in zip(optimizers, groups, strict=True):
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)
