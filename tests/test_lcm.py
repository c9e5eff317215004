"""Latent consistency distillation: the loss against diffusers' own schedulers, runs, samples, the export, bad input."""

import contextlib
import functools
import shutil

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from test_lora import CAPTIONS, in_fork, photos  # noqa: F401  a fixture
from warm import brief, cli, cli_many, digest, flags, tensors

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import stable_diffusion, text_to_image
from oneloop.machine import placement
from oneloop.maths import consistency
from oneloop.settings import command_line
from oneloop.tasks import Rng, lcm, without_adapters
from oneloop.training import ema

SIDE = 32
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module", autouse=True)
def warmed(built):
    """Everything imported that forks need."""
    lcm.make_models(config(built("sdxl")))


def config(model, **settings):
    base = Base(output_dir="unused", logger=("none",))
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2)
    adapters = {} if settings.get("trains") == "all" else {"rank": 4}
    return lcm.Config(base, sizes, lcm.Settings(pretrained_model_name_or_path=str(model), **adapters | settings))


def command(folder, model, photos, out="out", **more):  # noqa: F811
    """A command line for two steps of `lcm`."""
    settings = brief(folder, out, photos, SIDE) | {
        "base.ema_power": 0,
        "lcm.pretrained_model_name_or_path": model,
        "lcm.learning_rate": 1e-3,
    }
    return flags("lcm", settings | {name.replace("__", "."): value for name, value in more.items()})


def encoded(models, cfg, count=4):
    """A batch of `count` examples as the loss sees it."""
    x = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {key: torch.tensor([[SIDE, SIDE]] * count) for key in ("original_size", "target_size")}
    batch["crop_top_left"] = torch.zeros(count, 2, dtype=torch.long)
    with torch.no_grad():
        return batch | text_to_image.encode_images(models, x, cfg) | text_to_image.encode_captions(models, CAPTIONS, cfg)


def student(cfg):
    """The models of a run, with a student and a target that are neither the teacher nor each other."""
    models = lcm.make_models(cfg)
    models |= placement.followers(models, lcm.task.follows)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("unet", "target"):
            for key, p in models[name].named_parameters():
                if models["unet"].get_parameter(key).requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return models


# ---------------------------------------------------------------------------------------------------------------------
# The loss.


