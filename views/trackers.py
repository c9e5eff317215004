"""Trackers known to accelerate, and the logins that they and the hub need."""

from __future__ import annotations

import netrc
import os
import urllib.parse
from pathlib import Path

from oneloop import configs
from oneloop.configs import BadInput


def check_trackers(base: configs.Base) -> None:
    """Refuse what cannot be reported to, before anything slow.

    Raises:
        BadInput: an unknown or missing tracker, or wandb or the hub without a login.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for logger in configs.trackers(base):
        if logger not in LOGGER_TYPE_TO_CLASS:
            raise BadInput(f"--base.logger is {logger!r}; expected some of {', '.join(LOGGER_TYPE_TO_CLASS)}, or none")
        if logger not in [tracker.value for tracker in get_available_trackers()]:
            raise BadInput(f"--base.logger {logger} needs the package {logger}; install it, or choose another")
    if "wandb" in configs.trackers(base) and not _knows_wandb():
        raise BadInput("--base.logger wandb needs a login: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
    if base.push_to_hub:
        import huggingface_hub

        name = base.hub_model_id or Path(base.output_dir).name
        try:
            huggingface_hub.utils.validate_repo_id(name)
        except huggingface_hub.errors.HFValidationError as error:
            raise BadInput(f"--base.hub-model-id: {name!r} is not the name of a repository: {error}") from None
        if not huggingface_hub.get_token():
            raise BadInput("--base.push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN")


def _knows_wandb() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
