"""What an export says to others: the lines that load it run, whatever its folder is called, and it names no folder of ours."""

import contextlib
import json
import re
import runpy
import shutil

import pytest
import tiny_models
import torch
import yaml
from diffusers import AutoencoderKL, DDPMPipeline, StableDiffusionPipeline  # noqa: F401
from safetensors import safe_open
from test_lora import command as lora_command
from test_lora import draw_photos
from warm import VAE, cli, fork, tiny

from oneloop import configs
from oneloop.configs import Base, Data
from oneloop.tasks import lora
from oneloop.views.loading import load_file

ODD = """it's a "big" \\ {one}"""
"""A folder's name with blanks, both quotes, a backslash and braces."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Task -> (result, output folder) of a run into a folder of an odd name, on inputs given by absolute paths."""
    folder = tmp_path_factory.mktemp("made")
    photos, model = draw_photos(folder / "secret photos"), tiny_models.build(folder / "secret models")
    odd, cache = folder / ODD, {"data__cache_dir": folder / "secret cache"}
    (folder / "shifted").mkdir()
    shift = {"vae__model_config": folder / "shifted" / "vae.json"}
    commands = {
        "ddpm": tiny(folder, f"{ODD}/ddpm", 1, **cache),
        "vae": [*tiny(folder, f"{ODD}/vae", 1, "vae", **cache | shift)],
        "lora": lora_command(folder, model, photos, f"{ODD}/lora", lora__kohya=True, base__max_train_steps=1, **cache),
    }
    (folder / "shifted" / "vae.json").write_text(json.dumps(VAE | {"shift_factor": 0.1}))
    model = ["--vae.model-config", "None", "--vae.pretrained-model-name-or-path", folder / "secret models" / "sd" / "vae"]
    commands["vae again"] = [*tiny(folder, f"{ODD}/vae again", 1, "vae"), *model]
    results = {}
    for name, argv in commands.items():
        result = cli(folder, *argv)
        assert result.code == 0, result.err
        results[name] = result, odd / name
    return results


def smaller(code):
    """The lines, drawing images of a tiny size."""
    return code.replace("guidance_scale=7.5", "height=32, width=32")


@pytest.mark.parametrize("task", ["ddpm", "vae", "lora"])
def test_every_snippet_runs(tmp_path, made, task):
    """load.py from anywhere, the lines on the console, and those of the card where it lies."""
    result, out = made[task]
    saved = next(out.glob("checkpoint-*"))
    printed = (result.out + result.err).partition("/export:\n\n")[2].strip()
    card = re.findall(r"```python\n(.*?)```", (out / "export" / "README.md").read_text(), re.S)[0]
    assert printed.startswith("path = ") and f"{saved}/load.py loads it" in result.out + result.err
    if task == "lora":  # a base model in a folder has its name alone in the card: whoever reads it has it elsewhere
        assert "from_pretrained('sd')" in card
        card = card.replace("'sd'", repr(str(out.parent.parent / "secret models" / "sd")))
    copy = shutil.copytree(saved, tmp_path / "moved here")
    (copy / "small.py").write_text(smaller((copy / "load.py").read_text()))

    def run():
        places = [(tmp_path, lambda: runpy.run_path(str(copy / "small.py")))]
        places += [(tmp_path, lambda: exec(smaller(printed), scope)), (out / "export", lambda: exec(smaller(card), scope))]
        for cwd, call in places:
            scope = {}
            with contextlib.chdir(cwd):
                scope |= call() or {}
            if task == "vae":
                x = torch.rand(1, 3, 8, 8) * 2 - 1
                assert scope["decode"](scope["encode"](x)).shape == x.shape
            else:
                (cwd / "sample.png").unlink()

    ended = fork(run, tmp_path).wait()
    assert ended.code == 0, ended.err


def test_earlier_forms_of_a_tasks_lines():
    """Quotes around the placeholder, as tasks of earlier versions wrote it, are no part of the path."""
    for lines in ('x = "{path}"; y = {{1}}', "x = {path}; y = {{1}}"):
        assert load_file(lines).endswith("x = path; y = {1}\n")


def test_the_printed_lines_shift_as_the_config_says(made):
    """Encoded images have mean 0 and deviation 1, by the lines themselves."""
    from oneloop import data
    from oneloop.inputs import sources

    _, out = made["vae"]
    cfg = Data(num_shapes=24, resolution=8, train_batch_size=24)
    x = next(iter(data.Fixed(data.Examples(sources.open_source(cfg), cfg, 0), 24, "cpu")))["pixel_values"]
    scope = runpy.run_path(str(next(out.glob("checkpoint-*")) / "load.py"))
    torch.manual_seed(0)
    with torch.no_grad():
        z = torch.cat([scope["encode"](x) for _ in range(20)])
        shift = scope["vae"].config.shift_factor
        assert abs(shift * scope["vae"].config.scaling_factor) > 0.05, "a shift of nothing shows nothing"
        assert abs(z.mean()) < 0.02 and z.std().item() == pytest.approx(1, abs=0.02)
        again = scope["vae"].decode(z[:24] / scope["vae"].config.scaling_factor + shift).sample
        assert torch.equal(scope["decode"](z[:24]), again)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing names this machine.


