"""Train a ControlNet: a second image, such as edges, decides where things are in what a frozen text-to-image model draws.

    python loop.py controlnet --data.train-data-dir photos --data.conditioning edges

Zhang, Rao, Agrawala 2023 (arXiv:2302.05543). Stable Diffusion 1.x, 2.x, SDXL, SD3, FLUX.1, Qwen-Image, Z-Image. The export
is the ControlNet's folder, which its class and the family's ControlNet pipeline open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from oneloop.configs import Amount, Base, Data, Live, Name, Range, check
from oneloop.families import control, control_conditions, control_samples, text_to_image
from oneloop.families.controls import CONTROLNETS, controlled
from oneloop.families.objective import objective
from oneloop.families.settings import check_apart
from oneloop.tasks import Batch, Loss, Models, Optims, Rng, Task, mean
from oneloop.training import optimizers


@dataclass(frozen=True)
class Settings(control.Conditioned):
    """The checkpoint, its ControlNet, and its objective."""

    learning_rate: Live[Amount] = 1e-5
    """Peak learning rate of the ControlNet: of AdamW; about 1 with prodigy."""
    controlnet_model_name_or_path: Name | None = None
    """A ControlNet to go on from: a folder, such as an export of this task, or a name on the hub. None: a copy of the base's
    first blocks, which changes nothing at first."""
    num_layers: Annotated[int, Range(1, 1000)] | None = None
    """Blocks of a new ControlNet of a transformer, the double ones of FLUX.1. None: 12 for SD3, 6 for Z-Image, 5 for
    Qwen-Image, 4 for FLUX.1, or as many as the base has."""
    num_single_layers: Annotated[int, Range(0, 1000)] | None = None
    """Single blocks of a new ControlNet of FLUX.1. None: 4."""

    def __post_init__(self):
        check(self, "controlnet")
        check_apart(self, "controlnet", {"controlnet_model_name_or_path": ("num_layers", "num_single_layers")})


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for some thousand images."""

    base: Base = field(default_factory=lambda: Base(num_samples=4, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA | {"train_batch_size": 4}))
    controlnet: Settings = field(default_factory=Settings)

    def __post_init__(self):
        text_to_image.check(self)
        text_to_image.check_unscaled(self)


def make_optim(models: Models, cfg: Config) -> Optims:
    trained = [p for p in models["controlnet"].parameters() if p.requires_grad]
    return {"controlnet": optimizers.make(trained, cfg.controlnet)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """The base's own objective, its answer with the ControlNet beside it."""
    own = control.entry(CONTROLNETS, cfg)
    both = controlled(models, own, control_conditions.condition_of(own, batch, rng), cfg.controlnet)
    yield Loss("controlnet", mean(objective(both, control_conditions.counted(own, batch), rng, cfg), batch))


task = Task(
    config=Config,
    make_models=partial(control.make_models, CONTROLNETS),
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=partial(control_samples.sample_fn, CONTROLNETS),
    export_fn=partial(control_samples.export_fn, CONTROLNETS),
    judged=False,
    card=lambda cfg: text_to_image.card(cfg, "controlnet", "text-to-image"),
    encodings=partial(control_conditions.encodings, CONTROLNETS),
    encoders=partial(control_samples.encoders, CONTROLNETS),
    float32=("vae",),
    columns=control_conditions.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=text_to_image.remarks,
)
