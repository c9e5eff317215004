"""A student beside its teacher, of one checkpoint: adapters on its UNet or transformer, or a copy of that. What the tasks that
distil do alike; their settings have `trains`, which says which, and those of settings.Adapters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import require
from oneloop.families import adapted, hub, recorded, text_to_image
from oneloop.families.settings import OWN_TEXT, Adapters, Checkpoint, check_unused
from oneloop.families.text_to_image import family, settings, under
from oneloop.tasks import Batch, Encoders, Models, Rng, without_adapters

if TYPE_CHECKING:
    from torch import Tensor, nn

TEACHER = "teacher"
ADAPTERS = {f.name for f in fields(Adapters)} - {f.name for f in fields(Checkpoint)} - {"save_dtype"}
"""Settings of adapters alone."""


def check_settings(s: Any, group: str) -> None:
    """Refuse settings that do not fit each other, in a task's `__post_init__`."""
    check_unused(s, group, OWN_TEXT, "has no part in distillation")
    if s.trains == "all":
        check_unused(s, group, sorted(ADAPTERS), f"there are no adapters with --{group}.trains all")
    adapted.check_settings(s, group)


def encoders(cfg: Any, student: Mapping[str, Any]) -> Encoders:
    """The text encoders: what they make of nothing too, and the prompts as the pipeline of a student with this config asks for
    them."""
    made = adapted.encoders(cfg, encode_constants, settings(cfg).trains)

    def prompts(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Any) -> dict[str, Tensor]:
        told = {family(settings(cfg)).TRAINED: recorded.stand_in(dict(student), models["text_encoder"].dtype)}
        return text_to_image.encode_prompts(models | told, examples, rng, cfg)

    return replace(made, prompts=prompts)


def encode_constants(models: Models, cfg: Any) -> dict[str, Tensor]:
    """What every task's are, and the empty caption, which guidance compares with, under `null/`."""
    null = text_to_image.encode_captions(models, [""], cfg)
    return text_to_image.encode_constants(models, cfg) | {f"null/{key}": x for key, x in null.items()}


def make(cfg: Any, given: Mapping[str, Tensor] | None, student: Mapping[str, Any]) -> Models:
    """The teacher with adapters, or itself, frozen, as `teacher` and beside it a student of this config in float32, with its
    weights where it has them; without text encoders where what they made is `given`."""
    import torch

    texts = ("null", "prompts")
    if settings(cfg).trains == "adapters":
        return adapted.make(cfg, given, encode_constants, texts)
    models, part = text_to_image.load(cfg, cfg.base.mixed_precision, given is None), family(settings(cfg)).TRAINED
    if given is None:
        with torch.no_grad():
            given = encode_constants(models, cfg)
    made = type(models[part]).from_config(dict(student))
    made.load_state_dict(models[part].state_dict(), strict=False)
    columns = {name: under(name, given) for name in texts}
    held = {name: text_to_image.held(column) for name, column in columns.items() if column}
    return models | held | {TEACHER: models[part], part: made}


@contextlib.contextmanager
def teacher(models: Models, s: Any) -> Iterator[nn.Module]:
    """The model that is distilled, as a fixed function."""
    if s.trains == "all":
        yield models[TEACHER]
    else:
        with without_adapters(models[family(s).TRAINED]) as base:
            yield base


def twin(module: nn.Module) -> nn.Module:
    """Once more the frozen base, itself, with adapters that begin alike and train by themselves."""
    shared = [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]
    return copy.deepcopy(module, {id(x): x for x in shared})


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Any) -> str:
    """The adapters, or the student as a folder; the lines that load them."""
    import torch

    s, part = settings(cfg), family(settings(cfg)).TRAINED
    if s.trains == "adapters":
        return adapted.export_fn(models, examples, path, cfg)
    hub.save(models[part], path / part, getattr(torch, s.save_dtype))
    return family(s).base_lines(s, [part]) + text_to_image.call_line(examples, cfg)


def merged(cfg: Any, folder: Path, strength: float, precision: str) -> tuple[Any, str]:
    """The teacher's pipeline with the student in it, and the name of the part that trained."""
    s, part = settings(cfg), family(settings(cfg)).TRAINED
    if s.trains == "adapters":
        return adapted.merged(cfg, folder, strength, precision)
    require(strength == 1, "strength", strength, "1 of a model that was distilled as a whole")
    kind = text_to_image.stable_diffusion.config(s, "")[part]
    student = hub.load(*kind, str(folder), f"{folder}: {part}", subfolder=part)
    return family(s).pipeline(text_to_image.load(cfg, precision, made=student), s), part
