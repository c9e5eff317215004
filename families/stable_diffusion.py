"""A checkpoint of Stable Diffusion or SDXL as a task uses it: its parts, images and captions on the way in, images on the way
out. Plain functions; `s` are a task's settings (settings.py).

Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models (arXiv:2112.10752); Podell et al. 2023, SDXL
(arXiv:2307.01952).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput, require
from oneloop.families import hub, recorded, tokens
from oneloop.families.hub import is_local, read
from oneloop.families.settings import Pretrained
from oneloop.tasks import Batch, Models, transfer, unwrap

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRAINED = "unet"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
ENCODERS = ("text_encoder", "text_encoder_2")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint: what it says of itself, and its parts.


def config(s: Pretrained, part: str) -> dict[str, Any]:
    """The config of a part of the checkpoint, or of the autoencoder that stands in for its own."""
    if part == "vae" and (s.pretrained_vae_model_name_or_path and not hub.is_file(s.pretrained_vae_model_name_or_path)):
        return read(s.pretrained_vae_model_name_or_path, None, "config.json")
    files = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    return read(s.pretrained_model_name_or_path, s.revision, files.get(part, f"{part}/config.json"))


def kind(s: Pretrained) -> str:
    """The class of the checkpoint's pipeline, by its own word."""
    return config(s, "")["_class_name"]


def is_xl(s: Pretrained) -> bool:
    """Whether the checkpoint is an SDXL."""
    return kind(s) == "StableDiffusionXLPipeline"


def check_files(s: Pretrained, group: str, known: Collection[str]) -> None:
    """Refuse what is not a diffusers model of one of the known pipelines, from its configs alone."""
    check_vae(s, group)
    for setting, own in instead(s).values():
        fits = Path(own).expanduser().is_file() if hub.is_file(own) else setting != "single-file"
        require(fits, f"{group}.{setting}", own, "a .safetensors or .gguf file that is there")
    flag = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}"
    with hub.readable(flag, "a diffusers model", MODEL):
        index = config(s, "")
        if (made := index.get("_class_name")) not in known:
            raise BadInput(f"{flag} is a {made}; expected one of {', '.join(known)}")
        for part in ("vae", "unet", "transformer", "scheduler"):
            config(s, part) if index.get(part) else None


def check(s: Pretrained, group: str, resolution: int) -> None:
    """Refuse what cannot work, from the configs of a checkpoint of Stable Diffusion alone.

    Raises:
        BadInput: it does not fit the settings.
    """
    flag = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}"
    with hub.readable(flag, "a diffusers model", MODEL):
        _check_parts(s, group, flag, resolution)


MODEL = "a name on the hub, or a folder that save_pretrained wrote, with a model_index.json"
VAE = "a folder that AutoencoderKL.save_pretrained wrote, such as the export of the task vae, or its name on the hub"


def _check_parts(s: Pretrained, group: str, flag: str, resolution: int) -> None:
    vae, unet, said = (config(s, part) for part in ("vae", "unet", "scheduler"))
    channels, given = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != given:
        other = s.pretrained_vae_model_name_or_path
        expected = f"another --{group}.pretrained-vae-model-name-or-path" if other else "a text-to-image model"
        raise BadInput(f"{flag}: its UNet takes {channels} channels, {other or 'its VAE'} gives {given}; expected {expected}")
    factor = multiple(s)
    require(resolution % factor == 0, "data.resolution", resolution, f"a multiple of {factor}, by which its VAE divides")
    otherwise = overrides(s)
    predicts = (said | otherwise).get("prediction_type", "epsilon")
    if "Flow" in said.get("_class_name", "") or predicts not in ("epsilon", "v_prediction", "sample"):
        raise BadInput(f"{flag}: its {said.get('_class_name')} predicts {predicts}; expected epsilon, v_prediction or sample")
    if (said | otherwise).get("rescale_betas_zero_snr") and predicts == "epsilon":
        raise BadInput(
            f"--{group}.prediction-type is 'epsilon' with a zero-terminal-SNR schedule, whose last step is pure noise: to "
            f"predict it teaches nothing; expected v_prediction or sample, or --{group}.rescale-betas-zero-snr no"
        )


