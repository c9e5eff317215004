"""A checkpoint of a family of flow.py as a task uses it: what is refused, its parts, captions on the way in, images on the way
out. The counterpart of stable_diffusion.py, with its names; `s` are a task's settings (settings.py).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput, require
from oneloop.families import adapters, flow, hub, latents, recorded, tokens
from oneloop.families.flow import Family
from oneloop.families.settings import Adapters, Pretrained
from oneloop.families.stable_diffusion import MODEL, config, load_parts, pipeline_lines
from oneloop.maths import flow as maths
from oneloop.tasks import Models, unwrap

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TRAINED = "transformer"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def family(s: Pretrained) -> Family:
    """The family that the checkpoint's model_index.json names."""
    return flow.of(config(s, "")["_class_name"])


def distilled(s: Pretrained) -> bool:
    """Whether the checkpoint was distilled to few steps, by its own configs."""
    return family(s).distilled(config(s, ""), config(s, TRAINED), config(s, "scheduler"))


def tag(s: Pretrained) -> str:
    """The family's name as the hub's pages have it."""
    return config(s, "")["_class_name"].removesuffix("Pipeline").lower()


def architecture(s: Pretrained) -> str:
    """The family's name in ModelSpec: what other trainers write where they write one, else that of its pages."""
    flux = "flux-1-schnell" if distilled(s) else "flux-1-dev"
    return {"flux": flux, "stablediffusion3": "stable-diffusion-3-medium"}.get(tag(s), tag(s))


def trainable(s: Pretrained) -> tuple[str, ...]:
    """Text encoders that can train: the CLIPs, where the official script trains them."""
    return ENCODERS[: family(s).clips]


def multiple(s: Pretrained) -> int:
    """What an image's height and width must be multiples of."""
    return family(s).multiple


def check(s: Pretrained, group: str, resolution: int) -> None:
    """Refuse what cannot work, from the checkpoint's configs alone.

    Raises:
        BadInput: the autoencoder or the resolution does not fit, or a text encoder is missing.
    """
    index, own = config(s, ""), family(s)
    flag = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}"
    own_vae = s.pretrained_vae_model_name_or_path
    if own_vae and not hub.is_file(own_vae) and index["vae"][1] != "AutoencoderKL":
        raise BadInput(f"--{group}.pretrained-vae-model-name-or-path: {flag} has an {index['vae'][1]}; leave the flag out")
    require(resolution % own.multiple == 0, "data.resolution", resolution, f"a multiple of {own.multiple}")
    for name in ENCODERS[: own.encoders]:
        if not (index.get(name) or [None, None])[1]:
            raise BadInput(f"{flag}: has no {name}; expected a folder that save_pretrained of its whole pipeline wrote")


def check_small(s: Pretrained, group: str) -> None:
    """Refuse a scheduler or tokenizers that cannot be opened."""
    with hub.readable(f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}", "a diffusers model", MODEL):
        parts(s)


def load(s: Pretrained, group: str, precision: str, encoders: bool = True, made: nn.Module | None = None) -> Models:
    """The frozen parts, with the text encoders or without, the transformer, or the one that is `made`, mended for training and
    with an exact `enable_gradient_checkpointing`.

    The transformer is read in bfloat16 where that is the run's `precision` by name, and takes half the memory while it loads.
    """
    import torch

    narrow = {"torch_dtype": torch.bfloat16} if precision == "bf16" else {}
    check_small(s, group)
    models = load_parts(s, group, ("vae", *(ENCODERS if encoders else ())))
    models |= load_parts(s, group, (TRAINED,), **narrow) if made is None else {TRAINED: made}
    transformer, vae = models[TRAINED], models["vae"]
    family(s).prepare(transformer)
    transformer.enable_gradient_checkpointing = functools.partial(flow.recompute, transformer)
    vae.decode, vae.encode = (functools.partial(as_its_weights, vae, call) for call in (vae.decode, vae.encode))
    return models


