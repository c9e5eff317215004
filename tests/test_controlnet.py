"""The task `controlnet` on six families, from tiny checkpoints: what training computes is what the pipelines compute, runs,
resuming, samples, the export."""

import functools
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from test_families import as_map, same
from test_lora_families import in_fork, photos  # noqa: F401  a fixture
from warm import brief, cli, cli_many, digest, distance, flags

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import control, stable_diffusion, text_to_image, transformer
from oneloop.families.controlnets import CONTROLNETS
from oneloop.families.objective import objective
from oneloop.settings import command_line
from oneloop.tasks import Rng, controlnet, of_settings

SD, FLOWS = ("sd", "sdxl"), ("StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline")
NAMES = (*SD, *FLOWS)
PROMPTS = ["a dog", "a small white dog on the left"]
HEIGHT, WIDTH, SIDE = 64, 32, 32
GRID = "condition-target-sample"
OFF = {"QwenImagePipeline": {"true_cfg_scale": 1.0}, "ZImagePipeline": {"guidance_scale": 0.0}}
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""
    return functools.cache(lambda name: controlnet.make_models(config(built(name))) and built(name))


controlnet.make_models = controlnet.task.make_models


def config(model, recompute=False, **settings):
    base = Base(output_dir="unused", logger=("none",), gradient_checkpointing=recompute)
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2, conditioning="edges")
    made = controlnet.Settings(pretrained_model_name_or_path=str(model), **{"num_inference_steps": 2} | settings)
    return controlnet.Config(base, sizes, made)