def check_vae(s: Pretrained, group: str) -> None:
    """Refuse what is no autoencoder, from its config alone."""
    name, flag = s.pretrained_vae_model_name_or_path, f"--{group}.pretrained-vae-model-name-or-path"
    with hub.readable(f"{flag} {name}", "an autoencoder", VAE):
        kind = config(s, "vae").get("_class_name") if name and not hub.is_file(name) else "AutoencoderKL"
        if kind != "AutoencoderKL":
            raise BadInput(f"{flag} {name}: holds a {kind}; expected {VAE}")


def load(s: Pretrained, group: str, parts: tuple[str, ...]) -> Models:
    """Those of the parts that the checkpoint has, frozen, as its model_index.json names their classes. Its scheduler and its
    tokenizers are opened first, so that their mistakes come before what takes long.

    Raises:
        BadInput: something of it cannot be loaded.
    """
    check_small(s, group)
    return load_parts(s, group, parts)


def check_small(s: Pretrained, group: str) -> None:
    """Refuse a scheduler or tokenizers that cannot be opened or used."""
    flag = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}"
    with hub.readable(flag, "a diffusers model", MODEL):
        made = scheduler(s)
        if not hasattr(made, "add_noise") or not alphas_cumprod(s, "cpu").isfinite().all():
            raise ValueError(f"its scheduler is a {type(made).__name__} without a schedule of noise")
        tokenizers_of(s)


def check_weights(s: Pretrained, group: str, parts: tuple[str, ...]) -> None:
    """Refuse parts that `load_parts` would, without reading their weights: made on the meta device, which asks headers alone.
    Single files are left to it."""
    files = {part for part, (_, own) in instead(s).items() if hub.is_file(own)}
    load_parts(s, group, tuple(part for part in parts if part not in files), device_map="meta")


def skeleton(s: Pretrained, group: str, part: str, given: dict[str, Any] | None = None) -> torch.nn.Module:
    """A UNet or transformer as its config, or the `given` one, has it, without memory of its own.

    Raises:
        BadInput: it cannot be made.
    """
    import diffusers
    import torch

    flag = f"--{group}.pretrained-model-name-or-path {s.pretrained_model_name_or_path}: its {part}"
    made = config(s, "")[part][1]
    with torch.device("meta"), hub.readable(flag, f"a {made}", "one that diffusers can make"):
        return getattr(diffusers, made).from_config(given or config(s, part))


def instead(s: Pretrained) -> dict[str, tuple[str, str]]:
    """Part -> (the setting, the name) of what stands in the place of the checkpoint's own."""
    own = {"vae": ("pretrained-vae-model-name-or-path", s.pretrained_vae_model_name_or_path)}
    own |= dict.fromkeys(("unet", "transformer"), ("single-file", s.single_file))
    return {part: (setting, name) for part, (setting, name) in own.items() if name}


def pipeline_lines(
    s: Pretrained, exported: Collection[str] = (), kind: str | None = None, beside: tuple[str, str] | None = None
) -> str:
    """The lines of Python that make `pipeline` from the checkpoint and what stands in the place of its parts, of which the
    `exported` ones are in the folder `path`; for `str.format`. `kind`: its class, where it is not the checkpoint's. `beside`: a
    part that it has beside the checkpoint's, which is the folder `path` itself, and that part's class."""
    kind, base = kind or config(s, "")["_class_name"], quoted(s.pretrained_model_name_or_path)
    told = {"revision": s.revision, "variant": s.variant}
    more, lines = "".join(f", {key}={quoted(value)}" for key, value in told.items() if value), ""
    if beside:
        part, made = beside
        lines += f"from diffusers import {made}\n{part} = {made}.from_pretrained({{path}})\n"
        more += f", {part}={part}"
    for part in exported:
        library, made = config(s, "")[part]
        lines += f"from {library} import {made}\n{part} = {made}.from_pretrained({{path}}, subfolder={part!r})\n"
        more += f", {part}={part}"
    for part, (_, own) in instead(s).items():
        if config(s, "").get(part) and part not in exported:
            made = config(s, part)["_class_name"]
            gguf = ", quantization_config=GGUFQuantizationConfig(torch.float32), torch_dtype=torch.float32"
            how = f"from_single_file({quoted(own)}, config={base}, subfolder={part!r}{gguf * own.endswith('.gguf')})"
            lines += "import torch\nfrom diffusers import GGUFQuantizationConfig\n" * own.endswith(".gguf")
            how = how if hub.is_file(own) else f"from_pretrained({quoted(own)})"
            lines += f"from diffusers import {made}\n{part} = {made}.{how}\n"
            more += f", {part}={part}"
    return f"{lines}from diffusers import {kind}\npipeline = {kind}.from_pretrained({base}{more})\n"