def as_its_weights(vae: nn.Module, function: Any, z: Tensor, *args: Any, **more: Any) -> Any:
    """A call of the autoencoder in the precision of its weights, whatever the run's: pipelines do not all see to that."""
    import torch

    with torch.autocast(z.device.type, enabled=False):
        return function(z.to(vae.dtype), *args, **more)


@functools.cache
def _parts(
    name: str, revision: str | None, made_of: tuple[tuple[str, str, str], ...], new: tuple[str, ...], clips: tuple[str, ...]
) -> dict[str, Any]:
    """Parts without weights: part -> what `library`.`class` opens in its folder; the tokenizers `clips` with new tokens."""
    made = {
        part: getattr(importlib.import_module(library), kind).from_pretrained(name, subfolder=part, revision=revision)
        for part, library, kind in made_of
    }
    return made | {part: tokens.extended(made[part], new) for part in clips}


def parts(s: Pretrained, plain: bool = False) -> dict[str, Any]:
    """What the checkpoint's pipeline is made of beside modules: tokenizers, scheduler, guiders and its own settings. `plain`:
    without new tokens."""
    index = {key: value for key, value in config(s, "").items() if not key.startswith("_")}
    modules = {key: x for key, x in index.items() if isinstance(x, list) and (x[1] is None or isinstance(x[0], str))}
    wanted = lambda key: key.startswith(("tokenizer", "processor")) or key.endswith(("scheduler", "guider"))  # noqa: E731
    small = {key: x for key, x in modules.items() if wanted(key)}
    made_of = tuple((part, library, kind) for part, (library, kind) in small.items() if kind)
    new, clips = () if plain else tokens.names(s), tuple(tokens.tokenizer(name) for name in inverted(s))
    opened = _parts(s.pretrained_model_name_or_path, s.revision, made_of, new, clips)
    return {key: x for key, x in index.items() if key not in modules} | opened


def inverted(s: Pretrained) -> tuple[str, ...]:
    """Text encoders for which the pipeline loads new tokens."""
    return trainable(s) if family(s).inversion else ()


def clip_tokenizers(s: Pretrained, plain: bool = False) -> dict[str, Any]:
    """Text encoder -> its tokenizer, of those for which the pipeline loads new tokens."""
    return {name: parts(s, plain)[tokens.tokenizer(name)] for name in inverted(s)}


def pipeline(models: Models, s: Pretrained, vae: bool = True, kind: str | None = None) -> Any:
    """The diffusers pipeline of these very modules, with a scheduler of its own; of text encoders alone, it encodes prompts.
    `kind`: its class, where it is not the checkpoint's."""
    scheduler = parts(s)["scheduler"]
    modules = {name: unwrap(m) for name, m in models.items() if name in (TRAINED, *ENCODERS) or (vae and name == "vae")}
    for name in (TRAINED, "vae")[: 1 + vae]:
        if name not in modules:
            modules[name] = recorded.stand_in(config(s, name), next(iter(models.values())).dtype)
    fresh = {"scheduler": type(scheduler).from_config(scheduler.config)}
    made = flow.assemble(kind or config(s, "")["_class_name"], parts(s) | modules | fresh)
    for name in ENCODERS:
        if name in models and models[name] is not unwrap(models[name]):  # it trains in several processes
            setattr(made, name, Wrapped(models[name]))
    if "prompts" in models:
        recorded.attach(made, models["prompts"])
    return made


class Wrapped:
    """A module that is called through the wrapper that reduces its gradients, and else is the module itself."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.module(*args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(unwrap(self.module), name)


# ---------------------------------------------------------------------------------------------------------------------
# Images and captions to columns.


def encode_images(models: Models, x: Tensor, s: Pretrained) -> dict[str, Tensor]:
    """Images [B, 3, H, W] in [-1, 1] -> `latent_mean` and, where the family trains on samples, `latent_std`, [B, C, h, w]."""
    return latents.encode(family(s), models["vae"], x)


def encode_captions(models: Models, captions: list[str], s: Pretrained, length: int | None = None) -> dict[str, Tensor]:
    """B captions -> the family's columns, [B, T, ...]; T is `length`, else the settings', else the family's."""
    return family(s).text(pipeline(models, s, vae=False), captions, length or s.max_sequence_length or family(s).length)


