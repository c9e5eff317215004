"""Fine-tune a text-to-image model itself, all of it or a part, or train one from scratch, on captioned images.

    python loop.py finetune --data.train-data-dir photos --finetune.trains attention

Stable Diffusion 1.x, 2.x, SDXL and every flow-matching family of families/flow.py, with the objective and the samples of
`lora`. The export has the trained UNet or transformer as a diffusers folder where all of it trains, else the weights that
changed, which load.py puts on the base; `python loop.py merge RUN --to FOLDER` writes the whole pipeline.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oneloop.configs import Amount, BadInput, Base, Data, Live, Name, check, read_model_config, require
from oneloop.families import adapters, hub, stable_diffusion, text_to_image, transformer
from oneloop.families.objective import objective
from oneloop.families.settings import Pretrained, check_apart
from oneloop.families.text_to_image import encode_captions, family, sample_fn, under
from oneloop.tasks import Batch, Encoders, Loss, Models, Optims, Rng, Task, mean
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor, nn

CHANGED = "changed.safetensors"
"""The weights that trained, by 'model.parameter', where that is not all of a model."""


@dataclass(frozen=True)
class Settings(Pretrained):
    """The checkpoint, what of it trains, and its objective."""

    learning_rate: Live[Amount] = 1e-5
    """Peak learning rate of what trains: of AdamW; about 1 with prodigy."""
    trains: tuple[Name, ...] = ("all",)
    """What of the UNet or transformer trains: all; attention; cross-attention (of models that have it); or modules, by the ends
    of their names or patterns (regular expressions for the whole name, such as `blocks\\.[0-3]`), with all that is inside."""
    from_scratch: bool = False
    """Begin with random weights in the place of the checkpoint's."""
    model_config: Name | None = None
    """With from_scratch: a config.json of the UNet or transformer, of another size than the checkpoint's."""
    save_dtype: Live[Literal["float32", "bfloat16", "float16"]] = "float32"
    """Precision of the exported UNet or transformer; the state to resume from has that of --base.weights."""

    def __post_init__(self):
        check(self, "finetune")
        require(len(self.trains) > 0, "finetune.trains", self.trains, "at least one name, or all")
        require("all" not in self.trains or len(self.trains) == 1, "finetune.trains", self.trains, "all without other names")
        scratch = self.model_config is None or self.from_scratch
        require(scratch, "finetune.model_config", self.model_config, "--finetune.from-scratch beside it")
        check_apart(self, "finetune", {"from_scratch": ("single_file", "trains")})


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for some hundred images."""

    base: Base = field(default_factory=lambda: Base(num_epochs=20, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    finetune: Settings = field(default_factory=Settings)

    def __post_init__(self):
        if self.finetune.from_scratch and self.data.num_class_images:
            raise BadInput("--finetune.from-scratch with --data.num-class-images: random weights draw nothing; leave one out")
        text_to_image.check(self)
        text_to_image.check_unscaled(self)


def own_config(s: Settings) -> dict[str, Any] | None:
    """The config of a model from scratch, where it is not the checkpoint's."""
    if s.model_config is None:
        return None
    kind = stable_diffusion.config(s, "")[family(s).TRAINED][1]
    given = read_model_config(s.model_config, "finetune.model-config", kind)
    theirs = stable_diffusion.config(s, family(s).TRAINED)
    for key in ("in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim"):
        if given.get(key, theirs.get(key)) != theirs.get(key):
            what = f"{key} is {given[key]}; expected {theirs.get(key)}, as the checkpoint's text encoders and autoencoder need"
            raise BadInput(f"--finetune.model-config {s.model_config}: its {what}")
    return given


