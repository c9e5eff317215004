"""Runs of `edit` merged into their bases."""

import functools
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from test_edit import CAPTIONS, NAMES, command, config, generator, pairs, side, small  # noqa: F401  fixtures
from warm import cli

from oneloop.families import edit, edit_samples, text_to_image
from oneloop.tasks import edit as task


@pytest.mark.parametrize("name", [*NAMES[:5], NAMES[-1], "FluxPipeline whole"])
def test_a_merged_edit_draws_as_the_run_does(tmp_path, built, pairs, name):  # noqa: F811
    """At strength 1 what base and export draw, in the pipeline that edits, without either; at 0 what the base does."""
    name, _, whole = name.partition(" ")
    more = {"edit__learning_rate": 0.1} | ({"edit__trains": "all", "edit__learning_rate": 1e-2} if whole else {})
    line = command(tmp_path, built(name), pairs, base__use_ema=False, base__lr_scheduler="constant", **more)
    assert cli(tmp_path, *line).code == 0
    merge = functools.partial(cli, tmp_path, "merge", "out", "--dtype", "float32", "--to")
    for to, strength in (("one", "1"), ("none", "0")):
        done = merge(to, "--strength", strength)
        assert done.code == 0 and f"at strength {strength} merged into" in done.out, done.err
    cfg, size = config(built(name), **({"trains": "all"} if whole else {})), side(name)
    cfg = replace(cfg, data=replace(cfg.data, resolution=size))
    s, part = cfg.edit, text_to_image.family(cfg.edit).TRAINED
    scope = {"__file__": str(tmp_path / "out" / "checkpoint-2" / "load.py")}
    exec((tmp_path / "out" / "checkpoint-2" / "load.py").read_text().rpartition("pipeline(")[0], scope)
    source = scope["load_image"](str(tmp_path / "out" / "export" / "source.png"))
    told = edit_samples.arguments(s, size, size) | {edit.way(s).argument: source, "output_type": "pt"}

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.float()
        return pipeline(prompt=CAPTIONS[0], generator=[generator(3)], **told).images[0]

    with torch.no_grad():
        wanted, ours = draw(scope["pipeline"]), draw(one := diffusers.DiffusionPipeline.from_pretrained(tmp_path / "one"))
        assert type(one).__name__ == edit.kind(s)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
        bare = edit_samples.pipeline(task.make_models(cfg), s)  # adapters begin as nothing, widened layers as zeros
        plain = draw(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "none"))
        torch.testing.assert_close(plain, draw(bare), rtol=0, atol=1e-4)
        assert (plain - wanted).abs().max() > 1e-3
    assert merge("part.safetensors").code == 0
    file, state = load_file(tmp_path / "part.safetensors"), getattr(one, part).state_dict()
    assert file.keys() == state.keys() and all(torch.equal(file[key], x) for key, x in state.items())


def test_half_way_and_in_the_original_names(tmp_path, built, pairs):  # noqa: F811
    """The new channels too: they begin as zeros. In one file diffusers reads the same weights from it."""
    line = command(tmp_path, built("sd"), pairs, base__use_ema=False, base__lr_scheduler="constant", edit__learning_rate=0.1)
    assert cli(tmp_path, *line).code == 0
    assert cli(tmp_path, "merge", "out", "--dtype", "float32", "--to", "half", "--strength", "0.5").code == 0
    base = task.make_models(config(built("sd")))["unet"].state_dict()
    learned = load_file(tmp_path / "out" / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    half = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "half", subfolder="unet").state_dict()
    for key, x in half.items():
        torch.testing.assert_close(x, (base[key] + learned[key]) / 2)
    assert half["conv_in.weight"][:, 4:].any() and not base["conv_in.weight"][:, 4:].any()
    assert cli(tmp_path, "merge", "out", "--dtype", "float32", "--to", "all.safetensors", "--original").code == 0
    first = load_file(tmp_path / "all.safetensors")["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(first, learned["conv_in.weight"])
