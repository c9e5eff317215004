"""Preference: the loss against the official formulas, pairs from a folder and from a column, runs, the export, bad input."""

import functools
import shutil

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from test_lora import CAPTIONS, in_fork, photos  # noqa: F401  a fixture
from warm import brief, cli, cli_many, digest, distance, flags, metrics

from oneloop import loop
from oneloop.configs import Base, Data
from oneloop.families import stable_diffusion, text_to_image, transformer
from oneloop.settings import command_line
from oneloop.tasks import Rng, dpo

SIDE = 32
NAMES = ("sd", "sdxl", "FluxPipeline", "ZImagePipeline")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module", autouse=True)
def warmed(built):
    """Everything imported that forks need."""
    for name in ("sdxl", "FluxPipeline"):
        dpo.task.make_models(config(built(name)))


@pytest.fixture(scope="module")
def worse(photos):  # noqa: F811
    """A folder of other images under the same names."""
    folder, noise = photos.parent / "worse", np.random.default_rng(1)
    folder.mkdir(exist_ok=True)
    for i in range(len(CAPTIONS)):
        small = noise.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 72), Image.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def config(model, **settings):
    base = Base(output_dir="unused", logger=("none",))
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2)
    made = {"rank": 4, "num_inference_steps": 2} | settings
    return dpo.Config(base, sizes, dpo.Settings(pretrained_model_name_or_path=str(model), **made))


def command(folder, model, photos, worse, out="out", **more):  # noqa: F811
    """A command line for two steps of `dpo`."""
    settings = brief(folder, out, photos, SIDE) | {
        "dpo.pretrained_model_name_or_path": model,
        "dpo.rejected_data_dir": worse,
        "dpo.rank": 2,
        "dpo.learning_rate": 1e-3,
        "dpo.num_inference_steps": 1,
    }
    return flags("dpo", settings | {name.replace("__", "."): value for name, value in more.items()})


def moved(cfg):
    """The models of a run whose adapters are large numbers."""
    models, generator = dpo.task.make_models(cfg), torch.Generator().manual_seed(1)
    net = models[text_to_image.family(cfg.dpo).TRAINED]
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return models, net


def encoded(models, cfg, count=4):
    """A batch of pairs as the loss sees it."""
    generator = torch.Generator().manual_seed(0)
    better, other = (torch.rand(count, 3, SIDE, SIDE, generator=generator) * 2 - 1 for _ in range(2))
    batch = {key: torch.tensor([[SIDE, SIDE]] * count) for key in ("original_size", "target_size")}
    batch["crop_top_left"] = torch.zeros(count, 2, dtype=torch.long)
    with torch.no_grad():
        batch |= text_to_image.encode_images(models, better, cfg) | dpo.encode_rejected(models, other, cfg)
        return batch | text_to_image.encode_captions(models, CAPTIONS[:count], cfg)


def answers(models, net, cfg, row, latent, rng):
    """Prediction and target at the noise and the noise level that `rng` has for one image [1, C, h, w] of a row."""
    s, noise = cfg.dpo, rng.normal("noise", *latent.shape[1:])
    if text_to_image.family(s) is stable_diffusion:
        ddpm = DDPMScheduler.from_config(stable_diffusion.config(s, "scheduler"))
        t = rng.integers("timestep", 1000)
        given = stable_diffusion.conditions(row, stable_diffusion.is_xl(s))
        return net(ddpm.add_noise(latent, noise, t), t, **given).sample, noise
    own, sigma = transformer.family(s), transformer.noise_level(s, rng.uniform("timestep"), latent.shape)
    return own.velocity(net, (1 - sigma) * latent + sigma * noise, sigma, row, 1.0), noise - latent


@pytest.mark.parametrize(
    ("name", "loss_type", "beta"),
    [*((name, "sigmoid", 600.0) for name in NAMES), ("sd", "hinge", 4.0), ("sd", "hinge", 60.0), ("sdxl", "ipo", 40.0)],
)
def test_the_loss_is_the_official_one(built, name, loss_type, beta):
    """Image by image, with the reference from the checkpoint itself; noise and its level are those of both of a pair."""
    cfg = config(built(name), loss_type=loss_type, beta=beta)
    (models, net), rng = moved(cfg), Rng.of(5, range(4))
    batch = encoded(models, cfg)
    (loss,) = dpo.loss_fn(models, batch, rng, cfg)
    bare = text_to_image.load(cfg, "no")[text_to_image.family(cfg.dpo).TRAINED].eval()
    wanted, right = [], []
    for i in range(4):
        row = {key: column[i : i + 1] for key, column in batch.items()}
        errors = []
        for front in ("", "rejected_"):
            own = rng[i : i + 1]
            latent = row[f"{front}latent_mean"]
            if f"{front}latent_std" in row:
                latent = latent + row[f"{front}latent_std"] * own.normal("posterior", *latent.shape[1:])
            if text_to_image.family(cfg.dpo) is stable_diffusion:
                latent = latent * models["vae"].config.scaling_factor
            with torch.no_grad():
                for model in (net, bare):
                    errors.append(F.mse_loss(*answers(models, model, cfg, row, latent, own)))
        model_diff, ref_diff = errors[0] - errors[2], errors[1] - errors[3]
        logits = 0.5 * (ref_diff - model_diff)
        makes = {
            "sigmoid": lambda x: torch.log1p(torch.exp(-beta * x)),
            "hinge": lambda x: torch.clamp(1 - beta * x, min=0),
            "ipo": lambda x: (x - 0.5 / beta) ** 2,
        }
        wanted.append(makes[loss_type](logits))
        right.append(float(logits > 0))
    torch.testing.assert_close(loss.value, torch.stack(wanted).mean(), rtol=1e-3, atol=1e-5)
    assert float(loss.logs["accuracy"]) == sum(right) / 4
    loss.value.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_it_learns_which_is_preferred(built):
    """At first nothing is preferred: the loss is log 2, and the accuracy a half. It falls over fixed draws."""
    cfg = config(built("sd"), beta=1000.0, learning_rate=1e-2)
    models = dpo.task.make_models(cfg)
    batch, optimizer = encoded(models, cfg), dpo.task.make_optim(models, cfg)["dpo"]
    seen = []
    for _ in range(30):
        (loss,) = dpo.loss_fn(models, batch, Rng.of(1, range(4)), cfg)
        loss.value.backward()
        optimizer.step(), optimizer.zero_grad()
        seen.append((loss.value.item(), float(loss.logs["accuracy"])))
    assert seen[0] == (pytest.approx(np.log(2), abs=1e-6), 0.5)
    assert seen[-1][0] < 0.3 and seen[-1][1] == 1, seen


