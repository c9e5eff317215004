"""What every task on a pretrained text-to-image model does alike: its checkpoint, captions and images on the way in, samples.

Which family a checkpoint is of, its own files say: stable_diffusion.py has the functions for Stable Diffusion and SDXL,
transformer.py those for every family of flow.py, under the same names. `s` are a task's settings (settings.py); what a `Task`
calls takes the whole `cfg`, whose group `s` is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from oneloop import configs
from oneloop.configs import BadInput, require
from oneloop.families import adapters, flow, hub, prompts, stable_diffusion, tokens, transformer
from oneloop.families.prompts import Prompt
from oneloop.families.settings import DIFFUSION, FLOW, TEXT, Pretrained, check_apart, flag
from oneloop.tasks import Batch, Column, Encoders, Encoding, Images, Models, Prior, Rng, hash64
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor, nn

COLUMNS = {"caption": Column("text", setting="data.caption_column")}
KNOWN = (*stable_diffusion.PIPELINES, *flow.FAMILIES)
"""Pipeline classes of text-to-image models."""
DATA = {"resolution": 512, "center_crop": True, "train_batch_size": 1, "interpolation": "lanczos"}
"""Settings of the data that are fit for photographs."""


def settings(cfg: Any) -> Pretrained:
    """The group of the task."""
    return getattr(cfg, configs.task_group(cfg))


def group_of(cfg: Any) -> str:
    """Its name in flags."""
    return configs.task_group(cfg).replace("_", "-")


def family(s: Pretrained) -> ModuleType:
    """The functions for the checkpoint's family, the same names in both modules: stable_diffusion or transformer."""
    return stable_diffusion if stable_diffusion.kind(s) in stable_diffusion.PIPELINES else transformer


def multiple(cfg: Any) -> int:
    """What the images' sides are multiples of."""
    check_base(cfg)
    return family(settings(cfg)).multiple(settings(cfg))


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint.


def check(cfg: Any, known: Collection[str] = KNOWN) -> None:
    """Refuse settings that do not fit each other or a checkpoint on this machine; one on the hub is looked up by `check_base`.

    Raises:
        BadInput: with the flag to change.
    """
    s, group = settings(cfg), group_of(cfg)
    optimizers.check(s, group, cfg.base)
    check_apart(s, group, {"prompts_file": ("validation_prompts",)})
    if all(map(stable_diffusion.is_local, (s.pretrained_vae_model_name_or_path or ".", s.pretrained_model_name_or_path))):
        check_base(cfg, known)
    given, several, name = cfg.base.num_samples, len(asked(cfg)), "prompts_file" if s.prompts_file else "validation_prompts"
    require(given >= several, "base.num_samples", given, f"at least {several}, one for each of {flag(group, name)}")


def check_unscaled(cfg: Any) -> None:
    """Refuse samples at a strength, for a task without adapters."""
    for entry in asked(cfg):
        if entry.strength != 1:
            raise BadInput(f"a sample at strength {entry.strength:g}: only adapters have a strength; leave it out")


def check_base(cfg: Any, known: Collection[str] = KNOWN) -> None:
    """Refuse what cannot work, from the checkpoint's configs alone; of pipelines the task knows these.

    Raises:
        BadInput: it is no diffusers model, or one of another kind, or the settings do not fit it.
    """
    s, group = settings(cfg), group_of(cfg)
    stable_diffusion.check_files(s, group, known)
    for name in (FLOW if family(s) is stable_diffusion else DIFFUSION) + (() if family(s).trainable(s) else TEXT):
        if (value := getattr(s, name)) != getattr(type(s), name):
            kind = stable_diffusion.kind(s)
            raise BadInput(f"{flag(group, name)} is {value!r}: a {kind} has no use for it; leave it out")
    family(s).check(s, group, cfg.data.resolution)
    with hub.readable(f"--{group}.pretrained-model-name-or-path", "a diffusers model", stable_diffusion.MODEL):
        tokens.check(s, group, stable_diffusion.kind(s), functools.partial(family(s).clip_tokenizers, s))
    asked(cfg, family(s).multiple(s))


def check_parts(cfg: Any, trained: bool = True) -> None:
    """Refuse parts that cannot be loaded, from headers alone; with what trains, or without."""
    s, group = settings(cfg), group_of(cfg)
    family(s).check_small(s, group)
    stable_diffusion.check_weights(s, group, ("vae", *family(s).ENCODERS, *((family(s).TRAINED,) if trained else ())))


