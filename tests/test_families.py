"""Every flow family beside its own pipeline, on a tiny checkpoint: what training computes is what inference computes.

Prompts are of unequal length, the image is not square, the time is in the middle of the schedule, and guidance is off as the
family defines it. An error planted in any part must be seen.
"""

import copy
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import diffusers
import peft
import pytest
import tiny_families
import torch
from safetensors.torch import save_file

from families import flow, latents
from maths import flow as maths

NAMES = list(tiny_families.FAMILIES)
PROMPTS = ["a dog", 'a large red circle on the left of the word "go"']
HEIGHT, WIDTH, STEPS = 64, 32, 3
diffusers.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class Seen:
    """What a pipeline did."""

    family: flow.Family
    pipeline: Any
    columns: dict[str, torch.Tensor]
    """Our encoding of the prompts."""
    x: torch.Tensor
    """x_t in the middle of the schedule, [B, C, h, w]."""
    sigma: torch.Tensor
    """Its time, [B]."""
    v: torch.Tensor
    """What the pipeline handed to scheduler.step there, [B, C, h, w]."""
    z: torch.Tensor
    """The last latents, [B, C, h, w]."""
    images: torch.Tensor
    """What the pipeline made of them, [B, 3, H, W]."""

    @property
    def tokens(self) -> int:
        return self.x.shape[-2] * self.x.shape[-1] // self.family.patch**2

    def velocity(self, family: flow.Family | None = None, transformer: Any = None, **columns: torch.Tensor) -> torch.Tensor:
        """Ours, at the pipeline's own x_t and time."""
        family, transformer = family or self.family, transformer or self.pipeline.transformer
        return family.velocity(transformer, self.x, self.sigma, self.columns | columns, family.off)


def as_map(x: torch.Tensor, family: flow.Family, height: int, width: int) -> torch.Tensor:
    """What a scheduler holds as [B, C, h, w]: as it is, or unpacked."""
    if x.ndim == 4:
        return x
    token = round((height * width / x.shape[1]) ** 0.5)  # pixels a token spans
    like = x.new_empty(1, 1, height // token * family.patch, width // token * family.patch)
    return latents.unpack(x, like, family.patch)


def draw(pipeline: Any, family: flow.Family, prompts: list[str], steps: int, **more: Any) -> tuple[torch.Tensor, list]:
    """The pipeline's images, and what it hands to scheduler.step: (x_t, t, velocity, next x_t) of each step."""
    calls, step = [], pipeline.scheduler.step

    def listen(v, t, x, **kwargs):
        result = step(v, t, x, **kwargs)
        calls.append((x.clone(), t, v.clone(), result[0].clone()))
        return result

    pipeline.scheduler.step = listen
    try:
        call = {**family.call, family.guided_by: family.off, "generator": torch.Generator().manual_seed(0), **more}
        if "negative_prompt" in call:
            del call["negative_prompt"]  # it comes with guidance
        images = pipeline(
            prompt=[*prompts], height=HEIGHT, width=WIDTH, num_inference_steps=steps, output_type="pt", **call
        ).images
    finally:
        del pipeline.scheduler.step
    return images, calls


@pytest.fixture(scope="session")
def see(tmp_path_factory):
    """name -> `Seen`, each made once."""

    @functools.cache
    def look(name: str) -> Seen:
        kind, folder = name.split()[0], tiny_families.build(name, tmp_path_factory.mktemp("tiny"))
        family = flow.of(kind)
        pipeline = getattr(diffusers, kind).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.default_sample_size = 16  # HiDream scales every size to this many latents' area
        # CogView4 fills to the longest of a batch: there inference of one prompt is what training must see.
        batches = [[prompt] for prompt in PROMPTS] if kind == "CogView4Pipeline" else [PROMPTS]
        runs = [draw(pipeline, family, batch, STEPS) for batch in batches]
        images = torch.cat([images for images, _ in runs])
        height, width = images.shape[-2:]
        middle = [calls[1] for _, calls in runs]
        x, v, z = (
            as_map(torch.cat(parts), family, height, width)
            for parts in ([m[0] for m in middle], [m[2] for m in middle], [calls[-1][3] for _, calls in runs])
        )
        # DPM-Solver tells whole-numbered times, floor(1000 sigma); Euler's sigma is exact, and CogView4's time is not its sigma.
        euler = type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        sigma = pipeline.scheduler.sigmas[1] if euler else middle[0][1] / 1000
        texts = {key: part for key, part in pipeline.components.items() if key.startswith(("text", "token"))}
        settings = {key: value for key, value in pipeline.config.items() if key in ("text_encoder_select_layers",)}
        with torch.no_grad():
            columns = family.text(flow.assemble(kind, texts | settings), PROMPTS, family.length)
        columns["target_size"] = torch.tensor([[height, width]] * len(PROMPTS))
        family.prepare(pipeline.transformer)
        return Seen(family, pipeline, columns, x, sigma.expand(len(PROMPTS)).float(), v, z, images)

    return look


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether no number differs by more."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_velocity_and_images_are_the_pipeline_s(name, see):
    seen = see(name)
    with torch.no_grad():
        ours = seen.velocity()
        images = latents.decode(seen.family, seen.pipeline.vae, seen.z)
    assert seen.v.abs().mean() > 0.01 and seen.x.shape[-2] > seen.x.shape[-1] and 0.1 < seen.sigma[0] < 0.95
    torch.testing.assert_close(ours, seen.v, rtol=0, atol=1e-6)
    torch.testing.assert_close(images, seen.images, rtol=0, atol=1e-4)
