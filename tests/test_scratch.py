"""Models from scratch: classes and guidance, EDM, transformers; formulas written here a second time."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from warm import DIT, UNET

from oneloop.families import classes, drawing
from oneloop.families import dit as transformer
from oneloop.maths import edm as maths
from oneloop.tasks import Rng, ddpm, dit, edm


class Answer(torch.nn.Module):
    """Stands for a model: a function of everything that it is called with; notes how many examples each call had."""

    calls = ()

    def forward(self, x, t, class_labels=None, return_dict=True):
        self.calls = (*self.calls, len(x))
        label = 0 if class_labels is None else class_labels[:, None, None, None]
        return (0.3 * x + (t[:, None, None, None] / 100).sin() + (1.0 + label) / 9 * x.square(),)


def test_guidance_is_the_formula():
    """(1 + w) c - w u (Ho and Salimans 2022, eq. 6), in one call; scale 1 asks for the labels alone."""
    x, t, labels, model = torch.randn(3, 2, 4, 4).double(), torch.tensor(30.0), torch.tensor([0, 2, 1]), Answer()
    c = [model(x[i : i + 1], t[None], labels[i : i + 1])[0] for i in range(3)]
    u = [model(x[i : i + 1], t[None], torch.tensor([3]))[0] for i in range(3)]
    for scale in (0.0, 1.0, 2.5):
        model.calls, w = (), scale - 1
        found = drawing.guided(model, x, t, labels, 3, scale)
        wanted = torch.cat([(1 + w) * a - w * b for a, b in zip(c, u, strict=True)])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
        assert model.calls == (3 if scale == 1 else 6,)


def test_labels_are_left_out_by_example():
    """A share of them, each by the example's own key; none without dropout; samples show the classes in turn."""
    s = ddpm.Settings(class_conditional=True, num_classes=5, label_dropout=0.25)
    rng, labels = Rng.of(0, range(4000)), torch.arange(4000) % 5
    shown = classes.shown({"label": labels}, rng, s)
    out = shown == 5
    assert 0.23 < out.float().mean() < 0.27 and torch.equal(shown[~out], labels[~out])
    assert torch.equal(classes.shown({"label": labels[7:9]}, rng[7:9], s), shown[7:9])
    assert torch.equal(classes.shown({"label": labels}, rng, ddpm.Settings(True, 5, 0.0)), labels)
    assert classes.in_turn(rng[3:8], s).tolist() == [3, 4, 0, 1, 2]
    assert classes.shown({}, rng, ddpm.Settings()) is None and classes.in_turn(rng, ddpm.Settings()) is None


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_table_1(sigma_data):
    """In double precision, beside formulas in plain Python; and diffusers' scheduler preconditions alike."""
    sigma = torch.tensor([0.002, 0.1, 0.7, 5.0, 80.0], dtype=torch.float64)
    found = [*maths.preconditioning(sigma, sigma_data), maths.loss_weight(sigma, sigma_data)]
    for i, s in enumerate(sigma.tolist()):
        root = math.hypot(s, sigma_data)
        wanted = [(sigma_data / root) ** 2, s * sigma_data / root, 1 / root, math.log(s) / 4, (root / (s * sigma_data)) ** 2]
        assert [x[i].item() for x in found] == pytest.approx(wanted, rel=1e-9)
    theirs, x, f = EDMEulerScheduler(sigma_data=sigma_data), torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)[0], Answer()
    answer = lambda x, c: f(x, c)[0]  # noqa: E731
    for i in range(5):
        one = x[i : i + 1]
        c = theirs.precondition_noise(sigma[i])
        wanted = theirs.precondition_outputs(one, answer(theirs.precondition_inputs(one, sigma[i]), c[None]), sigma[i])
        torch.testing.assert_close(maths.denoised(answer, one, sigma[i : i + 1], sigma_data), wanted, rtol=1e-6, atol=1e-6)


def test_edm_noise_levels():
    """Log-normal, by its quantiles; the sampler's levels are eq. 5, and diffusers'."""
    u = (torch.arange(10_000) + 0.5) / 10_000
    log = maths.noise_level(u, -1.2, 0.7).log()
    assert log.mean() == pytest.approx(-1.2, abs=1e-4) and log.std() == pytest.approx(0.7, rel=1e-3)
    assert (log.diff() > 0).all() and maths.noise_level(torch.tensor([0.0]), -1.2, 0.7).log().isfinite()
    below = [0.5 * (1 + math.erf((x + 1.2) / 0.7 / math.sqrt(2))) for x in log[::997].tolist()]
    assert below == pytest.approx(u[::997].tolist(), abs=1e-4)
    levels = maths.sigmas(9, 0.01, 40.0, 5.0)
    wanted = [(40 ** (1 / 5) + i / 8 * (0.01 ** (1 / 5) - 40 ** (1 / 5))) ** 5 for i in range(9)]
    assert levels.tolist() == pytest.approx([*wanted, 0.0], rel=1e-9)
    theirs = EDMEulerScheduler(sigma_min=0.01, sigma_max=40.0, rho=5.0)
    theirs.set_timesteps(9)
    assert theirs.sigmas.tolist() == pytest.approx(levels.tolist(), rel=1e-5)


