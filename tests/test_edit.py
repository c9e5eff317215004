"""The task `edit` on every family: what is drawn before training, runs, resuming, samples, exports, bad input."""

import functools
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from test_lora_families import in_fork
from warm import brief, cli, cli_many, digest, flags

from oneloop import loop
from oneloop.configs import Base, Data
from oneloop.families import edit, edit_samples, text_to_image
from oneloop.settings import command_line
from oneloop.tasks import Rng
from oneloop.tasks import edit as task

NAMES = ("sd", "sdxl", "FluxPipeline", "FluxKontextPipeline", "Flux2KleinPipeline", "Flux2Pipeline")
NAMES += ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
WIDENED, SEVERAL = NAMES[:3], ("sd", "sdxl", "FluxKontextPipeline")
SIDE = 32
side = lambda name: 64 if name.startswith("Flux2") else SIDE  # noqa: E731  the least that its pipeline takes
CAPTIONS = ("a red circle", "a large dog", "a small square")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Qwen's pipelines scale references to a million pixels, and here to a width of 64."""
    size = lambda area, ratio: (64, 32 * round(2 / ratio))  # noqa: E731
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", size)
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (*size(area, ratio), None))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three captioned images of 80 x 70, and their sources."""
    folder, noise = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for part in ("after", "before"):
        (folder / part).mkdir()
        for i, caption in enumerate(CAPTIONS):
            small = noise.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            Image.fromarray(small).resize((80, 70), Image.BICUBIC).save(folder / part / f"{i}.png")
            (folder / "after" / f"{i}.txt").write_text(caption)
    return folder


def config(model, **settings):
    """The `Config` of a run, for a test that calls the task's functions itself."""
    base = Base(output_dir="unused", logger=("none",))
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2)
    made = task.Settings(pretrained_model_name_or_path=str(model), **{"num_inference_steps": 2} | settings)
    return task.Config(base, sizes, made)


def command(folder, model, pairs, out="out", **more):
    """A command line for two steps of `edit`."""
    settings = brief(folder, out, pairs / "after", side(Path(model).name)) | {
        "base.ema_power": 0,
        "data.conditioning_data_dir": pairs / "before",
        "edit.pretrained_model_name_or_path": model,
        "edit.learning_rate": 1e-3,
        "edit.num_inference_steps": 2,
    }
    if Path(model).name.startswith("sd"):
        settings["edit.conditioning_dropout"] = 0.3  # of which some is in the four examples of a run
    return flags("edit", settings | {name.replace("__", "."): value for name, value in more.items()})


def batch_of(cfg, count=2):
    """A batch of `count` raw examples."""
    draw = lambda purpose: Rng.of(0, range(count)).uniform(purpose, 3, SIDE, SIDE) * 2 - 1  # noqa: E731
    size, corner = torch.full((count, 2), SIDE), torch.zeros(count, 2, dtype=torch.long)
    sizes = {"original_size": size, "target_size": size, "crop_top_left": corner}
    return {"pixel_values": draw("x"), "conditioning": draw("source"), "caption": [*CAPTIONS[:count]]} | sizes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def silent_draws(encode):
    """The autoencoder's function, of whose posteriors a sample takes nothing from a generator."""

    def encoded(*args, **more):
        made = encode(*args, **more)
        made.latent_dist.sample = lambda generator=None: made.latent_dist.mode()
        return made

    return encoded


@pytest.mark.parametrize("name", WIDENED)
def test_before_training_it_draws_what_its_base_draws(built, name):
    """Whatever the source: the new weights are zero, and so is what is guided by it."""
    cfg = config(built(name), guidance_scale=3.0)
    models = task.make_models(cfg)
    source = edit_samples.picture(batch_of(cfg)["conditioning"][0])
    own, base = text_to_image.family(cfg.edit), text_to_image.load(cfg, "no")
    models["vae"].encode = silent_draws(models["vae"].encode)
    with torch.no_grad():
        ours = edit_samples.sample(models, cfg.edit, CAPTIONS[0], source, generator(), SIDE, SIDE)
        theirs = own.sample(base, cfg.edit, [CAPTIONS[0]], [generator()], SIDE, SIDE)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_equal_and_its_export_draws_as_it_does(tmp_path, built, pairs, name):
    size = side(name)

    def run(out, **more):
        line = command(tmp_path, built(name), pairs, out, base__checkpointing_steps=1, base__use_ema=False, **more)
        cfg = command_line.parse(line)[1]
        return loop.run(task.task, cfg), cfg

    def runs():
        state, cfg = run("whole")
        shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        run("again")
        assert digest(tmp_path / "whole") == digest(tmp_path / "again")
        lines = tmp_path / "whole" / "checkpoint-2" / "load.py"
        scope = {"__file__": str(lines)}
        exec(lines.read_text(), scope)  # and it draws sample.png
        pipeline, s = scope["pipeline"], cfg.edit
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline).__name__ == edit.kind(s) and Image.open("sample.png").size == (size, size)
        models = task.make_models(cfg)
        part = text_to_image.family(s).TRAINED
        before = {key: x.clone() for key, x in models[part].state_dict().items()}
        models[part].load_state_dict(state.models[part].state_dict(), strict=False)
        assert any(not torch.equal(before[key], x) for key, x in models[part].state_dict().items())
        if edit.way(s).widened:  # what sees the source has learned: the weight's second half, or the adapter's
            first = models[part].get_submodule(edit.way(s).widened)
            wide = first.weight if task.trains(s) == "all" else first.get_delta_weight("default")
            assert bool(wide[:, wide.shape[1] // 2 :].any())
        source = Image.open(tmp_path / "whole" / "export" / "source.png")
        told = edit_samples.arguments(s, size, size) | {edit.way(s).argument: source}
        with torch.no_grad():
            ours = edit_samples.sample(models, s, CAPTIONS[0], source, generator(3), size, size)
            theirs = pipeline(prompt=CAPTIONS[0], generator=[generator(3)], output_type="pt", **told).images[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

    said = in_fork(tmp_path, runs).err
    assert "no samples" not in said and "cannot be made ahead" not in said, said
    row = np.asarray(Image.open(tmp_path / "whole" / "samples" / "2-source-target-sample.png")).astype(float)  # [H, 3 W, 3]
    for at, part in enumerate(("before", "after")):
        whole = Image.open(pairs / part / "0.png")  # 80 x 70, whose shorter side becomes size
        there = np.asarray(whole.resize((wide := round(80 * size / 70), size), Image.LANCZOS)).astype(float)
        there = there[:, (wide - size) // 2 :][:, :size]
        assert np.abs(row[:, at * size : (at + 1) * size] - there).mean() < 8


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_end_in_the_bits_of_one(tmp_path, built, pairs, name):
    line = functools.partial(command, tmp_path, built(name), pairs)
    done = cli(tmp_path, *line("one", base__gradient_accumulation_steps=2))
    assert done.code == 0, done.err
    for result in cli_many(tmp_path, 2, *line("two")):
        assert result.code == 0, result.err
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
