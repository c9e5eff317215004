"""Fine-tune low-rank adapters of a text-to-image model on captioned images.

    python loop.py lora --data.train-data-dir photos --lora.pretrained-model-name-or-path stabilityai/sdxl-turbo

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685). Stable Diffusion 1.x, 2.x, SDXL and
every flow-matching family of families/flow.py: which one a checkpoint is, what it predicts and which layers get adapters, its
own files and that table say. The export is a `pytorch_lora_weights.safetensors` for a pipeline's `load_lora_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from oneloop.configs import Amount, Base, Data, Words, check
from oneloop.families import adapted, text_to_image
from oneloop.families.adapted import export_fn, make_optim
from oneloop.families.objective import objective
from oneloop.families.settings import Adapters, Pretrained, check_apart
from oneloop.families.text_to_image import encode_captions, family, sample_fn
from oneloop.tasks import Batch, Encoders, Loss, Models, Rng, Task, mean, without_adapters

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
        adapted.check_settings(self, "lora")
        check_apart(self, "lora", {"preservation_weight": ("train_text_encoder", "placeholder_tokens")})


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for a few photographs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=100, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    lora: Settings = field(default_factory=Settings)

    def __post_init__(self):
        adapted.check(self)


def encoders(cfg: Config) -> Encoders | None:
    """The text encoders, unless something of them trains."""
    s = cfg.lora
    return adapted.encoders(cfg, encode_constants, bool(s.preservation_weight) and s.preservation_prompt)


def encode_constants(models: Models, cfg: Config) -> dict[str, Tensor]:
    """What every task's are, and the preservation prompt, under `preservation/`."""
    s = cfg.lora
    kept = encode_captions(models, [s.preservation_prompt], cfg) if s.preservation_weight else {}
    return text_to_image.encode_constants(models, cfg) | {f"preservation/{key}": x for key, x in kept.items()}


def make_models(cfg: Config, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The parts with adapters; without text encoders where `constants` has what is needed of them."""
    return adapted.make(cfg, constants, encode_constants, ("preservation", "prompts"))


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """The objective; before it, where asked, the loss that keeps the base's answers, whose gradient is added to its own."""
    s = cfg.lora
    if "prompt_embeds" not in batch:  # something of the text encoders trains
        batch = batch | encode_captions(models, batch["caption"], cfg)
    if s.preservation_weight:
        same = text_to_image.repeated(models["preservation"], batch["prompt_embeds"])
        with without_adapters(models[family(s).TRAINED]) as base:
            kept = mean(objective(models, batch | same, rng, cfg, base), batch)
        yield Loss("lora", s.preservation_weight * kept, {"preservation": kept.detach()}, step=False)
    yield Loss("lora", mean(objective(models, batch, rng, cfg), batch))


merged = adapted.merged

task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    prompts=text_to_image.drawn_after,
    export_fn=export_fn,
    card=lambda cfg: text_to_image.card(cfg, "lora", "text-to-image", "template:sd-lora"),
    encodings=text_to_image.ENCODINGS,
    encoders=encoders,
    prior=replace(text_to_image.PRIOR, load=adapted.untouched),
    float32=("vae",),
    columns=text_to_image.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=adapted.remarks,
)