def caption_key(s: Pretrained) -> tuple[Any, ...]:
    """What decides how a caption is encoded beside the encoders: tokenizers, length, and diffusers' own `encode_prompt`."""
    import diffusers

    words = []
    for part, tokenizer in sorted(parts(s).items()):
        if part == "processor":
            words.append(sorted(tokenizer.image_processor.to_dict().items(), key=str))
        if part.startswith("tokenizer"):
            inner = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
            if fast := getattr(inner, "backend_tokenizer", None):
                fast.no_padding(), fast.no_truncation()  # which the last call left
            vocabulary = fast.to_str() if fast else sorted(inner.get_vocab().items())
            words += [vocabulary, inner.model_max_length, inner.padding_side, getattr(tokenizer, "chat_template", None)]
    index, width = config(s, ""), config(s, TRAINED).get("joint_attention_dim")
    return (*words, diffusers.__version__, s.max_sequence_length, width, sorted((k, str(v)) for k, v in index.items()))


def too_long(captions: list[str], s: Pretrained) -> None:
    """Captions longer than the encoder sees are not counted here: templates decide how long they are."""


def remarks(models: Models, s: Pretrained) -> Iterator[str]:
    """What there is to say of the checkpoint before it trains."""
    if distilled(s):
        yield (
            f"warning: {s.pretrained_model_name_or_path} is distilled to few steps, and training unlearns that: prefer to "
            f"train its base and to load the adapters into this one"
        )
    adapted = getattr(models[TRAINED], "peft_config", {}).get("default")
    if names := sorted((adapted and adapted.exclude_modules) or ()):
        yield f"no adapters for {', '.join(names)}: no gradient reaches {'it' if len(names) == 1 else 'them'}"


# ---------------------------------------------------------------------------------------------------------------------
# Which layers train.


def adapt(models: Models, s: Adapters, columns: flow.Columns) -> None:
    """Give the transformer its adapters: those of a file, or on the layers that are asked for, or the family's own; but none to
    layers that would get no gradient: they would learn nothing, and several processes would wait for them. `columns`: those
    of `rehearsed`."""
    transformer, targets = models[TRAINED], s.target_modules or family(s).targets
    names = list(adapters.tuned(transformer)) or adapters.layers(transformer, targets)
    silent = adapters.silent(transformer, names, functools.partial(rehearsal, models, s, columns))
    if not s.init_lora:
        adapters.adapt(transformer, s, targets, silent)
    elif silent:
        adapters.drop(transformer, silent)
        transformer.peft_config["default"].exclude_modules = silent


def rehearsed(models: Models, s: Pretrained) -> dict[str, Tensor]:
    """A short caption's columns, [1, 32, ...]."""
    return encode_captions(models, ['the word "dog"'], s, length=32)


def rehearsal(models: Models, s: Pretrained, columns: flow.Columns) -> Tensor:
    """Something to differentiate that uses the whole transformer, on the CPU in about the time that loading took: the velocity
    of one image of 8 x 8 tokens under a short caption, whose columns are given."""
    import torch

    own, transformer = family(s), models[TRAINED]
    with torch.no_grad():
        channels = encode_images(models, torch.zeros(1, 3, own.multiple, own.multiple), s)["latent_mean"].shape[1]
    dtype = transformer.dtype
    columns = {key: x.to(dtype) if x.is_floating_point() else x for key, x in columns.items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 8 * own.patch, 8 * own.patch, generator=generator)  # [1, C, h, w]
    x = latents.beside(x, columns)
    columns["target_size"] = torch.tensor([[8 * own.multiple] * 2])
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        return own.velocity(transformer, x, torch.tensor([0.5]), columns, 1.0).float().square().mean()


