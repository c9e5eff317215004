"""Train a model to edit: images, what they were before, and the instruction between them.

    python loop.py edit --data.train-data-dir after --data.conditioning-data-dir before

Each image of `after` has its instruction as caption, and the source of the same name in `before`. What is trained, the
checkpoint decides (families/edit.py): Stable Diffusion and SDXL become InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800),
all of the UNet; FLUX.1 gets a control LoRA; FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit, which edit already, a LoRA. Any
transformer can be trained whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oneloop.configs import Amount, BadInput, Base, Data, Live, Range, check, require
from oneloop.families import (
    adapted,
    edit,
    edit_merged,
    edit_samples,
    edit_sources,
    hub,
    precision,
    stable_diffusion,
    text_to_image,
    transformer,
)
from oneloop.families.edit import trains
from oneloop.families.objective import objective
from oneloop.families.settings import OWN_TEXT, Adapters, Checkpoint, Pretrained, check_unused, flag
from oneloop.families.text_to_image import family, under
from oneloop.tasks import Batch, Encoders, Loss, Models, Optims, Rng, Task, mean
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings(edit_sources.Sources, Pretrained, Adapters):
    """The checkpoint, what of it trains, and its objective."""

    trains: Literal["all", "lora"] | None = None
    """All weights of the UNet or transformer, or adapters of it. None: all of a UNet, adapters of a transformer."""
    conditioning_dropout: Annotated[float, Range(0, 1 / 3)] | None = None
    """InstructPix2Pix: share of examples that the model sees without their instruction, that without their source, and that
    without both, each. None: 0.05, as published."""
    image_guidance_scale: Live[Amount | None] = None
    """InstructPix2Pix: strength of guidance by the source in samples, beside guidance_scale, that by the instruction. None: the
    default of the model's pipeline."""

    def __post_init__(self):
        check(self, "edit")
        adapted.check_settings(self, "edit")
        check_unused(self, "edit", OWN_TEXT, "edit trains no text encoder and no words")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for some hundred pairs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=20, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    edit: Settings = field(default_factory=Settings)

    def __post_init__(self):
        precision.check(self.edit, "edit", self.base)
        text_to_image.check(self, edit.WAYS)


def check_base(cfg: Config) -> None:
    """Refuse what cannot work, from the checkpoint's configs alone.

    Raises:
        BadInput: with the flag to change.
    """
    s = cfg.edit
    text_to_image.check_base(cfg, edit.WAYS)
    edit.check_first(s, "edit")
    edit_sources.check(s)
    least = edit.way(s).least
    require(cfg.data.resolution >= least, "data.resolution", cfg.data.resolution, f"at least {least}, as its pipeline asks")
    if family(s) is stable_diffusion:
        other = "no pipeline reads adapters of a widened UNet"
        require(s.trains != "lora", "edit.trains", s.trains, f"all of a {stable_diffusion.kind(s)}: {other}")
    else:
        for name in ("conditioning_dropout", "image_guidance_scale"):
            unset = getattr(s, name) is None
            require(unset, f"edit.{name}", getattr(s, name), f"nothing with a {stable_diffusion.kind(s)}; leave it out")
    if trains(s) == "lora":
        adapted.check_form(s, "edit")
        return
    for each in fields(Adapters):
        if not hasattr(Checkpoint, each.name) and each.name != "save_dtype" and getattr(s, each.name) != each.default:
            raise BadInput(f"{flag('edit', each.name)}: all weights train here, and no adapters; leave it out")
    text_to_image.check_unscaled(cfg)
    if (s.single_file or "").endswith(".gguf"):
        raise BadInput(f"--edit.single-file {s.single_file}: its weights are quantized and cannot train; expected .safetensors")


def multiple(cfg: Config) -> int:
    """What the images' sides are multiples of."""
    check_base(cfg)
    return family(cfg.edit).multiple(cfg.edit)


def encoders(cfg: Config) -> Encoders:
    """The text encoders, which are gone before the large model comes."""
    check_base(cfg)
    text_to_image.check_parts(cfg)
    key = (cfg.edit.image_guidance_scale, edit_sources.dropout(cfg.edit) > 0)
    return replace(text_to_image.encoders(cfg, encode_constants, key), prompts=edit_samples.encode_prompts)


def encode_constants(models: Models, cfg: Config) -> dict[str, Tensor]:
    """What every task's are, and an absent instruction's, under `null/`."""
    null = text_to_image.encode_captions(models, [""], cfg) if edit_sources.dropout(cfg.edit) else {}
    return text_to_image.encode_constants(models, cfg) | {f"null/{key}": x for key, x in null.items()}


def make_models(cfg: Config, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The parts, of which what trains is in float32; without text encoders where `constants` has what is needed of them."""
    import torch

    s, own, whole = cfg.edit, family(cfg.edit), trains(cfg.edit) == "all"
    check_base(cfg)
    models = text_to_image.load(cfg, "no" if whole else cfg.base.mixed_precision, constants is None)
    with torch.no_grad():
        given = encode_constants(models, cfg) if constants is None else constants
    edit.prepare(models, s)
    given = {**given, **edit.blank(s)}
    if whole:
        module = models[own.TRAINED]
        silent = transformer.unread(models, s, under("rehearsal", given)) if own is transformer else set()
        for key, p in module.named_parameters():
            p.requires_grad_(key not in silent)
    else:
        asked = cfg if s.init_lora else replace(cfg, edit=replace(s, target_modules=edit.targets(s)))
        adapted.adapt(models, asked, given, encoded=constants is not None)
    texts = {name: under(name, given) for name in ("null", "prompts")}  # [1, ...] of the absent instruction
    return models | {name: text_to_image.held(columns) for name, columns in texts.items() if columns}


def make_optim(models: Models, cfg: Config) -> Optims:
    s = cfg.edit
    groups = text_to_image.groups(models, s) if trains(s) == "all" else adapted.groups(models, s)
    return {"edit": optimizers.make(groups, s)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    yield Loss("edit", mean(objective(models, edit_sources.given(models, batch, rng, cfg), rng, cfg), batch))


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    import torch

    s, own = cfg.edit, family(cfg.edit)
    if trains(s) == "all":
        hub.save(models[own.TRAINED], path / own.TRAINED, getattr(torch, s.save_dtype))
        lines = own.base_lines(s, [own.TRAINED], edit.kind(s))
    else:
        adapted.save(models, path, cfg)
        lines = f"{own.base_lines(s, (), edit.kind(s))}{own.family(s).load_lora}\n"
    return lines + edit_samples.call_lines(examples, path, cfg)


merged = edit_merged.merged


def card(cfg: Config) -> dict[str, Any]:
    """What the hub's page of the result needs."""
    tags = ("lora", "image-to-image") if trains(cfg.edit) == "lora" else ("image-to-image",)
    return text_to_image.card(cfg, *tags) | {"pipeline_tag": "image-to-image"}


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=edit_samples.sample_fn,
    export_fn=export_fn,
    judged=False,
    card=card,
    encodings=edit_sources.encodings,
    encoders=encoders,
    float32=("vae",),
    columns=edit_sources.columns,
    resolve=edit.resolve,
    multiple=multiple,
    remarks=adapted.remarks,
)
