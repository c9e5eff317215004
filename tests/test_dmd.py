"""Distribution matching: the noise levels against pipelines, the losses against the formulas, runs, the export, bad input."""

import functools
import shutil

import diffusers
import pytest
import torch
from test_lora import CAPTIONS, in_fork, photos  # noqa: F401  a fixture
from warm import brief, cli, cli_many, digest, distance, flags, metrics

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import flow, text_to_image, transformer
from oneloop.maths import flow as flow_maths
from oneloop.settings import command_line
from oneloop.tasks import Rng, dmd

SIDE = 32
SLOW = ("HunyuanImagePipeline", "HiDreamImagePipeline")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module", autouse=True)
def warmed(built):
    """Everything imported that forks need."""
    dmd.make_models(config(built("FluxPipeline")))


def config(model, **settings):
    base = Base(output_dir="unused", logger=("none",))
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2)
    made = {"rank": 4, "fake_updates": 2} | settings
    return dmd.Config(base, sizes, dmd.Settings(pretrained_model_name_or_path=str(model), **made))


def command(folder, model, photos, out="out", **more):  # noqa: F811
    """A command line for four steps of `dmd`, every second of the student."""
    settings = brief(folder, out, photos, SIDE) | {
        "base.max_train_steps": 4,
        "dmd.pretrained_model_name_or_path": model,
        "dmd.rank": 2,
        "dmd.fake_updates": 2,
        "dmd.learning_rate": 1e-3,
        "dmd.num_inference_steps": 2,
    }
    return flags("dmd", settings | {name.replace("__", "."): value for name, value in more.items()})


@pytest.mark.parametrize("name", [name for name in flow.FAMILIES if name not in SLOW])
def test_the_noise_levels_are_those_of_the_pipeline(built, monkeypatch, name):
    """Of the families that are taken, and of no other."""
    cfg, drawn, made = config(built(name)), [], transformer.pipeline
    models = text_to_image.load(cfg, "no")
    monkeypatch.setattr(transformer, "pipeline", lambda *given, **more: drawn.append(made(*given, **more)) or drawn[-1])
    transformer.sample(models, cfg.dmd, CAPTIONS[:1], Rng.of(0, range(1)).generators("s"), SIDE, SIDE)
    shape = text_to_image.encode_images(models, torch.zeros(1, 3, SIDE, SIDE), cfg)["latent_mean"].shape
    theirs, ours = drawn[0].scheduler.sigmas, torch.tensor(dmd.levels(cfg.dmd, shape))
    assert len(theirs) == len(ours) and torch.allclose(theirs.double(), ours.double(), atol=1e-5) == (name in dmd.KINDS)


