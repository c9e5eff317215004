# ruff: noqa: F811  fixtures of other files
"""The folder of class images: what is in it, is refused and is taken; where none is drawn; how one is drawn, and the loss."""

import errno
import functools
import os
import shutil
import types

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_lora_families import SIDE, in_fork, photos  # noqa: F401  a fixture
from test_prior import NAMES, PROMPT, asked, built, command, fine, images, ready, refused, unused  # noqa: F401  fixtures
from warm import cli, tiny

from oneloop.configs import BadInput, Base, Data
from oneloop.families import objective, offload, text_to_image
from oneloop.inputs import drawn, sources
from oneloop.machine import placement
from oneloop.settings import command_line
from oneloop.tasks import Rng, finetune, lora
from oneloop.training import prior


@pytest.fixture
def filled(tmp_path, ready):
    """name -> a test's own copy of them."""
    return lambda name="sd": shutil.copytree(ready(name)[0], tmp_path / "class") and tmp_path / "class"


def test_an_image_is_drawn_in_the_company_of_the_same_numbers(tmp_path, built, monkeypatch):
    """Whatever is missing and however it is shared: matrix products of another shape may round otherwise."""
    cfg = command_line.parse(command(tmp_path, built("sd"), tmp_path))[1]
    alone, seen = types.SimpleNamespace(is_main_process=False, device="cpu"), []

    def draw(task, models, weights, ema, shown, rng, *_):
        seen.append(rng.numbers)
        return {"samples": torch.tensor(rng.numbers)[:, None, None, None].expand(-1, 3, 2, 2) / 255}

    monkeypatch.setattr(placement, "draw", draw)
    monkeypatch.setattr(drawn, "write", lambda wanted, number, image: seen.append((number, image[0, 0, 0].item())))
    prior.fill(lora.task, cfg, alone, None, [1, 2, 5, 8, 9], (0, 2), dict)
    assert seen == [(0, 1, 2, 3), (1, 1), (2, 2), (8, 9, 10, 11), (8, 8), (9, 9)]


def test_a_full_disk_while_they_are_drawn(tmp_path, built, photos, ready):
    """Exit code 4, and what was drawn stays."""
    count = iter(range(100))

    def full():
        own = os.replace

        def replace(one, other):
            if "drawn-" in str(other) and next(count) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            own(one, other)

        os.replace = replace

    done = cli(tmp_path, *command(tmp_path, built("sd"), photos), patch=full)
    assert done.code == 4 and "drawn-00003.png failed: No space left on device" in done.err, done.err
    assert list(images(tmp_path / "class").items()) == list(images(ready("sd")[0]).items())[:3]


def test_a_base_whose_blocks_stay_in_the_machines_memory_draws_the_same(tmp_path, built):
    """With group_offload as without; the blocks' weights are brought as they are called."""
    lines = {"base__mixed_precision": "bf16", "base__gradient_checkpointing": True}
    drawn_by = []

    def run():
        for offloaded in (False, True):
            brought, own = [], offload.brought
            offload.brought = lambda held, *given, own=own, brought=brought, **more: (
                brought.append(held) or own(held, *given, **more)
            )
            cfg = command_line.parse(
                command(tmp_path, built("FluxPipeline"), tmp_path, lora__group_offload=offloaded, **lines)
            )[1]
            accelerator = Accelerator(cpu=True, mixed_precision="bf16")
            models = prior.untouched(lora.task, lora.task.prior.settings(cfg), accelerator, lora.encoders(cfg))
            own_cfg, rng = lora.task.prior.settings(cfg), prior.keys(range(2), accelerator)
            drawn_by.append(placement.draw(lora.task, models, {}, {}, lambda *_: (), rng, accelerator, own_cfg)["samples"])
            assert bool(brought) == offloaded
            offload.brought = own
        assert torch.equal(*drawn_by) and drawn_by[0].std() > 0

    in_fork(tmp_path, run)


