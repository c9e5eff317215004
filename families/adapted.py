"""A pretrained model with adapters that train, as the tasks that train adapters make and export it. `s` are a task's settings
(settings.py); `cfg` has them as its group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop import configs
from oneloop.configs import BadInput, Range, require
from oneloop.families import adapters, flow, offload, precision, stable_diffusion, text_to_image, transformer
from oneloop.families.settings import Adapters, flag
from oneloop.families.text_to_image import family, group_of, settings, under
from oneloop.tasks import Models

if TYPE_CHECKING:
    from torch import Tensor

APART = {
    "kohya": ("use_dora", "use_lokr"),  # programs do not agree on DoRA in that form
    "train_text_encoder": ("use_dora",),  # transformers 5 loses the lengths when it loads them
    "use_lokr": ("use_dora", "use_rslora", "dropout", "training_adapter"),
    "init_lora": ("target_modules", "alpha", "rank_pattern", "alpha_pattern", "dropout", "use_dora", "use_rslora", "use_lokr"),
}
"""Settings -> those that mean nothing beside them."""


def check_settings(s: Adapters, group: str) -> None:
    """Refuse names of layers and numbers by layer that mean nothing, whatever the checkpoint.

    Raises:
        BadInput: with the flag to change.
    """
    given = s.target_modules
    require(given is None or len(given) > 0, f"{group}.target_modules", given, "at least one name, or all-linear")
    alone = given is None or "all-linear" not in given or len(given) == 1
    require(alone, f"{group}.target_modules", given, "all-linear without other names")
    numbers = {"rank_pattern": Range(1, 65_536), "alpha_pattern": Range(0.0, 3e38, without=0)}
    for name, limit in (numbers | {"learning_rate_pattern": Range(0.0, 3e38)}).items():
        adapters.check_pattern(flag(group, name).removeprefix("--"), getattr(s, name), limit)


def check(s: Adapters, group: str) -> None:
    """Refuse adapters that the checkpoint's family has no form for, or that are on none of its layers.

    Raises:
        BadInput: with the flag to change.
    """
    kind, own = stable_diffusion.kind(s), transformer.family(s) if family(s) is transformer else None
    if s.kohya and own and not own.comfyui:
        raise BadInput(f"{flag(group, 'kohya')}: other programs have no names known here for a {kind}; leave it out")
    if s.use_lokr and not (own and own.lokr):
        readers = ", ".join(name for name, other in flow.FAMILIES.items() if other.lokr)
        raise BadInput(f"{flag(group, 'use_lokr')}: the loader of a {kind} reads no LoKr; expected one of {readers}")
    if s.group_offload and not own:
        raise BadInput(f"{flag(group, 'group_offload')}: a {kind} has no transformer of blocks; leave it out")
    adapters.check_targets(s, group, family(s).TRAINED)


def adapt(models: Models, cfg: Any, given: Mapping[str, Tensor], encoded: bool) -> None:
    """Give the parts the adapters that the settings ask for, in place; `given` has the columns to find layers without gradient
    with, and `encoded` says that the text encoders have done their work and are not there.

    Raises:
        BadInput: a file of adapters cannot be read, or has some of text encoders that do not train.
    """
    s, own, name_of = settings(cfg), family(settings(cfg)), lambda name: flag(group_of(cfg), name)
    train_text = name_of("train_text_encoder")
    for path, name in ((s.init_lora, "init_lora"), (s.training_adapter, "training_adapter")):
        if encoded and path and adapters.has_text(path):
            raise BadInput(f"{name_of(name)} {path}: has adapters of a text encoder; add {train_text}")
    if s.init_lora:
        adapters.read(own.pipeline(models, s), s.init_lora, name_of("init_lora"))
    if own is transformer:
        transformer.adapt(models, s, under("rehearsal", given))
    elif not s.init_lora:
        adapters.adapt(models["unet"], s, s.target_modules or stable_diffusion.TARGETS)
    for name in own.ENCODERS:
        if name not in models:
            continue
        if s.train_text_encoder and name in own.trainable(s) and not adapters.tuned(models[name]):
            adapters.adapt(models[name], s, (adapters.text_target(text_to_image.text_layers(s, name)),))
        elif adapters.tuned(models[name]) and not s.train_text_encoder:
            raise BadInput(f"{name_of('init_lora')} {s.init_lora}: has adapters of the {name}; add {train_text}")
    if s.training_adapter:
        adapters.read(own.pipeline(models, s), s.training_adapter, name_of("training_adapter"), "assistant")
    for name in (own.TRAINED, *own.ENCODERS):
        adapters.activate(models[name]) if name in models else None
    if s.group_offload:
        offload.hold(models["transformer"], flow.recomputable(models["transformer"]))


def groups(models: Models, s: Any) -> list[dict[str, Any]]:
    """The adapters as an optimizer's groups."""
    return [group for module, rate in text_to_image.rates(models, s) for group in adapters.groups(module, rate, s)]


def save(models: Models, path: Path, cfg: Any) -> None:
    """Write the adapters, and in the file the settings and what others want to know of it."""
    told = configs.portable(configs.to_dict(cfg), cfg)
    told["base"]["output_dir"] = None
    adapters.save(models, path, settings(cfg), {"oneloop": json.dumps(told)} | model_spec(cfg))


def remarks(models: Models, cfg: Any) -> Iterator[str]:
    """What there is to say of the models before they train."""
    yield from filter(None, [precision.remark(settings(cfg), cfg.base)])
    yield from text_to_image.remarks(models, cfg)


def model_spec(cfg: Any) -> dict[str, str]:
    """What the file says of itself, by the keys of Stability AI's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec). Without
    a date, so that equal runs write equal files."""
    s, trigger = settings(cfg), cfg.data.trigger
    said = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family(s).architecture(s)}/lora",
        "implementation": "diffusers",
        "title": Path(cfg.base.output_dir or "lora").name,
        "description": f"Adapters of {Path(s.pretrained_model_name_or_path).name}, trained with oneloop.",
        "resolution": f"{cfg.data.resolution}x{cfg.data.resolution}",
    }
    if trigger:
        said |= {"trigger_phrase": trigger, "usage_hint": f"Trigger: {trigger}"}
    if family(s) is stable_diffusion:
        said["prediction_type"] = {"v_prediction": "v"}.get(kind := stable_diffusion.prediction_type(s), kind)
    return {f"modelspec.{key}": value for key, value in said.items()}
