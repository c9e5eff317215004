"""A pretrained text-to-image model whose adapters train: what the tasks that train them do alike, whatever their loss.

Hu et al. 2021, LoRA (arXiv:2106.09685). `s` are a task's settings, with those of settings.Adapters; what a `Task` calls takes
the whole `cfg`, whose group `s` is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop import configs
from oneloop.configs import BadInput, Range, require
from oneloop.families import adapters, flow, offload, precision, stable_diffusion, text_to_image, transformer
from oneloop.families.settings import check_apart
from oneloop.families.text_to_image import family, group_of, settings, under
from oneloop.tasks import Batch, Encoders, Models, Optims
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor

APART = {
    "kohya": ("use_dora", "use_lokr"),  # programs do not agree on DoRA in that form
    "train_text_encoder": ("use_dora",),  # transformers 5 loses the lengths when it loads them
    "use_lokr": ("use_dora", "use_rslora", "dropout", "training_adapter"),
    "init_lora": ("target_modules", "alpha", "rank_pattern", "alpha_pattern", "dropout", "use_dora", "use_rslora", "use_lokr"),
}
"""Settings -> those that mean nothing beside them."""


def check_settings(s: Any, group: str) -> None:
    """Refuse settings of adapters that do not fit each other, in a task's `__post_init__`."""
    given = s.target_modules
    require(given is None or len(given) > 0, f"{group}.target_modules", given, "at least one name, or all-linear")
    alone = given is None or "all-linear" not in given or len(given) == 1
    require(alone, f"{group}.target_modules", given, "all-linear without other names")
    numbers = {"rank_pattern": Range(1, 65_536), "alpha_pattern": Range(0.0, 3e38, without=0)}
    for name, limit in (numbers | {"learning_rate_pattern": Range(0.0, 3e38)}).items():
        adapters.check_pattern(f"{group}.{name.replace('_', '-')}", getattr(s, name), limit)
    check_apart(s, group, APART)


def check(cfg: Any) -> None:
    """Refuse settings that do not fit the run or a checkpoint on this machine, in the `__post_init__` of a task's Config."""
    s, group = settings(cfg), group_of(cfg)
    precision.check(s, group, cfg.base)
    text_to_image.check(cfg)
    scaled = [entry.strength for entry in text_to_image.asked(cfg) if entry.strength != 1]
    if s.use_dora and scaled:
        raise BadInput(f"--{group}.use-dora with a sample at strength {scaled[0]:g}: DoRA has no strength; leave one out")


def check_base(cfg: Any) -> None:
    """Refuse a checkpoint that does not fit, or adapters that its family has no form for, or that are on none of its layers."""
    text_to_image.check_base(cfg)
    check_form(settings(cfg), group_of(cfg))


def check_form(s: Any, group: str) -> None:
    """Refuse adapters that the checkpoint's family has no form for, or that are on none of its layers."""
    kind, own = stable_diffusion.kind(s), transformer.family(s) if family(s) is transformer else None
    if s.kohya and own and not own.comfyui:
        raise BadInput(f"--{group}.kohya: other programs have no names known here for a {kind}; leave it out")
    if s.use_lokr and not (own and own.lokr):
        readers = ", ".join(name for name, other in flow.FAMILIES.items() if other.lokr)
        raise BadInput(f"--{group}.use-lokr: the loader of a {kind} reads no LoKr; expected one of {readers}")
    if s.group_offload and not own:
        raise BadInput(f"--{group}.group-offload: a {kind} has no transformer of blocks; leave it out")
    adapters.check_targets(s, group, family(s).TRAINED)


Constants = Callable[[Models, Any], dict[str, "Tensor"]]
"""What the text encoders make of texts that the settings give, by `name/column` (text_to_image.encode_constants)."""


def encoders(cfg: Any, constants: Constants | None = None, key: Any = None) -> Encoders | None:
    """The text encoders, unless something of them trains. `constants` gives what they make of settings, which `key` tells from
    others."""
    check_base(cfg)
    if settings(cfg).train_text_encoder or settings(cfg).placeholder_tokens:
        return None
    text_to_image.check_parts(cfg)
    return text_to_image.encoders(cfg, constants, key)


def make(
    cfg: Any,
    given: Mapping[str, Tensor] | None = None,
    constants: Constants = text_to_image.encode_constants,
    texts: tuple[str, ...] = ("prompts",),
) -> Models:
    """The checkpoint's parts with adapters, which alone train; without text encoders where what they made is `given`. Of that
    the columns of `texts` stay beside the models, a module each."""
    import torch

    check_base(cfg)
    models, encoded = text_to_image.load(cfg, cfg.base.mixed_precision, given is None), given is not None
    with torch.no_grad():
        given = given if encoded else constants(models, cfg)
    adapt(models, cfg, given, encoded)
    columns = {name: under(name, given) for name in texts}
    return models | {name: text_to_image.held(column) for name, column in columns.items() if column}


