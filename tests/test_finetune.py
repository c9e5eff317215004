"""Fine-tuning: what trains and what does not, the objective, runs, the export, from scratch, merging, bad input."""

import functools
import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from test_lora_families import CAPTIONS, SIDE, in_fork, photos  # noqa: F401  a fixture
from warm import brief, cli, cli_many, digest, distance, flags

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import objective, text_to_image
from oneloop.settings import command_line
from oneloop.tasks import Rng, finetune, lora

NAMES = ("sd", "sdxl", "FluxPipeline", "QwenImagePipeline")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""
    return functools.cache(lambda name: finetune.make_models(config(built(name))) and built(name))


def config(model, task=finetune, **settings):
    base = Base(output_dir="unused", logger=("none",))
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2)
    made = task.Settings(pretrained_model_name_or_path=str(model), **{"num_inference_steps": 2} | settings)
    return task.Config(base, sizes, made)


def command(folder, model, photos, out="out", **more):  # noqa: F811
    """A command line for two steps of `finetune`."""
    settings = brief(folder, out, photos, SIDE) | {
        "base.ema_power": 0,
        "finetune.pretrained_model_name_or_path": model,
        "finetune.learning_rate": 1e-3,
        "finetune.num_inference_steps": 2,
    }
    return flags("finetune", settings | {name.replace("__", "."): value for name, value in more.items()})


def drawn(own, s, parts):
    return own.sample(parts, s, CAPTIONS[:1], Rng.of(0, range(1), "samples").generators("sample"), SIDE, SIDE)