def load(cfg: Any, precision: str, encoders: bool = True, made: Any = None) -> Models:
    """The frozen parts, with the text encoders or without; a transformer in bfloat16 where `precision` is bf16; and the new
    tokens' vectors, which train. `made`: what stands in the place of the UNet or transformer."""
    s, group = settings(cfg), group_of(cfg)
    if family(s) is transformer:
        models = transformer.load(s, group, precision, encoders, made)
    else:
        parts = ("vae", *(stable_diffusion.ENCODERS if encoders else ()), *(("unet",) if made is None else ()))
        models = stable_diffusion.load(s, group, parts) | ({} if made is None else {"unet": made})
    if s.placeholder_tokens:
        tokens.add(models, s, cfg.base.seed, family(s).clip_tokenizers(s, plain=True), family(s).TRAINED)
    return models


def text_layers(s: Pretrained, name: str) -> range:
    """Numbers of the layers of a text encoder that can learn: SDXL reads the last but one state of its first encoder."""
    unread = stable_diffusion.is_xl(s) and name == "text_encoder"
    return range(stable_diffusion.config(s, name)["num_hidden_layers"] - unread)


def reads(s: Pretrained, name: str, key: str) -> bool:
    """Whether a parameter of a text encoder decides what the model is told of a caption."""
    layer, own = re.search(r"\.layers\.(\d+)\.", f".{key}"), text_layers(s, name)
    last = "final_layer_norm" in key and len(own) < stable_diffusion.config(s, name)["num_hidden_layers"]
    return not last and (layer is None or int(layer[1]) in own)


def rates(models: Models, s: Pretrained) -> Iterator[tuple[Any, float]]:
    """The modules that may train, and their peak learning rates."""
    text = s.learning_rate / 2 if s.text_encoder_learning_rate is None else s.text_encoder_learning_rate
    yield models[family(s).TRAINED], s.learning_rate
    yield from ((models[name], text) for name in family(s).trainable(s) if name in models)
    own = s.learning_rate if s.token_learning_rate is None else s.token_learning_rate
    yield from ((models[name], own) for name in tokens.MODELS.values() if name in models)


def groups(models: Models, s: Pretrained) -> list[dict[str, Any]]:
    """What trains of them, as an optimizer's groups."""
    each = (([p for p in module.parameters() if p.requires_grad], rate) for module, rate in rates(models, s))
    return [{"params": params, "lr": rate} for params, rate in each if params]


# ---------------------------------------------------------------------------------------------------------------------
# New tokens.


def spliced(models: Models, cfg: Any) -> contextlib.AbstractContextManager[None]:
    """The text encoders with the new tokens' vectors, where there are some."""
    s = settings(cfg)
    return tokens.spliced(models, s, family(s).clip_tokenizers(s) if s.placeholder_tokens else {})


def save_tokens(models: Models, path: Path, cfg: Any) -> str:
    """Write the new tokens where there are some, and return the lines that load them into `pipeline`."""
    s = settings(cfg)
    return tokens.save(models, path, s, tuple(family(s).clip_tokenizers(s))) if s.placeholder_tokens else ""


def settle_tokens(pipeline: Any, folder: Path, cfg: Any) -> None:
    """The text encoders of a pipeline with the new tokens of an export, where there are some."""
    s = settings(cfg)
    tokens.settle(pipeline, folder, s, tuple(family(s).clip_tokenizers(s))) if s.placeholder_tokens else None


# ---------------------------------------------------------------------------------------------------------------------
# Text encoders that are gone before the large model comes.


def encoders(cfg: Any, constants: Callable[..., dict[str, Tensor]] | None = None, key: Any = None) -> Encoders:
    """The text encoders, for a run that does not train them. `constants` gives what else they make of settings, which `key`
    tells from others."""
    return Encoders(
        models=ENCODINGS["caption"].models,
        load=lambda cfg: stable_diffusion.load_parts(settings(cfg), group_of(cfg), family(settings(cfg)).ENCODERS),
        files=encoder_files,
        constants=constants or encode_constants,
        prompts=encode_prompts,
        key=lambda cfg: (
            *(caption_key(cfg), version("diffusers"), version("transformers")),
            *(asked(cfg), settings(cfg).negative_prompt, settings(cfg).guidance, settings(cfg).num_inference_steps),
            *(cfg.data.resolution, key),
        ),
    )


def encoder_files(cfg: Any) -> list[Any]:
    """What tells the text encoders' weights from others."""
    s = settings(cfg)
    parts = [part for part in family(s).ENCODERS if part in stable_diffusion.config(s, "")]
    return [s.variant, *((part, hub.stamp(s.pretrained_model_name_or_path, s.revision, part)) for part in parts)]