def written(folder):
    """Every text of an export: its files, and what weights files say of themselves."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        yield path.name, path.read_bytes().decode("latin-1")
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield path.name, json.dumps(file.metadata())


@pytest.mark.parametrize("task", ["ddpm", "vae", "vae again", "lora"])
def test_an_export_names_no_folder_of_this_machine(made, task):
    _, out = made[task]
    for name, text in written(out / "export"):
        assert str(out.parent.parent) not in text and json.dumps(str(out))[1:-1] not in text, name
    settings = json.loads(re.findall(r"```json\n(.*?)```", (out / "export" / "README.md").read_text(), re.S)[0])
    assert settings["base"]["output_dir"] is None
    if task == "vae again":
        assert settings["vae"]["pretrained_model_name_or_path"] == "vae"
    if task == "lora":
        assert settings["data"]["train_data_dir"] == "secret photos" and settings["data"]["cache_dir"] == "secret cache"
        assert settings["lora"]["pretrained_model_name_or_path"] == "sd"
        assert "4 images of secret photos" in (out / "export" / "README.md").read_text()


def test_every_setting_that_is_a_path_becomes_a_name(tmp_path, monkeypatch):
    """Whatever the setting is called: absolute, from home, with dots, inside a tuple; free text and names on the hub stay."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = tiny_models.build(tmp_path / "models")
    (tmp_path / "a" / "b").mkdir(parents=True)
    base = Base(output_dir=str(tmp_path / "runs" / "mine"), resume_from_checkpoint=str(tmp_path / "a" / "b"))
    folders = {"train_data_dir": "a/b", "cache_dir": "~/a", "example_cache": f"{tmp_path}/a/../a/b/", "dataset_name": "./a/b"}
    data = Data(**folders, resolution=32, trigger="~ /, a {label} . ..", dataset_config_name="owner/name")
    prompts = ("/imagine a dog", "~", str(tmp_path / "a"), "a/b testing")
    cfg = lora.Config(base, data, lora.Settings(pretrained_model_name_or_path=str(model), validation_prompts=prompts))
    got = configs.portable(configs.to_dict(cfg), cfg)
    assert [got["base"][k] for k in ("output_dir", "resume_from_checkpoint")] == ["mine", "b"]
    assert [got["data"][k] for k in folders] == ["b", "a", "b", "b"]
    assert got["data"]["trigger"] == data.trigger and got["data"]["dataset_config_name"] == "owner/name"
    assert got["lora"]["pretrained_model_name_or_path"] == "sd"
    assert got["lora"]["validation_prompts"][0] == "/imagine a dog" and got["lora"]["validation_prompts"][2] == "a"
    assert str(tmp_path) not in json.dumps(got)
    assert configs.to_dict(cfg)["data"]["train_data_dir"] == "a/b", "the settings themselves are as they were"


# ---------------------------------------------------------------------------------------------------------------------
# The head of the card.


def head(out):
    return yaml.safe_load((out / "export" / "README.md").read_text().split("---\n")[1])


def test_the_card_has_what_the_hubs_pages_read(made):
    card = head(made["lora"][1])
    assert card["library_name"] == "diffusers" and card["pipeline_tag"] == "text-to-image"
    assert {"lora", "text-to-image", "template:sd-lora", "stable-diffusion", "diffusers"} <= set(card["tags"])
    assert "base_model" not in card and card["license"] == "other"  # a folder is no model on the hub
    assert head(made["ddpm"][1])["pipeline_tag"] == "unconditional-image-generation"
    assert len(card["tags"]) == len(set(card["tags"]))


def test_the_base_model_and_its_license(tmp_path, monkeypatch):
    """By its own card; without one the license is said to be the base model's."""
    from oneloop.families import hub

    (tmp_path / "README.md").write_text("---\nlicense: 'openrail++'\ntags:\n- x\n---\n# license: none\n")
    monkeypatch.setattr(hub, "file", lambda name, revision, path: tmp_path / path)
    assert hub.card("owner/model", None) == {"base_model": "owner/model", "license": "openrail++"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x-1\nlicense_link: LICENSE.md\n---\n")
    assert hub.card(str(tmp_path), None) == {"license": "other", "license_name": "x-1", "license_link": "LICENSE.md"}
    (tmp_path / "README.md").unlink()
    assert hub.card("owner/model", None) == {
        "base_model": "owner/model",
        "license": "other",
        "license_name": "as-the-base-model",
        "license_link": "https://huggingface.co/owner/model",
    }