def test_heun_solves_the_flow_of_a_gaussian():
    """Its best denoiser is known, and with it the path: x sqrt((d^2 + s^2) / (d^2 + S^2)). Errors fall as a square; and each
    step is algorithm 1, written out in numpy."""
    d, x = 0.5, torch.linspace(-40, 40, 7, dtype=torch.float64).view(7, 1, 1, 1)
    denoise = lambda x, s: d**2 / (d**2 + s**2) * x  # noqa: E731
    errors = []
    for steps in (40, 80):
        levels = maths.sigmas(steps, 0.02, 20.0, 7.0)
        wanted = x * math.sqrt((d**2 + 0) / (d**2 + 400))
        errors.append((maths.heun(denoise, x, levels) - wanted).abs().max().item())
        y = x.numpy()
        for a, b in zip(levels[:-1].numpy(), levels[1:].numpy(), strict=True):
            k = (y - denoise(y, a)) / a
            euler = y + (b - a) * k
            y = euler if b == 0 else y + (b - a) * 0.5 * (k + (euler - denoise(euler, b)) / b)
        np.testing.assert_allclose(maths.heun(denoise, x, levels).numpy(), y, rtol=1e-6, atol=1e-9)
    assert errors[1] < errors[0] / 3 and errors[1] < 2e-3


def test_edm_loss_is_the_paper_s():
    """lambda |D - x|^2, which is |F - (x - c_skip y) / c_out|^2 (eq. 8), with classes; example by example."""
    torch.manual_seed(0)
    cfg = edm.Config(edm=edm.Settings(class_conditional=True, num_classes=3, label_dropout=0.5, p_mean=-1.2))
    unet = UNet2DModel.from_config(UNET | {"sample_size": 8, "num_class_embeds": 4}).eval()
    x, rng = torch.rand(6, 3, 8, 8) * 2 - 1, Rng.of(0, range(6))
    (loss,) = edm.loss_fn({"unet": unet}, {"pixel_values": x, "label": torch.tensor([0, 1, 2, 0, 1, 2])}, rng, cfg)
    noise, out, total = rng.normal("noise", 3, 8, 8), rng.uniform("label dropout") < 0.5, 0.0
    assert 0 < out.sum() < 6
    quantile = torch.special.ndtri(rng.uniform("timestep").double())
    for i in range(6):
        s, d = math.exp(-1.2 + 1.2 * quantile[i].item()), 0.5
        y, root = x[i : i + 1] + s * noise[i : i + 1], math.hypot(s, d)
        label = torch.tensor([3 if out[i] else i % 3])
        f = unet(y / root, torch.tensor([math.log(s) / 4]), class_labels=label).sample
        total += (f - (x[i : i + 1] - d**2 / root**2 * y) / (s * d / root)).square().mean().item() / 6
    assert loss.value.item() == pytest.approx(total, rel=2e-6)


def test_dit_loss_is_sit_s():
    """v = alpha' x + sigma' noise, alpha = 1 - t, sigma = t (Ma et al. 2024), at 1000 t; shifted: a t / (1 + (a - 1) t)."""
    torch.manual_seed(0)
    cfg = dit.Config(dit=dit.Settings(num_classes=3, label_dropout=0.5, flow_shift=3.0))
    model = transformer.make(DIT, "it", (3, 8, 8), 3).train()
    torch.nn.init.normal_(model.proj_out_2.weight)
    torch.nn.init.normal_(model.transformer_blocks[0].norm1.linear.weight, std=0.1)
    x, rng, labels = torch.rand(6, 3, 8, 8) * 2 - 1, Rng.of(0, range(6)), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = [next(dit.loss_fn({"transformer": model}, {"pixel_values": x, "label": labels}, rng, cfg)).value for _ in "ab"]
    assert torch.equal(*losses)  # nothing is left to a generator of the model's own
    noise, u, out = rng.normal("noise", 3, 8, 8), rng.uniform("timestep"), rng.uniform("label dropout") < 0.5
    t = (3 * u / (1 + 2 * u))[:, None, None, None]
    answer = model((1 - t) * x + t * noise, 1000 * t.flatten(), torch.where(out, 3, labels)).sample
    assert losses[0].item() == pytest.approx((answer - (-x + noise)).square().mean().item(), rel=1e-6)


def test_dit_begins_as_published():
    """Blocks as the identity, so that the answer is 0 whatever the label."""
    torch.manual_seed(0)
    model, x = transformer.make(DIT, "it", (2, 4, 4), 3), torch.randn(2, 2, 4, 4)
    call = lambda: model(x, torch.tensor([10.0, 900.0]), torch.tensor([0, 3])).sample  # noqa: E731
    assert torch.equal(call(), torch.zeros_like(x))
    block = model.transformer_blocks[0]
    hidden = torch.randn(2, 4, 8)
    assert torch.equal(block(hidden, timestep=torch.tensor([1.0, 2.0]), class_labels=torch.tensor([0, 1])), hidden)
    assert block.norm1.emb.class_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.5)
    assert block.norm1.emb.class_embedder.dropout_prob == 0