def encode_constants(models: Models, cfg: Any) -> dict[str, Tensor]:
    """A caption to find layers without gradient with, under `rehearsal/`."""
    s = settings(cfg)
    with spliced(models, cfg):
        made = transformer.rehearsed(models, s) if family(s) is transformer else {}
    return {f"rehearsal/{key}": x for key, x in made.items()}


def encode_prompts(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Any) -> dict[str, Tensor]:
    """The prompts of samples, under `prompts/`: what their pipelines ask of the text encoders."""
    made: dict[str, Tensor] = {}
    sample_fn(models | {"prompts": made}, examples, rng, cfg)
    return {f"prompts/{key}": x for key, x in made.items()}


def under(name: str, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constants with this name before the slash."""
    return {key.partition("/")[2]: x for key, x in constants.items() if key.startswith(f"{name}/")}


def held(columns: Mapping[str, Tensor]) -> Any:
    """A module that holds tensors beside the models, and moves with them; not in checkpoints. Its masks can still be read on
    the host (tasks.on_host)."""
    import torch

    module = torch.nn.Module()
    module.host = {key: x for key, x in columns.items() if not x.is_floating_point()}
    for key, x in columns.items():
        module.register_buffer(key, x, persistent=False)
    return module


def repeated(text: nn.Module, like: Tensor) -> dict[str, Tensor]:
    """The columns of one caption that `held` holds, for as many examples as `like` [B, ...] has and in its precision."""
    all_of = lambda x: x.expand(len(like), *x.shape[1:])  # noqa: E731
    columns = {key: all_of(x.to(like.dtype) if x.is_floating_point() else x) for key, x in text.named_buffers()}
    for key, x in text.host.items():
        columns[key].host = all_of(x)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Images and captions to columns.


def encode_images(models: Models, x: Tensor, cfg: Any) -> dict[str, Tensor]:
    """Images [B, 3, H, W] in [-1, 1] -> the family's columns of latents."""
    return family(settings(cfg)).encode_images(models, x, settings(cfg))


def encode_captions(models: Models, captions: list[str], cfg: Any) -> dict[str, Tensor]:
    """B captions -> the family's columns of text states."""
    with spliced(models, cfg):
        return family(settings(cfg)).encode_captions(models, captions, settings(cfg))


def caption_key(cfg: Any) -> Any:
    """What decides how a caption is encoded beside the encoders."""
    return family(settings(cfg)).caption_key(settings(cfg))


def remark(captions: list[str], cfg: Any) -> str | None:
    """What there is to say of all captions."""
    s = settings(cfg)
    for token in s.placeholder_tokens:
        if not any(token in caption for caption in captions):
            way = f"--data.trigger {token!r} puts it in front of each"
            return f"warning: no caption has {token}, whose vectors then learn nothing; {way}"
    return family(s).too_long(captions, s)


ENCODINGS = {
    "pixel_values": Encoding(fn=encode_images, models=("vae",), key=lambda cfg: stable_diffusion.kind(settings(cfg))),
    "caption": Encoding(
        fn=encode_captions,
        models=(*transformer.ENCODERS, *tokens.MODELS.values()),
        key=caption_key,
        remark=remark,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Samples, and what is said.


def asked(cfg: Any, multiple: int = 1) -> list[Prompt]:
    """The sample prompts that the settings give, whose sizes must be multiples of `multiple`."""
    s = settings(cfg)
    name = flag(group_of(cfg), "prompts_file" if s.prompts_file else "validation_prompts")
    return prompts.read(prompts.read_file(s.prompts_file, name) if s.prompts_file else s.validation_prompts, name, multiple)


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Any) -> Images:
    """The prompts of the settings in turn, or of the first captions; images of several sizes on white, in the largest."""
    import torch

    s, side = settings(cfg), cfg.data.resolution
    own, entries = family(s), asked(cfg)
    sizes = [(entry.height or side, entry.width or side) for entry in entries] or [(side, side)]
    canvas = torch.ones(len(rng), 3, *map(max, zip(*sizes, strict=True)))  # [B, 3, H, W]
    for part, how, drawn, texts, generators in alike(lambda: next(iter(examples))["caption"], rng, cfg):
        height, width = how.height or side, how.width or side
        with spliced(models, cfg), contextlib.ExitStack() as stack:
            for name in (own.TRAINED, *own.ENCODERS):
                if name in models:
                    stack.enter_context(adapters.scaled(models[name], {"default": how.strength, "assistant": 0.0}))
            images = own.sample(models, drawn, texts, generators, height, width)
        canvas[part, :, :height, :width] = images.cpu()
    return {"samples": canvas}  # in [0, 1]


def drawn_after(examples: Iterable[Batch], rng: Rng, cfg: Any) -> list[str]:
    """The texts of the samples of a grid."""
    return [text for *_, texts, _ in alike(lambda: next(iter(examples))["caption"], rng, cfg) for text in texts]


def alike(
    captions: Callable[[], list[str]], rng: Rng, cfg: Any
) -> Iterator[tuple[slice, Prompt, Pretrained, list[str], list[Any]]]:
    """The samples of a grid that are drawn together: which they are, what the first of them asks for, the settings with that,
    their prompts, and a generator each. `captions` gives those of the examples, where no prompts are asked for."""
    entries, first = asked(cfg), 0
    wanted = [entries[i % len(entries)] for i in rng.numbers] if entries else map(Prompt, captions())
    same = lambda pair: replace(pair[0], prompt="", seed=None)  # noqa: E731
    for how, pairs in itertools.groupby(zip(wanted, rng.generators("sample"), strict=True), same):
        some, generators = zip(*pairs, strict=True)
        for entry, generator in zip(some, generators, strict=True):
            generator.manual_seed(entry.seed) if entry.seed is not None else None
        told = {"negative_prompt": how.negative, "num_inference_steps": how.steps, "guidance_scale": how.guidance}
        drawn = replace(settings(cfg), **{key: value for key, value in told.items() if value is not None})
        yield slice(first, first + len(some)), how, drawn, [entry.prompt for entry in some], [*generators]
        first += len(some)


def class_settings(cfg: Any) -> Any:
    """The settings with which the prompt of class images is what samples are drawn of, with their steps and guidance."""
    entry = json.dumps({"prompt": cfg.data.class_prompt})  # in which nothing is read as a setting of its own
    own = replace(settings(cfg), validation_prompts=(entry,), prompts_file=None)
    return replace(cfg, **{configs.task_group(cfg): own})


def untouched(cfg: Any, constants: Mapping[str, Tensor] | None) -> Models:
    """The checkpoint's own parts; without text encoders where `constants` has what they make of the prompts."""
    models = load(cfg, cfg.base.mixed_precision, constants is None)
    return models if constants is None else models | {"prompts": held(under("prompts", constants))}


def drawn_of(cfg: Any) -> dict[str, str]:
    """The prompt of class images, and what tells the checkpoint's files from all others."""
    check_base(cfg)
    s = settings(cfg)
    every = [part for part, made in stable_diffusion.config(s, "").items() if isinstance(made, list) and made[-1]]
    parts = every if hub.is_local(s.pretrained_model_name_or_path) else [""]
    stamps = [hub.stamp(s.pretrained_model_name_or_path, s.revision, part) for part in parts]
    stamps += [hub.stamp(name, None, "") for _, name in stable_diffusion.instead(s).values()]
    files = hash64(stamps, s.variant, s.prediction_type, s.rescale_betas_zero_snr)
    return {"prompt": cfg.data.class_prompt, "model": f"{Path(s.pretrained_model_name_or_path).name}, files {files:016x}"}


PRIOR = Prior(
    settings=class_settings,
    load=untouched,
    of=drawn_of,
    how=lambda cfg: family(settings(cfg)).arguments(settings(cfg), cfg.data.resolution, cfg.data.resolution),
)


def call_line(examples: Iterable[Batch], cfg: Any) -> str:
    """The line of Python that draws a first sample with `pipeline`; for `str.format`."""
    s, side = settings(cfg), cfg.data.resolution
    prompt = next((entry.prompt for entry in asked(cfg)), None) or next(iter(examples))["caption"][0]
    how = "".join(f", {key}={value!r}" for key, value in family(s).arguments(s, side, side).items())
    how = "prompt=" + stable_diffusion.quoted(prompt) + how.replace("{", "{{").replace("}", "}}")
    return f'pipeline({how}).images[0].save("sample.png")'


def remarks(models: Models, cfg: Any) -> Iterator[str]:
    """What there is to say of the checkpoint before it trains."""
    yield from family(settings(cfg)).remarks(models, settings(cfg))


def card(cfg: Any, *tags: str) -> dict[str, Any]:
    """What the hub's page of the result needs. `base_model` is a name on the hub; for a folder there is none."""
    s, trigger = settings(cfg), cfg.data.trigger
    base = hub.card(s.pretrained_model_name_or_path, s.revision)
    prompt = {"instance_prompt": trigger} if trigger else {}
    return base | {"pipeline_tag": "text-to-image", "tags": [*tags, family(s).tag(s)]} | prompt
