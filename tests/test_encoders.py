"""Text encoders are loaded, used and dropped before the large model is loaded: the same bits, and never both in memory."""

import functools
import gc
import re
import weakref

import diffusers
import numpy as np
import pytest
import tiny_families
import tiny_models
from PIL import Image
from test_lora_families import CAPTIONS, command, config
from warm import digest, fork, metrics

from oneloop import configs, loop
from oneloop.families import hub
from oneloop.tasks import lora

NAMES = ("sd", "sdxl", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """name -> a tiny checkpoint's folder, each made once."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name):
        path = tiny_models.build(folder, name) if name.startswith("sd") else tiny_families.build(name, folder)
        lora.make_models(config(path))  # so that forks find everything imported
        return path

    return make


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twelve captioned images."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        small = noise.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((80, 70), Image.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 3])
    return folder


def watched(line):
    """Run a command line and say what was loaded, and the most kinds of large models that were alive at once."""
    loaded, alive = [], {"encoder": weakref.WeakSet(), "large": weakref.WeakSet()}
    most = 0

    def seen(part, module):
        nonlocal most
        gc.collect()
        loaded.append(part)
        kind = "encoder" if part.startswith("text_encoder") else "large" if part in ("unet", "transformer") else None
        alive[kind].add(module) if kind else None
        most = max(most, sum(bool(len(modules)) for modules in alive.values()))
        return module

    real, hub_load = hub.load, hub.load
    hub.load = lambda library, kind, name, what, **where: seen(
        where.get("subfolder", "vae"), hub_load(library, kind, name, what, **where)
    )
    try:
        loop.run(lora.task, configs.parse(line)[1])
    finally:
        hub.load = real
    print(f"loaded {sorted(set(loaded))} most {most}")


def run(folder, line):
    result = fork(lambda: watched(line), folder).wait()
    assert result.code == 0, result.err
    assert "no samples" not in result.err, result.err
    found = re.search(r"loaded (\[.*\]) most (\d)", result.out)
    return set(eval(found[1])), int(found[2]), result.err


MORE = {
    "lora__validation_prompts": ("a dog --negative red --guidance 3", 'the word "go"'),
    "base__num_samples": 3,
    "base__validation_steps": 1,
    "data__validation_split": 0.4,
    "data__center_crop": True,
}


def grids(out):
    return {path.name: path.read_bytes() for path in sorted((out / "samples").glob("*.png"))}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_and_never_both_in_memory(tmp_path, built, photos, name):
    """Adapters, EMA, validation and samples equal those of a run whose encoders stay; a second start loads no encoder."""
    more = MORE | ({"lora__preservation_weight": 0.5, "lora__preservation_prompt": "a dog"} if name != "sd" else {})
    line = functools.partial(command, tmp_path, built(name), photos, **more)
    first, most, _ = run(tmp_path, line("first", data__example_cache=tmp_path / "cache"))
    assert "text_encoder" in first and most == 1
    second, most, said = run(tmp_path, line("second", data__example_cache=tmp_path / "cache"))
    assert not any(part.startswith("text_encoder") for part in second) and most == 1 and "encoding caption" not in said
    stays, most, _ = run(tmp_path, line("stays", data__example_cache="no"))
    assert stays == first and most == 2
    assert len(grids(tmp_path / "first")) == 3
    for other in ("second", "stays"):
        assert digest(tmp_path / "first") == digest(tmp_path / other)
        assert grids(tmp_path / "first") == grids(tmp_path / other)
        losses = [[x["validation/loss"] for x in metrics(tmp_path / out) if "validation/loss" in x] for out in ("first", other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 3
