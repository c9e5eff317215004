"""The task `controlnet` on six families, from tiny checkpoints: what training computes is what the pipelines compute."""

import functools

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from test_families import as_map, same

from oneloop.configs import Base, Data
from oneloop.families import (
    control,
    control_conditions,
    control_samples,
    controls,
    stable_diffusion,
    text_to_image,
    transformer,
)
from oneloop.families.controls import CONTROLNETS
from oneloop.families.objective import objective
from oneloop.tasks import Rng, controlnet, of_settings

SD, FLOWS = ("sd", "sdxl"), ("StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline")
NAMES = (*SD, *FLOWS)
PROMPTS = ["a dog", "a small white dog on the left"]
HEIGHT, WIDTH, SIDE = 64, 32, 32
OFF = {"QwenImagePipeline": {"true_cfg_scale": 1.0}, "ZImagePipeline": {"guidance_scale": 0.0}}
"""Guidance that is none; elsewhere 1."""
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""
    return functools.cache(lambda name: controlnet.task.make_models(config(built(name))) and built(name))


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
    return controls.controlled(models, own, control_conditions.condition_of(own, batch, rng), cfg.controlnet)


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
        drawn = control_samples.sample(models, entry, cfg.controlnet, batch["conditioning"], PROMPTS, draw.generators("sample"))
        plain = own.sample(models, cfg.controlnet, PROMPTS, draw.generators("sample"), HEIGHT, WIDTH)
    # Pipelines that draw more for the condition have other noise in what follows.
    assert same(drawn, plain, 1e-4) or name in ("FluxPipeline", "QwenImagePipeline")
    net, optims = models["controlnet"], controlnet.make_optim(models, cfg)
    state, copied = models[own.TRAINED].state_dict(), net.state_dict()
    if name == "ZImagePipeline":  # it has two layers
        copied = {key.replace("control_", ""): x for key, x in copied.items()}
    pairs = [(state[key], x) for key, x in copied.items() if key in state and state[key].shape == x.shape]
    assert len(pairs) > len(copied) / 2 and all(torch.equal(a, b) for a, b in pairs)
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


def again(name, s, pipeline, steps, batch):
    """The second of the steps that a pipeline took, (its model's answer, timestep, sample) each: that answer, and what gives it
    again of models."""
    v, t, x = steps[1]
    if name in FLOWS:
        family, sigma = transformer.family(s), pipeline.scheduler.sigmas[1].expand(2)
        x, v = as_map(x, family, HEIGHT, WIDTH), as_map(v, family, HEIGHT, WIDTH)

    def answer(models):
        if name in FLOWS:
            return family.velocity(models["transformer"], x, sigma, batch, 1.0)
        return models["unet"](x, t.expand(2), **stable_diffusion.conditions(batch, name == "sdxl"), return_dict=False)[0]

    return v, answer


def hold(v, ours, other, without):
    """The answer is the pipeline's, and would be another under another condition, and quite another without."""
    tolerance = 2e-5 * max(1.0, float(v.abs().max()))
    assert same(ours, v, tolerance), (ours - v).abs().max()
    assert not same(other, v, 20 * tolerance) and not same(without, v, 100 * tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_its_answer_is_that_of_the_pipeline(built, tmp_path, monkeypatch, name):
    """The export in the family's own ControlNet pipeline, by from_pretrained: at its x_t and time, what it hands to its
    scheduler is what training computes, under prompts of unequal length and conditions that are not square; and what it draws
    is what a sample is."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    off = OFF.get(name, {"guidance_scale": 1.0})
    cfg = config(built(name), num_inference_steps=3, guidance_scale=next(iter(off.values())))
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
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    images = pipeline(prompt=[*PROMPTS], generator=generators(), **call | off).images
    with torch.no_grad():
        drawn = control_samples.sample(models, own, s, batch["conditioning"], PROMPTS, generators())
    assert same(drawn, images, 1e-3), (drawn - images).abs().max()
    v, answer = again(name, s, pipeline, steps, batch)
    still = {key: 0 * batch[key] for key in ("condition_std",) if key in batch}
    turned = {key: batch[key].flip(0) for key in ("condition_mean", "conditioning") if key in batch}
    with torch.no_grad():
        ours, other = (answer(both(cfg, models, batch | still | more)) for more in ({}, turned))
        hold(v, ours, other, answer(models))


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
        plain, own = (control_conditions.encode_condition(CONTROLNETS, models, x, c)["condition_mean"] for c in (cfg, other))
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