def student(cfg):
    """The models of a run, whose student and whose model of what it draws are not the teacher."""
    models, generator = dmd.make_models(cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("transformer", "fake"):
            for p in models[name].parameters():
                if p.requires_grad:
                    p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return models


@pytest.mark.parametrize(("name", "step"), [("FluxPipeline", 0), ("FluxPipeline", 4), ("ZImagePipeline", 2)])
def test_the_losses_are_the_papers(built, name, step):
    """Image by image: the gradient (fake - real) / |drawn - real| at the last of the steps, and flow matching of the fake."""
    cfg = config(built(name), teacher_guidance=3.0)
    models, rng, own = student(cfg), Rng.of(5, range(3)), transformer.family(cfg.dmd)
    with torch.no_grad():
        batch = text_to_image.encode_images(models, torch.zeros(3, 3, SIDE, SIDE), cfg)
        batch |= text_to_image.encode_captions(models, CAPTIONS[:3], cfg)
        batch |= {"step": step, "total": 9, "phase": "train", "target_size": torch.tensor([[SIDE, SIDE]] * 3)}
        nothing = text_to_image.encode_captions(models, [""], cfg)
    first, second = dmd.loss_fn(models, batch, rng, cfg)
    assert (first.name, second.name) == ("dmd", "fake")
    bare = text_to_image.load(cfg, "no")["transformer"].eval()
    shape = batch["latent_mean"].shape[1:]
    levels = dmd.levels(cfg.dmd, shape)
    draws = {purpose: rng.normal(purpose, *shape) for purpose in ("start", "noise", "fake noise")}
    near = transformer.noise_level(cfg.dmd, rng.uniform("timestep"), shape).clamp(0.02, 0.98)
    other = transformer.noise_level(cfg.dmd, rng.uniform("fake timestep"), shape)
    wanted, fakes = [], []
    for i in range(3):
        row = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        v = lambda net, x, sigma, text=row: own.velocity(net, x, torch.as_tensor([sigma]).float(), text, 1.0)  # noqa: E731
        x = draws["start"][i : i + 1]
        with torch.no_grad():
            for k in range((step // 2) % 4):
                x = x + (levels[k + 1] - levels[k]) * v(models["transformer"], x, levels[k])
        last = levels[(step // 2) % 4]
        drawn = x - last * v(models["transformer"], x, last)
        with torch.no_grad():
            at = float(near[i])
            noised = (1 - at) * drawn + at * draws["noise"][i : i + 1]
            yes, no = (v(bare, noised, at, text) for text in (row, row | nothing))
            real, fake = noised - at * (no + 3 * (yes - no)), noised - at * v(models["fake"], noised, at)
            gradient = (fake - real) / (drawn - real).abs().mean()
        wanted.append((gradient * drawn).mean())
        x, at = drawn.detach(), float(other[i])
        noise = draws["fake noise"][i : i + 1]
        fakes.append((v(models["fake"], (1 - at) * x + at * noise, at) - (noise - x)).square().mean())
    torch.testing.assert_close(second.value, torch.stack(fakes).mean(), rtol=1e-3, atol=1e-4)
    trained = [p for p in models["transformer"].parameters() if p.requires_grad]
    theirs = torch.autograd.grad(torch.stack(wanted).mean(), trained)
    first.value.backward()
    assert all(p.grad is None for p in models["fake"].parameters())
    for p, grad in zip(trained, theirs, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-2, atol=1e-2 * float(grad.abs().max()))
    second.value.backward()
    assert all(p.grad is not None for p in models["fake"].parameters() if p.requires_grad)


def test_the_student_steps_once_in_a_while(built):
    cfg = config(built("FluxPipeline"), fake_updates=3)
    models = student(cfg)
    with torch.no_grad():
        batch = text_to_image.encode_images(models, torch.zeros(1, 3, SIDE, SIDE), cfg)
        batch |= text_to_image.encode_captions(models, CAPTIONS[:1], cfg) | {"total": 9}

    def names(step, phase):
        return [loss.name for loss in dmd.loss_fn(models, batch | {"step": step, "phase": phase}, Rng.of(0, [0]), cfg)]

    assert [names(step, "train") for step in range(4)] == [["dmd", "fake"], ["fake"], ["fake"], ["dmd", "fake"]]
    assert names(1, "validate") == names(2, "warm-up") == ["dmd", "fake"]
    both = zip(models["transformer"].parameters(), models["fake"].parameters(), strict=True)
    assert all((p is q) != p.requires_grad for p, q in both)


def test_what_the_student_draws_is_modelled_at_all_its_steps(built, monkeypatch):
    """Also where the steps of a drawing are a multiple of the updates between two steps of the student."""
    cfg, levels = config(built("FluxPipeline"), fake_updates=2, num_inference_steps=4), []
    models, clean = student(cfg), flow_maths.clean
    monkeypatch.setattr(flow_maths, "clean", lambda x, v, sigma: levels.append(sigma[0].item()) or clean(x, v, sigma))
    with torch.no_grad():
        batch = text_to_image.encode_images(models, torch.zeros(1, 3, SIDE, SIDE), cfg)
        batch |= text_to_image.encode_captions(models, CAPTIONS[:1], cfg) | {"total": 9, "phase": "train"}
    for step in (1, 3, 5, 7):
        next(dmd.loss_fn(models, batch | {"step": step}, Rng.of(0, [0]), cfg))
    assert sorted(levels, reverse=True) == pytest.approx(dmd.levels(cfg.dmd, batch["latent_mean"].shape[1:])[:-1])


@pytest.mark.parametrize("name", ["FluxPipeline", "ZImagePipeline"])
def test_a_run_resumes_equal_and_its_export_loads(tmp_path, built, photos, name):  # noqa: F811
    def runs():
        line = functools.partial(command, tmp_path, built(name), photos, base__checkpointing_steps=1, base__logging_steps=1)
        cfg = command_line.parse(line("whole", base__checkpoints_total_limit=9))[1]
        state = loop.run(dmd.task, cfg)
        shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        loop.run(dmd.task, command_line.parse(line("again"))[1])
        assert digest(tmp_path / "whole") == digest(tmp_path / "again")
        assert ["loss/dmd" in line for line in metrics(tmp_path / "whole")] == [True, False, True, False]
        scope = {"__file__": str(tmp_path / "whole" / "checkpoint-4" / "load.py")}
        lines = (tmp_path / "whole" / "checkpoint-4" / "load.py").read_text()
        exec(lines.rpartition("pipeline(")[0], scope)
        assert "num_inference_steps=2" in lines and "guidance_scale=" in lines
        loaded = {k.replace("default_0", "default"): p for k, p in scope["pipeline"].transformer.named_parameters()}
        own = {k: x for k, x in state.ema.items() if k.startswith("transformer.")}
        assert own and all(torch.equal(loaded[key.removeprefix("transformer.")], x) for key, x in own.items())

    assert "no samples" not in in_fork(tmp_path, runs).err


def test_two_processes_agree_with_one(tmp_path, built, photos):  # noqa: F811
    steady = {"base__use_ema": False, "dmd__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    line = functools.partial(command, tmp_path, built("FluxPipeline"), photos, **steady)
    assert cli(tmp_path, *line("one")).code == 0
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert distance(tmp_path / "one", tmp_path / "two", "model") < 1e-6


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("sd", {}, "is a StableDiffusionPipeline; expected one of ZImagePipeline, FluxPipeline"),
        ("StableDiffusion3Pipeline", {}, "is a StableDiffusion3Pipeline; expected one of ZImagePipeline"),
        ("FluxPipeline", {"group_offload": True}, "--dmd.group-offload: has no part in distillation; leave it out"),
        ("FluxPipeline", {"train_text_encoder": True}, "--dmd.train-text-encoder: has no part in distillation"),
        ("FluxPipeline", {"fake_updates": 0}, "--dmd.fake-updates is 0"),
    ],
)
def test_settings_that_do_not_fit_are_a_line(built, name, settings, says):
    with pytest.raises(BadInput) as refused:
        dmd.encoders(config(built(name), **settings))
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value
