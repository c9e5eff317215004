"""Fine-tune low-rank adapters of a text-to-image model on pairs of images, of which one is preferred.

    python loop.py dpo --data.train-data-dir better --dpo.rejected-data-dir worse

Wallace et al. 2023, Diffusion Model Alignment Using Direct Preference Optimization (arXiv:2311.12908); of flow matching, Liu et
al. 2025, Improving Video Generation with Human Feedback (arXiv:2501.13918). Stable Diffusion, SDXL and every flow-matching
family, as `lora`: the reference is the model without its adapters. The export is a `pytorch_lora_weights.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from oneloop.configs import Amount, Base, Data, Folder, Live, Name, Range, check
from oneloop.families import adapted, text_to_image
from oneloop.families.objective import objective
from oneloop.families.settings import OWN_TEXT, Adapters, Pretrained, check_unused
from oneloop.families.text_to_image import family, sample_fn
from oneloop.tasks import Batch, Column, Loss, Models, Rng, Task, mean, without_adapters

if TYPE_CHECKING:
    from torch import Tensor

REJECTED = "rejected"


@dataclass(frozen=True)
class Settings(Pretrained, Adapters):
    """The checkpoint, its adapters, and what a preference counts."""

    rejected_column: Live[Name | None] = None
    """The data set's column of the images that are not preferred. None: the one called `rejected`."""
    rejected_data_dir: Live[Folder | None] = None
    """Folder of them under the preferred images' file names, in place of a column."""
    beta: Annotated[float, Range(0, 3e38, without=0)] = 5000.0
    """How soon a step away from the reference is enough: the larger, the closer to it the model stays. Counted as the paper's
    authors do, for whom 2000 is right for Stable Diffusion 1.5 and 5000 for SDXL: half of it multiplies errors averaged over a
    latent's numbers."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """What is made of the margin: the paper's, a hinge, or IPO's square (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
    learning_rate: Live[Amount] = 1e-5
    """Peak learning rate of what trains: of AdamW; about 1 with prodigy."""

    def __post_init__(self):
        check(self, "dpo")
        check_unused(self, "dpo", (*OWN_TEXT, "training_adapter"), "the reference would train with it, or be without it")
        adapted.check_settings(self, "dpo")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for some thousand pairs."""

    base: Base = field(default_factory=lambda: Base(num_epochs=1, num_samples=4, validation_steps=200, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA))
    dpo: Settings = field(default_factory=Settings)

    def __post_init__(self):
        adapted.check(self)


def encode_rejected(models: Models, x: Tensor, cfg: Config) -> dict[str, Tensor]:
    """What `pixel_values` become, under names of their own."""
    return {f"{REJECTED}_{key}": column for key, column in text_to_image.encode_images(models, x, cfg).items()}


def pair(batch: Batch) -> Batch:
    """The preferred images [B, ...], then the rejected ones, as one batch of 2 B whose other columns are theirs alike."""
    import torch

    twice = {key: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
    others = {key.removeprefix(f"{REJECTED}_"): x for key, x in batch.items() if key.startswith(f"{REJECTED}_")}
    return twice | {key: torch.cat([batch[key], x]) for key, x in others.items()}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """Eq. 14 of arXiv:2311.12908: by how much more than the reference the model errs on the rejected image than on the
    preferred one, at the same noise and noise level."""
    import torch

    s, both = cfg.dpo, pair(batch)
    alike = replace(rng, keys=torch.cat([rng.keys, rng.keys]), numbers=2 * rng.numbers)
    net = family(s).TRAINED
    with torch.no_grad(), without_adapters(models[net]) as reference:
        base = objective(models | {net: reference}, both, alike, cfg)  # [2 B]
    won, lost = (objective(models, both, alike, cfg) - base).chunk(2)  # [B] each
    margin = (lost - won) / 2
    logs = {"margin": margin.detach().mean(), "accuracy": (margin.detach().sign() / 2 + 0.5).mean()}
    yield Loss("dpo", mean(preference(s, margin), batch), logs)


def preference(s: Settings, margin: Tensor) -> Tensor:
    """The loss of each pair, [B]."""
    import torch.nn.functional as F

    if s.loss_type == "sigmoid":
        return -F.logsigmoid(s.beta * margin)
    return F.relu(1 - s.beta * margin) if s.loss_type == "hinge" else (margin - 1 / (2 * s.beta)).square()


merged = adapted.merged

task = Task(
    config=Config,
    make_models=adapted.make,
    make_optim=adapted.make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    prompts=text_to_image.drawn_after,
    export_fn=adapted.export_fn,
    card=lambda cfg: text_to_image.card(cfg, "lora", "dpo", "text-to-image", "template:sd-lora"),
    encodings=text_to_image.ENCODINGS | {REJECTED: replace(text_to_image.ENCODINGS["pixel_values"], fn=encode_rejected)},
    encoders=adapted.encoders,
    float32=("vae",),
    columns=text_to_image.COLUMNS
    | {REJECTED: Column("image", like="pixel_values", setting="dpo.rejected_column", folder="dpo.rejected_data_dir")},
    multiple=text_to_image.multiple,
    remarks=adapted.remarks,
)