def made(cfg, moved=True):
    """The models; with `moved` nothing of the ControlNet is zero any more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = controlnet.task.make_models(cfg)
        for p in models["controlnet"].parameters() if moved else ():
            if not p.any():
                torch.nn.init.normal_(p, std=1.0 if "unet" in models else 0.2)
        return models


def encoded(models, cfg, height=HEIGHT, width=WIDTH):
    """Two examples as a loss sees them, and the conditions that they were made of."""
    rng = Rng.of(1, range(2))
    x, conditioning = (rng.uniform(name, 3, height, width) * 2 - 1 for name in ("x", "condition"))
    batch = {name: torch.tensor([[height, width]] * 2) for name in ("original_size", "target_size")}
    batch["crop_top_left"] = torch.zeros(2, 2, dtype=torch.long)
    with torch.no_grad():
        batch |= text_to_image.encode_images(models, x, cfg) | text_to_image.encode_captions(models, PROMPTS, cfg)
        for name, encoding in of_settings(controlnet.task.encodings, cfg).items():
            batch |= encoding.fn(models, conditioning, cfg) if name == "conditioning" else {}
    return batch | {"conditioning": conditioning}


def both(cfg, models, batch, rng=Rng.of(0, range(2))):  # noqa: B008
    own = control.entry(CONTROLNETS, cfg)
    return control.controlled(models, own, control.condition_of(own, batch, rng), cfg.controlnet)


def loss_of(cfg, models, batch, rng=Rng.of(0, range(2))):  # noqa: B008
    (loss,) = controlnet.loss_fn(models, batch, rng, cfg)
    return loss.value


# ---------------------------------------------------------------------------------------------------------------------
# What training computes.


@pytest.mark.parametrize("name", NAMES)
def test_at_first_it_changes_nothing_and_then_all_of_it_learns(built, name):
    """Zero layers: the loss and a sample are the base's, to the bit; after two steps every parameter has moved."""
    cfg = config(built(name), learning_rate=1e-2)
    models, rng = made(cfg, moved=False), Rng.of(0, range(2))
    batch, own = encoded(models, cfg), text_to_image.family(cfg.controlnet)
    with torch.no_grad():
        assert torch.equal(objective(both(cfg, models, batch), batch, rng, cfg), objective(models, batch, rng, cfg))
        entry, draw = control.entry(CONTROLNETS, cfg), Rng.of(0, range(2), "samples")
        drawn = control.sample(models, entry, cfg.controlnet, batch["conditioning"], PROMPTS, draw.generators("sample"))
        plain = own.sample(models, cfg.controlnet, PROMPTS, draw.generators("sample"), HEIGHT, WIDTH)
    # Pipelines that draw more for the condition have other noise in what follows.
    assert same(drawn, plain, 1e-4) or name in ("FluxPipeline", "QwenImagePipeline")
    net, optims = models["controlnet"], controlnet.make_optim(models, cfg)
    before = {key: p.clone() for key, p in models[own.TRAINED].named_parameters()}
    trained = {key: p.clone() for key, p in net.named_parameters() if p.requires_grad}
    for step in range(3):
        loss_of(cfg, models, batch, Rng.of(step, range(2))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
        optims["controlnet"].step(), optims["controlnet"].zero_grad()
    assert not [key for key, p in net.named_parameters() if key in trained and torch.equal(p, trained[key])]
    assert all(torch.equal(p, before[key]) and p.grad is None for key, p in models[own.TRAINED].named_parameters())
    frozen = sum(p.numel() for key, p in net.named_parameters() if key not in trained)
    assert frozen < sum(p.numel() for p in net.parameters()) / 3 and bool(frozen) == (name in FLOWS[::2])


@pytest.mark.parametrize("name", NAMES)
def test_its_answer_is_that_of_the_pipeline(built, tmp_path, monkeypatch, name):
    """The export in the family's own ControlNet pipeline, by from_pretrained: at its x_t and time, what it hands to its
    scheduler is what training computes, under prompts of unequal length and conditions that are not square."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    cfg = config(built(name))
    models, s = made(cfg), cfg.controlnet
    batch, own = encoded(models, cfg), control.entry(CONTROLNETS, cfg)
    models["controlnet"].save_pretrained(tmp_path)
    net = getattr(diffusers, own.kind).from_pretrained(tmp_path)
    pipeline = getattr(diffusers, own.pipeline).from_pretrained(built(name), controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    steps, step = [], pipeline.scheduler.step

    def listen(v, t, x, **more):
        steps.append((v, t, x))
        return step(v, t, x, **more)

    pipeline.scheduler.step = listen
    image = batch["conditioning"] if own.latent else batch["conditioning"] / 2 + 0.5
    call = {own.image: image, own.scale: 1.0, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    pipeline(prompt=[*PROMPTS], generator=generators, **call | OFF.get(name, {"guidance_scale": 1.0}))
    v, t, x = steps[1]
    if name in FLOWS:
        family, sigma = transformer.family(s), pipeline.scheduler.sigmas[1].expand(2)
        x, v = as_map(x, family, HEIGHT, WIDTH), as_map(v, family, HEIGHT, WIDTH)

    def answer(models):
        if name in FLOWS:
            return family.velocity(models["transformer"], x, sigma, batch, 1.0)
        return models["unet"](x, t.expand(2), **stable_diffusion.conditions(batch, name == "sdxl"), return_dict=False)[0]

    still = {key: 0 * batch[key] for key in ("condition_std",) if key in batch}
    turned = {key: batch[key].flip(0) for key in ("condition_mean", "conditioning") if key in batch}
    with torch.no_grad():
        ours, other = (answer(both(cfg, models, batch | still | more)) for more in ({}, turned))
        tolerance = 2e-5 * max(1.0, float(v.abs().max()))
        assert same(ours, v, tolerance), (ours - v).abs().max()
        assert not same(other, v, 20 * tolerance) and not same(answer(models), v, 100 * tolerance)


@pytest.mark.parametrize("name", SD)
def test_the_loss_is_the_official_formula(built, name):
    """train_controlnet.py and train_controlnet_sdxl.py, written out with their names."""
    cfg = config(built(name))
    models = made(cfg)
    batch, rng = encoded(models, cfg), Rng.of(0, range(2))
    pipe = diffusers.DiffusionPipeline.from_pretrained(built(name))
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    mean, std = batch["latent_mean"], batch["latent_std"]
    latents = (mean + std * rng.normal("posterior", *mean.shape[1:])) * pipe.vae.config.scaling_factor
    noise, timesteps = rng.normal("noise", *mean.shape[1:]), rng.integers("timestep", 1000)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    given = {"encoder_hidden_states": batch["prompt_embeds"]}
    if name == "sdxl":
        ids = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2).float()
        given["added_cond_kwargs"] = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": ids}
    controlnet_image = (batch["conditioning"] + 1) / 2
    with torch.no_grad():
        down, mid = models["controlnet"](noisy_latents, timesteps, **given, controlnet_cond=controlnet_image, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        model_pred = models["unet"](noisy_latents, timesteps, **given, **residuals, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(model_pred.float(), noise.float())
        assert loss_of(cfg, models, batch).item() == pytest.approx(loss.item(), rel=2e-6)
        other = batch | {"conditioning": batch["conditioning"].flip(0)}
        assert abs(loss_of(cfg, models, other).item() - loss.item()) > 3e-5


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations_give_the_same_gradient(built, name):
    grads = []
    for recompute in (False, True):
        cfg = config(built(name), recompute)
        models = made(cfg)
        if recompute:
            models["controlnet"].enable_gradient_checkpointing()
        models["controlnet"].train()
        loss_of(cfg, models, encoded(models, cfg)).backward()
        grads.append({key: p.grad for key, p in models["controlnet"].named_parameters() if p.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-5)


def test_sd3_of_others_is_given_what_it_was_trained_on(built, tmp_path):
    """By its config's default: no pooled text, latents without their shift; diffusers' script trains otherwise."""
    cfg = config(built("StableDiffusion3Pipeline"))
    models = made(cfg)
    models["controlnet"].register_to_config(force_zeros_for_pooled_projection=True)
    models["controlnet"].save_pretrained(tmp_path / "other")
    other = config(built("StableDiffusion3Pipeline"), controlnet_model_name_or_path=str(tmp_path / "other"))
    x, vae = torch.rand(1, 3, SIDE, SIDE) * 2 - 1, models["vae"]
    with torch.no_grad():
        plain, own = (control.encode_condition(CONTROLNETS, models, x, c)["condition_mean"] for c in (cfg, other))
        wanted = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(own, wanted)
        torch.testing.assert_close(plain, wanted - vae.config.shift_factor * vae.config.scaling_factor)
        batch = encoded(models, cfg)
        answers = []
        for pooled in (batch["pooled_prompt_embeds"], batch["pooled_prompt_embeds"].flip(0)):
            seen = []
            hook = models["controlnet"].register_forward_pre_hook(
                lambda m, args, more, seen=seen: seen.append(more["pooled_projections"]), with_kwargs=True
            )
            loss_of(other, models, batch | {"pooled_prompt_embeds": pooled})
            hook.remove()
            answers += seen
    assert len(answers) == 2 and not any(x.any() for x in answers)


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


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
    line = functools.partial(command, tmp_path, built(name), photos, base__use_ema=False)
    in_fork(tmp_path, lambda: loop.run(controlnet.task, command_line.parse(line("one"))[1]))
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert distance(tmp_path / "one", tmp_path / "two", "model") < 1e-4
    one = tmp_path / "one" / "export"
    cfg = config(built(name), controlnet_model_name_or_path=str(one))
    kept = diffusers.AutoModel.from_pretrained(str(one)).state_dict()
    net = controlnet.task.make_models(cfg)["controlnet"]
    assert all(torch.equal(kept[key], x) for key, x in net.state_dict().items()) and net.dtype == torch.float32
    again = cli(tmp_path, *line("more", controlnet__controlnet_model_name_or_path=one, base__max_train_steps=1))
    assert again.code == 0 and str(tmp_path) not in (tmp_path / "more" / "export" / "config.json").read_text(), again.err


def test_samples_of_prompts_at_the_size_of_their_conditions(tmp_path, built):
    """With buckets: sizes are those of the conditions, prompts in turn; a condition that counts nothing is the base's."""
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (24, 48, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    more = {"data__buckets": True, "data__trigger": "a dog", "base__num_samples": 3, "base__max_train_steps": 1}
    more["controlnet__validation_prompts"] = ("a dog --seed 5", "a red circle --guidance 2")
    done = cli(tmp_path, *command(tmp_path, built("sd"), tmp_path / "photos", **more))
    assert done.code == 0 and "no samples" not in done.err, done.err
    grid = np.asarray(Image.open(next((tmp_path / "out" / "samples").glob(f"1-{GRID}.png"))))
    assert grid.shape == (2 * 24 + 12, 2 * 3 * 48 + 12, 3)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in a line, before anything is trained.


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("ChromaPipeline", {}, "is a ChromaPipeline, for which diffusers has no such model; expected one of StableDiffusion"),
        ("sd", {"controlnet_model_name_or_path": "sdxl"}, "its cross_attention_dim is 20; expected one made for"),
        ("sd", {"controlnet_model_name_or_path": "FluxPipeline"}, "is a FluxControlNetModel; expected a ControlNetModel, as a"),
        ("FluxPipeline", {"controlnet_model_name_or_path": "sd"}, "is a ControlNetModel; expected a FluxControlNetModel"),
        ("sd", {"controlnet_model_name_or_path": "/nowhere"}, "--controlnet.controlnet-model-name-or-path /nowhere: not a"),
        ("sd", {"controlnet_model_name_or_path": "channels"}, "its conditioning_channels is 4; expected 3"),
        ("sd", {"controlnet_model_name_or_path": "factor"}, "it shrinks conditions by 8; expected 4, as the autoencoder does"),
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
    assert said.code == 2 and "the task needs a conditioning for each image and found none" in said.err, said.err
    (edges / "2.png").rename(edges / "3.png")
    said = cli(tmp_path, *plain(line(**folder)))
    assert said.code == 2 and "1 images have no partner" in said.err and "2.png has none" in said.err, said.err
    Image.new("RGB", (70, 20)).save(edges / "2.png")
    said = cli(tmp_path, *plain(line(**folder)))
    assert said.code == 2 and "its conditioning, 2.png, is 70 x 20 where it is 80 x 70" in said.err, said.err
    said = cli(tmp_path, *line(**folder))
    assert said.code == 2 and "expected one source of conditioning images" in said.err, said.err
    assert not (tmp_path / "out" / "run.json").exists()
