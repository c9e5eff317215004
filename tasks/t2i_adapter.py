"""Train a T2I-Adapter: a small model that sees a second image and adds its features to those of a frozen UNet.

    python loop.py t2i_adapter --data.train-data-dir photos --data.conditioning edges

Mou et al. 2023, T2I-Adapter (arXiv:2302.08453). SDXL and Stable Diffusion 1.x, 2.x. The export is the adapter's folder, which
T2IAdapter and the family's adapter pipeline open. `controlnet` is the larger and slower relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from oneloop.configs import Amount, Base, Data, Live, Name, check
from oneloop.families import control, control_conditions, control_samples, text_to_image
from oneloop.families.controls import Control, controlled
from oneloop.families.objective import objective
from oneloop.tasks import Batch, Loss, Models, Optims, Rng, Task, mean
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Settings(control.Conditioned):
    """The checkpoint, its adapter, and its objective."""

    pretrained_model_name_or_path: Name = "stabilityai/stable-diffusion-xl-base-1.0"
    """The model to draw with: a name on the hub, or a folder that diffusers wrote. SDXL, or Stable Diffusion."""
    learning_rate: Live[Amount] = 1e-5
    """Peak learning rate of the adapter: of AdamW; about 1 with prodigy."""
    adapter_model_name_or_path: Name | None = None
    """A T2I-Adapter to go on from: a folder, such as an export of this task, or a name on the hub. None: random weights."""
    cubic_timesteps: bool = True
    """Train most on noisy images, where shapes are decided: timesteps as (1 - u^3) T (Mou et al., section 3.4)."""

    def __post_init__(self):
        check(self, "t2i_adapter")


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task; the data's and the run's defaults are fit for some thousand images."""

    base: Base = field(default_factory=lambda: Base(num_samples=4, validate_first=True))
    data: Data = field(default_factory=lambda: Data(**text_to_image.DATA | {"resolution": 1024, "train_batch_size": 4}))
    t2i_adapter: Settings = field(default_factory=Settings)

    def __post_init__(self):
        text_to_image.check(self)
        text_to_image.check_unscaled(self)


def adapter_start(unet: nn.Module, s: Any, factor: int) -> nn.Module:
    """One feature for each level of the UNet, of its width. A level with attention takes it before it shrinks, one without
    after: SDXL, whose first has none, wants it at half the size of the latents."""
    from diffusers import T2IAdapter

    first = "CrossAttn" not in unet.config.down_block_types[0]
    kind, down = ("full_adapter_xl", 2 * factor) if first else ("full_adapter", factor)
    return T2IAdapter(3, [*unet.config.block_out_channels], 2, down, kind)


def adapter_answer(unet: nn.Module, net: nn.Module, condition: Tensor, *args: Any, **more: Any) -> Any:
    """Added inside the levels of the UNet's encoder; it sees the condition alone."""
    return unet(*args, **more, down_intrablock_additional_residuals=[*net(condition)])


ADAPTER = {"kind": "T2IAdapter", "start": adapter_start, "answer": adapter_answer, "latent": False, "layers": ()}
ADAPTER |= {"same": ("in_channels", "channels", "adapter_type", "downscale_factor")}
ADAPTER |= {"part": "adapter", "image": "image", "scale": "adapter_conditioning_scale"}
ADAPTERS: dict[str, Control] = {
    "StableDiffusionPipeline": Control(pipeline="StableDiffusionAdapterPipeline", **ADAPTER),
    "StableDiffusionXLPipeline": Control(pipeline="StableDiffusionXLAdapterPipeline", **ADAPTER),
}
"""The base's pipeline -> its T2I-Adapter."""


class Cubic:
    """The draws of an Rng, of which the timestep's are (1 - u^3) T."""

    def __init__(self, rng: Rng):
        self.rng = rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        """As Rng.integers."""
        if purpose != "timestep":
            return self.rng.integers(purpose, high, *shape)
        return ((1 - self.rng.uniform(purpose, *shape) ** 3) * high).long().clamp_(max=high - 1)


def make_optim(models: Models, cfg: Config) -> Optims:
    return {"t2i_adapter": optimizers.make(models["adapter"].parameters(), cfg.t2i_adapter)}


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    """The base's own objective, its answer with the adapter's features."""
    own = control.entry(ADAPTERS, cfg)
    both = controlled(models, own, control_conditions.condition_of(own, batch, rng), cfg.t2i_adapter)
    drawn = Cubic(rng) if cfg.t2i_adapter.cubic_timesteps else rng
    yield Loss("t2i_adapter", mean(objective(both, batch, drawn, cfg), batch))


task = Task(
    config=Config,
    make_models=partial(control.make_models, ADAPTERS),
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=partial(control_samples.sample_fn, ADAPTERS),
    export_fn=partial(control_samples.export_fn, ADAPTERS),
    judged=False,
    card=lambda cfg: text_to_image.card(cfg, "t2i-adapter", "text-to-image"),
    encodings=partial(control_conditions.encodings, ADAPTERS),
    encoders=partial(control_samples.encoders, ADAPTERS),
    float32=("vae",),
    columns=control_conditions.COLUMNS,
    multiple=text_to_image.multiple,
    remarks=text_to_image.remarks,
)