def trained(cfg):
    """Names of what trains, by model."""
    models = finetune.make_models(cfg)
    return {name: {key for key, p in m.named_parameters() if p.requires_grad} for name, m in models.items()} | {"": models}


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_lora_and_reaches_all_that_trains(built, name):
    """The formula's own tests are those of `lora`, whose adapters begin as nothing."""
    cfg, other = config(built(name)), config(built(name), lora, rank=2)
    models, theirs = finetune.make_models(cfg), lora.make_models(other)
    net = text_to_image.family(cfg.finetune).TRAINED
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    sizes = {key: torch.tensor([[SIDE, SIDE]] * 2) for key in ("original_size", "target_size")}
    batch = sizes | {"crop_top_left": torch.zeros(2, 2, dtype=torch.long)}
    with torch.no_grad():
        batch |= text_to_image.encode_images(models, x, cfg) | text_to_image.encode_captions(models, CAPTIONS[:2], cfg)
        wanted = objective.objective(theirs, batch, Rng.of(0, range(2)), other).mean()
    (loss,) = finetune.loss_fn(models, batch, Rng.of(0, range(2)), cfg)
    torch.testing.assert_close(loss.value, wanted, rtol=1e-5, atol=1e-6)
    loss.value.backward()
    own = [key for key, p in models[net].named_parameters() if p.requires_grad and p.grad is None]
    assert not own and all(not p.requires_grad for k, m in models.items() if k != net for p in m.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_an_image(built, name):
    """Over 32 fixed draws of noise and its level of one image the loss falls; what does not train stays."""
    cfg = config(built(name))
    models = finetune.make_models(cfg)
    net = models[text_to_image.family(cfg.finetune).TRAINED]
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {key: torch.tensor([[SIDE, SIDE]]) for key in ("original_size", "target_size")}
    batch["crop_top_left"] = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        batch |= text_to_image.encode_images(models, x, cfg) | text_to_image.encode_captions(models, CAPTIONS[:1], cfg)

    def loss(numbers):
        wide = {key: value.expand(len(numbers), *value.shape[1:]) for key, value in batch.items()}
        return next(finetune.loss_fn(models, wide, Rng.of(9, numbers), cfg)).value

    frozen = {key: p.clone() for key, p in net.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)
    with torch.no_grad():
        before = loss(range(32)).item()
    for step in range(16):
        loss(range(100 + 4 * step, 104 + 4 * step)).backward()
        optimizer.step(), optimizer.zero_grad()
    with torch.no_grad():
        after = loss(range(32)).item()
    assert after < 0.8 * before, (before, after)
    assert all(torch.equal(dict(net.named_parameters())[key], x) for key, x in frozen.items())
    assert bool(frozen) == (name == "QwenImagePipeline")


def test_what_trains(built):
    every = trained(config(built("sd")))
    assert (
        every["unet"] == {key for key, _ in every[""]["unet"].named_parameters()} and not every["vae"] | every["text_encoder"]
    )
    attention = trained(config(built("sd"), trains=("attention",)))["unet"]
    cross = trained(config(built("sd"), trains=("cross-attention",)))["unet"]
    assert cross and all(".attn2." in key for key in cross)
    assert attention == {key for key in every["unet"] if ".attn1." in key or ".attn2." in key}
    some = trained(config(built("sd"), trains=("attn2.to_k", r"down_blocks\.0")))["unet"]
    assert some == {key for key in every["unet"] if ".attn2.to_k." in key or key.startswith("down_blocks.0.")}
    flux = trained(config(built("FluxPipeline"), trains=("attention",)))["transformer"]
    assert flux and all(".attn." in key for key in flux)
    text = trained(config(built("sdxl"), train_text_encoder=True))
    last = max(int(key.split(".layers.")[1].split(".")[0]) for key in text["text_encoder_2"] if ".layers." in key)
    assert text["text_encoder"] and not any("final_layer_norm" in k or f".layers.{last}." in k for k in text["text_encoder"])
    assert any("final_layer_norm" in key for key in text["text_encoder_2"])


def test_what_no_gradient_reaches_does_not_train(built):
    """As the last block's text stream in Qwen-Image: several processes would wait for its gradients."""
    parts = trained(config(built("QwenImagePipeline")))
    every = {key for key, _ in parts[""]["transformer"].named_parameters()}
    assert 0 < len(every - parts["transformer"]) < len(every) / 4


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_equal_and_its_export_draws_the_same(tmp_path, built, photos, name):  # noqa: F811
    """All of it, then attention alone: what does not train is the base's, bit for bit."""

    def run(out, **more):
        cfg = command_line.parse(command(tmp_path, built(name), photos, out, base__checkpointing_steps=1, **more))[1]
        return loop.run(finetune.task, cfg), cfg

    def runs():
        for out, trains in (("all", "all"), ("some", "attention")):
            state, cfg = run(out, finetune__trains=trains)
            shutil.copytree(tmp_path / out / "checkpoint-1", tmp_path / f"{out}-again" / "checkpoint-1")
            run(f"{out}-again", finetune__trains=trains)
            assert digest(tmp_path / out) == digest(tmp_path / f"{out}-again")
            own = text_to_image.family(cfg.finetune)
            scope = {"__file__": str(tmp_path / out / "checkpoint-2" / "load.py")}
            lines = (tmp_path / out / "checkpoint-2" / "load.py").read_text()
            exec(lines.rpartition("pipeline(")[0], scope)
            loaded, base = getattr(scope["pipeline"], own.TRAINED), finetune.make_models(cfg)[own.TRAINED].state_dict()
            for key, x in loaded.state_dict().items():
                average = state.ema.get(f"{own.TRAINED}.{key}")
                assert torch.equal(x, base[key] if average is None else average), key
            moved = [key for key, x in loaded.state_dict().items() if not torch.equal(x, base[key])]
            assert moved and (trains == "all" or all("attn" in key for key in moved))
            draw = functools.partial(drawn, own, cfg.finetune)
            with torch.no_grad():
                models = finetune.make_models(cfg)
                models[own.TRAINED].load_state_dict(loaded.state_dict())
                torch.testing.assert_close(draw(scope["pipeline"].components), draw(models), rtol=0, atol=1e-4)
        assert not list((tmp_path / "some" / "export").glob("*/*.safetensors"))

    assert "no samples" not in in_fork(tmp_path, runs).err


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_agree_with_one(tmp_path, built, photos, name):  # noqa: F811
    steady = {"base__use_ema": False, "finetune__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    text = {"finetune__train_text_encoder": True} if name == "sd" else {}
    line = functools.partial(command, tmp_path, built(name), photos, **steady, **text)

    def run():
        """What trained, the text encoder too, is what the lines of the checkpoint load."""
        state = loop.run(finetune.task, command_line.parse(line("one"))[1])
        scope = {"__file__": str(tmp_path / "one" / "checkpoint-2" / "load.py")}
        exec((tmp_path / "one" / "checkpoint-2" / "load.py").read_text().rpartition("pipeline(")[0], scope)
        assert ("text_encoder" in state.models) == bool(text)
        for part, module in state.models.items():
            loaded = getattr(scope["pipeline"], part).state_dict()
            assert all(torch.equal(loaded[key], x) for key, x in module.state_dict().items())

    in_fork(tmp_path, run)
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert 0 < distance(tmp_path / "one", tmp_path / "two", "model") < 1e-6


@pytest.mark.parametrize("name", ["sd", "QwenImagePipeline"])
def test_from_scratch_and_merged(tmp_path, built, photos, name):  # noqa: F811
    """Of another size, without the weights; merged, it is a base that draws as the run does; by half, it is half way."""
    model, part = shutil.copytree(built(name), tmp_path / "model"), "unet" if name == "sd" else "transformer"
    given = json.loads((model / part / "config.json").read_text())
    given |= {"layers_per_block": 2} if name == "sd" else {"num_layers": 1}
    (tmp_path / "own.json").write_text(json.dumps(given))
    for path in (model / part).glob("*.safetensors"):
        path.unlink()
    scratch = {"finetune__from_scratch": True, "finetune__model_config": tmp_path / "own.json"}
    done = cli(tmp_path, *command(tmp_path, model, photos, **scratch))
    assert done.code == 0 and "no samples" not in done.err, done.err
    made = json.loads((tmp_path / "out" / "export" / part / "config.json").read_text())
    assert all(made[key] == value for key, value in given.items() if key in ("layers_per_block", "num_layers"))

    merge = lambda run, to, x: cli(tmp_path, "merge", run, "--to", to, "--dtype", "float32", "--strength", x)  # noqa: E731
    half, whole = (merge("out", f"scratch-{x}", x) for x in (0.5, 1))
    assert half.code == 2 and "--strength is 0.5; expected 1 of a model that was trained from scratch" in half.err
    assert whole.code == 0, whole.err
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "scratch-1").rglob("*.*")} == {
        (tmp_path / "own.json").stat().st_mode & 0o777
    }
    drawn_with = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "scratch-1").components[part].state_dict()
    own = load_file(tmp_path / "out" / "export" / part / "diffusion_pytorch_model.safetensors")
    assert own.keys() == drawn_with.keys() and all(torch.equal(drawn_with[key], x) for key, x in own.items())
    one = cli(tmp_path, "merge", "out", "--to", "one.safetensors", "--dtype", "float32", "--original")
    if name == "sd":
        assert one.code == 0, one.err
        kind, whole = diffusers.StableDiffusionPipeline, str(tmp_path / "scratch-1")
        state = kind.from_single_file(str(tmp_path / "one.safetensors"), config=whole).unet.state_dict()
        assert own.keys() == state.keys() and all(torch.equal(state[key], x) for key, x in own.items())
    else:
        assert one.code == 2 and "--original with a QwenImagePipeline; expected a StableDiffusionPipeline or" in one.err
    folder = cli(tmp_path, "merge", "out", "--to", "one", "--original")
    assert folder.code == 2 and "--to is 'one'; expected a .safetensors file, as --original asks for" in folder.err

    assert cli(tmp_path, *command(tmp_path, built(name), photos, "tuned", finetune__trains="attention")).code == 0
    states = [load_file(next((built(name) / part).glob("*.safetensors")))]
    for strength in (0.5, 1):
        to = f"merged-{strength}"
        done = merge("tuned", to, strength)
        assert done.code == 0 and f"at strength {strength} merged into" in done.out, done.err
        states.append(getattr(diffusers.DiffusionPipeline.from_pretrained(tmp_path / to), part).state_dict())
    changed = load_file(tmp_path / "tuned" / "export" / finetune.CHANGED)
    for key, x in states[0].items():
        assert torch.equal(states[2][key], changed.get(key, x))
        torch.testing.assert_close(states[1][key], (x + changed.get(key, x)) / 2)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (
            "sd",
            {"trains": ("nothing",)},
            "--finetune.trains 'nothing': a UNet2DConditionModel has no such module",
        ),
        ("FluxPipeline", {"trains": ("cross-attention",)}, "'cross-attention': a FluxTransformer2DModel has no such module"),
        ("sd", {"trains": ("(",)}, "--finetune.trains '(': no regular expression"),
        ("sd", {"trains": ("all", "attention")}, "expected all without other names"),
        ("sd", {"trains": ()}, "expected at least one name, or all"),
        ("sd", {"model_config": "x.json"}, "--finetune.model-config is 'x.json'; expected --finetune.from-scratch beside it"),
        ("sd", {"from_scratch": True, "trains": ("attention",)}, "--finetune.from-scratch with --finetune.trains"),
        ("sd", {"from_scratch": True, "model_config": "x.json"}, "--finetune.model-config x.json: cannot read x.json"),
        ("sd", {"flow_shift": 3.0}, "--finetune.flow-shift is 3.0: a StableDiffusionPipeline has no use for it"),
        ("QwenImagePipeline", {"train_text_encoder": True}, "a QwenImagePipeline has no use for it"),
        ("sd", {"validation_prompts": ("a --strength 0.5",)}, "a sample at strength 0.5: only adapters have a strength"),
    ],
)
def test_settings_that_do_not_fit_are_a_line(built, name, settings, says):
    with pytest.raises(BadInput) as refused:
        cfg = config(built(name), **settings)
        finetune.encoders(cfg)
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value


def test_a_model_config_of_another_kind(built, tmp_path):
    config_of = json.loads((built("sd") / "unet" / "config.json").read_text())
    for given, says in (
        ({"cross_attention_dim": 7}, "its cross_attention_dim is 7; expected"),
        ({"_class_name": "UNet2DModel"}, "expected an object, the config of a model whose _class_name is UNet2DConditionModel"),
        ({"block_out_channels": [3]}, "not a UNet2DConditionModel"),
    ):
        (tmp_path / "own.json").write_text(json.dumps(config_of | given))
        cfg = config(built("sd"), from_scratch=True, model_config=str(tmp_path / "own.json"))
        with pytest.raises(BadInput, match=says):
            finetune.encoders(cfg)
