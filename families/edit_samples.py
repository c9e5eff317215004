"""Samples of a task that edits: source, target and sample side by side, and the line that draws one of an export. `s` are the
task's settings; `cfg` has them as its group.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.families import adapters, flow, recorded, stable_diffusion, text_to_image, transformer
from oneloop.families.edit import kind, way
from oneloop.families.edit_sources import named, picture
from oneloop.families.prompts import Prompt
from oneloop.families.text_to_image import family, settings
from oneloop.tasks import Batch, Images, Models, Rng

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def pipeline(models: Models, s: Any) -> Any:
    """The pipeline of these very modules that edits."""
    if family(s) is transformer:
        return transformer.pipeline(models, s, kind=kind(s))
    base = stable_diffusion.pipeline({name: m for name, m in models.items() if name != "prompts"}, s)
    told = {"requires_safety_checker": False, "add_watermarker": False}
    told |= {key: x for key, x in base.config.items() if key == "force_zeros_for_empty_prompt"}
    made = flow.assemble(kind(s), base.components | told)
    if "prompts" in models:
        recorded.attach(made, models["prompts"])
    return made


def arguments(s: Any, height: int, width: int) -> dict[str, Any]:
    """How the pipeline is called to draw one sample, beside its prompt and its source."""
    import diffusers

    known = inspect.signature(getattr(diffusers, kind(s)).__call__).parameters
    told = family(s).arguments(s, height, width) | way(s).call(height, width)
    if s.image_guidance_scale is not None:
        told["image_guidance_scale"] = s.image_guidance_scale
    return {key: x for key, x in told.items() if key in known}


def sample(
    models: Models, s: Any, prompt: str, source: Image.Image | list[Image.Image], generator: Any, height: int, width: int
) -> Tensor:
    """One image of a source, or of several, [3, height, width] in [0, 1]."""
    import torch

    sources = source if isinstance(source, list) else [source]
    call = arguments(s, height, width) | {"prompt": [prompt], "generator": [generator], way(s).argument: sources}
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]]
    drawn = pipeline(models, s)
    with recorded.ended():
        if family(s) is stable_diffusion:
            latents = drawn(**call, output_type="latent").images
            return stable_diffusion.decode(models["vae"], latents)[0]
        return drawn(**call, output_type="pt").images[0]
    return torch.zeros(3, height, width)


def abreast(images: list[Tensor]) -> Tensor:
    """Images [3, h, w] side by side on white, [3, H, W] in the order given."""
    import torch
    import torch.nn.functional as F

    height = max(image.shape[-2] for image in images)
    return torch.cat([F.pad(image, (0, 0, 0, height - image.shape[-2]), value=1.0) for image in images], -1)


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Any) -> Images:
    """Source, target and sample side by side, of the first examples with their own instructions, or those of the settings in
    turn; images of several sizes on white."""
    import torch
    import torch.nn.functional as F

    s, batch, entries = settings(cfg), next(iter(examples)), text_to_image.asked(cfg)
    rows, net = [], models.get(family(s).TRAINED)
    for i, generator in enumerate(rng.generators("sample")):
        entry = entries[rng.numbers[i] % len(entries)] if entries else Prompt(batch["caption"][i])
        generator.manual_seed(entry.seed) if entry.seed is not None else None
        told = {"negative_prompt": entry.negative, "num_inference_steps": entry.steps, "guidance_scale": entry.guidance}
        drawn = replace(s, **{key: value for key, value in told.items() if value is not None})
        sources, target = [batch[name][i] for name in named(s)], batch["pixel_values"][i]
        height, width = entry.height or target.shape[-2], entry.width or target.shape[-1]
        seen = [*map(picture, sources)]
        seen = [image.resize((width, height)) for image in seen] if way(s).widened else seen
        with adapters.scaled(net, {"default": entry.strength, "assistant": 0.0}) if net is not None else torch.no_grad():
            image = sample(models, drawn, entry.prompt, seen, generator, height, width)
        rows.append(abreast([*(x.cpu() / 2 + 0.5 for x in (*sources, target)), image.cpu().float()]))
    size = [max(row.shape[axis] for row in rows) for axis in (-2, -1)]
    padded = [F.pad(row, (0, size[1] - row.shape[-1], 0, size[0] - row.shape[-2]), value=1.0) for row in rows]
    return {"source-target-sample": torch.stack(padded)}  # [B, 3, H, W] in [0, 1]


def encode_prompts(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Any) -> dict[str, Tensor]:
    """The prompts of samples, under `prompts/`."""
    made: dict[str, Tensor] = {}
    sample_fn(models | {"prompts": made}, examples, rng, cfg)
    return {f"prompts/{key}": x for key, x in made.items()}


def call_lines(examples: Iterable[Batch], path: Path, cfg: Any) -> str:
    """Write the first example's source into the folder, and return the lines that draw a first sample with `pipeline`."""
    s, batch, quoted = settings(cfg), next(iter(examples)), stable_diffusion.quoted
    names = [f"source{f'_{i}' * (i > 1)}.png" for i in range(1, len(named(s)) + 1)]
    for name, column in zip(names, named(s), strict=True):
        picture(batch[column][0]).save(path / name)
    prompt = next((entry.prompt for entry in text_to_image.asked(cfg)), None) or batch["caption"][0]
    told = arguments(s, *batch["pixel_values"].shape[-2:])
    how = "".join(f", {key}={quoted(value)}" for key, value in told.items())
    sources = [f'load_image({{path}} + "/{name}")' for name in names]
    source = f"{way(s).argument}={sources[0] if len(sources) == 1 else '[' + ', '.join(sources) + ']'}"
    call = f'pipeline(prompt={quoted(prompt)}, {source}{how}).images[0].save("sample.png")'
    return f"from diffusers.utils import load_image\n{call}"
