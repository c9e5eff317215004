"""What a trainer must know of each family that edits: a table, and the functions that read it. `s` are a task's settings
(settings.py); `cfg` has them as its group.

An edit is a target, an instruction and a source. The source reaches the model in one of two ways: as channels beside x_t, for
which its first layer is widened (InstructPix2Pix: Brooks et al. 2023, arXiv:2211.09800, section 3.2; FLUX.1's control models),
or as tokens behind those of x_t (FLUX.1 Kontext: Black Forest Labs 2025, arXiv:2506.15742, section 3; FLUX.2; Qwen-Image-Edit).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput, require
from oneloop.families import adapters, stable_diffusion, transformer
from oneloop.families.settings import Pretrained, flag
from oneloop.families.text_to_image import family, settings
from oneloop.tasks import Facts, Models

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the checkpoints of a pipeline class learn to edit."""

    kind: str | None = None
    """The pipeline class that draws; None: the checkpoint's own."""
    widened: str | None = None
    """The layer whose input has the source's latents as further channels; None: the source is tokens of its own."""
    least: int = 1
    """Pixels of the smallest side of a source that its pipeline takes."""
    sees: bool = False
    """Whether the text encoder sees the source too."""
    several: bool = False
    """Whether it takes more than one source."""
    argument: str = "image"
    """The pipeline's argument for the source."""
    call: Callable[[int, int], dict[str, Any]] = lambda height, width: {}
    """Further arguments of the pipeline, for samples of the size that is asked for, after the source as training saw it."""


WAYS: dict[str, Way] = {
    "StableDiffusionPipeline": Way(kind="StableDiffusionInstructPix2PixPipeline", widened="conv_in"),
    "StableDiffusionXLPipeline": Way(kind="StableDiffusionXLInstructPix2PixPipeline", widened="conv_in"),
    "FluxPipeline": Way(kind="FluxControlPipeline", widened="x_embedder", argument="control_image"),
    # The pipeline scales the sample to an area of its own, and the source to one of its list of sizes.
    "FluxKontextPipeline": Way(call=lambda height, width: {"max_area": height * width, "_auto_resize": False}),
    "Flux2KleinPipeline": Way(least=64, several=True),
    "Flux2Pipeline": Way(least=64, several=True),
    "QwenImageEditPipeline": Way(sees=True),
    "QwenImageEditPlusPipeline": Way(sees=True, several=True),
}
"""Pipeline class of a checkpoint -> how it learns to edit."""


def way(s: Pretrained) -> Way:
    """The checkpoint's."""
    return WAYS[stable_diffusion.kind(s)]


def kind(s: Pretrained) -> str:
    """The pipeline class that draws."""
    return way(s).kind or stable_diffusion.kind(s)


def resolve(cfg: Any, facts: Facts) -> Any:
    """The settings, once no bucket has a side that the pipeline refuses."""
    least, side = way(settings(cfg)).least, min(map(min, facts.sizes))
    more = f"one, or a higher --data.resolution, that makes no side of {side}: its pipeline asks for at least {least}"
    require(side >= least, "data.bucket_ratio", cfg.data.bucket_ratio, more)
    return cfg


def trains(s: Any) -> str:
    """`all` or `lora`, of the task's settings."""
    return s.trains or ("all" if family(s) is stable_diffusion else "lora")


# ---------------------------------------------------------------------------------------------------------------------
# The model.


def check_first(s: Pretrained, group: str) -> None:
    """Refuse a transformer that takes more than x_t already; of a UNet `family.check` does.

    Raises:
        BadInput: with both numbers of channels.
    """
    if way(s).widened and family(s) is transformer:
        given, wanted = (stable_diffusion.config(s, part) for part in (transformer.TRAINED, "vae"))
        channels, expected = given.get("in_channels"), 4 * wanted.get("latent_channels", 0)
        if channels != expected:
            what = f"its transformer takes {channels} channels a token; expected {expected}, a text-to-image model's"
            raise BadInput(f"{flag(group, 'pretrained_model_name_or_path')} {s.pretrained_model_name_or_path}: {what}")


def widen(module: nn.Module, name: str) -> None:
    """Give a layer, a convolution or a linear one, as many further inputs as it has, whose weights are zero: with whatever in
    them it answers as before. Its bias stays."""
    import torch

    layer = module.get_submodule(name)
    wide = torch.cat([layer.weight.detach(), torch.zeros_like(layer.weight)], 1)  # [out, 2 in, ...]
    layer.weight = torch.nn.Parameter(wide, requires_grad=layer.weight.requires_grad)
    size = "in_channels" if hasattr(layer, "in_channels") else "in_features"
    setattr(layer, size, 2 * getattr(layer, size))
    own = module.config
    module.register_to_config(in_channels=2 * own.in_channels, out_channels=own.out_channels or own.in_channels)


def prepare(models: Models, s: Pretrained) -> None:
    """Have loaded parts learn to edit: the layer widened, and pipelines encode the source in the precision of the
    autoencoder's weights, as training does."""
    vae = models["vae"]
    vae.encode = functools.partial(transformer.as_its_weights, vae, vae.encode)
    if name := way(s).widened:
        widen(models[family(s).TRAINED], name)


def blank(s: Pretrained) -> dict[str, Tensor]:
    """What the transformer's rehearsal needs beside a caption, as its constants are called."""
    import torch

    if not (way(s).widened and family(s) is transformer):
        return {}
    side = 8 * transformer.family(s).patch
    channels = stable_diffusion.config(s, "vae")["latent_channels"]
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(1))
    return {"rehearsal/beside": noise}


def targets(s: Any) -> tuple[str, ...]:
    """The layers that get adapters: the widened one is among them, or the source would stay unseen."""
    name, asked = way(s).widened, s.target_modules or transformer.family(s).targets
    return asked if name is None or asked == adapters.ALL or name in asked else (*asked, name)
