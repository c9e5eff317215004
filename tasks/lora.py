"""Fine-tune low-rank adapters of a text-to-image model on captioned images.

    python loop.py lora --data.train-data-dir photos --lora.pretrained-model-name-or-path stabilityai/sdxl-turbo

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685). Stable Diffusion 1.x, 2.x, SDXL and
every flow-matching family of families/flow.py: which one a checkpoint is, what it predicts and which layers get adapters, its
own files and that table say. The export is a `pytorch_lora_weights.safetensors` for a pipeline's `load_lora_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop import configs
from oneloop.configs import Amount, BadInput, Base, Data, Range, Words, check, require
from oneloop.families import adapters, flow, offload, precision, stable_diffusion, text_to_image, transformer
from oneloop.families.objective import objective
from oneloop.families.settings import Adapters, Pretrained, check_apart
from oneloop.families.text_to_image import encode_captions, family, sample_fn, under
from oneloop.tasks import Batch, Encoders, Loss, Models, Optims, Rng, Task, mean, without_adapters
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings(Pretrained, Adapters):
    """The checkpoint, its adapters and their objective."""

    use_8bit_adam: bool = False
    """The same as --lora.optimizer adamw8bit."""
    preservation_weight: Amount = 0.0
    """Weight of a second loss: under preservation_prompt the model shall answer as its base does, on the same noised images.
    What the images do not teach stays as it was, without images of it."""
    preservation_prompt: Words = ""
    """What that is said of, such as the subject's class: `a dog` beside captions of one dog."""

    def __post_init__(self):
        check(self, "lora")
        given = self.target_modules
        require(given is None or len(given) > 0, "lora.target_modules", given, "at least one name, or all-linear")
        alone = given is None or "all-linear" not in given or len(given) == 1
        require(alone, "lora.target_modules", given, "all-linear without other names")
        numbers = {"rank_pattern": Range(1, 65_536), "alpha_pattern": Range(0.0, 3e38, without=0)}
        for name, limit in (numbers | {"learning_rate_pattern": Range(0.0, 3e38)}).items():
            adapters.check_pattern(f"lora.{name.replace('_', '-')}", getattr(self, name), limit)
        check_apart(self, "lora", APART)


APART = {
    "kohya": ("use_dora", "use_lokr"),  # programs do not agree on DoRA in that form
    "train_text_encoder": ("use_dora",),  # transformers 5 loses the lengths when it loads them
    "use_lokr": ("use_dora", "use_rslora", "dropout", "training_adapter"),
    "preservation_weight": ("train_text_encoder", "placeholder_tokens"),
    "init_lora": ("target_modules", "alpha", "rank_pattern", "alpha_pattern", "dropout", "use_dora", "use_rslora", "use_lokr"),
}
"""Settings -> those that mean nothing beside them."""


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for a few photographs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=100, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    lora: Settings = field(default_factory=Settings)

    def __post_init__(self):
        precision.check(self.lora, "lora", self.base)
        text_to_image.check(self)
        scaled = [entry.strength for entry in text_to_image.asked(self) if entry.strength != 1]
        if self.lora.use_dora and scaled:
            raise BadInput(f"--lora.use-dora with a sample at strength {scaled[0]:g}: DoRA has no strength; leave one out")


def check_adapters(s: Settings) -> None:
    """Refuse adapters that the checkpoint's family has no form for, or that are on none of its layers."""
    kind, own = stable_diffusion.kind(s), transformer.family(s) if family(s) is transformer else None
    if s.kohya and own and not own.comfyui:
        raise BadInput(f"--lora.kohya: other programs have no names known here for a {kind}; leave it out")
    if s.use_lokr and not (own and own.lokr):
        readers = ", ".join(name for name, other in flow.FAMILIES.items() if other.lokr)
        raise BadInput(f"--lora.use-lokr: the loader of a {kind} reads no LoKr; expected one of {readers}")
    if s.group_offload and not own:
        raise BadInput(f"--lora.group-offload: a {kind} has no transformer of blocks; leave it out")
    adapters.check_targets(s, "lora", family(s).TRAINED)


def encoders(cfg: Config) -> Encoders | None:
    """The text encoders, unless something of them trains."""
    s = cfg.lora
    text_to_image.check_base(cfg)
    check_adapters(s)
    if s.train_text_encoder or s.placeholder_tokens:
        return None
    text_to_image.check_parts(cfg)
    return text_to_image.encoders(cfg, encode_constants, bool(s.preservation_weight) and s.preservation_prompt)


def encode_constants(models: Models, cfg: Config) -> dict[str, Tensor]:
    """What every task's are, and the preservation prompt, under `preservation/`."""
    s = cfg.lora
    kept = encode_captions(models, [s.preservation_prompt], cfg) if s.preservation_weight else {}
    return text_to_image.encode_constants(models, cfg) | {f"preservation/{key}": x for key, x in kept.items()}


