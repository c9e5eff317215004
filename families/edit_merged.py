"""What a run of `edit` learned as part of its base: the pipeline that edits, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oneloop.families import adapted, edit, edit_samples, hub, stable_diffusion, text_to_image
from oneloop.families.text_to_image import family, settings
from oneloop.tasks import Models


def merged(cfg: Any, folder: Path, strength: float, precision: str) -> tuple[Any, str]:
    """The pipeline that edits, its weights moved by this share of the way to those of an export, or with its adapters added,
    times a strength; and the name of the part that trained. `precision` is what a transformer is read in: bf16, or no. The way
    begins at the base with its first layer widened, which draws as the base does whatever the source."""
    import torch

    s, own = settings(cfg), family(settings(cfg))
    if edit.trains(s) == "lora":
        return adapted.merged(cfg, folder, strength, precision, assembled)
    models = text_to_image.load(cfg, precision)
    pipeline = assembled(models, s)
    made = hub.load(
        *stable_diffusion.config(s, "")[own.TRAINED], str(folder), f"{folder}: {own.TRAINED}", subfolder=own.TRAINED
    )
    learned = dict(made.named_parameters())
    with torch.no_grad():
        for key, p in models[own.TRAINED].named_parameters():
            p.lerp_(learned[key].to(p.dtype), strength)
    return pipeline, own.TRAINED


def assembled(models: Models, s: Any) -> Any:
    """The pipeline that edits of the checkpoint's parts, the first layer widened in place where the source is channels."""
    if layer := edit.way(s).widened:
        edit.widen(models[family(s).TRAINED], layer)
    return edit_samples.pipeline(models, s)