def unread(models: Models, s: Pretrained, columns: flow.Columns) -> set[str]:
    """Parameters of the transformer that no gradient reaches: several processes would wait for them."""
    module = models[TRAINED]
    leaves = [name for name, m in module.named_modules() if not [*m.children()] and [*m.parameters()]]
    loss = functools.partial(rehearsal, models, s, dict(columns))
    silent = adapters.silent(module, leaves, loss, zero=False)
    return {f"{name}.{key}" for name in silent for key, _ in module.get_submodule(name).named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# The noise level, and samples.


def scheme(s: Pretrained) -> str:
    """The official scripts' weighting_scheme: a density of sigma (logit_normal, mode), or a weight (sigma_sqrt, cosmap)."""
    return s.weighting_scheme or family(s).weighting


def noise_level(s: Pretrained, u: Tensor, shape: torch.Size) -> Tensor:
    """Uniform numbers [B] -> sigma [B] of the run's density, shifted as inference shifts it for latents of this shape."""
    own = family(s)
    name = s.density or (scheme(s) if scheme(s) in maths.DENSITIES[:2] else "uniform")
    tokens = shape[-2] * shape[-1] // own.patch**2
    alpha = s.flow_shift or own.shift(parts(s)["scheduler"], tokens, config(s, ""))
    return maths.shift(maths.density(name, u, s.logit_mean, s.logit_std, s.mode_scale), alpha)


def weight(s: Pretrained, sigma: Tensor) -> Tensor:
    """How much an example of this sigma counts, [B]; sigma below 1 / 1000, the last step of a thousand, counts as that."""
    name = scheme(s) if scheme(s) in maths.WEIGHTS else "none"
    return maths.weight(name, sigma.clamp(min=1e-3))


def arguments(s: Pretrained, height: int, width: int) -> dict[str, Any]:
    """How the pipeline is called to draw one sample."""
    import diffusers

    own, kind = family(s), config(s, "")["_class_name"]
    known = inspect.signature(getattr(diffusers, kind).__call__).parameters
    told = flow.samples(kind, own)
    if distilled(s):
        told = {"num_inference_steps": own.few_steps, own.guided_by: own.off}
    asked = {"num_inference_steps": s.num_inference_steps, own.guided_by: s.guidance}
    asked |= {"max_sequence_length": s.max_sequence_length} if "max_sequence_length" in known else {}
    asked |= {"negative_prompt": s.negative_prompt or own.negative} if "negative_prompt" in known else {}
    return {"height": height, "width": width, **told, **{k: v for k, v in asked.items() if v is not None}, **own.call}


def sample(models: Models, s: Pretrained, prompts: list[str], generators: list[Any], height: int, width: int) -> Tensor:
    """Images of the prompts, [B, 3, height, width] in [0, 1], a generator each."""
    import torch

    drawn, call = pipeline(models, s), arguments(s, height, width)
    if config(s, "")["_class_name"] == "HiDreamImagePipeline":  # it scales every size to the area of this many latents
        drawn.default_sample_size = (height * width) ** 0.5 / drawn.vae_scale_factor
    images, size = [], len(prompts) if family(s).together else 1
    for start in range(0, len(prompts), size):
        some = slice(start, start + size)
        negative = {"negative_prompt": [call["negative_prompt"]] * len(prompts[some])} if "negative_prompt" in call else {}
        with recorded.ended():
            images.append(drawn(prompt=prompts[some], generator=generators[some], output_type="pt", **call | negative).images)
    return torch.cat(images) if images else torch.zeros(len(prompts), 3, height, width)


def load_lines(s: Pretrained) -> str:
    """The lines of Python that make `pipeline` of the checkpoint and load the adapters of the folder `path`; for
    `str.format`."""
    return f"{pipeline_lines(s)}{family(s).load_lora}\n"


base_lines = pipeline_lines