def adapt(models: Models, cfg: Any, given: Mapping[str, Tensor], encoded: bool) -> None:
    """Give the parts the adapters that the settings ask for, in place; `given` has the columns to find layers without gradient
    with, and `encoded` says that the text encoders have done their work and are not there.

    Raises:
        BadInput: a file of adapters cannot be read, or has some of text encoders that do not train.
    """
    s, group, own = settings(cfg), group_of(cfg), family(settings(cfg))
    for path, flag in ((s.init_lora, f"--{group}.init-lora"), (s.training_adapter, f"--{group}.training-adapter")):
        if encoded and path and adapters.has_text(path):
            raise BadInput(f"{flag} {path}: has adapters of a text encoder; add --{group}.train-text-encoder")
    if s.init_lora:
        adapters.read(own.pipeline(models, s), s.init_lora, f"--{group}.init-lora")
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
            raise BadInput(f"--{group}.init-lora {s.init_lora}: has adapters of the {name}; add --{group}.train-text-encoder")
    if s.training_adapter:
        adapters.read(own.pipeline(models, s), s.training_adapter, f"--{group}.training-adapter", "assistant")
    for name in (own.TRAINED, *own.ENCODERS):
        adapters.activate(models[name]) if name in models else None
    if s.group_offload:
        offload.hold(models["transformer"], flow.recomputable(models["transformer"]))


def untouched(cfg: Any, constants: Mapping[str, Tensor] | None) -> Models:
    """The parts without adapters, stored as the run's are."""
    models, s = text_to_image.untouched(cfg, constants), settings(cfg)
    module = models[family(s).TRAINED]
    precision.quantize(module, s.base_precision)
    precision.cast(module, s.base_precision)
    if s.group_offload:
        offload.hold(module, flow.recomputable(module))
    return models


def make_optim(models: Models, cfg: Any) -> Optims:
    """One optimizer, called as the task is."""
    return {configs.task_group(cfg): optimizers.make(groups(models, settings(cfg)), settings(cfg))}


def groups(models: Models, s: Any) -> list[dict[str, Any]]:
    """The adapters as an optimizer's groups."""
    return [group for module, rate in text_to_image.rates(models, s) for group in adapters.groups(module, rate, s)]


def save(models: Models, path: Path, cfg: Any) -> None:
    """Write the adapters, and in the file of what run they are and what others want to know of it."""
    told = configs.portable(configs.to_dict(cfg), cfg)
    told["base"]["output_dir"] = None
    adapters.save(models, path, settings(cfg), {"oneloop": json.dumps(told)} | model_spec(cfg))


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Any) -> str:
    """Write the adapters; the lines that load them."""
    s = settings(cfg)
    save(models, path, cfg)
    lines = family(s).load_lines(s) + text_to_image.save_tokens(models, path, cfg)
    return lines + text_to_image.call_line(examples, cfg)


def remarks(models: Models, cfg: Any) -> Iterator[str]:
    """What there is to say of the checkpoint before its adapters train."""
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
        "title": Path(cfg.base.output_dir or configs.task_group(cfg)).name,
        "description": f"Adapters of {Path(s.pretrained_model_name_or_path).name}, trained with oneloop.",
        "resolution": f"{cfg.data.resolution}x{cfg.data.resolution}",
    }
    if trigger:
        said |= {"trigger_phrase": trigger, "usage_hint": f"Trigger: {trigger}"}
    if family(s) is stable_diffusion:
        said["prediction_type"] = {"v_prediction": "v"}.get(kind := stable_diffusion.prediction_type(s), kind)
    return {f"modelspec.{key}": value for key, value in said.items()}


def merged(
    cfg: Any, folder: Path, strength: float, precision: str, assembled: Callable[[Models, Any], Any] | None = None
) -> tuple[Any, str]:
    """The checkpoint's pipeline with the adapters of an export added to its weights, times a strength, and the name of the part
    that trained; `precision` is what a transformer is read in: bf16, or no. `assembled`: (models, settings) -> the pipeline,
    where it is another than the checkpoint's."""
    s, own, flag = settings(cfg), family(settings(cfg)), f"--{group_of(cfg)}.single-file"
    if (s.single_file or "").endswith(".gguf"):
        raise BadInput(f"{flag} {s.single_file}: adapters cannot be merged into a GGUF file's quantized weights")
    models = text_to_image.load(cfg, precision)
    pipeline = (assembled or own.pipeline)(models, s)
    adapters.read(pipeline, str(folder), "the folder")
    for name in (own.TRAINED, *own.ENCODERS):
        adapters.merge(models[name], strength) if name in models else None
    return pipeline, own.TRAINED