def make_models(cfg: Config, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The parts with adapters; without text encoders where `constants` has what is needed of them."""
    import torch

    s = cfg.lora
    text_to_image.check_base(cfg)
    check_adapters(s)
    own = family(s)
    models = text_to_image.load(cfg, cfg.base.mixed_precision, constants is None)
    if constants is None:
        with torch.no_grad():
            given = encode_constants(models, cfg)
    else:
        given = constants
        for path, flag in ((s.init_lora, "--lora.init-lora"), (s.training_adapter, "--lora.training-adapter")):
            if path and adapters.has_text(path):
                raise BadInput(f"{flag} {path}: has adapters of a text encoder; add --lora.train-text-encoder")
    if s.init_lora:
        adapters.read(own.pipeline(models, s), s.init_lora, "--lora.init-lora")
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
            raise BadInput(f"--lora.init-lora {s.init_lora}: has adapters of the {name}; add --lora.train-text-encoder")
    if s.training_adapter:
        adapters.read(own.pipeline(models, s), s.training_adapter, "--lora.training-adapter", "assistant")
    for name in (own.TRAINED, *own.ENCODERS):
        adapters.activate(models[name]) if name in models else None
    if s.group_offload:
        offload.hold(models["transformer"], flow.recomputable(models["transformer"]))
    texts = {name: under(name, given) for name in ("preservation", "prompts")}  # [1, ...] of the preservation prompt
    return models | {name: text_to_image.held(columns) for name, columns in texts.items() if columns}


def untouched(cfg: Config, constants: Mapping[str, Tensor] | None) -> Models:
    """The parts without adapters, stored as the run's are."""
    models, s = text_to_image.untouched(cfg, constants), cfg.lora
    module = models[family(s).TRAINED]
    precision.quantize(module, s.base_precision)
    precision.cast(module, s.base_precision)
    if s.group_offload:
        offload.hold(module, flow.recomputable(module))
    return models


def make_optim(models: Models, cfg: Config) -> Optims:
    s = cfg.lora
    groups = [group for module, rate in text_to_image.rates(models, s) for group in adapters.groups(module, rate, s)]
    return {"lora": optimizers.make(groups, s)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """The objective; before it, where asked, the loss that keeps the base's answers, whose gradient is added to its own."""
    s = cfg.lora
    if "prompt_embeds" not in batch:  # something of the text encoders trains
        batch = batch | encode_captions(models, batch["caption"], cfg)
    if s.preservation_weight:
        like = batch["prompt_embeds"]
        same = {
            key: x.to(like.dtype if x.is_floating_point() else x.dtype).expand(len(like), *x.shape[1:])
            for key, x in models["preservation"].named_buffers()
        }
        with without_adapters(models[family(s).TRAINED]) as base:
            kept = mean(objective(models, batch | same, rng, cfg, base), batch)
        yield Loss("lora", s.preservation_weight * kept, {"preservation": kept.detach()}, step=False)
    yield Loss("lora", mean(objective(models, batch, rng, cfg), batch))


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    settings = configs.portable(configs.to_dict(cfg), cfg)
    settings["base"]["output_dir"] = None
    adapters.save(models, path, cfg.lora, {"oneloop": json.dumps(settings)} | model_spec(cfg))
    lines = family(cfg.lora).load_lines(cfg.lora) + text_to_image.save_tokens(models, path, cfg)
    return lines + text_to_image.call_line(examples, cfg)


def remarks(models: Models, cfg: Config) -> Iterator[str]:
    yield from filter(None, [precision.remark(cfg.lora, cfg.base)])
    yield from text_to_image.remarks(models, cfg)


def model_spec(cfg: Config) -> dict[str, str]:
    """What the file says of itself, by the keys of Stability AI's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec). Without
    a date, so that equal runs write equal files."""
    s, trigger = cfg.lora, cfg.data.trigger
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


def merged(cfg: Config, folder: Path, strength: float, precision: str) -> tuple[Any, str]:
    """The checkpoint's pipeline with the adapters of an export added to its weights, times a strength, and the name of the part
    that trained; `precision` is what a transformer is read in: bf16, or no."""
    s, own = cfg.lora, family(cfg.lora)
    if (s.single_file or "").endswith(".gguf"):
        raise BadInput(f"--lora.single-file {s.single_file}: adapters cannot be merged into a GGUF file's quantized weights")
    models = text_to_image.load(cfg, precision)
    pipeline = own.pipeline(models, s)
    adapters.read(pipeline, str(folder), "the folder")
    for name in (own.TRAINED, *own.ENCODERS):
        adapters.merge(models[name], strength) if name in models else None
    return pipeline, own.TRAINED


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    card=lambda cfg: text_to_image.card(cfg, "lora", "text-to-image", "template:sd-lora"),
    encodings=text_to_image.ENCODINGS,
    encoders=encoders,
    prior=replace(text_to_image.PRIOR, load=untouched),
    float32=("vae",),
    columns=text_to_image.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=remarks,
)
