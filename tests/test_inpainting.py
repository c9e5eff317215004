"""Inpainting as the condition of a ControlNet: holes, what training computes, runs, and what is refused."""

import functools
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from test_controlnet import HEIGHT, OFF, PROMPTS, WIDTH, again, hold, made
from test_controlnet import config as edges
from test_controlnet_runs import GRID, command, tiny
from test_families import same
from test_lora_families import in_fork, photos  # noqa: F401  a fixture
from warm import cli, cli_many, digest, distance

from oneloop import loop
from oneloop.configs import BadInput
from oneloop.families import (
    control,
    control_conditions,
    control_samples,
    controls,
    inpainting,
    text_to_image,
)
from oneloop.families.controls import CONTROLNETS
from oneloop.families.objective import objective
from oneloop.settings import command_line
from oneloop.tasks import Rng, controlnet, of_settings, t2i_adapter

SD, FLOWS = ("sd", "sdxl"), ("StableDiffusion3Pipeline", "QwenImagePipeline")
NAMES = (*SD, *FLOWS)
diffusers.utils.logging.set_verbosity_error()


def config(model, masks=None, **settings):
    cfg = edges(model, **settings)
    return replace(cfg, data=replace(cfg.data, conditioning="inpainting", mask_data_dir=masks))


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""
    return functools.cache(lambda name: controlnet.task.make_models(config(built(name))) and built(name))


def encoded(models, cfg, mask=None, numbers=(5, 9)):
    """Two examples as a loss sees them, and the images that they were made of."""
    x = Rng.of(1, range(2)).uniform("x", 3, HEIGHT, WIDTH) * 2 - 1
    batch = {name: torch.tensor([[HEIGHT, WIDTH]] * 2) for name in ("original_size", "target_size")}
    batch |= {"crop_top_left": torch.zeros(2, 2, dtype=torch.long), "n": torch.tensor(numbers), "conditioning": x}
    batch |= {} if mask is None else {"mask": mask}
    with torch.no_grad():
        batch |= text_to_image.encode_images(models, x, cfg) | text_to_image.encode_captions(models, PROMPTS, cfg)
        encoding = of_settings(controlnet.task.encodings, cfg).get("conditioning")
        if encoding:
            batch |= encoding.fn(models, *(batch[name] for name in encoding.columns), cfg)
    return batch


def both(cfg, models, batch, rng):
    own = control.entry(CONTROLNETS, cfg)
    return controls.controlled(models, own, control_conditions.condition_of(own, batch, rng), cfg.controlnet)


def loss_of(cfg, models, batch, rng):
    (loss,) = controlnet.loss_fn(models, batch, rng, cfg)
    return loss.value


