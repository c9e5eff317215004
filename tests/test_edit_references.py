"""Edits by reference: velocity and text states are the pipeline's own, for a reference of whatever size."""

import pytest
import torch
from PIL import Image
from test_edit import CAPTIONS, config, small  # noqa: F401  a fixture
from torchvision.transforms.functional import to_tensor

from oneloop.families import edit, edit_samples, edit_sources, latents, recorded, text_to_image, transformer
from oneloop.tasks import Rng

NAMES = [name for name, own in edit.WAYS.items() if own.widened is None]
HEIGHT, WIDTH = 96, 64  # of the reference; the sample is 64 x 64
SIDE = 64


class Stop(Exception): ...


@pytest.fixture(scope="module")
def made(built):
    """name -> its settings and its parts, without adapters."""

    def make(name):
        cfg = config(built(name))
        models = text_to_image.load(cfg, "no")
        edit.prepare(models, cfg.edit)
        return cfg, models

    return make


def seen(cfg, models, source, generator):
    """What the pipeline hands its scheduler at the second of three steps, unguided: velocity, sigma, x_t, unpacked."""
    own = transformer.family(cfg.edit)
    calls, drawn = [], edit_samples.pipeline(models, cfg.edit)
    step = drawn.scheduler.step

    def stepped(v, t, x, **more):
        calls.append((v, t, x))
        if len(calls) == 2:
            raise Stop
        return step(v, t, x, **more)

    drawn.scheduler.step = stepped
    call = edit_samples.arguments(cfg.edit, SIDE, SIDE) | {own.guided_by: own.off, "num_inference_steps": 3}
    sources = source if isinstance(source, list) else [source]
    call |= {"prompt": [CAPTIONS[0]], "image": sources, "generator": [generator]}
    with pytest.raises(Stop):
        drawn(**call)
    v, t, x = calls[1]
    like = torch.empty(1, 1, *[round(v.shape[1] ** 0.5) * own.patch] * 2)  # of a square
    return latents.unpack(v, like, own.patch), t.expand(1) / 1000, latents.unpack(x, like, own.patch)


@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_the_pipeline_s_with_a_reference_of_another_size(made, name):
    cfg, models = made(name)
    source = Rng.of(0, [0]).uniform("source", 3, HEIGHT, WIDTH) * 2 - 1
    picture = edit_sources.picture(source[0])
    source = to_tensor(picture)[None] * 2 - 1  # of its 256 levels
    with torch.no_grad():
        v, sigma, x = seen(cfg, models, picture, torch.Generator().manual_seed(0))
        given = {"conditioning": source, "caption": [CAPTIONS[0]]}
        columns = {}
        for column, encoding in edit_sources.encodings(cfg).items():
            if column != "pixel_values":
                reads = encoding.columns or (column,)
                columns |= encoding.fn(models, *(given[key] for key in reads), cfg)
        ours = transformer.family(cfg.edit).velocity(models["transformer"], x, sigma, columns, 1.0)
        blind = {key: torch.zeros_like(value) if key == "reference" else value for key, value in columns.items()}
        other = transformer.family(cfg.edit).velocity(models["transformer"], x, sigma, blind, 1.0)
    torch.testing.assert_close(ours, v, rtol=0, atol=1e-5)
    assert (ours - other).abs().max() > 1e-3 and 0.1 < sigma < 0.95


def test_a_prompt_is_another_with_another_image():
    """What samples ask of an encoder that sees images is named by their pixels, whatever object holds them."""

    class Pipeline:
        def encode_prompt(self, prompt, image=None, device=None): ...

    name = lambda *levels: recorded._name(Pipeline(), (["a"],), {"image": [Image.new("L", (2, 2), x) for x in levels]})  # noqa: E731
    assert name(1, 2) == name(1, 2) and len({name(1, 2), name(2, 1), name(1), name()}) == 4