def test_a_folder_of_something_else_is_refused(tmp_path, built, photos, filled):
    """In a line that says what differs and which flag to change; nothing is touched."""
    before, model = images(filled()), built("sd")
    for more, says in (
        ({"data__class_prompt": "a cat"}, ["prompt was 'a photo of a dog' and is now 'a cat'", "--data.class-data-dir"]),
        (
            {"data__num_class_images": 9, "lora__num_inference_steps": 3},
            ["lacks 3 images", "num_inference_steps was 2 and is now 3"],
        ),
        ({"data__num_class_images": 9, "data__resolution": 64}, ["height was 32 and is now 64; width was"]),
        ({"data__num_class_images": 9, "lora__negative_prompt": "blurry"}, ["negative_prompt was None and is now 'blurry'"]),
        ({"lora__prediction_type": "v_prediction"}, ["model was 'sd, files "]),
    ):
        refused(cli(tmp_path, *command(tmp_path, model, photos, **more)), *says, "--data.num-class-images 0")
    other = shutil.copytree(model, tmp_path / "sd")
    unet = next((other / "unet").glob("*.safetensors"))
    unet.write_bytes(unet.read_bytes()[:-1] + b"\1")
    refused(cli(tmp_path, *command(tmp_path, other, photos)), "something else: model was 'sd, files ")
    assert images(tmp_path / "class") == before and not (tmp_path / "out").exists()
    same, remark = asked(tmp_path, model, lora__num_inference_steps=3)
    assert not same and remark == "class images are as they were drawn: num_inference_steps was 2 and is now 3"
    for more in ({"base__seed": 7}, {"data__num_class_images": 4}, {"task": "finetune"}):
        assert asked(tmp_path, model, **more) == ([], None)


def test_what_else_is_in_the_folder(tmp_path, built, filled):
    """Its owner's images count; damaged ones are drawn anew; what is named as a drawn one and is none is refused."""
    folder, model = filled(), built("sd")
    whole = (folder / "drawn-00003.png").read_bytes()
    for content in (whole[:-20], whole[:10], b"", whole[:-40] + b"\0" * 40):
        (folder / "drawn-00003.png").write_bytes(content)
        assert asked(tmp_path, model) == ([3], None)
    for image, options in ((Image.new("RGB", (8, 8)), {}), (Image.open(folder / "drawn-00002.png"), {})):
        image.save(folder / "drawn-00003.png", **options)
        with pytest.raises(BadInput, match=r"drawn-00003.png is named as a drawn image, and does not say of what; rename"):
            asked(tmp_path, model)
    shutil.copy(folder / "drawn-00002.png", folder / "drawn-00003.png")
    with pytest.raises(BadInput, match=r"drawn-00003.png is named as a drawn image"):
        asked(tmp_path, model)
    (folder / "drawn-00003.png").write_bytes(whole)
    (folder / "mine").mkdir()
    for name in ("mine/a.png", "drawn-3.png", "drawn-000003.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    assert asked(tmp_path, model, data__num_class_images=10) == ([6], None)
    assert asked(tmp_path, model, data__num_class_images=3) == ([], None)
    (folder / "metadata.jsonl").write_text("{}")
    assert asked(tmp_path, model, data__num_class_images=9) == ([], None)
    with pytest.raises(BadInput, match=r"images that are drawn into it would have no row in metadata.jsonl"):
        asked(tmp_path, model, data__num_class_images=10)
    (folder / "drawn-00001.png").chmod(0)
    if os.geteuid():
        with pytest.raises(BadInput, match=r"drawn-00001.png cannot be read: Permission denied"):
            asked(tmp_path, model)


def test_a_run_takes_as_many_as_it_asks_for(tmp_path, filled, photos):
    """Its owner's and the first drawn ones: a folder may hold more, for other runs."""
    folder = filled()
    Image.new("RGB", (SIDE, SIDE)).save(folder / "a.png")
    data = functools.partial(Data, train_data_dir=str(photos), class_data_dir=str(folder), class_prompt=PROMPT, resolution=SIDE)
    for count, rows in ((0, 7), (3, 3), (7, 7), (1, 1)):
        source = sources.open_source(data(num_class_images=count, train_batch_size=2))
        names = [source.name(row) for row in range(3, source.size)]
        assert names == ["a.png", *(drawn.name_of(n) for n in range(rows - 1))], count
        assert source.pass_length() == 6


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"class_data_dir": None}, "--data.class-data-dir is None; expected a folder with --data.num-class-images"),
        ({"class_prompt": None}, "--data.class-prompt is None; expected what to draw with --data.num-class-images"),
        ({"class_prompt": ""}, "--data.class-prompt is ''; expected what to draw"),
        ({"class_prompt": "a {label}"}, "--data.class-prompt is 'a {label}'; expected what to draw"),
        ({"num_class_images": -1}, "--data.num-class-images is -1; expected at least 0 and at most 1,000,000"),
        ({"num_class_images": 10**7}, "--data.num-class-images is 10000000; expected at least 0"),
    ],
)
def test_settings_that_do_not_fit(settings, says):
    with pytest.raises(BadInput) as error:
        Data(**{"class_data_dir": "class", "class_prompt": PROMPT, "num_class_images": 6} | settings)
    assert says in str(error.value)