def left_half():
    """Masks of grey levels: the left half is white."""
    mask = torch.zeros(2, 1, HEIGHT, WIDTH)
    mask[..., : WIDTH // 2] = 0.8
    mask[..., WIDTH // 2 :] = 0.2
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Holes.


def test_holes_are_functions_of_the_seed_and_the_number():
    """Of both kinds and of any size; whoever else is in the batch."""
    holes = inpainting.drawn(Rng.of(3, range(64)), 48, 40)
    assert holes.shape == (64, 1, 48, 40) and holes.dtype == torch.bool
    assert torch.equal(holes[7:9], inpainting.drawn(Rng.of(3, [7, 8]), 48, 40))
    assert not torch.equal(holes[7:9], inpainting.drawn(Rng.of(4, [7, 8]), 48, 40))
    share = holes.float().mean((1, 2, 3))
    assert share.min() > 0.02 and share.max() < 0.98 and 0.2 < share.mean() < 0.6
    boxes = Rng.of(3, range(64)).uniform("hole") < 0.5
    corners = [sum((np.diff(np.pad(hole[0].int(), 1), axis=0) != 0).any(0)) for hole in holes]
    assert 20 < boxes.sum() < 44 and max(corners) > 0

    def straight(hole):  # a union of up to three rectangles changes at up to six rows
        rows = hole[0].int()
        return int((rows[1:] != rows[:-1]).any(1).sum()) <= 6 and int((rows[:, 1:] != rows[:, :-1]).any(0).sum()) <= 6

    assert all(straight(hole) for hole in holes[boxes]) and not any(straight(hole) for hole in holes[~boxes][:8])
    large = inpainting.drawn(Rng.of(3, range(64)), 192, 160).float()
    coarse = torch.nn.functional.avg_pool2d(large, 4)
    assert (coarse - holes.float()).abs().mean() < 0.05  # the same hole at another resolution
    assert inpainting.drawn(Rng.of(3, range(64)), 8, 8).flatten(1).any(1).all()


def test_masks_are_cut_at_half_and_kept_as_pipelines_keep_them():
    x = torch.ones(2, 3, HEIGHT, WIDTH)
    holes = inpainting.hole(x, left_half(), Rng.of(0, range(2)))
    assert holes[..., : WIDTH // 2].eq(1).all() and holes[..., WIDTH // 2 :].eq(0).all()
    seen = inpainting.hidden(x, holes)
    assert seen[..., : WIDTH // 2].eq(-1).all() and seen[..., WIDTH // 2 :].eq(1).all()
    assert torch.equal(inpainting.kept(holes, x[..., ::8, ::8])[0, 0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


# ---------------------------------------------------------------------------------------------------------------------
# What training computes.


@pytest.mark.parametrize("name", NAMES)
def test_at_first_it_changes_nothing_and_then_all_of_it_learns(built, name):
    cfg = config(built(name), learning_rate=1e-2)
    models, rng = made(cfg, moved=False), Rng.of(0, (5, 9))
    batch, own = encoded(models, cfg), text_to_image.family(cfg.controlnet)
    with torch.no_grad():
        assert torch.equal(objective(both(cfg, models, batch, rng), batch, rng, cfg), objective(models, batch, rng, cfg))
    net, optims = models["controlnet"], controlnet.make_optim(models, cfg)
    trained = {key: p.clone() for key, p in net.named_parameters() if p.requires_grad}
    for step in range(3):
        loss_of(cfg, models, batch, Rng.of(step, range(2))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
        optims["controlnet"].step(), optims["controlnet"].zero_grad()
    assert not [key for key, p in net.named_parameters() if key in trained and torch.equal(p, trained[key])]
    assert all(p.grad is None for p in models[own.TRAINED].parameters())


@pytest.mark.parametrize("name", NAMES)
def test_its_answer_is_that_of_the_pipeline(built, tmp_path, monkeypatch, name):
    """The export in the family's own inpainting pipeline, by from_pretrained: at its x_t and time, what it hands to its
    scheduler is what training computes, with a mask of the data; and what it draws is what a sample is."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    off = OFF.get(name, {"guidance_scale": 1.0})
    cfg = config(built(name), "masks", num_inference_steps=3, guidance_scale=next(iter(off.values())))
    models, s, mask = made(cfg), cfg.controlnet, left_half()
    batch, own = encoded(models, cfg, mask), control.entry(CONTROLNETS, cfg)
    models["controlnet"].save_pretrained(tmp_path)
    net = getattr(diffusers, own.kind).from_pretrained(tmp_path)
    pipeline = getattr(diffusers, own.pipeline).from_pretrained(built(name), controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    steps, step = [], pipeline.scheduler.step

    def listen(v, t, x, **more):
        steps.append((v, t, x))
        return step(v, t, x, **more)

    pipeline.scheduler.step = listen
    x, white = batch["conditioning"], (mask > 0.5).float()
    if own.latent:
        image = {"control_image": x, "control_mask": white}
    else:  # as the published checkpoints are used
        control_image = torch.where(white > 0, -1.0, x / 2 + 0.5)
        image = {"image": x / 2 + 0.5, "mask_image": white, "control_image": control_image, "strength": 1.0}
    call = image | {own.scale: 1.0, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "pt"}
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    images = pipeline(prompt=[*PROMPTS], generator=generators(), **call | off).images
    with torch.no_grad():
        drawn = control_samples.sample(models, own, s, x, PROMPTS, generators(), white)
    assert same(drawn, images, 1e-3), (drawn - images).abs().max()
    v, answer = again(name, s, pipeline, steps, batch)
    still = {key: 0 * batch[key] for key in ("condition_std",) if key in batch}
    turned = {key: batch[key].flip(-1) for key in ("condition_kept", "mask") if key in batch}
    with torch.no_grad():
        ours, other = (answer(both(cfg, models, batch | still | more, Rng.of(0, range(2)))) for more in ({}, turned))
        hold(v, ours, other, answer(models))


def test_the_loss_counts_all_pixels_and_sees_none_that_are_hidden(built):
    """A mask says what is hidden, and weights nothing; what is behind it is not in the condition."""
    for name in ("sd", "StableDiffusion3Pipeline"):
        cfg, rng = config(built(name), "masks"), Rng.of(0, range(2))
        models, own = made(cfg), control.entry(CONTROLNETS, cfg)
        batch = encoded(models, cfg, left_half())
        condition = control_conditions.condition_of(own, batch, rng)
        plain = objective(both(cfg, models, batch, rng), {k: x for k, x in batch.items() if k != "mask"}, rng, cfg).mean()
        assert torch.equal(loss_of(cfg, models, batch, rng), plain)
        other = batch | {"conditioning": torch.where(left_half() > 0.5, 0.3, batch["conditioning"])}
        encoding = of_settings(controlnet.task.encodings, cfg).get("conditioning")
        with torch.no_grad():
            other |= encoding.fn(models, *(other[key] for key in encoding.columns), cfg) if encoding else {}
        assert torch.equal(control_conditions.condition_of(own, other, rng), condition)


@pytest.mark.parametrize("name", FLOWS)
def test_holes_are_drawn_by_number(built, name):
    """The same in a batch of two and of one, and as those that the loss of Stable Diffusion draws."""
    cfg = config(built(name))
    models = made(cfg)
    batch = encoded(models, cfg)
    encoding = of_settings(controlnet.task.encodings, cfg)["conditioning"]
    assert encoding.columns == ("conditioning", "n")
    with torch.no_grad():
        one = encoding.fn(models, batch["conditioning"][1:], torch.tensor([9]), cfg)
    assert torch.equal(one["condition_kept"], batch["condition_kept"][1:]) and torch.equal(one["n"], torch.tensor([9]))
    holes = inpainting.drawn(Rng.of(cfg.base.seed, (5, 9)), HEIGHT, WIDTH)
    assert torch.equal(inpainting.kept(holes.float(), batch["condition_mean"]), batch["condition_kept"])
    other = replace(cfg, base=replace(cfg.base, seed=cfg.base.seed + 1))
    with torch.no_grad():
        seeded = encoding.fn(models, batch["conditioning"], torch.tensor([5, 9]), other)
    assert not torch.equal(seeded["condition_kept"], batch["condition_kept"])


def test_of_sd3_a_given_one_has_latents_with_their_shift(built, tmp_path):
    """As its pipeline has them, whatever its config says of pooled text; one that does not fill in has them without."""
    name = "StableDiffusion3Pipeline"
    models = made(config(built(name), "masks"))
    models["controlnet"].save_pretrained(tmp_path)
    cfg = config(built(name), "masks", controlnet_model_name_or_path=str(tmp_path))
    batch, vae = encoded(models, cfg, left_half()), models["vae"]
    with torch.no_grad():
        mean = vae.encode(inpainting.hidden(batch["conditioning"], (left_half() > 0.5).float())).latent_dist.mean
    torch.testing.assert_close(batch["condition_mean"], (mean - vae.config.shift_factor) * vae.config.scaling_factor)
    net, losses = models["controlnet"], []
    assert net.config.force_zeros_for_pooled_projection
    for forced in (True, False):
        net.register_to_config(force_zeros_for_pooled_projection=forced)
        other = models | {"transformer": Deaf(models["transformer"])}
        for pooled in (batch["pooled_prompt_embeds"], 0 * batch["pooled_prompt_embeds"]):
            with torch.no_grad():
                losses.append(loss_of(cfg, other, batch | {"pooled_prompt_embeds": pooled}, Rng.of(0, range(2))))
    assert len({loss.item() for loss in losses}) == 1


class Deaf:
    """A base that sees no pooled text."""

    def __init__(self, base):
        self.base, self.config, self.dtype = base, base.config, base.dtype

    def __call__(self, *args, pooled_projections=None, **more):
        return self.base(*args, pooled_projections=0 * pooled_projections, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Masks for the photographs: a white rectangle in grey levels."""
    folder = tmp_path_factory.mktemp("masks")
    for i in range(3):
        mask = np.zeros((70, 80), np.uint8)
        mask[10 + 5 * i : 50, 10:60] = 255
        Image.fromarray(mask).save(folder / f"{i}.png")
    return folder


def line(folder, model, photos, out, **more):  # noqa: F811
    return command(folder, model, photos, out, **{"data__conditioning": "inpainting"} | more)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_equal_and_its_export_draws_the_same(tmp_path, built, photos, masks, name, given):  # noqa: F811
    """Text encoders are gone before the base comes; what load.py says draws as the run drew."""
    more = {"data__mask_data_dir": masks} if given else {}

    def run(out):
        settings = {"base__checkpointing_steps": 1, "base__mixed_precision": "no", "data__center_crop": True}
        cfg = command_line.parse(line(tmp_path, built(name), photos, out, **settings, **more))[1]
        return loop.run(controlnet.task, cfg), cfg

    def runs():
        _, cfg = run("out")
        shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        run("again")
        assert digest(tmp_path / "out") == digest(tmp_path / "again")
        folder, own = tmp_path / "out" / "checkpoint-2", control.entry(CONTROLNETS, cfg)
        lines, scope = (folder / "load.py").read_text(), {"__file__": str(folder / "load.py")}
        exec(lines.rpartition("pipeline(")[0], scope)
        pipeline = scope["pipeline"]
        assert type(pipeline).__name__ == own.pipeline and "Inpaint" in own.pipeline
        [grid] = (tmp_path / "out" / "samples").glob("2*.png")
        condition, target, sample = np.split(np.asarray(Image.open(grid)).astype(int), 3, 1)
        image, mask = (np.asarray(Image.open(folder / name).convert("RGB")) for name in ("image.png", "mask.png"))
        assert grid.name == f"2-{GRID}.png" and (image == target).all() and 0.02 < (mask > 0).mean() < 0.98
        assert (condition == np.where(mask > 127, 0, target)).all() and set(np.unique(mask)) == {0, 255}
        (generator,) = Rng.of(cfg.base.seed, range(1), "samples").generators("sample")
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(generator.initial_seed())
        call = lines.rpartition("pipeline(")[2].rpartition(").images")[0]
        result = eval(f"pipeline({call}, generator=generator)", scope | {"generator": generator}).images[0]
        assert np.abs(np.asarray(result) - sample).max() <= 2, np.abs(np.asarray(result) - sample).max()

    done = in_fork(tmp_path, runs)
    assert "made ahead" not in done.err and "no samples" not in done.err, done.err
    assert ("encoding conditioning and mask once" in done.out + done.err) == (given and name in FLOWS), done.err


@pytest.mark.parametrize("name", ["sd", *FLOWS])
def test_two_processes_agree_with_one_and_go_on_from_an_export(tmp_path, built, photos, name):  # noqa: F811
    steady = {"base__use_ema": False, "controlnet__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    make = functools.partial(line, tmp_path, built(name), photos, **steady)
    in_fork(tmp_path, lambda: loop.run(controlnet.task, command_line.parse(make("one"))[1]))
    for result in cli_many(tmp_path, 2, *make("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert distance(tmp_path / "one", tmp_path / "two", "model") < 1e-6
    one = tmp_path / "one" / "export"
    again = cli(tmp_path, *make("more", controlnet__controlnet_model_name_or_path=one, base__max_train_steps=1))
    assert again.code == 0 and distance(tmp_path / "one", tmp_path / "more", "model") > 1e-5, again.err


def test_a_base_in_bfloat16_in_buckets(tmp_path, built, masks):
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (24, 48, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    more = {"base__mixed_precision": "bf16", "data__buckets": True, "data__trigger": "a dog", "base__num_samples": 3}
    for name in NAMES:
        done = cli(tmp_path, *line(tmp_path, built(name), tmp_path / "photos", name, **more, base__max_train_steps=1))
        assert done.code == 0 and "no samples" not in done.err, done.err


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    ("task", "name", "more", "says"),
    [
        (controlnet, "FluxPipeline", {}, "no pipeline tells a FluxControlNetModel what is hidden; expected one of StableDiff"),
        (controlnet, "ZImagePipeline", {}, "no pipeline tells a ZImageControlNetModel what is hidden"),
        (t2i_adapter, "sd", {}, "no pipeline tells a T2IAdapter what is hidden; t2i-adapter trains none; leave it out"),
        (controlnet, "sd", {"mask_from_alpha": True}, "--data.mask-from-alpha is True; expected False with --data.cond"),
        (controlnet, "sd", {"mask_minimum": 0.5}, "--data.mask-minimum is 0.5; expected 0 with --data.conditioning inpainting"),
        (controlnet, "StableDiffusion3Pipeline", {"given": True}, "its extra_conditioning_channels is 0; expected 1, as one"),
        (controlnet, "QwenImagePipeline", {"given": True}, "its extra_condition_channels is 0; expected 4, as one for"),
    ],
)
def test_what_does_not_fit_is_a_line(built, tmp_path, task, name, more, says):
    cfg = config(built(name) if name in NAMES else tiny(tmp_path, name))
    if more.pop("given", False):
        controlnet.task.make_models(edges(built(name)))["controlnet"].save_pretrained(tmp_path / "net")
        cfg = config(built(name), controlnet_model_name_or_path=str(tmp_path / "net"))
    if task is t2i_adapter:
        own = t2i_adapter.Settings(pretrained_model_name_or_path=cfg.controlnet.pretrained_model_name_or_path)
        cfg = t2i_adapter.Config(cfg.base, cfg.data, own)
    cfg = replace(cfg, data=replace(cfg.data, **more))
    with pytest.raises(BadInput) as refused:
        task.task.encoders(cfg)
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value
