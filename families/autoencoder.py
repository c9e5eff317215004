"""Any image autoencoder of diffusers, frozen: what a model from scratch has its latents of, and its images back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput
from oneloop.families import hub, latents

if TYPE_CHECKING:
    from torch import Tensor, nn

PLAIN = SimpleNamespace(sample=True, eps=None, video=False)
"""What families.latents asks of a family: latents are samples of the posterior, of images."""


def config(name: str, inside: str | None, flag: str) -> dict[str, Any]:
    """The config of an autoencoder, by its folder or its name on the hub.

    Raises:
        BadInput: there is none, or it does not say the scale of its latents.
    """
    with hub.readable(
        f"{flag} {name}", "an autoencoder of diffusers", "its folder or name, such as the export of the task vae"
    ):
        found = hub.read(name, None, f"{inside}/config.json" if inside else "config.json")
        kind = str(found.get("_class_name"))
        if not kind.startswith("Autoencoder"):
            raise BadInput(f"{flag} {name}: holds a {kind}; expected an autoencoder of diffusers, such as an AutoencoderKL")
        scale = found.get("scaling_factor", 0.18215)  # diffusers' own where the config says none
        if not isinstance(scale, (int, float)) or found.get("latents_mean"):
            raise BadInput(f"{flag} {name}: a {kind} of latents by channel; expected one with a scaling_factor")
    return found


def load(name: str, inside: str | None, flag: str) -> nn.Module:
    """The autoencoder, frozen, in float32."""
    import torch

    kind, where = config(name, inside, flag)["_class_name"], {"subfolder": inside} if inside else {}
    made = hub.load("diffusers", kind, name, f"{flag} {name}", **where, torch_dtype=torch.float32)
    return made.requires_grad_(False).eval()


def size(vae: nn.Module, side: int, flag: str) -> tuple[int, int, int]:
    """Of the latent of an image of this side, [C, h, w].

    Raises:
        BadInput: it has none.
    """
    import torch

    try:
        with torch.no_grad():
            return tuple(encode(vae, torch.zeros(1, 3, side, side))["latent_mean"].shape[1:])
    except Exception as error:  # of anyone's autoencoder
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{flag}: encodes no image of {side}x{side} ({reason}); another one, or another resolution") from None


def encode(vae: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Images [B, 3, H, W] in [-1, 1] -> `latent_mean` and, of a posterior, `latent_std`, in the latents' own scale."""
    return latents.encode(PLAIN, vae, images)


def decode(vae: nn.Module, z: Tensor) -> Tensor:
    """Latents [B, C, h, w] of that scale -> images [B, 3, H, W] in [0, 1]."""
    return latents.decode(PLAIN, vae, z)


def export(vae: nn.Module, name: str, inside: str | None, path: Path) -> tuple[str, str]:
    """The lines of load.py that load the autoencoder, and what decodes `x` with it. One of the hub is named, one of a folder is
    copied beside the model, so that the export is whole anywhere."""
    kind = type(vae).__name__
    if hub.is_local(name):
        vae.save_pretrained(path / "vae")
        place = '{path} + "/vae"'
    else:
        place = repr(name) + (f", subfolder={inside!r}" if inside else "")
    line = f"from diffusers import {kind}\n\nvae = {kind}.from_pretrained({place})\n"
    return line, "vae.decode(x / vae.config.scaling_factor + (vae.config.get('shift_factor') or 0)).sample / 2 + 0.5"
