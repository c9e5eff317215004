"""The ddpm task against formulas written out here, and against diffusers."""

import math
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import DDPMScheduler, EMAModel, UNet2DModel
from diffusers.optimization import get_scheduler
from warm import UNET

from oneloop import configs, loop
from oneloop.maths import diffusion
from oneloop.tasks import Rng, ddpm
from oneloop.training import ema


def official_loss(model, x, noise, t, prediction_type, scheduler):
    """The loss of diffusers' unconditional script; v_prediction, which it lacks, in the form of its text-to-image script."""
    output = model(scheduler.add_noise(x, noise, t), t).sample
    if prediction_type == "epsilon":
        return torch.nn.functional.mse_loss(output.float(), noise.float())
    if prediction_type == "v_prediction":
        return torch.nn.functional.mse_loss(output.float(), scheduler.get_velocity(x, noise, t).float())
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return (a / (1 - a) * torch.nn.functional.mse_loss(output.float(), x.float(), reduction="none")).mean()


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loss_is_the_official_one(prediction_type, schedule):
    torch.manual_seed(0)
    settings = ddpm.Settings(prediction_type=prediction_type, ddpm_beta_schedule=schedule, snr_gamma=None)
    cfg = ddpm.Config(ddpm=settings)
    model = UNet2DModel.from_config(UNET | {"sample_size": 8}).eval()
    x, rng = torch.rand(6, 3, 8, 8) * 2 - 1, Rng.of(0, range(6))
    (loss,) = ddpm.loss_fn({"unet": model}, {"pixel_values": x}, rng, cfg)
    noise, t = rng.normal("noise", 3, 8, 8), rng.integers("timestep", 1000)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=schedule, prediction_type=prediction_type)
    wanted = official_loss(model, x, noise, t, prediction_type, scheduler)
    assert loss.value.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_one_loss_in_three_parametrizations(gamma):
    """An error in the clean image costs min(SNR, gamma) times its square, whatever the model predicts (Hang et al. 2023)."""
    torch.manual_seed(0)
    a = torch.rand(8, dtype=torch.float64).clamp(0.01, 0.99)
    x, noise, guess = torch.randn(3, 8, 4, dtype=torch.float64)
    x_t = diffusion.add_noise(x, noise, a)
    b = a[:, None]
    noise_of_guess = (x_t - b.sqrt() * guess) / (1 - b).sqrt()
    v_of_guess = b.sqrt() * noise_of_guess - (1 - b).sqrt() * guess
    wanted = (a / (1 - a)).clamp(max=gamma) * (guess - x).square().mean(1)
    for kind, prediction in (("sample", guess), ("epsilon", noise_of_guess), ("v_prediction", v_of_guess)):
        error = (prediction - diffusion.target(kind, x, noise, a)).square().mean(1)
        torch.testing.assert_close(diffusion.loss_weight(kind, a, gamma) * error, wanted)


def test_philox_is_philox():
    """Known answers of Philox4x32-10 (Salmon et al. 2011, Random123): a change of torch's generator would change every run."""
    from torch.func import _random

    drawn = _random.normal(torch.tensor([0, 0], dtype=torch.uint64), 4)
    u = [(word + 0.5) / 2**32 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    wanted = [math.sqrt(-2 * math.log(p)) * f(2 * math.pi * q) for p, q in (u[:2], u[2:]) for f in (math.cos, math.sin)]
    assert drawn.tolist() == pytest.approx(wanted, abs=1e-5)


def test_randomness_is_a_function_of_example_and_purpose():
    together, alone = Rng.of(3, range(10)), Rng.of(3, [7])
    assert torch.equal(together.normal("noise", 5, 5)[7:8], alone.normal("noise", 5, 5))
    assert torch.equal(together.integers("t", 1000), together.integers("t", 1000))
    draws = [r.normal(p, 64) for r in (together, Rng.of(4, range(10)), Rng.of(3, range(10), "samples")) for p in ("a", "b")]
    assert len({tuple(row) for draw in draws for row in draw.tolist()}) == 60
    many = Rng.of(0, range(4096))
    x, u, k = many.normal("x", 64), many.uniform("u", 64), many.integers("k", 7, 64)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs(x.pow(4).mean() - 3) < 0.05
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005
    assert torch.bincount(k.flatten(), minlength=7).float().div(k.numel()).sub(1 / 7).abs().max() < 0.003
    assert abs((x[:, 0] * x[:, 1]).mean()) < 0.06 and abs((x[:-1] * x[1:]).mean()) < 0.01


@pytest.mark.parametrize("kind", get_args(get_type_hints(configs.Base)["lr_scheduler"]))
def test_schedules(kind):
    """Those of diffusers, at every step; the peak where asked, the end value at the end."""
    total, warmup = 40, 10
    rate = loop.schedule(configs.Base(lr_scheduler=kind, lr_warmup_steps=warmup, lr_num_cycles=2, lr_power=2.0), total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total, num_cycles=2, power=2.0)
    for step in range(total + 1):
        assert rate(step) * 0.5 == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-7)
        optimizer.step()
        theirs.step()
    assert rate(warmup) == 1.0
    assert rate(total) == pytest.approx(1.0 if kind.startswith("constant") else 0.0, abs=1e-6)


def test_ema_is_that_of_diffusers():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    theirs = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    weights = {f"m.{n}": p for n, p in model.named_parameters()}
    copies = {k: p.detach().clone() for k, p in weights.items()}
    mine = ema.Ema(copies, list(weights.values()), lambda step, _: ema.decay_at(step, 0.9, 0.75))
    for step in range(1, 30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        mine.update(step, 30)
        theirs.step(model.parameters())
        for x, other in zip(mine.values.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(x, other)


@pytest.mark.parametrize("schedule", get_args(get_type_hints(ddpm.Settings)["ddpm_beta_schedule"]))
@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_the_usual_number_of_steps_keeps_the_deviation(sampler, schedule):
    """Samples of a Gaussian whose best denoiser is known are about as wide as it is, whatever the schedule."""
    settings = ddpm.Settings(sampler=sampler, ddpm_beta_schedule=schedule)
    steps, drawn, deviation = ddpm.inference_steps(settings), torch.Generator().manual_seed(0), 0.25
    scheduler = ddpm.scheduler(ddpm.Config(ddpm=settings))
    scheduler.register_to_config(thresholding=False, clip_sample=False)
    scheduler.set_timesteps(steps)
    x = torch.randn(4000, 1, 1, 1, generator=drawn)
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[t]
        best = a.sqrt() * deviation**2 / (a * deviation**2 + 1 - a) * x
        x = scheduler.step(best, t, x, generator=drawn).prev_sample
    assert 0.92 < x.std().item() / deviation < 1.08, steps


def test_a_number_of_steps_that_is_given_is_taken():
    steps = lambda **given: ddpm.inference_steps(ddpm.Settings(**given))  # noqa: E731
    assert [steps(), steps(ddpm_beta_schedule="linear"), steps(ddpm_num_inference_steps=7)] == [25, 50, 7]
    assert steps(ddpm_num_steps=10) == 10
