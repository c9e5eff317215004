"""The task `controlnet`: runs, resuming, several processes, samples, the export, and what is refused."""

import functools
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_controlnet import NAMES, SIDE, config
from test_lora_families import in_fork, photos  # noqa: F401  a fixture
from warm import brief, cli, cli_many, digest, distance, flags

from oneloop import loop
from oneloop.configs import BadInput
from oneloop.families import control, text_to_image
from oneloop.families.controls import CONTROLNETS
from oneloop.settings import command_line
from oneloop.tasks import Rng, controlnet

GRID = "condition-target-sample"
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""
    return functools.cache(lambda name: controlnet.task.make_models(config(built(name))) and built(name))


def command(folder, model, photos, out="out", **more):  # noqa: F811
    """A command line for two steps of `controlnet`."""
    settings = brief(folder, out, photos, SIDE) | {
        "base.ema_power": 0,
        "data.conditioning": "edges",
        "controlnet.pretrained_model_name_or_path": model,
        "controlnet.learning_rate": 1e-2,
        "controlnet.num_inference_steps": 2,
    }
    return flags("controlnet", settings | {name.replace("__", "."): value for name, value in more.items()})


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_equal_and_its_export_draws_the_same(tmp_path, built, photos, name):  # noqa: F811
    """Text encoders are gone before the base comes; what is exported is the ControlNet alone, and draws as the run drew."""

    def run(out, **more):
        line = command(tmp_path, built(name), photos, out, base__checkpointing_steps=1, base__mixed_precision="no", **more)
        cfg = command_line.parse(line)[1]
        return loop.run(controlnet.task, cfg), cfg

    def runs():
        state, cfg = run("out")
        shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        run("again")
        assert digest(tmp_path / "out") == digest(tmp_path / "again") and set(state.models) == {"controlnet"}
        folder, own = tmp_path / "out" / "checkpoint-2", control.entry(CONTROLNETS, cfg)
        saved, base = diffusers.DiffusionPipeline.from_pretrained(built(name)), text_to_image.family(cfg.controlnet).TRAINED
        lines, scope = (folder / "load.py").read_text(), {"__file__": str(folder / "load.py")}
        exec(lines.rpartition("pipeline(")[0], scope)
        pipeline = scope["pipeline"]
        assert type(pipeline).__name__ == own.pipeline and "load_image(path" in lines
        net = getattr(diffusers, own.kind).from_pretrained(folder).state_dict()
        assert net.keys() == state.models["controlnet"].state_dict().keys()
        assert all(torch.equal(x, state.ema[f"controlnet.{key}"]) for key, x in net.items() if f"controlnet.{key}" in state.ema)
        assert not any(key.partition(".")[0] in ("all_x_embedder", "cap_embedder", "x_pad_token") for key in net)
        # The grid's first row: what load.py draws, with the draws of the run's first sample.
        [grid] = (tmp_path / "out" / "samples").glob("2*.png")
        condition, target, sample = np.split(np.asarray(Image.open(grid)).astype(int), 3, 1)
        png = np.asarray(Image.open(folder / "condition.png"))
        assert grid.name == f"2-{GRID}.png" and (condition == png).all() and set(np.unique(condition)) <= {0, 255}
        assert np.abs(target - condition).mean() > 20 and np.abs(sample - target).mean() > 5
        (generator,) = Rng.of(cfg.base.seed, range(1), "samples").generators("sample")
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(generator.initial_seed())  # SD3's pipeline draws without a generator
        call = lines.rpartition("pipeline(")[2].rpartition(").images")[0]
        result = eval(f"pipeline({call}, generator=generator)", scope | {"generator": generator}).images[0]
        assert np.abs(np.asarray(result) - sample).max() <= 2, np.abs(np.asarray(result) - sample).max()
        del saved, base

    done = in_fork(tmp_path, runs)
    assert "made ahead" not in done.err and "no samples" not in done.err, done.err
    models = next(line for line in done.out.splitlines() + done.err.splitlines() if line.startswith("models "))
    assert "text_encoder" not in models and "controlnet" in models
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"]["conditioning"] == "edges"


