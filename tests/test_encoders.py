"""Text encoders are loaded, used and dropped before the large model is loaded: the same bits, and never both in memory."""

import functools
import gc
import os
import re
import shutil
import weakref

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora_families import CAPTIONS, command, config
from warm import brief, cli, cli_many, digest, flags, fork, metrics

from oneloop import loop
from oneloop.evaluation import features
from oneloop.families import hub, text_to_image
from oneloop.settings import command_line
from oneloop.tasks import Rng, lora
from oneloop.views import evaluate

NAMES = ("sd", "sdxl", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""
    return functools.cache(lambda name: lora.make_models(config(built(name))) and built(name))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twelve captioned images."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        small = noise.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((80, 70), Image.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 3])
    return folder


def watched(line, stay):
    """Run a command line and say what was loaded, and the most kinds of large models that were alive at once. With `stay` in
    another order: encoders beside the transformer, which encode the same once, and leave the device."""
    if stay:
        loop.encodings.encode_first = lambda *given: None
    loaded, alive = [], {"encoder": weakref.WeakSet(), "large": weakref.WeakSet()}
    most = 0

    def seen(part, module):
        nonlocal most
        if next(module.parameters()).is_meta:  # a look at headers
            return module
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
        loop.run(lora.task, command_line.parse(line)[1])
    finally:
        hub.load = real
    print(f"loaded {sorted(set(loaded))} most {most}")


def run(folder, line, stay=False):
    result = fork(lambda: watched(line, stay), folder).wait()
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
    """Adapters, EMA, validation and samples as with encoders and transformer side by side; a second start loads no encoder."""
    more = MORE | ({"lora__preservation_weight": 0.5, "lora__preservation_prompt": "a dog"} if name != "sd" else {})
    line = functools.partial(command, tmp_path, built(name), photos, **more)
    first, most, _ = run(tmp_path, line("first", data__example_cache=tmp_path / "cache"))
    assert "text_encoder" in first and most == 1
    second, most, said = run(tmp_path, line("second", data__example_cache=tmp_path / "cache"))
    assert not any(part.startswith("text_encoder") for part in second) and most == 1 and "encoding caption" not in said
    stays, most, _ = run(tmp_path, line("stays", data__example_cache=tmp_path / "cache"), stay=True)
    assert stays == first and most == 2
    assert len(grids(tmp_path / "first")) == 3
    for other in ("second", "stays"):
        assert digest(tmp_path / "first") == digest(tmp_path / other)
        assert grids(tmp_path / "first") == grids(tmp_path / other)
        losses = [[x["validation/loss"] for x in metrics(tmp_path / out) if "validation/loss" in x] for out in ("first", other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 3


def test_altered_encoders_are_noticed(tmp_path, built, photos):
    """Under the same file names, of the same size: their captions and prompts are encoded anew."""
    model = shutil.copytree(built("sd"), tmp_path / "model")
    cfg = config(model)
    before = text_to_image.encoder_files(cfg)
    assert (
        text_to_image.encoder_files(cfg) == before == text_to_image.encoder_files(config(built("sd")))
    )  # copied with its dates
    (path,) = (model / "text_encoder").glob("*.safetensors")
    weights = load_file(path)
    size, key = path.stat().st_size, next(name for name in weights if name.endswith("fc1.weight"))
    save_file(weights | {key: weights[key] + 0.5}, path, {"format": "pt"})
    assert path.stat().st_size == size and text_to_image.encoder_files(cfg) != before
    os.utime(path, ns=(1, (built("sd") / "text_encoder" / path.name).stat().st_mtime_ns))  # as archives and copies leave it
    assert text_to_image.encoder_files(cfg) != before
    assert text_to_image.encoder_files(config(built("sd"), variant="fp16")) != before


def test_two_processes_share_the_work_and_a_stopped_run_resumes(tmp_path, built, photos):
    """The same bits as one process and as a run that did not stop; what was encoded by one start is read by the others."""
    line = functools.partial(command, tmp_path, built("sd"), photos, **MORE | {"data__example_cache": tmp_path / "cache"})
    for result in cli_many(tmp_path, 2, *line("two", base__validation_steps=0)):
        assert result.code == 0 and "no samples" not in result.err, result.err
    shared = {"base__gradient_accumulation_steps": 2, "base__validation_steps": 0}
    loaded, _, _ = run(tmp_path, line("one", **shared))
    assert "text_encoder" not in loaded and digest(tmp_path / "one") == digest(tmp_path / "two")
    run(tmp_path, line("resumed", base__max_train_steps=1, **shared))
    run(tmp_path, line("resumed", **shared))
    assert digest(tmp_path / "resumed") == digest(tmp_path / "one")
    loaded, _, said = run(tmp_path, line("resumed", **shared))
    assert "already done" in said and "text_encoder" not in loaded
    drawn = cli(tmp_path, "sample", tmp_path / "resumed", "--to", tmp_path / "drawn.png")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "drawn.png").read_bytes() == grids(tmp_path / "resumed")["2.png"]


def test_prompts_that_were_not_encoded_are_no_others(built):
    """What is looked up is what was asked: another prompt, another number of prompts or other guidance is an error."""
    cfg = config(built("sd"), guidance_scale=3.0)
    encoders = {"text_encoder": lora.make_models(cfg)["text_encoder"]}
    rng = Rng.of(0, range(2), "samples")
    with torch.no_grad():
        made = text_to_image.encode_prompts(encoders, [{"caption": CAPTIONS[:2]}], rng, cfg)
        models = lora.make_models(cfg, made)
        assert "text_encoder" not in models
        ours = text_to_image.sample_fn(models, [{"caption": CAPTIONS[:2]}], rng, cfg)["samples"]
        theirs = text_to_image.sample_fn(lora.make_models(cfg), [{"caption": CAPTIONS[:2]}], rng, cfg)["samples"]
        assert torch.equal(ours, theirs)
        for captions, keys, other in (
            (CAPTIONS[1:], rng, cfg),
            (CAPTIONS[:1], rng[:1], cfg),
            (CAPTIONS[:2], rng, config(built("sd"), guidance_scale=0.0)),
        ):
            with pytest.raises(LookupError, match="were not encoded at the start"):
                text_to_image.sample_fn(models, [{"caption": captions}], keys, other)


def test_captions_of_what_is_judged_are_encoded_too(tmp_path, built):
    """Samples that are judged while it trains are more than those of the grid, and of other captions."""

    def quicker():
        features.STEPS, evaluate.Settings.num = 4, 32

    shapes = {"data.num_shapes": 40, "data.train_batch_size": 6, "base.evaluate_steps": 2, "lora.num_inference_steps": 1}
    line = flags("lora", {k: x for k, x in brief(tmp_path, "out", "", 32).items() if k != "data.train_data_dir"} | shapes)
    line += ["--lora.pretrained-model-name-or-path", str(built("sd"))]
    done = cli(tmp_path, *line, patch=quicker)
    assert done.code == 0 and "no judgement" not in done.err and (tmp_path / "out" / "evaluation" / "2.json").exists(), done.err
