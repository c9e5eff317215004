"""Conditions of tasks on image conditions on their way to the loss: columns of the data, what frozen models make of them, and
what the part beside the base (control.py) is given.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oneloop.families import hub, inpainting, latents, stable_diffusion, text_to_image, transformer
from oneloop.families.control import Controls, entry, given, of
from oneloop.families.controlnets import pooled_is_zero
from oneloop.families.controls import Control
from oneloop.families.text_to_image import settings
from oneloop.tasks import Batch, Column, Encoding, Models, Rng

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = text_to_image.COLUMNS | {
    "conditioning": Column(
        "image",
        like="pixel_values",
        setting="data.conditioning_column",
        folder="data.conditioning_data_dir",
        made="data.conditioning",
    )
}


def encodings(controls: Controls, cfg: Any) -> Mapping[str, Encoding]:
    """Conditions are encoded as images are, for families whose conditions go through the autoencoder; with holes that are drawn
    for each example in every step, since the example's number is read too."""
    own = of(controls, cfg)
    if not own.latent:
        return text_to_image.ENCODINGS
    key = lambda cfg: (stable_diffusion.kind(settings(cfg)), unshifted(controls, cfg))  # noqa: E731
    function, columns = encode_condition, ()
    if own.fills:
        function, columns = encode_filled, ("conditioning", "mask" if inpainting.masked(cfg) else "n")
    encode = functools.partial(function, controls)
    functools.update_wrapper(encode, function)
    return text_to_image.ENCODINGS | {"conditioning": Encoding(fn=encode, columns=columns, models=("vae",), key=key)}


def unshifted(controls: Controls, cfg: Any) -> bool:
    """Whether the part that is given wants latents without their shift."""
    own = entry(controls, cfg)
    name = given(settings(cfg), own)
    asks = own.kind == "SD3ControlNetModel" and not own.fills
    return asks and bool(name) and pooled_is_zero(hub.read(name, None, "config.json"))


def encode_condition(controls: Controls, models: Models, x: Tensor, cfg: Any) -> dict[str, Tensor]:
    """Conditions [B, 3, H, W] in [-1, 1] -> mean and, where images have one, deviation of their latents, [B, C, h, w] each."""
    s, vae = settings(cfg), models["vae"]
    made = latents.encode(transformer.family(s), vae, x)
    if unshifted(controls, cfg):
        mean, std = latents.statistics(vae)
        made["latent_mean"] = made["latent_mean"] + mean / std
    return {name.replace("latent", "condition"): x for name, x in made.items()}


def encode_filled(controls: Controls, models: Models, x: Tensor, told: Tensor, cfg: Any) -> dict[str, Tensor]:
    """Images [B, 3, H, W] in [-1, 1], of which something is hidden -> the same of what is seen of them, and where they are
    kept, [B, 1, h, w]. `told`: masks [B, 1, H, W], or the examples' numbers [B], by which holes are drawn."""
    drawn, numbers = told.ndim == 1, told.tolist() if told.ndim == 1 else ()
    holes = inpainting.hole(x, None if drawn else told, Rng.of(cfg.base.seed, numbers, device=x.device))
    made = encode_condition(controls, models, inpainting.hidden(x, holes), cfg)
    return made | {"condition_kept": inpainting.kept(holes, made["condition_mean"])} | ({"n": told} if drawn else {})


def condition_of(own: Control, batch: Batch, rng: Rng) -> Tensor:
    """What the part is given: latents, a sample as of the images, or the image in [0, 1]."""
    import torch

    if not own.latent:
        image = batch["conditioning"] / 2 + 0.5
        return inpainting.hidden(image, inpainting.hole(image, batch.get("mask"), rng)) if own.fills else image
    columns = {f"latent_{k}": batch[f"condition_{k}"] for k in ("mean", "std") if f"condition_{k}" in batch}
    z = latents.draw(columns, rng.normal("condition", *batch["condition_mean"].shape[1:]))
    return torch.cat([z, batch["condition_kept"]], 1) if own.fills else z


def counted(own: Control, batch: Batch) -> Batch:
    """The batch as the loss counts it: all pixels where masks say what is hidden."""
    return {name: x for name, x in batch.items() if name != "mask" or not own.fills}