def test_folders_and_tasks_that_do_not_fit(tmp_path, built, photos):
    """Before anything is drawn: mistakes of the data and of the model too."""
    model = built("sd")
    for more, says in (
        ({"data__train_data_dir": tmp_path / "class" / "dog"}, "images that are drawn into one would be found in the other"),
        (
            {"data__train_data_dir": tmp_path},
            f"--data.class-data-dir {tmp_path}/class and --data.train-data-dir {tmp_path}: images",
        ),
        ({"data__class_data_dir": tmp_path / "out"}, "and --base.output-dir"),
        ({"data__train_data_dir": tmp_path / "nothing"}, "there is no such folder; expected a folder of images"),
        ({"data__mask_data_dir": photos}, "have no partner"),
        ({"lora__target_modules": "nothing"}, "--lora.target-modules"),
        ({"task": "finetune", "finetune__from_scratch": True}, "--finetune.from-scratch with --data.num-class-images"),
    ):
        refused(cli(tmp_path, *command(tmp_path, model, photos, **more), patch=unused), says)
    more = {"data__class_data_dir": tmp_path / "class", "data__class_prompt": PROMPT, "data__num_class_images": 2}
    refused(cli(tmp_path, *tiny(tmp_path, **more)), "--data.num-class-images is 2; expected 0: ddpm draws no class images")
    (tmp_path / "class").write_text("")
    refused(cli(tmp_path, *command(tmp_path, model, photos)), "--data.class-data-dir", "the path of a folder")
    assert not (tmp_path / "out").exists()


def test_checks_and_estimates_draw_nothing(tmp_path, built, photos, filled):
    """And say what a run would; an estimate counts the class images' half of a pass."""
    line = functools.partial(command, tmp_path, built("sd"), photos, data__num_class_images=8)
    said = fine(cli(tmp_path, *line(base__check=True), patch=unused)).out
    assert f"class images: 8 of 8 would be drawn into {tmp_path}/class first" in said and "images      3 can be read" in said
    more = {"base__dry_run": True, "base__max_train_steps": None, "base__num_epochs": 2}
    done = fine(cli(tmp_path, *line(**more), patch=unused))
    assert "class images: 8 of 8 would be drawn" in done.out and "6 steps" in done.out, done.out
    assert not (tmp_path / "class").exists()
    filled()
    said = fine(cli(tmp_path, *line(base__check=True), patch=unused)).out
    assert "class images: 2 of 8 would be drawn" in said and "images      9 can be read" in said
    said = fine(cli(tmp_path, *line(base__check=True, data__num_class_images=6), patch=unused)).out
    assert "would be drawn" not in said and "images      9 can be read" in said


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_half_of_the_official_one(built, name):
    """train_dreambooth.py: a batch of instance images and as many class images, cut in two: loss + weight * prior_loss.
    The mean over all of them is half of that, and AdamW's steps do not depend on such a factor."""
    s = finetune.Settings(pretrained_model_name_or_path=str(built(name)))
    data = Data(train_data_dir="unused", resolution=SIDE, train_batch_size=4)
    cfg = finetune.Config(Base(output_dir="unused"), data, s)
    models, rng = finetune.make_models(cfg), Rng.of(0, range(4))
    sizes = {key: torch.tensor([[SIDE, SIDE]] * 4) for key in ("original_size", "target_size")}
    batch = sizes | {"crop_top_left": torch.zeros(4, 2, dtype=torch.long), "weight": torch.tensor([1.0, 1.0, 0.3, 0.3])}
    with torch.no_grad():
        x = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        batch |= text_to_image.encode_images(models, x, cfg)
        batch |= text_to_image.encode_captions(models, ["sks dog", "sks dog", PROMPT, PROMPT], cfg)
        (ours,) = finetune.loss_fn(models, batch, rng, cfg)
        error = objective.objective(models, {k: v for k, v in batch.items() if k != "weight"}, rng, cfg).float()
        instance, prior_part = torch.chunk(error, 2)
    official = instance.mean() + 0.3 * prior_part.mean()
    assert ours.value.item() == pytest.approx(official.item() / 2, rel=1e-5)
