"""What `edit` refuses, in one line and before anything is trained; and all weights of transformers."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_edit import SIDE, command, config, pairs, small  # noqa: F401  fixtures
from warm import cli

from oneloop.configs import BadInput
from oneloop.families import edit, edit_samples, text_to_image
from oneloop.tasks import edit as task


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("sd", {"trains": "lora"}, "--edit.trains is 'lora'; expected all of a StableDiffusionPipeline: no pipeline reads"),
        ("sd", {"rank": 4}, "--edit.rank: all weights train here, and no adapters; leave it out"),
        ("sd", {"base_precision": "float8"}, "--base.mixed-precision is 'auto'; expected bf16"),
        ("sd", {"train_text_encoder": True}, "--edit.train-text-encoder: edit trains no text encoder and no words"),
        ("sd", {"placeholder_tokens": ("<x>",)}, "--edit.placeholder-tokens: edit trains no text encoder and no words"),
        ("sd", {"conditioning_dropout": 0.4}, "--edit.conditioning-dropout is 0.4; expected"),
        ("sd", {"validation_prompts": ("a --strength 0.5",)}, "a sample at strength 0.5: only adapters have a strength"),
        ("sd", {"flow_shift": 3.0}, "--edit.flow-shift is 3.0: a StableDiffusionPipeline has no use for it"),
        ("FluxPipeline", {"conditioning_dropout": 0.1}, "expected nothing with a FluxPipeline; leave it out"),
        ("FluxKontextPipeline", {"image_guidance_scale": 2.0}, "expected nothing with a FluxKontextPipeline; leave it out"),
        ("FluxKontextPipeline", {"snr_gamma": 5.0}, "--edit.snr-gamma is 5.0: a FluxKontextPipeline has no use for it"),
        ("FluxKontextPipeline", {"trains": "all", "kohya": True}, "--edit.kohya: all weights train here, and no adapters"),
        ("FluxKontextPipeline", {"target_modules": ("nothing",)}, "'nothing' is the end of no layer's name; the nearest is"),
        ("Flux2KleinPipeline", {}, "--data.resolution is 32; expected at least 64, as its pipeline asks"),
        (
            "QwenImagePipeline",
            {},
            "is a QwenImagePipeline; expected one of StableDiffusionPipeline, StableDiffusionXLPipeline, Fl",
        ),
        ("ZImagePipeline", {}, "is a ZImagePipeline; expected one of StableDiffusionPipeline"),
    ],
)
def test_settings_that_do_not_fit_are_a_line(built, name, settings, says):
    with pytest.raises(BadInput) as refused:
        task.encoders(config(built(name), **settings))
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value


@pytest.mark.parametrize(
    ("name", "part", "channels", "says"),
    [
        ("sd", "unet", 8, "its UNet takes 8 channels, its VAE gives 4; expected a text-to-image model"),
        ("FluxPipeline", "transformer", 32, "its transformer takes 32 channels a token; expected 16, a text-to-image model's"),
    ],
)
def test_a_base_that_is_wide_already_is_refused(tmp_path, built, name, part, channels, says):
    model = shutil.copytree(built(name), tmp_path / "wide")
    told = json.loads((model / part / "config.json").read_text())
    (model / part / "config.json").write_text(json.dumps(told | {"in_channels": channels}))
    with pytest.raises(BadInput, match=says):
        task.encoders(config(model))


@pytest.mark.parametrize("name", ["lora", "finetune"])
def test_a_model_that_edits_is_none_of_text_to_image(tmp_path, built, pairs, name):  # noqa: F811
    line = [word.replace("--edit.", f"--{name}.") for word in command(tmp_path, built("FluxKontextPipeline"), pairs)]
    told = cli(tmp_path, name, *line[1:])
    assert told.code == 2 and "is a FluxKontextPipeline; expected one of StableDiffusionPipeline" in told.err
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_fit_are_a_line(tmp_path, built, pairs):  # noqa: F811
    def told(name, **more):
        done = cli(tmp_path, *command(tmp_path, built(name), pairs, **more))
        error = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.code == 2 and len(error) == 1 and not list(tmp_path.glob("out/checkpoint-*")), done.err
        return error[0]

    line = command(tmp_path, built("sd"), pairs)
    at = line.index("--data.conditioning_data_dir")
    line = [*line[:at], *line[at + 2 :]]
    done = cli(tmp_path, *line)
    assert (
        done.code == 2
        and "the task needs a conditioning image for each image and found none with a folder of images; --data.cond" in done.err
    )
    few, tall = (shutil.copytree(pairs / "before", tmp_path / name) for name in ("few", "tall"))
    (few / "1.png").rename(few / "other.png")
    assert "1 images have no partner" in told("sd", data__conditioning_data_dir=few)
    Image.new("RGB", (70, 80)).save(tall / "1.png")
    assert "its conditioning, 1.png, is 70 x 80 where it is 80 x 70" in told("sd", data__conditioning_data_dir=tall)
    assert "--data.conditioning-column is 'what'" in cli(tmp_path, *line, "--data.conditioning_column", "what").err
    assert "expected one source of conditioning images" in told("sd", data__conditioning_column="what")
    narrow = told("Flux2KleinPipeline", data__buckets=True)
    assert narrow.endswith("makes no side of 48: its pipeline asks for at least 64")
    classes = told("sd", data__num_class_images=2, data__class_prompt="a dog", data__class_data_dir=tmp_path / "classes")
    assert "--data.num-class-images is 2" in classes


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxKontextPipeline"])
def test_all_of_a_transformer_can_train(tmp_path, built, pairs, name):  # noqa: F811
    """The export is what the pipeline that edits opens, and draws as training does."""
    done = cli(tmp_path, *command(tmp_path, built(name), pairs, edit__trains="all", base__use_ema=False))
    assert done.code == 0 and "no samples" not in done.err, done.err
    scope = {"__file__": str(tmp_path / "out" / "checkpoint-2" / "load.py")}
    exec((tmp_path / "out" / "checkpoint-2" / "load.py").read_text().rpartition("pipeline(")[0], scope)
    pipeline, cfg = scope["pipeline"], config(built(name), trains="all")
    trained = load_file(tmp_path / "out" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = text_to_image.load(cfg, "no")["transformer"].state_dict()
    moved = [key for key, x in base.items() if trained[key].shape != x.shape or not torch.equal(trained[key], x)]
    assert len(moved) == len(base), set(base) - set(moved)
    models = task.make_models(cfg)
    models["transformer"].load_state_dict(trained)
    source, generator = Image.open(tmp_path / "out" / "export" / "source.png"), lambda: torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours = edit_samples.sample(models, cfg.edit, "a dog", source, generator(), SIDE, SIDE)
        told = edit_samples.arguments(cfg.edit, SIDE, SIDE) | {edit.way(cfg.edit).argument: source}
        theirs = pipeline(prompt="a dog", generator=[generator()], output_type="pt", **told).images[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
