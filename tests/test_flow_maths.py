"""The flow objective against the papers' and the official scripts' formulas written out."""

import math

import pytest
import torch

from oneloop.maths import diffusion, flow

U = torch.linspace(0.001, 0.999, 500)


def test_interpolation_and_its_inverse():
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g)
    sigma = torch.tensor([0.0, 0.3, 1.0])
    x_t = flow.interpolate(x, noise, sigma)
    for i, s in enumerate(sigma.tolist()):
        torch.testing.assert_close(x_t[i], (1 - s) * x[i] + s * noise[i], rtol=0, atol=1e-5)
    v = flow.velocity(x, noise)
    torch.testing.assert_close(v, noise - x, rtol=0, atol=0)
    torch.testing.assert_close(flow.clean(x_t, v, sigma), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(x_t + (1 - flow.like(sigma, x)) * v, noise, rtol=0, atol=1e-5)  # the other end of the line


def test_logit_normal_is_the_official_map_of_a_normal_number():
    for mean, std in ((0.0, 1.0), (-0.5, 1.3)):
        z = math.sqrt(2) * torch.erfinv(2 * U.double() - 1)  # the normal number whose probability is u
        wanted = 1 / (1 + torch.exp(-(mean + std * z)))
        torch.testing.assert_close(flow.logit_normal(U, mean, std).double(), wanted, rtol=0, atol=1e-5)
    ends = flow.logit_normal(torch.tensor([0.0, 1 - 2**-24]))
    assert bool(torch.isfinite(torch.logit(ends)).all()) and 0 < ends[0] < 0.01 and 0.99 < ends[1] < 1


def test_mode_is_the_official_formula_of_the_mirrored_number():
    for scale in (1.29, -0.8, 0.0):
        u = 1 - U
        wanted = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        torch.testing.assert_close(flow.mode(U, scale), wanted, rtol=0, atol=1e-5)


def test_cosmap_has_the_density_that_its_weight_says():
    torch.testing.assert_close(flow.cosmap(U), 1 - 1 / (torch.tan(math.pi / 2 * U) + 1), rtol=0, atol=1e-5)
    # The derivative of the inverse map: sigma = f(u) has the density 1 / f'(u).
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    sigma = flow.cosmap(u)
    (slope,) = torch.autograd.grad(sigma.sum(), u)
    torch.testing.assert_close(flow.weight("cosmap", sigma.detach()), 1 / slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", flow.DENSITIES)
def test_a_density_is_an_increasing_map_into_the_unit_interval(name):
    sigma = flow.density(name, U)
    assert bool((sigma.diff() > 0).all()) and sigma.min() >= 0 and sigma.max() <= 1


def test_an_unknown_density_or_weight_is_our_own_bug():
    with pytest.raises(AssertionError):
        flow.density("lognormal", U)
    with pytest.raises(AssertionError):
        flow.weight("min_snr", U)


def test_weights_are_the_official_formulas():
    sigmas = U
    torch.testing.assert_close(flow.weight("none", sigmas), torch.ones(500), rtol=0, atol=0)
    torch.testing.assert_close(flow.weight("sigma_sqrt", sigmas), (sigmas**-2.0).float(), rtol=1e-5, atol=1e-5)
    bottom = 1 - 2 * sigmas + 2 * sigmas**2
    torch.testing.assert_close(flow.weight("cosmap", sigmas), 2 / (math.pi * bottom), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", flow.WEIGHTS)
def test_the_loss_is_the_official_scripts(name):
    """That of train_dreambooth_lora_flux.py and its kin, in their names: the mean of each example's weighted squared error."""
    g = torch.Generator().manual_seed(0)
    model_input, noise, model_pred = torch.randn(3, 4, 16, 6, 4, generator=g)
    sigmas = torch.tensor([0.1, 0.5, 0.9, 0.99]).view(4, 1, 1, 1)
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
    weighting = {
        "none": torch.ones_like(sigmas),
        "sigma_sqrt": (sigmas**-2.0).float(),
        "cosmap": 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
    }[name]
    target = noise - model_input
    error = weighting.float() * (model_pred.float() - target.float()) ** 2
    loss = torch.mean(error.reshape(target.shape[0], -1), 1).mean()
    sigma = sigmas.flatten()
    torch.testing.assert_close(flow.interpolate(model_input, noise, sigma), noisy_model_input, rtol=0, atol=1e-5)
    ours = (
        flow.weight(name, sigma) * diffusion.square_error(model_pred, flow.velocity(model_input, noise)).flatten(1).mean(1)
    ).mean()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)


def test_shift_multiplies_the_odds_and_is_the_scheduler_s():
    from diffusers import FlowMatchEulerDiscreteScheduler

    u = U.double()
    torch.testing.assert_close(torch.logit(flow.shift(u, 3.0)), torch.logit(u) + math.log(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.unshift(flow.shift(U, 6.0), 6.0), U, rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.shift(U, 1.0), U, rtol=0, atol=0)
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=U.tolist())
    torch.testing.assert_close(static.sigmas[:-1], flow.shift(U, 3.0), rtol=0, atol=1e-5)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=U.tolist(), mu=0.8)
    torch.testing.assert_close(dynamic.sigmas[:-1], flow.shift(U, math.exp(0.8)), rtol=0, atol=1e-5)


def test_official_helpers_agree():
    """diffusers' own training helpers, with the random numbers taken out."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigmas = U[:, None]
    for name in flow.WEIGHTS:
        wanted = compute_loss_weighting_for_sd3(name, sigmas)
        torch.testing.assert_close(flow.weight(name, sigmas), wanted, rtol=1e-5, atol=1e-5)