def load_parts(s: Pretrained, group: str, parts: tuple[str, ...], **more: Any) -> Models:
    """Those of the parts that the checkpoint has, frozen; `from_pretrained` gets `more`."""
    import transformers

    if not os.isatty(2):
        transformers.logging.disable_progress_bar()
    models, name = {}, s.pretrained_model_name_or_path
    flag = f"--{group}.pretrained-model-name-or-path {name}"
    with hub.readable(flag, "a diffusers model", MODEL):
        index = {part: config(s, "").get(part) or (None, None) for part in parts}
        named = {part: (library, kind) for part, (library, kind) in index.items() if kind is not None}
    variant = f" (--{group}.variant {s.variant})" if s.variant else ""
    for part, (library, kind) in named.items():
        setting, own = instead(s).get(part, (None, None))
        what = f"--{group}.{setting} {own}: {part}" if own else f"{flag}{variant}: {part}"
        where = {"subfolder": part, "revision": s.revision}
        if own and hub.is_file(own):
            models[part] = hub.load_file(kind, own, what, config=name, **where, **more)
        elif own:
            models[part] = hub.load("diffusers", "AutoencoderKL", own, what, **more)
        else:
            models[part] = hub.load(library, kind, name, what, variant=s.variant, **where, **more)
        models[part].requires_grad_(False)
    return models


