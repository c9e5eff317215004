"""Files of a checkpoint, from a folder or from the hub: an answer in seconds, and a line that says what is wrong."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput

if TYPE_CHECKING:
    import torch
    from torch import nn

WAY_OUT = "a folder that save_pretrained wrote works without it"


class Unavailable(OSError):
    """A file of a model on the hub cannot be had, for a reason that is no fault of the file."""


def is_local(name: str) -> bool:
    """Whether it names a folder rather than a model on the hub, which is `owner/name`."""
    return Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1


@functools.cache
def unreachable() -> str | None:
    """Why the hub does not answer; None: it does. Asked once, for at most 10 seconds: its own client tries six times, and then
    again, for every file."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, since HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # those of requests, httpx or httpx2, by the client's version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"the hub cannot be reached: {constants.ENDPOINT}: {reason}"
    return None


def logged_in() -> str | None:
    """Where the token for the hub is from; None: there is none."""
    import os

    from huggingface_hub import get_token

    return ("HF_TOKEN" if os.environ.get("HF_TOKEN") else "your token") if get_token() else None


def file(name: str, revision: str | None, path: str) -> Path:
    """A file of a checkpoint.

    Raises:
        Unavailable: the hub cannot be reached and the file is not in its cache, or it does not give it to this user.
        OSError: the checkpoint has no such file.
    """
    if is_local(name):
        return Path(name).expanduser() / path
    from huggingface_hub import errors, hf_hub_download

    why, page = unreachable(), f"https://huggingface.co/{name}"
    absent = f"there is no model of this name on the hub, or it is private; check {page}, or log in with `hf auth login`"
    try:
        return Path(hf_hub_download(name, path, revision=revision, local_files_only=why is not None))
    except errors.GatedRepoError:
        known = f"the account of {logged_in()} is not let in: accept its terms at {page}, or wait for its authors"
        unknown = f"accept its terms at {page}, then log in with `hf auth login`"
        raise Unavailable(f"it is gated: {known if logged_in() else unknown}") from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(absent) from None
    except errors.RevisionNotFoundError:
        raise Unavailable(f"it has no branch, tag or commit {revision!r} on the hub") from None
    except errors.RemoteEntryNotFoundError:
        raise FileNotFoundError(f"it has no {path}") from None
    except errors.HFValidationError as error:
        raise Unavailable(f"no name of a model: {str(error).partition(chr(10))[0]}") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error if why else error.__cause__ or error, "response", None), "status_code", None)
        if status is None:
            raise Unavailable(f"{why or 'the hub cannot be reached'}, for {page}; {WAY_OUT}") from None
        more = f"; log in with a token that may read {page} (`hf auth login`)" if status == 403 else ""
        wrong = f"the hub does not accept {logged_in()}: log in anew with `hf auth login`, for {page}"
        refused = (wrong if logged_in() else absent) if status == 401 else f"the hub answers {status} for {path}{more}"
        raise Unavailable(refused) from None


@contextlib.contextmanager
def readable(what: str, kind: str, expected: str) -> Iterator[None]:
    """Reads a checkpoint's files: whatever is wrong with them is a line that begins with `what`."""
    try:
        yield
    except BadInput:
        raise
    except Unavailable as error:
        raise BadInput(f"{what}: {error}") from None
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{what}: not {kind} ({reason}); expected {expected}") from None


@functools.cache
def read(name: str, revision: str | None, path: str) -> dict[str, Any]:
    """A JSON file of a checkpoint, without any of its weights; it is an object, else ValueError."""
    found = json.loads(file(name, revision, path).read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def stamp(name: str, revision: str | None, part: str) -> list[Any]:
    """What tells the files of a part from all others, without reading them whole: of a file or of those in a folder name, size,
    time of change in nanoseconds and a hash of blocks spread over them, since archives and copies may give other weights the
    same times; or the commit on the hub, whose files never change."""
    if not is_local(name):
        return [file(name, revision, "model_index.json").parent.name]
    place = Path(name).expanduser() / part
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns, _blocks(path)) for path in files]