@pytest.mark.parametrize("trains", ["adapters", "all"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sd", {}),
        ("sd2", {"loss_type": "l2", "num_ddim_timesteps": 20}),
        ("sd", {"prediction_type": "sample", "w_min": 0.0, "w_max": 0.0, "huber_c": 0.1}),
        ("sdxl", {"w_min": 1.0, "timestep_scaling_factor": 3.0}),
    ],
)
def test_the_loss_is_of_diffusers_own_steps(built, kind, settings, trains):
    """The teacher's step is DDIMScheduler's, f is what LCMScheduler calls denoised, a pipeline embeds the guidance."""
    cfg = config(built(kind), trains=trains, **settings)
    models, s, rng = student(cfg), cfg.lcm, Rng.of(5, range(4))
    batch = encoded(models, cfg)
    (loss,) = lcm.loss_fn(models, batch, rng, cfg)

    said = stable_diffusion.config(s, "scheduler") | stable_diffusion.overrides(s)
    ddim = DDIMScheduler.from_config(said, set_alpha_to_one=False, clip_sample=False)
    ddim.set_timesteps(s.num_ddim_timesteps)
    lcms = LCMScheduler.from_config(said, timestep_scaling=s.timestep_scaling_factor)
    lcms.set_timesteps(1)
    index = rng.integers("timestep", s.num_ddim_timesteps)
    w = s.w_min + (s.w_max - s.w_min) * rng.uniform("guidance")
    x = batch["latent_mean"] + batch["latent_std"] * rng.normal("posterior", *batch["latent_mean"].shape[1:])
    x, noise = x * models["vae"].config.scaling_factor, rng.normal("noise", *x.shape[1:])
    nothing = text_to_image.encode_captions(models, [""], cfg)
    pipeline = StableDiffusionPipeline.get_guidance_scale_embedding
    wanted = []
    for i in range(4):
        row = {key: column[i : i + 1] for key, column in batch.items()}
        given, null = (stable_diffusion.conditions(columns, kind == "sdxl") for columns in (row, row | nothing))
        told = {"timestep_cond": pipeline(None, w[i : i + 1], 256)} if trains == "all" else {}
        t = (index[i] + 1) * (1000 // s.num_ddim_timesteps) - 1
        x_t = ddim.add_noise(x[i : i + 1], noise[i : i + 1], t[None])
        with (
            torch.no_grad(),
            without_adapters(models["unet"]) if trains == "adapters" else contextlib.nullcontext(models["teacher"]) as net,
        ):
            with_text, without = (net(x_t, t, **columns).sample for columns in (given, null))
            before = ddim.step(with_text + w[i] * (with_text - without), t, x_t).prev_sample
        earlier = max(t - 1000 // s.num_ddim_timesteps, torch.tensor(0))
        f = []
        for name, point, at in (("unet", x_t, t), ("target", before, earlier)):
            lcms._step_index = None
            lcms.timesteps = at[None]
            f.append(lcms.step(models[name](point, at, **given, **told).sample, at, point).denoised)
        error = f[0] - f[1]
        c = s.huber_c
        wanted.append((error.square() if s.loss_type == "l2" else (error.square() + c * c).sqrt() - c).mean())
    torch.testing.assert_close(loss.value, torch.stack(wanted).mean(), rtol=1e-5, atol=1e-6)
    loss.value.backward()
    assert all(p.grad is None for key, m in models.items() if key != "unet" for p in m.parameters())
    silent = [key for key, p in models["unet"].named_parameters() if p.requires_grad and p.grad is None]
    assert not silent and any(p.grad.any() for p in models["unet"].parameters() if p.requires_grad)


def test_the_answer_at_the_start_is_what_it_is_given():
    """And at small timesteps between it and the model's, as LCMScheduler has it."""
    t = torch.tensor([0, 1, 3, 20])
    for scaling in (0.1, 10.0):
        c_skip, c_out = consistency.boundary(t, scaling)
        theirs = LCMScheduler(timestep_scaling=scaling).get_scalings_for_boundary_condition_discrete(t)
        torch.testing.assert_close((c_skip, c_out), theirs)
        assert (c_skip[0], c_out[0]) == (1, 0)


def test_the_student_begins_as_the_teacher(built):
    """Whatever the guidance that it is told; its copy trains in float32, and the teacher does not."""
    models = lcm.make_models(config(built("sd"), trains="all"))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 16)
    told = consistency.embedded(torch.tensor([2.0, 9.0]), 256)
    with torch.no_grad():
        answers = [models["unet"](x, t, text, timestep_cond=told).sample, models["teacher"](x, t, text).sample]
    assert torch.equal(*answers)
    assert {p.requires_grad for p in models["unet"].parameters()} == {True} and models["unet"].dtype == torch.float32
    assert not any(p.requires_grad for name, m in models.items() if name != "unet" for p in m.parameters())


def test_the_target_moves_as_the_setting_says(built):
    cfg = config(built("sd"), target_decay=0.75)
    models = lcm.make_models(cfg)
    models |= placement.followers(models, lcm.task.follows)
    (average,) = ema.following(models, lcm.task.follows, cfg)
    with torch.no_grad():
        before = {key: x.clone() for key, x in average.values.items()}
        [p.add_(1) for p in models["unet"].parameters() if p.requires_grad]
    assert before and average.update(1, 10) == 0.75
    for key, x in average.values.items():
        torch.testing.assert_close(x, before[key] + 0.25)


# ---------------------------------------------------------------------------------------------------------------------
# Runs.

FORMS = [("sd", "all"), ("sdxl", "adapters")]


@pytest.mark.parametrize(("kind", "trains"), FORMS)
def test_a_run_resumes_equal_and_its_export_draws_the_same(tmp_path, built, photos, kind, trains):  # noqa: F811
    """In the bits of the run that was not stopped, target and all; load.py makes an LCM pipeline that draws as the run does."""

    def run(out):
        more = {"base__checkpointing_steps": 1, "lcm__trains": trains, "lcm__target_decay": 0.5}
        cfg = command_line.parse(command(tmp_path, built(kind), photos, out, **more))[1]
        return loop.run(lcm.task, cfg), cfg

    def runs():
        state, cfg = run("whole")
        shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        run("again")
        assert digest(tmp_path / "whole") == digest(tmp_path / "again")
        far = [(state.follows[f"target.{key}"] - p).abs().max() for key, p in trained(state.models["unet"])]
        assert len(far) == len(state.follows) and max(far) > 1e-5
        scope = {"__file__": str(tmp_path / "whole" / "checkpoint-2" / "load.py")}
        lines = (tmp_path / "whole" / "checkpoint-2" / "load.py").read_text()
        exec(lines.rpartition("pipeline(")[0], scope)
        loaded = scope["pipeline"]
        assert type(loaded.scheduler) is LCMScheduler and "num_inference_steps=4" in lines
        assert ("guidance_scale=1.0" if trains == "adapters" else "guidance_scale=7.5") in lines
        told = {"num_inference_steps": 4, "guidance_scale": 1.0 if trains == "adapters" else 7.5, "output_type": "latent"}
        seeded = Rng.of(0, range(1), "samples").generators("sample")
        with torch.no_grad():
            theirs = loaded(CAPTIONS[:1], generator=seeded, height=SIDE, width=SIDE, **told).images
            theirs = stable_diffusion.decode(loaded.vae, theirs)
            models = lcm.make_models(cfg)
            for key, p in models["unet"].named_parameters():
                p.data = state.ema.get(f"unet.{key}", p.data)
            ours = text_to_image.sample_fn(models, [{"caption": CAPTIONS[:1]}], Rng.of(0, range(1), "samples"), cfg)
        torch.testing.assert_close(ours["samples"], theirs, rtol=0, atol=1e-4)
        assert loaded.scheduler.timesteps.tolist() == [999, 759, 499, 259]
        if trains == "all":
            assert loaded.unet.config.time_cond_proj_dim == 256
            assert loaded.unet.time_embedding.cond_proj.weight.abs().max() > 0

    assert "no samples" not in in_fork(tmp_path, runs).err


def trained(module):
    return [(key, p) for key, p in module.named_parameters() if p.requires_grad]


def test_two_processes_agree_with_one(tmp_path, built, photos):  # noqa: F811
    """With an epsilon under which steps follow gradients: those that are rounding alone would else decide by their signs."""
    more = {"lcm__trains": "all", "lcm__adam_epsilon": 1e-3, "lcm__learning_rate": 1e-2, "lcm__adam_weight_decay": 0}
    line = functools.partial(command, tmp_path, built("sdxl"), photos, **more)
    assert cli(tmp_path, *line("one")).code == 0
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    moved = [(x - one[f"ema/target.{key.removeprefix('model/')}"]).abs().max() for key, x in one.items() if "model/" in key]
    assert max(moved) > 1e-3
    for key, x in one.items():
        if key.startswith(("model", "ema")):
            torch.testing.assert_close(two[key], x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("trains", ["adapters", "all"])
def test_merged(tmp_path, built, photos, trains):  # noqa: F811
    """The whole pipeline, which draws with LCMScheduler and needs nothing else."""
    assert cli(tmp_path, *command(tmp_path, built("sd"), photos, lcm__trains=trains)).code == 0
    merge = lambda to, *more: cli(tmp_path, "merge", "out", "--to", to, "--dtype", "float32", *more)  # noqa: E731
    done = merge("whole")
    assert done.code == 0, done.err
    whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(whole.scheduler) is LCMScheduler
    state, base = whole.unet.state_dict(), load_file(next((built("sd") / "unet").glob("*.safetensors")))
    moved = [key for key in base if not torch.equal(state[key], base[key])]
    assert moved and all(key in state for key in base)
    if trains == "all":
        own = load_file(tmp_path / "out" / "export" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(state[key], x) for key, x in own.items()) and state.keys() == own.keys()
        half = merge("half", "--strength", "0.5")
        assert half.code == 2 and "--strength is 0.5; expected 1 of a model that was distilled as a whole" in half.err


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("FluxPipeline", {}, "is a FluxPipeline; expected one of StableDiffusionPipeline, StableDiffusionXLPipeline"),
        ("sd", {"w_min": 3.0, "w_max": 2.0}, "--lcm.w-max is 2.0; expected at least --lcm.w-min, 3"),
        ("sd", {"unet_time_cond_proj_dim": 5}, "--lcm.unet-time-cond-proj-dim is 5; expected an even number"),
        ("sd", {"train_text_encoder": True}, "--lcm.train-text-encoder: has no part in distillation; leave it out"),
        ("sd", {"placeholder_tokens": ("<a>",)}, "--lcm.placeholder-tokens: has no part in distillation"),
        ("sd", {"snr_gamma": 5.0}, "--lcm.snr-gamma: has no part in distillation"),
        ("sd", {"trains": "all", "rank": 8}, "--lcm.rank: there are no adapters with --lcm.trains all; leave it out"),
        ("sd", {"num_ddim_timesteps": 1001}, "--lcm.num-ddim-timesteps is 1001; expected at most the teacher's 1000"),
        ("sd", {"num_inference_steps": 51}, "--lcm.num-inference-steps is 51; expected at most --lcm.num-ddim-timesteps, 50"),
        ("sd", {"flow_shift": 3.0}, "--lcm.flow-shift is 3.0: a StableDiffusionPipeline has no use for it"),
        ("sd", {"target_modules": ("nothing",)}, "--lcm.target-modules: 'nothing' is the end of no layer's name"),
    ],
)
def test_settings_that_do_not_fit_are_a_line(built, name, settings, says):
    with pytest.raises(BadInput) as refused:
        cfg = config(built(name), **settings)
        lcm.encoders(cfg)
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value
