"""Files that are there whole or not at all, and the hidden folder in which a run stages them.

    OUT/.oneloop/lock       locked by the process that writes to OUT; it marks the folder as this program's
    OUT/.oneloop/...        what is being written, and what is being removed

Everything is written in there and renamed into place, and what has to go is renamed into there first. So what a killed process
leaves is all in one folder that is known to be this program's, and nothing elsewhere has to be recognised by its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from oneloop.configs import BadInput

WORK = ".oneloop"
JUNK = (".DS_Store", "._*", ".nfs*", "Thumbs.db", "desktop.ini")
"""Names of files that systems put into every folder, and that are nobody's."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What only a write is answered with."""


def take(folder: Path, flag: str, locked: contextlib.ExitStack, wait: Callable[[str], None] | None = None) -> None:
    """Make the folder and lock it for this process until `locked` ends; afterwards it is gone again if nothing was written.

    The lock is the kernel's, so that of a dead process is free, and a forked worker does not inherit it. `wait` is called with
    who has it, for as long as another process does.

    Raises:
        BadInput: the folder, which `flag` names, cannot be written, or another process has it and there is no `wait`.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    work, path, attempts = folder / WORK, folder / WORK / "lock", 0
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            if work.is_symlink() or (any(work.iterdir()) and not path.is_file()):
                raise BadInput(f"{flag} {folder}: {work} is not this program's; move it away")
            with contextlib.ExitStack() as attempt:
                file = attempt.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+"))
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = file.read().strip() or "another run"
                    if wait is None:
                        raise BadInput(f"{flag} {folder} is in use by {holder}") from None
                    wait(holder)
                    continue
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                    locked.push(attempt.pop_all())
                    break  # else the last holder removed the file in between: a lock on it keeps nobody out
        except OSError as error:
            attempts += 1
            if not isinstance(error, FileNotFoundError) or attempts == 10:  # the last holder may remove the folder in between
                raise BadInput(f"{flag} {folder} cannot be written: {error.strerror}") from None

    def give_back() -> None:
        with contextlib.suppress(OSError):
            if os.listdir(work) == ["lock"]:
                path.unlink()
                work.rmdir()
                for parent in created:
                    parent.rmdir()  # fails, as it should, where something was written

    locked.callback(give_back)


def staged(path: Path) -> Path:
    """A new name for what becomes, or was, `path`: in the run's hidden folder, or beside it where there is no run."""
    name = f"{path.name}.{uuid.uuid4().hex[:12]}"
    work = path.parent / WORK
    return work / name if work.is_dir() else path.with_name(f".{name}.writing")


def write(path: Path, content: str | bytes) -> None:
    """A file that is there whole or not at all; texts are in UTF-8. No link is followed."""
    made = staged(path)
    try:
        with open(made, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        flush(made)
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """A text file, and nothing that would be waited for, such as a pipe.

    Raises:
        OSError: it is none, or cannot be read. ValueError: it is not in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a file" if os.path.lexists(path) else "no such file", str(path))
    return path.read_text("utf-8")


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def erase(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that is possible. No link is followed."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a folder whole or not at all: renamed away, then erased.

    Raises:
        OSError: it cannot be renamed; it is as it was.
    """
    os.rename(path, away := staged(path))
    erase(away)


def size(folder: Path) -> int:
    """Bytes in the files of a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in the folder, oldest first."""
    names = (path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    return sorted(int(name[11:]) for name in names if re.fullmatch("checkpoint-(0|[1-9][0-9]*)", name))


def strangers(folder: Path, names: set[str]) -> list[str]:
    """Files below a folder that have none of these names, but for junk; its own name, where it is a link or no folder."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name] if os.path.lexists(folder) else []
    there = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names_there = {
        str(path.relative_to(folder)) for path in there if not any(fnmatch.fnmatch(path.name, junk) for junk in JUNK)
    }
    return sorted(names_there - names)


def as_masked(folder: Path) -> list[Path]:
    """Give every file in a new folder the mode that the umask leaves, which the folder has: safetensors writes for the owner
    alone. Returns them in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        path.chmod(folder.stat().st_mode & 0o666)
    return files


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file in a folder as its name -> size and xxh3, flushed and with the mode that the umask leaves."""
    files = as_masked(folder)
    with ThreadPoolExecutor(4) as pool:
        flushes, hashes = pool.map(flush, files), list(pool.map(xxh3, files))
        list(flushes)
    for path in {folder, *(path.parent for path in files)}:
        flush(path)
    pairs = zip(files, hashes, strict=True)
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "xxh3": digest} for path, digest in pairs}


def xxh3(path: Path) -> str:
    """128 bits that tell damage, fifteen times as fast as sha256. They do not tell malice: nothing that is loaded can run."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def flaws(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with files of a folder: those that are missing, or not what was written."""

    def look(name: str) -> str | None:
        path, entry = folder / name, files[name]
        try:
            if not path.is_file():
                return f"{path}: missing"
            if (length := path.stat().st_size) != entry["size"]:
                return f"{path}: {length:,} bytes, expected {entry['size']:,}"
            return None if xxh3(path) == entry["xxh3"] else f"{path}: its content is not what was saved (xxh3)"
        except (OSError, ValueError) as error:
            return f"{path}: {getattr(error, 'strerror', None) or 'not a file name'}"

    with ThreadPoolExecutor(4) as pool:
        return list(filter(None, pool.map(look, files)))
