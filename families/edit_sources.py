"""The source of an edit on its way to the loss: columns of the data set, what frozen models make of them, and dropout. `cfg`
has the task's settings as its group.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput, Folder, Live, Name, require
from oneloop.families import latents, stable_diffusion, text_to_image, transformer
from oneloop.families.edit import WAYS, kind, way
from oneloop.families.text_to_image import family, settings
from oneloop.tasks import Batch, Column, Encoding, Models, Rng

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


FURTHER = ("second_source", "third_source")
"""Columns of sources beside the first, which is `conditioning`."""


@dataclass(frozen=True)
class Sources:
    """Settings of an edit that has several sources."""

    second_source_data_dir: Live[Folder | None] = None
    """Folder of further sources of the same file names, of FLUX.2 and Qwen-Image-Edit from 2509 on: an example has two."""
    second_source_column: Live[Name | None] = None
    """The data set's column of them, in place of a folder."""
    third_source_data_dir: Live[Folder | None] = None
    """Folder of third sources."""
    third_source_column: Live[Name | None] = None
    """The data set's column of them, in place of a folder."""


def named(s: Any) -> tuple[str, ...]:
    """The columns of an example's sources, in their order."""
    return ("conditioning", *(name for name in FURTHER if getattr(s, f"{name}_data_dir") or getattr(s, f"{name}_column")))


def check(s: Any) -> None:
    """Refuse several sources that do not fit each other or the checkpoint.

    Raises:
        BadInput: with the flag to change.
    """
    given = {f"{name}_{end}": getattr(s, f"{name}_{end}") for name in FURTHER for end in ("data_dir", "column")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        alone = f"nothing with a {stable_diffusion.kind(s)}, which takes one source; leave it out"
        require(way(s).several, f"edit.{name}", value, alone)
    for name in named(s)[1:]:
        both = [value for key, value in given.items() if key.startswith(name)]
        require(len(both) == 1, f"edit.{name}_column", both, "one place of these sources")
    if named(s)[1:] == FURTHER[1:]:
        raise BadInput("--edit.third-source is given and no second one; expected --edit.second-source-data-dir, or its column")


def columns(cfg: Any) -> Mapping[str, Column]:
    """A source that is channels has the crop of its target; those that are tokens have sizes of their own."""
    like = "pixel_values" if way(settings(cfg)).widened else None
    where = {"setting": "data.conditioning_column", "folder": "data.conditioning_data_dir"}
    made = text_to_image.COLUMNS | {"conditioning": Column("image", like=like, **where)}
    for name in named(settings(cfg))[1:]:
        made[name] = Column("image", setting=f"edit.{name}_column", folder=f"edit.{name}_data_dir")
    return made


def encode_source(models: Models, x: Tensor, cfg: Any) -> dict[str, Tensor]:
    """Sources [B, 3, H, W] in [-1, 1] -> what `given` makes the loss's columns of, [B, C, h, w] each.

    InstructPix2Pix takes the posterior's mode without the scale of x_t, as its authors' code and its pipelines do; references
    are the mode in the scale of x_t; FLUX.1's control models take a sample in that scale, as their pipeline does.
    """
    s = settings(cfg)
    if family(s) is stable_diffusion:
        return {"source_latents": models["vae"].encode(x).latent_dist.mode()}
    own = replace(transformer.family(s), sample=way(s).widened is not None)
    made = latents.encode(own, models["vae"], x)
    if not own.sample:
        return {"reference": made["latent_mean"]}
    return {f"source_{key.removeprefix('latent_')}": z for key, z in made.items()}


def encode_further(name: str, models: Models, x: Tensor, cfg: Any) -> dict[str, Tensor]:
    """The same of a further source, under this name."""
    return {name: encode_source(models, x, cfg)["reference"]}


def encode_instructions(models: Models, captions: list[str], *more: Any) -> dict[str, Tensor]:
    """Instructions of B sources [B, 3, H, W] in [-1, 1], or several such, as an encoder that sees both has them. The settings
    come last."""
    *sources, cfg = more
    s = settings(cfg)
    own, length = transformer.family(s), s.max_sequence_length or transformer.family(s).length
    seen = [[*map(picture, each)] for each in zip(*sources, strict=True)]
    images = seen if len(sources) > 1 else [image for (image,) in seen]
    return own.text(transformer.pipeline(models, s, vae=False), captions, length, images)


def picture(x: Tensor) -> Image.Image:
    """An image [3, H, W] in [-1, 1] as pipelines take it."""
    from PIL import Image

    return Image.fromarray(((x.cpu().float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


ENCODINGS = text_to_image.ENCODINGS | {
    "conditioning": Encoding(
        fn=encode_source, models=("vae",), key=lambda cfg: (stable_diffusion.kind(settings(cfg)), kind(settings(cfg)))
    )
}


def encodings(cfg: Any) -> Mapping[str, Encoding]:
    """What frozen models make of sources, targets and instructions.

    Raises:
        BadInput: the checkpoint cannot be read, or is of no family that edits.
    """
    text_to_image.check_base(cfg, WAYS)
    made, names = dict(ENCODINGS), named(settings(cfg))
    for name, reference in zip(names[1:], latents.REFERENCES[1:], strict=False):
        encode = functools.update_wrapper(functools.partial(encode_further, reference), encode_further)
        made[name] = replace(ENCODINGS["conditioning"], fn=encode)
    if way(settings(cfg)).sees:
        made["caption"] = replace(ENCODINGS["caption"], fn=encode_instructions, columns=("caption", *names))
    return made


def dropout(s: Any) -> float:
    """The share of examples without an instruction, that without a source, and that without both, each."""
    if s.conditioning_dropout is not None:
        return s.conditioning_dropout
    return 0.05 if family(s) is stable_diffusion else 0.0


def given(models: Models, batch: Batch, rng: Rng, cfg: Any) -> Batch:
    """The batch as the objective reads it: the source `beside` x_t, or as `reference`.

    InstructPix2Pix drops the instruction of 5 % of the examples, the source of 5 %, and both of 5 % (section 3.2.1), so that
    samples can be guided by either; without an instruction the model sees what the pipeline shows it in its place.
    """
    import torch

    s = settings(cfg)
    if "source_mean" in batch:
        mean = batch["source_mean"]
        noise = rng.normal("source posterior", *mean.shape[1:])
        return batch | {"beside": mean + batch["source_std"] * noise}
    if "source_latents" not in batch:
        return batch
    p, u = dropout(s), rng.uniform("dropout")  # [B]
    made = batch | {"beside": batch["source_latents"] * ~((p <= u) & (u < 3 * p))[:, None, None, None]}
    for key, x in models["null"].named_buffers() if p else ():
        silent = (u < 2 * p).view(-1, *[1] * (batch[key].ndim - 1))
        made[key] = torch.where(silent, x.to(batch[key].dtype), batch[key])
    return made