def _blocks(path: Path, count: int = 256, size: int = 4096) -> str:
    """A hash of `count` blocks of a file, evenly spread from its first byte to its last."""
    check, length = hashlib.blake2b(digest_size=8), path.stat().st_size
    with path.open("rb") as content:
        for i in range(count if length > count * size else 1):
            content.seek(i * max(length - size, 0) // max(count - 1, 1))
            check.update(content.read(size if length > count * size else length))
    return check.hexdigest()


def card(name: str, revision: str | None) -> dict[str, str]:
    """What a card says of the model that something was made from: `base_model` where it is on the hub, and its license as its
    own card has it; where it has none, that the license is that of the base model."""
    on_hub = {} if is_local(name) else {"base_model": name}
    try:
        text = file(name, revision, "README.md").read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    lines = re.findall(r"^(license|license_name|license_link): *['\"]?(.+?)['\"]? *$", head[1] if head else "", re.M)
    own = {"license": "other", "license_name": "as-the-base-model"}
    link = {} if is_local(name) else {"license_link": f"https://huggingface.co/{name}"}
    return on_hub | (dict(lines) or own | link)


def load(library: Any, kind: Any, name: str, what: str, **where: Any) -> Any:
    """A module with its pretrained weights, of the class that a checkpoint names. A file cannot have anything imported but what
    diffusers and transformers have at hand.

    Args:
        what: the flag and the part, as messages begin.
        where: subfolder, revision, variant, as `from_pretrained` takes them.

    Raises:
        BadInput: it cannot be loaded, or weights are missing. MemoryError and torch's are as they were.
    """
    import torch

    made = getattr(importlib.import_module(library), str(kind), None) if library in ("diffusers", "transformers") else None
    if not (isinstance(made, type) and hasattr(made, "from_pretrained")):
        raise BadInput(f"{what} is a {kind} of {library!r}; expected a class of models of diffusers or transformers")
    local = is_local(name)
    source = {"local_files_only": not local and unreachable() is not None, "output_loading_info": True}
    try:
        model, report = made.from_pretrained(Path(name).expanduser() if local else name, **where, **source)
        if missing := sorted(map(str, report["missing_keys"])):
            raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
        return model
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever is wrong with someone's files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        offline = "" if local or not unreachable() else f" ({unreachable()}; {WAY_OUT})"
        raise BadInput(f"{what} cannot be loaded: {reason}{offline}") from None


def is_file(name: str) -> bool:
    """Whether it names a single file of weights."""
    return name.endswith((".safetensors", ".gguf"))


def save(module: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """A diffusers model as a folder that `from_pretrained` opens, in this precision; the module itself stays as it is."""
    from huggingface_hub import save_torch_state_dict

    module.save_config(folder)
    state = {key: x.detach().to("cpu", dtype).contiguous() for key, x in module.state_dict().items()}
    save_torch_state_dict(state, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")


def load_file(kind: str, name: str, what: str, **where: Any) -> Any:
    """A diffusers module with the weights of a single file, in the names of its authors or of diffusers.

    Args:
        what: the flag and the part, as messages begin.
        where: config, subfolder, revision, torch_dtype, as `from_single_file` takes them; no config is guessed or downloaded.

    Raises:
        BadInput: it cannot be loaded, or its class cannot be read from a file. MemoryError and torch's are as they were.
    """
    import diffusers
    import torch

    made, path = getattr(diffusers, kind), Path(name).expanduser()
    if not hasattr(made, "from_single_file"):
        raise BadInput(f"{what}: diffusers reads no {kind} from a single file; expected a folder that save_pretrained wrote")
    more: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise BadInput(f"{what} needs the package gguf: install oneloop[quantized], or give a .safetensors file")
        where = {"torch_dtype": torch.float32} | where
        more["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=where["torch_dtype"])
    if is_local(str(where["config"])):
        where["config"] = str(Path(where["config"]).expanduser())
    offline = is_local(str(where["config"])) or unreachable() is not None
    try:
        return made.from_single_file(str(path), local_files_only=offline, **where, **more)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever is wrong with someone's file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"{what} cannot be loaded as a {kind}: {reason}") from None
