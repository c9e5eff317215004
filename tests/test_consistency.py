"""Consistency training from scratch: the loss against diffusers' own scheduler, the curriculum, runs, the export, bad input."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from test_lora import in_fork
from warm import ROOT, UNET, cli, cli_many, digest, distance, flags, metrics, tensors

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.maths import consistency as maths
from oneloop.settings import command_line
from oneloop.tasks import Rng, consistency


def config(folder, **settings):
    (folder / "unet.json").write_text(json.dumps(UNET))
    made = consistency.Settings(model_config=str(folder / "unet.json"), **settings)
    return consistency.Config(Base(output_dir="unused"), Data(resolution=8, train_batch_size=4), made)


def command(folder, out="out", steps=6, **more):
    (folder / "unet.json").write_text(json.dumps(UNET))
    given = {
        "base.output_dir": folder / out,
        "base.max_train_steps": steps,
        "base.logger": "none",
        "base.validation_steps": 0,
        "base.num_samples": 2,
        "base.logging_steps": 1,
        "data.num_shapes": 24,
        "data.resolution": 8,
        "data.train_batch_size": 4,
        "consistency.model_config": folder / "unet.json",
        "consistency.discretization_s_0": 2,
        "consistency.discretization_s_1": 8,
    }
    return flags("consistency", given | {name.replace("__", "."): value for name, value in more.items()})


COUNTS = [(0, 80, 11), (9, 80, 11), (10, 80, 21), (79, 80, 1281), (80, 80, 1281), (3, 5, 81), (0, 1, 11)]


@pytest.mark.parametrize(("step", "total", "count"), COUNTS)
def test_the_curriculum(step, total, count):
    """Eq. 15 of arXiv:2310.14189: doubled eight times on the way from 10 to 1280, also where there are too few steps for it."""
    assert maths.levels(step, total, 10, 1280) == count


@pytest.mark.parametrize(("first", "last"), [(10, 15), (10, 30), (2, 100), (7, 7)])
def test_the_curriculum_ends_at_the_last_number(first, last):
    """Whatever that is: no power of 2 times the first; and each number lasts as long."""
    counts = [maths.levels(step, 240, first, last) for step in range(240)]
    lengths = [counts.count(count) for count in dict.fromkeys(counts)]
    assert (
        counts[0] == first + 1 and counts[-1] == last + 1 and max(lengths[:-1], default=0) <= lengths[-1] < 2 * lengths[0] + 1
    )


@pytest.mark.parametrize(("count", "settings"), [(11, {}), (41, {"p_mean": 0.5, "p_std": 1.0, "sigma_max": 20.0, "rho": 3.0})])
def test_the_levels_and_how_often_they_are_drawn(count, settings):
    """Rising from sigma_min to sigma_max; a lognormal density between neighbours, by numbers drawn from it."""
    s = consistency.Settings(**settings)
    sigma, share = maths.ladder(count, s.sigma_min, s.sigma_max, s.rho, s.p_mean, s.p_std, "cpu")
    cm = CMStochasticIterativeScheduler(count, s.sigma_min, s.sigma_max, rho=s.rho)
    torch.testing.assert_close(sigma, cm.sigmas.flip(0).float())
    drawn = np.exp(np.random.default_rng(0).normal(s.p_mean, s.p_std, 400_000))
    counts = np.histogram(drawn, sigma.double().numpy())[0]
    np.testing.assert_allclose(share.diff(prepend=torch.zeros(1)), counts / counts.sum(), atol=4e-3)
    assert share[-1] == 1


@pytest.mark.parametrize(("step", "settings"), [(0, {}), (7, {"huber_c": 0.3, "sigma_min": 0.05, "sigma_data": 0.3})])
def test_the_loss_is_of_diffusers_own_steps(tmp_path, step, settings):
    """f is what CMStochasticIterativeScheduler makes of the model's answer; the distance is eq. 8's of the whole image."""
    cfg = config(tmp_path, **settings)
    s, models, rng = cfg.consistency, consistency.make_models(cfg), Rng.of(3, range(4))
    models["unet"].eval()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0])
    batch = {"pixel_values": x, "step": step, "total": 8, "weight": weight}
    (loss,) = consistency.loss_fn(models, batch, rng, cfg)
    count = 10 * 2**step + 1
    cm = CMStochasticIterativeScheduler(count, s.sigma_min, s.sigma_max, s.sigma_data, rho=s.rho, clip_denoised=False)
    levels = cm.sigmas.flip(0)
    log = lambda sigma: (math.log(sigma) - s.p_mean) / s.p_std  # noqa: E731
    normal = torch.distributions.Normal(0.0, 1.0)
    below = torch.stack([normal.cdf(torch.tensor(log(float(sigma)), dtype=torch.float64)) for sigma in levels])
    u, noise, wanted = rng.uniform("timestep"), rng.normal("noise", 3, 8, 8), []
    for k in range(4):
        i = max(i for i in range(count - 1) if (below[i] - below[0]) / (below[-1] - below[0]) <= u[k])
        f = []
        for at in (i + 1, i):
            noised = x[k : k + 1] + levels[at].float() * noise[k : k + 1]
            t = cm.timesteps = torch.from_numpy(cm.sigma_to_t(levels[at : at + 1].numpy()))
            cm.sigmas = torch.stack([levels[at].float(), torch.tensor(s.sigma_min)])
            cm._step_index = 0
            with torch.set_grad_enabled(at > i):
                answer = models["unet"](cm.scale_model_input(noised, t[0]), t.float()).sample
            f.append(cm.step(answer, t[0], noised).prev_sample)
        c = s.huber_c or 0.00054 * math.sqrt(3 * 8 * 8)
        distance = ((f[0] - f[1]).square().sum() + c**2).sqrt() - c
        wanted.append(weight[k] * distance / (levels[i + 1] - levels[i]).float())
    torch.testing.assert_close(loss.value, torch.stack(wanted).mean(), rtol=2e-4, atol=1e-5)
    assert loss.logs["levels"] == count
    theirs = torch.autograd.grad(torch.stack(wanted).mean(), models["unet"].parameters())
    loss.value.backward()
    for p, grad in zip(models["unet"].parameters(), theirs, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=5e-3, atol=1e-3 * float(grad.abs().max()) + 1e-6)


def test_both_answers_have_the_same_dropout(tmp_path):
    """At two levels that are close they are as close as without dropout; with other dropout they would be far apart."""
    cfg = config(tmp_path, sigma_max=2.0, discretization_s_0=1280, p_mean=0.0, p_std=0.1, huber_c=1e-6)
    models, seen = consistency.make_models(cfg), []
    assert models["unet"].config.dropout and models["unet"].training
    batch = {"pixel_values": torch.rand(4, 3, 8, 8), "step": 0, "total": 1}
    for training in (True, False):
        (loss,) = consistency.loss_fn({"unet": models["unet"].train(training)}, batch, Rng.of(3, range(4)), cfg)
        seen.append(loss.value.item())
    assert 0 < seen[0] < 2 * seen[1], seen


def test_a_run_resumes_equal_and_its_export_draws_the_same(tmp_path):
    def runs():
        line = lambda out: command(tmp_path, out, base__checkpointing_steps=3, base__ema_power=0)  # noqa: E731
        cfg = command_line.parse(list(map(str, line("whole"))))[1]
        state = loop.run(consistency.task, cfg)
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
        loop.run(consistency.task, command_line.parse(list(map(str, line("again"))))[1])
        assert digest(tmp_path / "whole") == digest(tmp_path / "again")
        assert [line["levels"] for line in metrics(tmp_path / "whole")] == [3, 3, 5, 5, 9, 9]
        loaded = ConsistencyModelPipeline.from_pretrained(tmp_path / "whole" / "export")
        assert all(torch.equal(p, state.ema[f"unet.{key}"]) for key, p in loaded.unet.named_parameters())
        generators = Rng.of(0, range(2)).generators("sample")
        images = loaded(batch_size=2, generator=generators, num_inference_steps=2, output_type="np").images
        ours = consistency.sample_fn({"unet": loaded.unet}, [], Rng.of(0, range(2)), cfg)["samples"]
        assert np.allclose(images, ours.permute(0, 2, 3, 1), atol=1e-5)
        assert loaded.scheduler.sigmas[0] == 80 and 1 < loaded.scheduler.sigmas[1] < 3

    assert "no samples" not in in_fork(tmp_path, runs).err


def test_two_processes_agree_with_one(tmp_path):
    assert cli(tmp_path, *command(tmp_path, "one", base__gradient_accumulation_steps=2)).code == 0
    for result in cli_many(tmp_path, 2, *command(tmp_path, "two")):
        assert result.code == 0, result.err
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "--consistency.sigma-max is 2.0; expected above 3"),
        ({"discretization_s_0": 20, "discretization_s_1": 10}, "--consistency.discretization-s-1 is 10; expected at least"),
        ({"num_inference_steps": 41}, "--consistency.num-inference-steps is 41"),
        ({"rho": 0.0}, "--consistency.rho is 0.0"),
    ],
)
def test_settings_that_do_not_fit_are_a_line(settings, says):
    with pytest.raises(BadInput, match=says):
        consistency.Settings(**settings)


def test_the_task_of_the_page_on_adding_one(tmp_path):
    """arrive.py beside the README's flow.py: it trains, and its average is resumed in the same bits."""
    for page, name in ((ROOT / "README.md", "flow"), (ROOT / "docs" / "adding-a-task.md", "arrive")):
        (code,) = (code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "task = " in code)
        (tmp_path / f"{name}.py").write_text(code)
    given = {"base.max_train_steps": 4, "base.logger": "none", "base.num_samples": 2, "base.checkpointing_steps": 2}
    given |= {"data.num_shapes": 24, "data.resolution": 8, "data.train_batch_size": 4, "arrive.decay": 0.5}
    run = lambda out: cli(tmp_path, *flags("arrive", given | {"base.output_dir": tmp_path / out}))  # noqa: E731
    assert run("whole").code == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert run("again").code == 0 and digest(tmp_path / "again") == digest(tmp_path / "whole")
    found = tensors(tmp_path / "whole")
    far = [(found[f"ema/target.{key}"] - x).abs().max() for key, x in by_name(found, "model/")]
    assert far and max(far) > 1e-5


def by_name(found, front):
    return [(key.removeprefix(front), x) for key, x in found.items() if key.startswith(front)]
