"""Edits of several references: FLUX.2 and Qwen-Image-Edit from 2509 on."""

import functools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_edit import CAPTIONS, command, config, generator, pairs, side, small  # noqa: F401  fixtures
from test_edit_references import made, seen  # noqa: F401  a fixture
from test_lora_families import in_fork
from torchvision.transforms.functional import to_tensor
from warm import cli, digest

from oneloop import loop
from oneloop.configs import BadInput
from oneloop.families import edit, edit_samples, edit_sources, transformer
from oneloop.settings import command_line
from oneloop.tasks import Rng
from oneloop.tasks import edit as task

NAMES = [name for name, own in edit.WAYS.items() if own.several]
SIZES = ((96, 64), (128, 64), (64, 64))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_the_pipeline_s_with_references_of_other_sizes(made, name, count):  # noqa: F811
    """Their order counts, and each of them."""
    cfg, models = made(name)
    further = {f"{name}_data_dir": "unused" for name in edit_sources.FURTHER[: count - 1]}
    cfg = config(cfg.edit.pretrained_model_name_or_path, **further)
    names = edit_sources.named(cfg.edit)
    drawn = [Rng.of(0, [i]).uniform("source", 3, *size)[0] * 2 - 1 for i, size in enumerate(SIZES[:count])]
    pictures = [*map(edit_sources.picture, drawn)]

    def columns(pictures):
        given = {name: to_tensor(picture)[None] * 2 - 1 for name, picture in zip(names, pictures, strict=True)}
        given["caption"], found = [CAPTIONS[0]], {}
        for column, encoding in edit_sources.encodings(cfg).items():
            if column != "pixel_values":
                found |= encoding.fn(models, *(given[key] for key in encoding.columns or (column,)), cfg)
        return found

    with torch.no_grad():
        v, sigma, x = seen(cfg, models, pictures, generator())
        answer = lambda told: transformer.family(cfg.edit).velocity(models["transformer"], x, sigma, told, 1.0)  # noqa: E731
        told = columns(pictures)
        torch.testing.assert_close(answer(told), v, rtol=0, atol=1e-5)
        for key in ("reference", "reference_2", "reference_3")[:count]:
            assert (answer(told | {key: torch.zeros_like(told[key])}) - v).abs().max() > 1e-4
        assert (answer(columns(pictures[::-1])) - v).abs().max() > 1e-4


def three(pairs, folder):  # noqa: F811
    """A folder of second sources, of another shape."""
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(10 + i).integers(0, 256, (4, 3, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((90, 120), Image.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", [NAMES[0], NAMES[-1]])
def test_a_run_resumes_equal_and_its_export_draws_as_it_does(tmp_path, built, pairs, name):  # noqa: F811
    size, second = side(name), three(pairs, tmp_path / "second")

    def run(out):
        more = {"base__checkpointing_steps": 1, "base__use_ema": False, "edit__second_source_data_dir": second}
        cfg = command_line.parse(command(tmp_path, built(name), pairs, out, **more))[1]
        return loop.run(task.task, cfg), cfg

    def runs():
        state, cfg = run("whole")
        shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        run("again")
        assert digest(tmp_path / "whole") == digest(tmp_path / "again")
        lines = tmp_path / "whole" / "checkpoint-2" / "load.py"
        scope = {"__file__": str(lines)}
        exec(lines.read_text(), scope)
        pipeline, s = scope["pipeline"], cfg.edit
        pipeline.set_progress_bar_config(disable=True)
        models = task.make_models(cfg)
        models["transformer"].load_state_dict(state.models["transformer"].state_dict(), strict=False)
        sources = [Image.open(lines.parent / name) for name in ("source.png", "source_2.png")]
        told = edit_samples.arguments(s, size, size) | {"image": sources, "output_type": "pt"}
        with torch.no_grad():
            ours = edit_samples.sample(models, s, CAPTIONS[0], sources, generator(3), size, size)
            theirs = pipeline(prompt=CAPTIONS[0], generator=[generator(3)], **told).images[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

    said = in_fork(tmp_path, runs).err
    assert "no samples" not in said and "cannot be made ahead" not in said and "encoding second_source once" in said, said
    row = np.asarray(Image.open(tmp_path / "whole" / "samples" / "2-source-target-sample.png"))
    assert row.shape == (size, 4 * size, 3)
    shown = np.asarray(Image.open(tmp_path / "whole" / "export" / "source_2.png"))
    assert (row[:, size : 2 * size] == shown).all() and not (row[:, :size] == shown).all()


def test_what_does_not_fit_is_a_line(tmp_path, built, pairs):  # noqa: F811
    refuse = functools.partial(pytest.raises, BadInput)
    for name in ("sd", "FluxKontextPipeline", "QwenImageEditPipeline", "FluxPipeline"):
        with refuse(match=r"--edit.second-source-data-dir is .x.; expected nothing with a .*, which takes one source; leave"):
            task.encoders(config(built(name), second_source_data_dir="x"))
    plus = built("QwenImageEditPlusPipeline")
    with refuse(match=r"--edit.second-source-column is .*x.*y.*; expected one place of these sources"):
        task.encoders(config(plus, second_source_data_dir="x", second_source_column="y"))
    with refuse(match=r"--edit.third-source is given and no second one"):
        task.encoders(config(plus, third_source_data_dir="x"))
    few = three(pairs, tmp_path / "few")
    (few / "1.png").unlink()
    said = cli(tmp_path, *command(tmp_path, plus, pairs, edit__second_source_data_dir=few))
    assert said.code == 2 and "--edit.second-source-data-dir" in said.err and "1 images have no partner" in said.err, said.err
