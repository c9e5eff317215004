"""The task `t2i_adapter`: its answer is the pipeline's, its timesteps are cubic, it learns, resumes, draws as its export."""

import functools
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_controlnet import HEIGHT, PROMPTS, SIDE, WIDTH
from test_families import same
from test_lora_families import in_fork, photos  # noqa: F401  a fixture
from warm import brief, digest, flags

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import control_conditions, controls, stable_diffusion, text_to_image
from oneloop.settings import command_line
from oneloop.tasks import Rng, t2i_adapter
from oneloop.training.validation import Stratified

NAMES = ("sd", "sdxl")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""
    return functools.cache(lambda name: t2i_adapter.task.make_models(config(built(name))) and built(name))


def config(model, **settings):
    base = Base(output_dir="unused", logger=("none",))
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2, conditioning="edges")
    made = t2i_adapter.Settings(pretrained_model_name_or_path=str(model), **{"num_inference_steps": 2} | settings)
    return t2i_adapter.Config(base, sizes, made)


def encoded(models, cfg):
    rng = Rng.of(1, range(2))
    x, conditioning = (rng.uniform(name, 3, HEIGHT, WIDTH) * 2 - 1 for name in ("x", "condition"))
    batch = {name: torch.tensor([[HEIGHT, WIDTH]] * 2) for name in ("original_size", "target_size")}
    batch["crop_top_left"] = torch.zeros(2, 2, dtype=torch.long)
    with torch.no_grad():
        batch |= text_to_image.encode_images(models, x, cfg) | text_to_image.encode_captions(models, PROMPTS, cfg)
    return batch | {"conditioning": conditioning}


@pytest.mark.parametrize("name", NAMES)
def test_its_answer_is_that_of_the_pipeline(built, tmp_path, name):
    """Its export in diffusers' own adapter pipeline, at that pipeline's x_t and timestep."""
    cfg = config(built(name))
    models, own = t2i_adapter.task.make_models(cfg), t2i_adapter.ADAPTERS[stable_diffusion.kind(cfg.t2i_adapter)]
    batch, steps = encoded(models, cfg), []
    models["adapter"].save_pretrained(tmp_path)
    adapter = diffusers.T2IAdapter.from_pretrained(tmp_path)
    pipeline = getattr(diffusers, own.pipeline).from_pretrained(built(name), adapter=adapter)
    pipeline.set_progress_bar_config(disable=True)
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda v, t, x, **more: steps.append((v, t, x)) or step(v, t, x, **more)
    call = {"image": batch["conditioning"] / 2 + 0.5, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 3}
    pipeline(prompt=[*PROMPTS], guidance_scale=1.0, output_type="pt", **call)
    v, t, x = steps[1]
    condition = control_conditions.condition_of(own, batch, Rng.of(0, range(2)))
    together = controls.controlled(models, own, condition, cfg.t2i_adapter)
    with torch.no_grad():
        given = stable_diffusion.conditions(batch, name == "sdxl") | {"return_dict": False}
        ours, plain = (net(x, t.expand(2), **given)[0] for net in (together["unet"], models["unet"]))
    assert same(ours, v, 2e-5) and not same(plain, v, 1e-3)


def test_timesteps_are_cubic_and_spread_by_validation():
    """Mou et al. 2023, section 3.4: (1 - u^3) T, of which validation's u are one in each of N equal parts."""
    rng = Rng.of(0, range(4000))
    t = t2i_adapter.Cubic(rng).integers("timestep", 1000)
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 750) < 15  # T (1 - 1/4)
    assert abs((t < 500).float().mean() - (1 - 0.5 ** (1 / 3))) < 0.02
    assert torch.equal(t2i_adapter.Cubic(rng).integers("other", 1000), rng.integers("other", 1000)) and len(rng) == 4000
    few = Rng.of(0, range(8))
    spread = Stratified(few.keys, ranks=torch.arange(8.0), count=8)
    t = t2i_adapter.Cubic(spread).integers("timestep", 1000)
    assert torch.equal(t, t.sort(descending=True).values) and "timestep" in spread.drawn


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_nothing_else_does(built, name):
    cfg = config(built(name), learning_rate=1e-2)
    models = t2i_adapter.task.make_models(cfg)
    batch, optims = encoded(models, cfg), t2i_adapter.make_optim(models, cfg)
    before = {key: p.clone() for key, p in models["unet"].named_parameters()}
    loss = lambda n: next(t2i_adapter.loss_fn(models, batch, Rng.of(n, range(2)), cfg)).value  # noqa: E731
    with torch.no_grad():
        first = sum(loss(n).item() for n in range(8))
    for _ in range(3):
        for n in range(8):
            loss(n).backward()
            assert all(p.grad is not None for p in models["adapter"].parameters())
            optims["t2i_adapter"].step(), optims["t2i_adapter"].zero_grad()
    with torch.no_grad():
        assert sum(loss(n).item() for n in range(8)) < first
    assert all(torch.equal(p, before[key]) and p.grad is None for key, p in models["unet"].named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_equal_and_its_export_draws_the_same(tmp_path, built, photos, name):  # noqa: F811
    settings = {
        "base.checkpointing_steps": 1,
        "base.mixed_precision": "no",
        "base.ema_power": 0,
        "data.conditioning": "edges",
        "t2i_adapter.pretrained_model_name_or_path": built(name),
        "t2i_adapter.learning_rate": 1e-2,
        "t2i_adapter.num_inference_steps": 2,
    }

    def runs():
        for out in ("out", "again"):
            cfg = command_line.parse(flags("t2i_adapter", brief(tmp_path, out, photos, SIDE) | settings))[1]
            loop.run(t2i_adapter.task, cfg)
            if out == "out":
                shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        assert digest(tmp_path / "out") == digest(tmp_path / "again")
        folder = tmp_path / "out" / "checkpoint-2"
        scope, lines = {"__file__": str(folder / "load.py")}, (folder / "load.py").read_text()
        exec(lines.rpartition("pipeline(")[0], scope)
        [grid] = (tmp_path / "out" / "samples").glob("2*.png")
        sample = np.asarray(Image.open(grid)).astype(int)[:, 2 * SIDE :]
        (generator,) = Rng.of(cfg.base.seed, range(1), "samples").generators("sample")
        call = lines.rpartition("pipeline(")[2].rpartition(").images")[0]
        drawn = eval(f"pipeline({call}, generator=generator)", scope | {"generator": generator}).images[0]
        assert np.abs(np.asarray(drawn) - sample).max() <= 2

    assert "made ahead" not in in_fork(tmp_path, runs).err


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("sd", "sdxl", "--t2i-adapter.adapter-model-name-or-path"),
        ("FluxPipeline", None, "is a FluxPipeline, for which diffusers has no such model; expected one of StableDiffusion"),
    ],
)
def test_what_does_not_fit_is_a_line(built, tmp_path, name, given, says):
    more = {}
    if given:
        adapter = diffusers.T2IAdapter(3, [8, 16], 2, 8, "full_adapter_xl")
        adapter.save_pretrained(tmp_path)
        more, says = {"adapter_model_name_or_path": str(tmp_path)}, f"{says} {tmp_path}: its adapter_type is full_adapter_xl"
    with pytest.raises(BadInput) as refused:
        import tiny_families

        t2i_adapter.task.encoders(config(built(name) if name in NAMES else tiny_families.build(name, tmp_path), **more))
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value