def chosen(module: nn.Module, s: Settings) -> set[str]:
    """Names of the parameters that `trains` means.

    Raises:
        BadInput: one of its names is of no module with parameters.
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    names, modules = set(), dict(module.named_modules())
    for target in s.trains:
        if target == "all":
            here = [""]
        elif target == "attention":
            here = [name for name, m in modules.items() if isinstance(m, (Attention, AttentionModuleMixin)) and name]
        elif target == "cross-attention":
            here = [name for name in modules if name.endswith(".attn2")]
        else:
            here = [name for name in modules if re.fullmatch(adapters.expression(target), name)]
        inside = {f"{name}.{key}".lstrip(".") for name in here for key, _ in modules[name].named_parameters()}
        if not inside:
            such = ", ".join(sorted({name.split(".")[0] for name, _ in module.named_parameters()})[:6])
            raise BadInput(f"--finetune.trains {target!r}: a {type(module).__name__} has no such module; it has {such}, ...")
        names |= inside
    return names


def check_trains(s: Settings) -> None:
    """Refuse names of nothing, before weights are loaded."""
    for target in s.trains:
        try:
            re.compile(adapters.expression(target))
        except re.error as error:
            raise BadInput(f"--finetune.trains {target!r}: no regular expression: {error}") from None
    chosen(stable_diffusion.skeleton(s, "finetune", family(s).TRAINED, own_config(s)), s)


def encoders(cfg: Config) -> Encoders | None:
    """The text encoders, unless something of them trains."""
    text_to_image.check_base(cfg)
    check_trains(cfg.finetune)
    if cfg.finetune.train_text_encoder or cfg.finetune.placeholder_tokens:
        return None
    text_to_image.check_parts(cfg, trained=not cfg.finetune.from_scratch)
    return text_to_image.encoders(cfg)


def make_models(cfg: Config, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The parts, of which what trains is in float32; without text encoders where `constants` has what is needed of them."""
    import diffusers
    import torch

    s = cfg.finetune
    text_to_image.check_base(cfg)
    check_trains(s)
    own, made = family(s), None
    if s.from_scratch:
        kind = stable_diffusion.config(s, "")[own.TRAINED][1]
        made = getattr(diffusers, kind).from_config(own_config(s) or stable_diffusion.config(s, own.TRAINED))
    models = text_to_image.load(cfg, "no", constants is None, made)
    with torch.no_grad():
        given = text_to_image.encode_constants(models, cfg) if constants is None else constants
    module, wanted = models[own.TRAINED], chosen(models[own.TRAINED], s)
    wanted -= transformer.unread(models, s, under("rehearsal", given)) if own is transformer else set()
    for key, p in module.named_parameters():
        p.requires_grad_(key in wanted)
    for name in models.keys() & own.trainable(s) if s.train_text_encoder else ():
        for key, p in models[name].named_parameters():
            p.requires_grad_(text_to_image.reads(s, name, key))
    prompts = under("prompts", given)
    return models | ({"prompts": text_to_image.held(prompts)} if prompts else {})


def make_optim(models: Models, cfg: Config) -> Optims:
    return {"finetune": optimizers.make(text_to_image.groups(models, cfg.finetune), cfg.finetune)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    if "prompt_embeds" not in batch:  # something of the text encoders trains
        batch = batch | encode_captions(models, batch["caption"], cfg)
    yield Loss("finetune", mean(objective(models, batch, rng, cfg), batch))


def whole(s: Settings) -> list[str]:
    """Parts that an export has as folders."""
    text = [name for name in family(s).trainable(s) if stable_diffusion.config(s, "").get(name)] if s.train_text_encoder else []
    return [*((family(s).TRAINED,) if s.trains == ("all",) else ()), *text]


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    import torch
    from safetensors.torch import save_file

    s, part = cfg.finetune, family(cfg.finetune).TRAINED
    dtype, folders = getattr(torch, s.save_dtype), whole(s)
    for name in folders:
        if name == part:
            hub.save(models[part], path / part, dtype)
        else:  # in float32: transformers opens a model in what it was saved in, diffusers in float32
            module = models[name] if models[name].dtype == torch.float32 else copy.deepcopy(models[name]).float()
            module.save_pretrained(path / name)
    lines = family(s).base_lines(s, folders)
    if part not in folders:
        changed = {
            key: p.detach().to("cpu", dtype).contiguous() for key, p in models[part].named_parameters() if p.requires_grad
        }
        save_file(changed, path / CHANGED, {"format": "pt", "part": part})
        load = f'load_file({{path}} + "/{CHANGED}")'
        lines = f"from safetensors.torch import load_file\n{lines}pipeline.{part}.load_state_dict({load}, strict=False)\n"
    return lines + text_to_image.save_tokens(models, path, cfg) + text_to_image.call_line(examples, cfg)


def merged(cfg: Config, folder: Path, strength: float, precision: str) -> tuple[Any, str]:
    """The checkpoint's pipeline, its weights moved by this share of the way to those of an export, and the name of the part
    that trained; `precision` is what a transformer is read in: bf16, or no."""
    import torch
    from safetensors.torch import load_file

    s, own, kinds = cfg.finetune, family(cfg.finetune), stable_diffusion.config(cfg.finetune, "")
    parts = {name: hub.load(*kinds[name], str(folder), f"{folder}: {name}", subfolder=name) for name in whole(s)}
    if s.from_scratch and strength != 1:
        raise BadInput(f"--strength is {strength:g}; expected 1 of a model that was trained from scratch: it has no base")
    models = text_to_image.load(cfg, precision, made=parts.pop(own.TRAINED) if s.from_scratch else None)
    changed = {name: dict(module.named_parameters()) for name, module in parts.items()}
    if s.trains != ("all",):
        changed[own.TRAINED] = load_file(folder / CHANGED)
    with torch.no_grad():
        for name, state in changed.items():
            base = dict(models[name].named_parameters())
            for key, x in state.items():
                base[key].lerp_(x.to(base[key].dtype), strength)
    return own.pipeline(models, s), own.TRAINED


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    prompts=text_to_image.drawn_after,
    export_fn=export_fn,
    card=lambda cfg: text_to_image.card(cfg, "text-to-image"),
    encodings=text_to_image.ENCODINGS,
    encoders=encoders,
    prior=text_to_image.PRIOR,
    float32=("vae",),
    columns=text_to_image.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=text_to_image.remarks,
)
