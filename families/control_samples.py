"""Samples of tasks on image conditions, by the pipelines that have the part beside the base too; their prompts, encoded first;
and the export. The rest of these tasks: control.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import portable
from oneloop.families import flow, inpainting, recorded, stable_diffusion, text_to_image, transformer
from oneloop.families.control import Controls, blank, entry, of
from oneloop.families.controls import Control
from oneloop.families.settings import Pretrained
from oneloop.families.text_to_image import family, settings
from oneloop.tasks import Batch, Encoders, Images, Models, Rng, unwrap

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONDITION = "condition.png"
"""In an export: what its load.py draws with."""


def pipeline(models: Models, own: Control, s: Pretrained) -> Any:
    """The diffusers pipeline of these very modules; of text encoders alone, it encodes prompts."""
    base = family(s).pipeline(models, s)
    net = unwrap(models[own.part]) if own.part in models else silent_part(own, s, next(iter(models.values())))
    parts = {**base.config, **base.components, own.part: net, "add_watermarker": False}
    made = flow.assemble(own.pipeline, parts)
    if own.part in models:
        own.settle(net, models[family(s).TRAINED])
    if "prompts" in models:
        recorded.attach(made, models["prompts"])
    return made


def silent_part(own: Control, s: Pretrained, like: nn.Module) -> nn.Module:
    """One without weights that says it is where `like` is, and a call of which ends the pipeline's."""
    import torch

    net = blank(s, own, "")
    net.register_parameter("first", torch.nn.Parameter(torch.empty(1, device=like.device, dtype=like.dtype)))
    net.forward = recorded.end
    return net


def sample(
    models: Models,
    own: Control,
    s: Any,
    conditions: Tensor,
    prompts: list[str],
    generators: list[Any],
    holes: Tensor | None = None,
) -> Tensor:
    """Images of the prompts under conditions [B, 3, H, W] in [-1, 1], of which `holes` [B, 1, H, W] are to be filled:
    [B, 3, H, W] in [0, 1], a generator each."""
    import torch

    drawn, (height, width), images = pipeline(models, own, s), conditions.shape[-2:], []
    call = family(s).arguments(s, height, width) | {own.scale: float(s.conditioning_scale)}
    flows = family(s) is transformer
    size = len(prompts) if own.together else 1
    for first in range(0, len(prompts), size):
        some = slice(first, first + size)
        more = {"negative_prompt": [call["negative_prompt"]] * len(prompts[some])} if "negative_prompt" in call else {}
        if own.fills:
            more |= own.fills(conditions[some], holes[some])
        else:
            more |= {own.image: conditions[some] if own.latent else conditions[some] / 2 + 0.5}
        with recorded.ended(), torch.random.fork_rng(devices=devices(conditions)):
            torch.manual_seed(generators[first].initial_seed())  # where a pipeline has draws of its own
            form = "pt" if flows else "latent"
            made = drawn(prompt=prompts[some], generator=generators[some], output_type=form, **call | more).images
            images.append(made if flows else stable_diffusion.decode(models["vae"], made))
    return torch.cat(images) if images else torch.zeros(conditions.shape)


def devices(x: Tensor) -> list[torch.device]:
    """The GPU that a tensor is on, if it is."""
    return [x.device] if x.is_cuda else []


def sample_fn(controls: Controls, models: Models, examples: Iterable[Batch], rng: Rng, cfg: Any) -> Images:
    """Condition, target and sample side by side, of the first examples: by their captions, or by the prompts of the settings in
    turn."""
    import torch

    own, batch, images = entry(controls, cfg), next(iter(examples)), []
    conditions = batch["conditioning"][: len(rng)]  # [B, 3, H, W]
    holes = inpainting.example(batch, cfg)[: len(rng)] if own.fills else None
    seen = inpainting.hidden(conditions, holes) if own.fills else conditions
    for part, _, drawn, prompts, generators in text_to_image.alike(lambda: batch["caption"][: len(rng)], rng, cfg):
        images.append(
            sample(models, own, drawn, conditions[part], prompts, generators, None if holes is None else holes[part]).float()
        )
    shown = [x.cpu() / 2 + 0.5 for x in (seen, batch["pixel_values"][: len(rng)])]
    return {"condition-target-sample": torch.cat([*shown, torch.cat(images).cpu()], -1)}  # [B, 3, H, 3 W]


def encode_prompts(controls: Controls, models: Models, examples: Iterable[Batch], rng: Rng, cfg: Any) -> dict[str, Tensor]:
    """The prompts of samples, under `prompts/`."""
    made: dict[str, Tensor] = {}
    sample_fn(controls, models | {"prompts": made}, examples, rng, cfg)
    return {f"prompts/{key}": x for key, x in made.items()}


def encoders(controls: Controls, cfg: Any) -> Encoders:
    """The text encoders; the prompts of samples are those of the pipeline that has the part too."""
    own = of(controls, cfg)
    text_to_image.check_parts(cfg)
    prompts = lambda models, examples, rng, cfg: encode_prompts(controls, models, examples, rng, cfg)  # noqa: E731
    return replace(text_to_image.encoders(cfg, key=own.pipeline), prompts=prompts)


def export_fn(controls: Controls, models: Models, examples: Iterable[Batch], path: Path, cfg: Any) -> str:
    """The part as a diffusers folder, with a condition to draw a first sample of."""
    from torchvision.utils import save_image

    own, s = entry(controls, cfg), settings(cfg)
    net = models[own.part]
    if "_name_or_path" in net.config:
        net.register_to_config(_name_or_path=portable(str(net.config["_name_or_path"]), cfg))
    net.save_pretrained(path)
    batch = next(iter(examples))
    if own.fills:
        before, image = inpainting.lines(batch, path, own.latent, cfg)
    else:
        save_image(batch["conditioning"][0] / 2 + 0.5, path / CONDITION)
        before = "from diffusers.utils import load_image\n"
        image = f'{own.image}=load_image({{path}} + "/{CONDITION}")'
    height, width = batch["conditioning"].shape[-2:]
    prompt = next((entry.prompt for entry in text_to_image.asked(cfg)), None) or batch["caption"][0]
    told = family(s).arguments(s, height, width) | {own.scale: float(s.conditioning_scale)}
    quoted = "".join(f", {key}={stable_diffusion.quoted(value)}" for key, value in told.items())
    call = f"prompt={stable_diffusion.quoted(prompt)}, {image}{quoted}"
    lines = family(s).base_lines(s, kind=own.pipeline, beside=(own.part, own.kind))
    return f'{lines}{before}pipeline({call}).images[0].save("sample.png")'