@functools.cache
def tokenizers(name: str, revision: str | None, xl: bool, new: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """The tokenizer of each text encoder, with new tokens."""
    from transformers import AutoTokenizer

    parts = ("tokenizer", "tokenizer_2") if xl else ("tokenizer",)
    where = {"revision": revision, "local_files_only": not is_local(name) and hub.unreachable() is not None}
    source = Path(name).expanduser() if is_local(name) else name
    return tuple(tokens.extended(AutoTokenizer.from_pretrained(source, subfolder=part, **where), new) for part in parts)


def tokenizers_of(s: Pretrained, plain: bool = False) -> tuple[Any, ...]:
    """The same, of these settings; `plain`: as the checkpoint has them."""
    return tokenizers(s.pretrained_model_name_or_path, s.revision, is_xl(s), () if plain else tokens.names(s))


def clip_tokenizers(s: Pretrained, plain: bool = False) -> dict[str, Any]:
    """Text encoder -> its tokenizer, of those for which the pipeline loads new tokens."""
    return dict(zip(ENCODERS, tokenizers_of(s, plain), strict=False))


def overrides(s: Pretrained) -> dict[str, Any]:
    """What the settings change in the checkpoint's scheduler."""
    told = {"prediction_type": s.prediction_type, "rescale_betas_zero_snr": s.rescale_betas_zero_snr}
    return {key: value for key, value in told.items() if value is not None}


def scheduler(s: Pretrained) -> Any:
    """The scheduler to sample with: the one that the task needs, or else the checkpoint's own; a DDIM from the last step on
    where the schedule was rescaled, as Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed
    (arXiv:2305.08891), ask."""
    import diffusers

    said, told = config(s, "scheduler"), changes(s)
    return getattr(diffusers, told.pop("_class_name", said["_class_name"])).from_config(said, **told)


def changes(s: Pretrained) -> dict[str, Any]:
    """What the scheduler to sample with has in its config that the checkpoint's own has not."""
    told = overrides(s)
    rescaled = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    return told | (rescaled if "rescale_betas_zero_snr" in told else {}) | dict(s.sampler)


@functools.cache
def _alphas_cumprod(name: str, revision: str | None, rescale: bool | None, device: Any) -> Tensor:
    from diffusers import DDPMScheduler

    told = {} if rescale is None else {"rescale_betas_zero_snr": rescale}
    return DDPMScheduler.from_config(read(name, revision, "scheduler/scheduler_config.json"), **told).alphas_cumprod.to(device)


def alphas_cumprod(s: Pretrained, device: Any) -> Tensor:
    """alpha-bar of every timestep of the checkpoint's schedule, [T] float32 on the device; 0 at the end of a rescaled one."""
    return _alphas_cumprod(s.pretrained_model_name_or_path, s.revision, s.rescale_betas_zero_snr, device)


def prediction_type(s: Pretrained) -> str:
    """What the UNet predicts: what the settings say, or else the checkpoint."""
    return s.prediction_type or config(s, "scheduler").get("prediction_type", "epsilon")


# ---------------------------------------------------------------------------------------------------------------------
# Images to latents and back. The VAE computes in the precision of its weights, float32, whatever the run's: SDXL's
# overflows in float16 (`force_upcast` in its config), and it is called once for each image.


def encode_images(models: Models, x: Tensor, s: Pretrained) -> dict[str, Tensor]:
    """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of the posterior, [B, C, H/f, W/f] each."""
    posterior = models["vae"].encode(x).latent_dist
    return {"latent_mean": posterior.mean, "latent_std": posterior.std}


def draw(vae: torch.nn.Module, batch: Batch, noise: Tensor) -> Tensor:
    """A sample of the posterior in the UNet's scale, [B, C, H/f, W/f]."""
    return (batch["latent_mean"] + batch["latent_std"] * noise) * vae.config.scaling_factor


def decode(vae: torch.nn.Module, z: Tensor) -> Tensor:
    """Latents in the UNet's scale -> images [B, 3, H, W] in [0, 1]."""
    import torch

    with torch.autocast(z.device.type, enabled=False):
        return (vae.decode(z.to(vae.dtype) / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Captions to text states.


def encode_captions(models: Models, captions: list[str], s: Pretrained) -> dict[str, Tensor]:
    """B captions -> `prompt_embeds` [B, T, C], and for SDXL `pooled_prompt_embeds` [B, P].

    Stable Diffusion takes the last hidden states; SDXL the last but one of both encoders, side by side, and the pooled state
    of the second. An empty caption is encoded as the pipeline encodes an absent one: as zeros where it says so.
    """
    import torch

    xl, states, pooled = is_xl(s), [], None
    for tokenizer, name in zip(tokenizers_of(s), ENCODERS, strict=False):
        device = next(models[name].parameters()).device
        settings = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        words = tokenizer(tokens.spelled(captions, s), return_tensors="pt", **settings)
        masked = getattr(unwrap(models[name]).config, "use_attention_mask", False)
        mask = transfer(words.attention_mask, device) if masked else None
        encoded = models[name](transfer(words.input_ids, device), attention_mask=mask, output_hidden_states=xl)
        states.append(encoded.hidden_states[-2] if xl else encoded[0])
        pooled = encoded[0]  # [B, P] from the last of SDXL's encoders
    if not xl:
        return {"prompt_embeds": states[0]}
    embeds = torch.cat(states, -1)
    if config(s, "").get("force_zeros_for_empty_prompt", True):
        present = transfer(torch.tensor([caption != "" for caption in captions]), embeds.device)
        embeds, pooled = embeds * present[:, None, None], pooled * present[:, None]
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def caption_key(s: Pretrained) -> tuple[Any, ...]:
    """What decides how a caption is encoded beside the encoders."""
    words: list[Any] = []
    for tokenizer in tokenizers_of(s):
        tokenizer.backend_tokenizer.no_padding(), tokenizer.backend_tokenizer.no_truncation()  # which the last call left
        words.append((tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length))
    return (*words, config(s, "").get("force_zeros_for_empty_prompt"))


def tag(s: Pretrained) -> str:
    """The family's name as the hub's pages have it."""
    return "stable-diffusion-xl" if is_xl(s) else "stable-diffusion"


def architecture(s: Pretrained) -> str:
    """The family's name in ModelSpec: SD 2 is the one whose text has 1024 channels."""
    if is_xl(s):
        return "stable-diffusion-xl-v1-base"
    if config(s, "unet").get("cross_attention_dim") != 1024:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if prediction_type(s) == "v_prediction" else "stable-diffusion-v2-512"


def trainable(s: Pretrained) -> tuple[str, ...]:
    """Text encoders that can train."""
    return ENCODERS


def multiple(s: Pretrained) -> int:
    """What an image's height and width must be multiples of."""
    return 2 ** (len(config(s, "vae").get("block_out_channels", [0])) - 1)


def remarks(models: Models, s: Pretrained) -> Iterator[str]:
    """What there is to say of the checkpoint before it trains: nothing."""
    yield from ()


def too_long(captions: list[str], s: Pretrained) -> str | None:
    """A line about the captions of which the text encoder sees only the beginning."""
    tokenizer = tokenizers_of(s)[0]
    lengths = [len(ids) for ids in tokenizer(tokens.spelled(captions, s), verbose=False).input_ids]
    over = sum(length > tokenizer.model_max_length for length in lengths)
    if not over:
        return None
    longest = captions[lengths.index(max(lengths))]
    return (
        f"warning: {over} of {len(captions)} captions are longer than the {tokenizer.model_max_length} tokens that the text "
        f"encoder sees; the rest of them is cut. The longest has {max(lengths)}: {longest!r}"
    )


def conditions(batch: Batch, xl: bool) -> dict[str, Any]:
    """What the UNet is given beside x_t and t. SDXL's time ids are the image's original size, the corner of its crop and its
    target size, each height first, [B, 6] (Podell et al. 2023, section 2.2)."""
    import torch

    given: dict[str, Any] = {"encoder_hidden_states": batch["prompt_embeds"]}
    if xl:
        ids = torch.cat([batch[name] for name in ("original_size", "crop_top_left", "target_size")], 1).float()
        given["added_cond_kwargs"] = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": ids}
    return given


# ---------------------------------------------------------------------------------------------------------------------
# Samples.


def pipeline(models: Models, s: Pretrained) -> Any:
    """The diffusers pipeline of these very modules; of text encoders alone, it encodes prompts."""
    import diffusers

    xl = is_xl(s)
    missing = [name for name in ("unet", "vae") if name not in models]
    parts = {name: recorded.stand_in(config(s, name), models["text_encoder"].dtype) for name in missing}
    parts |= {name: models[name] for name in ("unet", "vae") if name in models} | {"scheduler": scheduler(s)}
    for i, tokenizer in enumerate(tokenizers_of(s)):
        parts |= {ENCODERS[i]: models.get(ENCODERS[i]), ENCODERS[i].replace("text_encoder", "tokenizer"): tokenizer}
    if xl:
        more = {
            "add_watermarker": False,
            "force_zeros_for_empty_prompt": config(s, "").get("force_zeros_for_empty_prompt", True),
        }
    else:
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = getattr(diffusers, config(s, "")["_class_name"])(**parts, **more)
    made.set_progress_bar_config(disable=True)
    if "prompts" in models:
        recorded.attach(made, models["prompts"])
    return made


def arguments(s: Pretrained, height: int, width: int) -> dict[str, Any]:
    """How the pipeline is called to draw one sample; what is not asked for is its own."""
    asked = {"num_inference_steps": s.num_inference_steps, "guidance_scale": s.guidance}
    asked |= {"negative_prompt": s.negative_prompt or None}
    return {"height": height, "width": width, **{key: value for key, value in asked.items() if value is not None}}


def sample(models: Models, s: Pretrained, prompts: list[str], generators: list[Any], height: int, width: int) -> Tensor:
    """Images of the prompts, [B, 3, height, width] in [0, 1], a generator each."""
    import torch

    call = arguments(s, height, width)
    negative = {"negative_prompt": [s.negative_prompt] * len(prompts)} if s.negative_prompt else {}
    with recorded.ended():
        latents = pipeline(models, s)(prompts, generator=generators, output_type="latent", **call | negative).images
        return decode(models["vae"], latents)
    return torch.zeros(len(prompts), 3, height, width)


def load_lines(s: Pretrained) -> str:
    """The lines of Python that make `pipeline` from the checkpoint as `pipeline` here does, and load the adapters of the folder
    `path`; for `str.format`."""
    return base_lines(s) + "pipeline.load_lora_weights({path})\n"


def base_lines(
    s: Pretrained, exported: Collection[str] = (), kind: str | None = None, beside: tuple[str, str] | None = None
) -> str:
    """Those that make `pipeline`, as of `pipeline_lines`."""
    lines = pipeline_lines(s, exported, kind, beside)
    if told := changes(s):
        made = told.pop("_class_name", config(s, "scheduler")["_class_name"])
        more = "".join(f", {key}={quoted(value)}" for key, value in told.items())
        lines += f"from diffusers import {made}\npipeline.scheduler = {made}.from_config(pipeline.scheduler.config{more})\n"
    return lines


def quoted(value: Any) -> str:
    """A value as Python writes it, inside a text that `str.format` will read."""
    return repr(value).replace("{", "{{").replace("}", "}}")