@pytest.mark.parametrize("name", ["sd", "FluxPipeline"])
def test_a_run_resumes_equal_and_its_export_loads(tmp_path, built, photos, worse, name):  # noqa: F811
    def runs():
        line = functools.partial(command, tmp_path, built(name), photos, worse, base__checkpointing_steps=1)
        module, cfg = command_line.parse(line("whole"))
        state = loop.run(module.task, cfg)
        shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        loop.run(module.task, command_line.parse(line("again"))[1])
        assert digest(tmp_path / "whole") == digest(tmp_path / "again")
        assert all("accuracy" in line and "margin" in line for line in metrics(tmp_path / "whole"))
        scope = {"__file__": str(tmp_path / "whole" / "checkpoint-2" / "load.py")}
        exec((tmp_path / "whole" / "checkpoint-2" / "load.py").read_text().rpartition("pipeline(")[0], scope)
        part = text_to_image.family(cfg.dpo).TRAINED
        loaded = {k.replace("default_0", "default"): p for k, p in getattr(scope["pipeline"], part).named_parameters()}
        assert state.ema and all(torch.equal(loaded[key.removeprefix(f"{part}.")], x) for key, x in state.ema.items())

    assert "no samples" not in in_fork(tmp_path, runs).err


def test_two_processes_agree_with_one(tmp_path, built, photos, worse):  # noqa: F811
    steady = {"base__use_ema": False, "dpo__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    line = functools.partial(command, tmp_path, built("sdxl"), photos, worse, **steady)
    assert cli(tmp_path, *line("one")).code == 0
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert distance(tmp_path / "one", tmp_path / "two", "model") < 1e-6


def test_pairs_are_cut_alike(tmp_path, built, photos, worse):  # noqa: F811
    """Mirrored and cut at the same place; with the same images in both folders nothing differs."""
    shutil.copytree(photos, tmp_path / "large")
    for path in (tmp_path / "large").glob("*.png"):
        path.unlink()
    for path in worse.iterdir():
        shutil.copy(path, tmp_path / "large")
    more = {"data__random_flip": True, "base__logging_steps": 1, "dpo__beta": 1e6}
    argv = command(tmp_path, built("sd"), tmp_path / "large", worse, **more)
    assert cli(tmp_path, *argv, "--data.no-center-crop").code == 0
    assert [line["loss"] for line in metrics(tmp_path / "out")] == [pytest.approx(np.log(2))] * 2
    argv = command(tmp_path, built("sd"), photos, worse, "other", **more)
    assert cli(tmp_path, *argv, "--data.no-center-crop").code == 0
    assert metrics(tmp_path / "other")[-1]["loss"] != pytest.approx(np.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"dpo__rejected_data_dir": "nowhere"}, "--dpo.rejected-data-dir"),
        ({"dpo__rejected_data_dir": None}, "rejected"),
        ({"dpo__train_text_encoder": True}, "--dpo.train-text-encoder: the reference would train with it"),
        ({"dpo__training_adapter": "x"}, "--dpo.training-adapter: the reference would train with it"),
        ({"dpo__beta": 0}, "--dpo.beta"),
        ({"dpo__target_modules": "nothing"}, "--dpo.target-modules: 'nothing' is the end of no layer's name"),
        ({"dpo__kohya": True, "dpo__use_dora": True}, "--dpo.kohya with --dpo.use-dora"),
    ],
)
def test_settings_that_do_not_fit_are_a_line(tmp_path, built, photos, worse, more, says):  # noqa: F811
    argv = command(tmp_path, built("sd"), photos, worse, **more)
    if more.get("dpo__rejected_data_dir", "") is None:
        at = argv.index("--dpo.rejected_data_dir")
        del argv[at : at + 2]
    done = cli(tmp_path, *argv)
    assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1, done.err


def test_a_pair_that_lacks_an_image_is_a_line(tmp_path, built, photos, worse):  # noqa: F811
    few = shutil.copytree(worse, tmp_path / "few")
    (few / "2.jpg").unlink()
    done = cli(tmp_path, *command(tmp_path, built("sd"), photos, few))
    assert done.code == 2 and "--dpo.rejected-data-dir" in done.err and "2" in done.err, done.err
