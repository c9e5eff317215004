"""What tasks on image conditions do alike: the part beside a frozen base (controls.py). Its conditions: control_conditions.py;
its samples and its export: control_samples.py. `s` are a task's settings, `Conditioned`; what a `Task` calls takes the whole
`cfg`, whose group `s` is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneloop.configs import Amount, BadInput, Live
from oneloop.families import adapters, flow, hub, inpainting, latents, stable_diffusion, text_to_image, transformer
from oneloop.families.controls import Control, controlled, narrow
from oneloop.families.settings import OWN_TEXT, Pretrained, check_unused, flag
from oneloop.families.text_to_image import family, group_of, settings
from oneloop.tasks import Models

if TYPE_CHECKING:
    from torch import Tensor, nn

Controls = Mapping[str, Control]


@dataclass(frozen=True)
class Conditioned(Pretrained):
    """Settings that tasks on image conditions share."""

    conditioning_scale: Live[Amount] = 1.0
    """How much the condition counts in samples; in training it counts 1."""


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


def given(s: Any, own: Control) -> str | None:
    """What the part starts from, in place of the base: the task's own setting says so."""
    return getattr(s, f"{own.part}_model_name_or_path")


def of(controls: Controls, cfg: Any) -> Control:
    """The entry of the checkpoint's family.

    Raises:
        BadInput: it has none, or the settings, the checkpoint and the part that is given do not fit each other.
    """
    text_to_image.check_base(cfg)
    s, group = settings(cfg), group_of(cfg)
    check_unused(s, group, OWN_TEXT, "what sees the condition trains, and nothing of the text")
    kind = stable_diffusion.kind(s)
    if kind not in controls:
        where = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path} is a {kind}"
        raise BadInput(f"{where}, for which diffusers has no such model; expected one of {', '.join(controls)}")
    for prompt in text_to_image.asked(cfg):
        if prompt.width or prompt.height:
            raise BadInput(f"a sample of {prompt.width} x {prompt.height}: it has the size of its condition; leave that out")
    own = entry(controls, cfg)
    if own is None:
        able = ", ".join(base for base, other in controls.items() if other.inpainting)
        expected = f"expected one of {able}" if able else f"{group} trains none; leave it out"
        raise BadInput(
            f"--data.conditioning {inpainting.NAME}: no pipeline tells a {controls[kind].kind} what is hidden; {expected}"
        )
    inpainting.check(cfg) if own.fills else None
    for name in ("num_layers", "num_single_layers"):
        if name not in own.layers and (value := getattr(s, name, None)) is not None:
            raise BadInput(f"{flag(group, name)} is {value}: a {kind} has no use for it; leave it out")
    if given(s, own):
        check_given(s, own, group, kind)
    else:
        blank(s, own, group)
    return own


def entry(controls: Controls, cfg: Any) -> Control:
    """The same, of settings that were checked."""
    own = controls[stable_diffusion.kind(settings(cfg))]
    return own.inpainting if inpainting.asked(cfg) else own


def check_given(s: Any, own: Control, group: str, base: str) -> None:
    """Refuse a part of another family, or with other conditions, by its config alone."""
    name, what = given(s, own), f"{flag(group, f'{own.part}_model_name_or_path')} {given(s, own)}"
    with hub.readable(what, f"a {own.kind}", f"a folder that {own.kind}.save_pretrained wrote, or its name on the hub"):
        config = hub.read(name, None, "config.json")
        if (made := config.get("_class_name")) != own.kind:
            raise BadInput(f"{what} is a {made}; expected a {own.kind}, as a {base} takes")
    new = json.loads(json.dumps(dict(blank(s, own, group).config), default=str))
    for key in own.same:
        size = len if key == "conditioning_embedding_out_channels" else lambda value: value  # each but one halves the image
        if key in new and size(config.get(key, new[key])) != size(new[key]):
            expected = f"{new[key]}, as one for {s.pretrained_model_name_or_path} has"
            raise BadInput(f"{what}: its {key} is {config[key]}; expected {expected}")


def blank(s: Any, own: Control, group: str) -> nn.Module:
    """A new part without weights.

    Raises:
        BadInput: diffusers makes none for this base.
    """
    import torch

    name = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}"
    with torch.device("meta"), hub.readable(name, f"a base for a {own.kind}", "the layers of a published one"):
        return own.start(stable_diffusion.skeleton(s, group, family(s).TRAINED), s, stable_diffusion.multiple(s))


# ---------------------------------------------------------------------------------------------------------------------
# The models.


def make_models(controls: Controls, cfg: Any, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The frozen base and the part beside it, which trains in float32."""
    import torch

    own, s = of(controls, cfg), settings(cfg)
    models = text_to_image.load(cfg, cfg.base.mixed_precision, constants is None)
    base = models[family(s).TRAINED]
    with torch.no_grad():
        told = text_to_image.encode_constants(models, cfg) if constants is None else constants
    what = f"{flag(group_of(cfg), f'{own.part}_model_name_or_path')} {given(s, own)}"
    if given(s, own):
        net = hub.load("diffusers", own.kind, given(s, own), what).float()
    else:
        net = own.start(base, s, stable_diffusion.multiple(s))
    net.requires_grad_(True)
    own.settle(net, base)
    base.register_forward_pre_hook(narrow, with_kwargs=True)
    models[own.part] = net
    if family(s) is transformer:
        net.enable_gradient_checkpointing = functools.partial(flow.recompute, net)
        still(models, own, s, text_to_image.under("rehearsal", told))
    if cfg.base.gradient_checkpointing:  # the gradient goes through it
        base.enable_gradient_checkpointing()
    prompts = text_to_image.under("prompts", told)
    return models | ({"prompts": text_to_image.held(prompts)} if prompts else {})


def still(models: Models, own: Control, s: Pretrained, columns: flow.Columns) -> None:
    """Freeze what no gradient reaches, as the text in a last block, whose output nothing reads: several processes would wait
    for it."""
    import torch

    net, side = models[own.part], transformer.family(s).multiple
    with torch.no_grad():
        one = latents.encode(transformer.family(s), models["vae"], torch.zeros(1, 3, side, side))["latent_mean"]
    one = torch.cat([one, one[:, :1]], 1) if own.fills else one
    condition = one[..., :1, :1].expand(1, -1, *[8 * transformer.family(s).patch] * 2)  # [1, C, h, w]
    both = controlled(models, own, condition, s)
    leaves = [name for name, m in net.named_modules() if not [*m.children()] and [*m.parameters()]]
    for name in adapters.silent(net, leaves, functools.partial(transformer.rehearsal, both, s, dict(columns)), zero=False):
        net.get_submodule(name).requires_grad_(False)
