"""Learn new words for a text-to-image model: vectors of the CLIP text encoders alone, a few kilobytes, nothing of the model.

    python loop.py textual_inversion --data.train-data-dir dog --data.trigger "<dog>" --data.caption-templates object \\
        --textual-inversion.placeholder-tokens "<dog>" --textual-inversion.initializer-tokens dog

Gal et al. 2022, An Image is Worth One Word (arXiv:2208.01618). Stable Diffusion 1.x, 2.x, SDXL and FLUX.1, with the objective
and the samples of `lora`; new words beside adapters or weights are options of `lora` and `finetune`. The export is a
`learned_embeds.safetensors` for a pipeline's `load_textual_inversion`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oneloop.configs import Amount, BadInput, Base, Data, Live, Words, check, require
from oneloop.families import text_to_image
from oneloop.families.objective import objective
from oneloop.families.settings import Pretrained
from oneloop.families.text_to_image import encode_captions, family, sample_fn
from oneloop.tasks import Batch, Loss, Models, Optims, Rng, Task, mean
from oneloop.training import optimizers


@dataclass(frozen=True)
class Settings(Pretrained):
    """The checkpoint, the new words, and their objective."""

    placeholder_tokens: tuple[Words, ...] = ("<new>",)
    """New words that captions and prompts have, such as `<dog>`."""
    learning_rate: Live[Amount] = 5e-4
    """Peak learning rate of the vectors: of AdamW; about 1 with prodigy."""

    def __post_init__(self):
        check(self, "textual_inversion")
        given = self.placeholder_tokens
        require(len(given) > 0, "textual_inversion.placeholder_tokens", given, "at least one new word, such as '<dog>'")
        if self.train_text_encoder:
            other = "lora and finetune train new words beside it (--lora.placeholder-tokens)"
            raise BadInput(f"--textual-inversion.train-text-encoder: the vectors alone train here; {other}")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for a few photographs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=500, num_samples=4, validation_steps=500, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    textual_inversion: Settings = field(default_factory=Settings)

    def __post_init__(self):
        text_to_image.check(self)
        text_to_image.check_unscaled(self)


def make_models(cfg: Config) -> Models:
    """All parts, frozen, and the vectors, which train."""
    text_to_image.check_base(cfg)
    return text_to_image.load(cfg, cfg.base.mixed_precision)


def make_optim(models: Models, cfg: Config) -> Optims:
    return {"textual_inversion": optimizers.make(text_to_image.groups(models, cfg.textual_inversion), cfg.textual_inversion)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """The objective; gradients reach the vectors through the frozen model and the frozen text encoders."""
    batch = batch | encode_captions(models, batch["caption"], cfg)
    yield Loss("textual_inversion", mean(objective(models, batch, rng, cfg), batch))


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    s = cfg.textual_inversion
    return family(s).base_lines(s) + text_to_image.save_tokens(models, path, cfg) + text_to_image.call_line(examples, cfg)


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    prompts=text_to_image.drawn_after,
    export_fn=export_fn,
    card=lambda cfg: text_to_image.card(cfg, "textual_inversion", "text-to-image"),
    encodings=text_to_image.ENCODINGS,
    float32=("vae",),
    columns=text_to_image.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=text_to_image.remarks,
)
