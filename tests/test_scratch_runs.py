"""Runs from scratch: what they export, that they resume, the chain from an autoencoder to its latents, and mistakes."""

import json
import runpy
import shutil

import pytest
import torch
from PIL import Image
from test_settings import refused
from warm import DIT, UNET, cli, cli_many, digest, distance, fork, tiny

from oneloop.families import drawing

RUNS = {
    "ddpm": {"ddpm__class_conditional": True, "data__random_flip": True},
    "edm": {"edm__class_conditional": True},
    "edm-dpm": {"edm__sampler": "dpm++"},
    "dit": {},
    "dit-plain": {"dit__class_conditional": False, "dit__sampler": "euler"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name of RUNS -> its folder, with a run of six steps in `out` that saved after three."""
    folder, made = tmp_path_factory.mktemp("scratch"), {}

    def run(name):
        if name not in made:
            made[name] = folder / name
            made[name].mkdir()
            result = cli(made[name], *argv(made[name], name, base__checkpointing_steps=3))
            assert result.code == 0, result.err
        return made[name]

    return run


def argv(folder, name, out="out", **more):
    """A tiny run."""
    return tiny(folder, out, task=name.partition("-")[0], **RUNS[name], **more)


@pytest.mark.parametrize("name", RUNS)
def test_the_export_draws(runs, name, tmp_path, monkeypatch):
    """load.py, from a folder elsewhere: a sample of each class, the one that the task draws from the same noise."""
    folder = runs(name)
    shutil.copytree(folder / "out" / "checkpoint-6", moved := tmp_path / "moved")
    done = fork(lambda: runpy.run_path(str(moved / "load.py")), tmp_path).wait(60)
    assert done.code == 0 and (tmp_path / "sample.png").is_file(), done.err
    monkeypatch.chdir(tmp_path)  # where it writes a sample
    scope = runpy.run_path(str(moved / "load.py")) if name == "dit" else {}
    if scope:
        assert scope["x"].shape == (3, 3, 8, 8)
        noise, given = torch.randn(3, 3, 8, 8), (2, torch.arange(3), 3, 1.5)
        both = [f(scope["transformer"], scope["scheduler"], noise, *given) for f in (scope["draw"], drawing.draw)]
        assert torch.equal(*both) and both[0].isfinite().all()


@pytest.mark.parametrize("name", ["ddpm", "edm", "dit"])
def test_resumed_and_on_two_processes(runs, name):
    """Equal, each from its checkpoint, and by the layout: labels and their dropout are the example's."""
    folder = runs(name)
    shutil.copytree(folder / "out" / "checkpoint-3", folder / "resumed" / "checkpoint-3")
    result = cli(folder, *argv(folder, name, "resumed", base__checkpointing_steps=3))
    assert result.code == 0 and "resuming after step 3" in result.err, result.err
    assert digest(folder / "resumed") == digest(folder / "out")
    halves = {"data__train_batch_size": 2}
    assert cli(folder, *argv(folder, name, "one", base__gradient_accumulation_steps=2, **halves)).code == 0
    for result in cli_many(folder, 2, *argv(folder, name, "two", **halves)):
        assert result.code == 0, result.err
    assert digest(folder / "one") == digest(folder / "two")
    assert distance(folder / "out", folder / "two") < 1e-5 or name != "dit"  # a UNet's dropout is by the batch


def test_an_autoencoder_its_latents_and_a_transformer_on_them(tmp_path, monkeypatch):
    """The chain of docs/from-scratch.md, tiny: latents are encoded once, samples are images, the export is whole anywhere."""
    assert cli(tmp_path, *tiny(tmp_path, "vae", 2, task="vae", vae__disc_weight=0)).code == 0
    own = {"dit__pretrained_vae_model_name_or_path": tmp_path / "vae" / "export"}
    result = cli(tmp_path, *tiny(tmp_path, "dit", task="dit", **own, data__validation_split=0.2))
    assert result.code == 0 and "encoding pixel_values once: " in result.err, result.err
    out, scope = tmp_path / "dit", {}
    made = out / "checkpoint-6" / "transformer" / "config.json"
    assert '"in_channels": 2' in made.read_text() and '"sample_size": 4' in made.read_text()
    shutil.move(out / "checkpoint-6", tmp_path / "moved")
    shutil.rmtree(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    scope = runpy.run_path(str(tmp_path / "moved" / "load.py"))
    assert scope["x"].shape == (3, 2, 4, 4) and scope["vae"].config.scaling_factor != 0.18215


@pytest.mark.parametrize(
    ("task", "flags", "says"),
    [
        ("ddpm", ["--ddpm.guidance-scale", "3"], ["--ddpm.guidance-scale is 3.0", "--ddpm.class-conditional beside it"]),
        ("dit", ["--dit.label-dropout", "0"], ["--dit.guidance-scale is 1.5", "--dit.label-dropout above 0"]),
        ("edm", ["--edm.class-conditional", "--edm.num-classes", "2"], ["--edm.num-classes is 2", "at least 3, the classes"]),
        ("edm", ["--edm.sigma-min", "100"], ["--edm.sigma-min is 100.0", "less than sigma_max, 80.0"]),
        ("edm", ["--edm.model-config", "fourier.json"], ["fourier.json", "time_embedding_type", "expected positional"]),
        ("consistency", ["--consistency.model-config", "fourier.json"], ["fourier.json", "expected positional"]),
        ("dit", ["--data.resolution", "9"], ["--data.resolution is 9", "a multiple of 2, the patches of --dit.model-config"]),
        ("dit", ["--data.buckets"], ["--data.buckets is True", "positions are those of one size"]),
        ("dit", ["--dit.model-config", "unet.json"], ["unet.json", "_class_name is DiTTransformer2DModel"]),
        ("dit", ["--dit.model-config", "four.json"], ["four.json: in_channels is 4; expected 3"]),
        ("dit", ["--dit.model-config", "odd.json"], ["odd.json: num_attention_heads is 'two'"]),
        ("dit", ["--dit.model-config", "patch.json"], ["patch.json: patch_size is 0; expected an integer from 1"]),
        ("dit", ["--dit.vae-subfolder", "vae"], ["--dit.vae-subfolder is 'vae'", "--dit.pretrained-vae-model-name-or-path"]),
        ("dit", ["--dit.pretrained-vae-model-name-or-path", "./gone"], ["gone: not an autoencoder of diffusers"]),
        ("dit", ["--dit.pretrained-vae-model-name-or-path", "./unet"], ["holds a UNet2DModel; expected an autoencoder"]),
        ("dit", ["--data.train-data-dir", "plain"], ["--dit.class-conditional: the images do not say labels"]),
    ],
)
def test_bad_input_is_a_line(tmp_path, task, flags, says):
    given = tiny(tmp_path, task=task)
    for name, config in (
        ("fourier", UNET | {"time_embedding_type": "fourier"}),
        ("four", DIT | {"in_channels": 4}),
        ("odd", DIT | {"num_attention_heads": "two"}),
        ("patch", DIT | {"patch_size": 0}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(UNET))
    (tmp_path / "plain").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "plain" / f"{i}.png")
    refused(cli(tmp_path, *given, *flags), *says)
    assert not (tmp_path / "out" / "checkpoint-6").exists()