@pytest.mark.parametrize("name", ["sd", "StableDiffusion3Pipeline", "ZImagePipeline"])
def test_two_processes_agree_with_one_and_go_on_from_an_export(tmp_path, built, photos, name):  # noqa: F811
    steady = {"base__use_ema": False, "controlnet__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    line = functools.partial(command, tmp_path, built(name), photos, **steady)
    in_fork(tmp_path, lambda: loop.run(controlnet.task, command_line.parse(line("one"))[1]))
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert distance(tmp_path / "one", tmp_path / "two", "model") < 1e-6
    one = tmp_path / "one" / "export"
    cfg = config(built(name), controlnet_model_name_or_path=str(one))
    kept = diffusers.AutoModel.from_pretrained(str(one)).state_dict()
    net = controlnet.task.make_models(cfg)["controlnet"]
    assert all(torch.equal(kept[key], x) for key, x in net.state_dict().items()) and net.dtype == torch.float32
    again = cli(tmp_path, *line("more", controlnet__controlnet_model_name_or_path=one, base__max_train_steps=1))
    assert distance(tmp_path / "one", tmp_path / "more", "model") > 1e-5
    assert again.code == 0 and str(tmp_path) not in (tmp_path / "more" / "export" / "config.json").read_text(), again.err


def test_samples_of_prompts_at_the_size_of_their_conditions(tmp_path, built):
    """With buckets: sizes are those of the conditions, prompts in turn; with a base in bfloat16."""
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (24, 48, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    more = {
        "base__mixed_precision": "bf16",
        "data__buckets": True,
        "data__trigger": "a dog",
        "base__num_samples": 3,
        "base__max_train_steps": 1,
    }
    more["controlnet__validation_prompts"] = ("a dog --seed 5", "a red circle --guidance 2")
    done = cli(tmp_path, *command(tmp_path, built("sd"), tmp_path / "photos", **more))
    assert done.code == 0 and "no samples" not in done.err, done.err
    grid = np.asarray(Image.open(next((tmp_path / "out" / "samples").glob(f"1-{GRID}.png"))))
    assert grid.shape == (2 * 24 + 12, 2 * 3 * 40 + 12, 3)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in a line, before anything is trained.


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("ChromaPipeline", {}, "is a ChromaPipeline, for which diffusers has no such model; expected one of StableDiffusion"),
        ("sd", {"controlnet_model_name_or_path": "sdxl"}, "its cross_attention_dim is 20; expected 16, as one for"),
        ("sd", {"controlnet_model_name_or_path": "FluxPipeline"}, "is a FluxControlNetModel; expected a ControlNetModel, as a"),
        ("FluxPipeline", {"controlnet_model_name_or_path": "sd"}, "is a ControlNetModel; expected a FluxControlNetModel"),
        ("sd", {"controlnet_model_name_or_path": "/nowhere"}, "--controlnet.controlnet-model-name-or-path /nowhere: not a"),
        ("sd", {"controlnet_model_name_or_path": "channels"}, "its conditioning_channels is 4; expected 3, as one for"),
        (
            "sd",
            {"controlnet_model_name_or_path": "factor"},
            "out_channels is [16, 32, 96, 256]; expected [16, 32, 96], as one",
        ),
        ("sd", {"num_layers": 2}, "--controlnet.num-layers is 2: a StableDiffusionPipeline has no use for it"),
        ("ZImagePipeline", {"num_single_layers": 2}, "--controlnet.num-single-layers is 2: a ZImagePipeline has no use for it"),
        ("sd", {"train_text_encoder": True}, "--controlnet.train-text-encoder: what sees the condition trains"),
        ("sd", {"placeholder_tokens": ("<dog>",)}, "--controlnet.placeholder-tokens: what sees the condition trains"),
        ("sd", {"validation_prompts": ("a dog --width 64",)}, "it has the size of its condition"),
        ("sd", {"validation_prompts": ("a dog --strength 0.5",)}, "only adapters have a strength"),
        ("sd", {"flow_shift": 3.0}, "--controlnet.flow-shift is 3.0: a StableDiffusionPipeline has no use for it"),
        ("sd", {"controlnet_model_name_or_path": "x", "num_layers": 1}, "they do not go together"),
    ],
)
def test_what_does_not_fit_is_a_line(built, tmp_path, name, settings, says):
    path = settings.get("controlnet_model_name_or_path")
    if path in NAMES:
        controlnet.task.make_models(config(built(path)))["controlnet"].save_pretrained(tmp_path / "net")
    elif path in ("channels", "factor"):
        controlnet.task.make_models(config(built("sd")))["controlnet"].save_pretrained(tmp_path / "net")
        changed = {
            "channels": {"conditioning_channels": 4},
            "factor": {"conditioning_embedding_out_channels": [16, 32, 96, 256]},
        }
        given = json.loads((tmp_path / "net" / "config.json").read_text()) | changed[path]
        (tmp_path / "net" / "config.json").write_text(json.dumps(given))
    if (tmp_path / "net").exists():
        settings = {"controlnet_model_name_or_path": str(tmp_path / "net")}
    with pytest.raises(BadInput) as refused:
        controlnet.task.encoders(config(built(name) if name in NAMES else tiny(tmp_path, name), **settings))
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value


def tiny(folder, name):
    import tiny_families

    return tiny_families.build(name, folder)


def test_data_that_does_not_fit_is_a_line(tmp_path, built, photos):  # noqa: F811
    """Before a model is read: too few conditions, none of the name, another shape, none at all."""
    edges = shutil.copytree(photos, tmp_path / "edges")
    folder = {"data__conditioning_data_dir": edges}
    line = functools.partial(command, tmp_path, built("sd"), photos)

    def plain(words):
        at = words.index("--data.conditioning")
        return words[:at] + words[at + 2 :]

    said = cli(tmp_path, *plain(line()))
    assert said.code == 2 and "the task needs a conditioning image for each image and found none" in said.err, said.err
    (edges / "2.png").rename(edges / "3.png")
    said = cli(tmp_path, *plain(line(**folder)))
    assert said.code == 2 and "1 images have no partner" in said.err and "2.png has none" in said.err, said.err
    Image.new("RGB", (70, 20)).save(edges / "2.png")
    said = cli(tmp_path, *plain(line(**folder)))
    assert said.code == 2 and "its conditioning, 2.png, is 70 x 20 where it is 80 x 70" in said.err, said.err
    said = cli(tmp_path, *line(**folder))
    assert said.code == 2 and "expected one source of conditioning images" in said.err, said.err
    assert not (tmp_path / "out" / "run.json").exists()
