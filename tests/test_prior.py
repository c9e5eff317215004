"""Class images: drawn by the model as it was, the same however they are drawn, never mixed with others, kept and used again."""

import errno
import functools
import gc
import os
import shutil
import signal
import time
import types
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_lora_families import SIDE, in_fork, photos  # noqa: F401  a fixture
from warm import cli, cli_many, digest, flags, start, start_many, tiny

from oneloop.configs import BadInput, Base, Data
from oneloop.families import objective, offload, text_to_image
from oneloop.inputs import drawn, sources
from oneloop.machine import placement
from oneloop.settings import command_line
from oneloop.tasks import Rng, finetune, lora
from oneloop.training import prior

NAMES = ("sd", "sdxl", "FluxPipeline", "QwenImagePipeline")
TASKS = {"QwenImagePipeline": "finetune"}
PROMPT = "a photo of a dog"
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need."""

    @functools.cache
    def make(name):
        base, data = Base(output_dir="unused"), Data(train_data_dir="unused", resolution=SIDE)
        lora.make_models(lora.Config(base, data, lora.Settings(pretrained_model_name_or_path=str(built(name)), rank=2)))
        return built(name)

    return make


def command(folder, model, photos, out="out", task="lora", **more):  # noqa: F811
    """A command line for two steps, after six class images."""
    settings = {
        "base.output_dir": folder / out,
        "base.max_train_steps": 2,
        "base.num_samples": 1,
        "base.logger": "none",
        "base.validation_steps": 0,
        "base.lr_scheduler": "constant",
        "data.train_data_dir": photos,
        "data.class_data_dir": folder / "class",
        "data.class_prompt": PROMPT,
        "data.num_class_images": 6,
        "data.resolution": SIDE,
        "data.train_batch_size": 2,
        f"{task}.pretrained_model_name_or_path": model,
        f"{task}.num_inference_steps": 2,
    } | ({"lora.rank": 2} if task == "lora" else {})
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    return flags(task, {name: value for name, value in settings.items() if value is not None})


def images(folder):
    """Name -> bytes of the images of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def fine(result):
    assert result.code == 0 and "no samples" not in result.err, result.err
    return result


def refused(result, *says):
    """Exit code 2 and one line."""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and "Traceback" not in result.err and len(lines) == 1, result.err
    assert all(text in lines[0] for text in says), lines[0]


def ends_when_drawn():
    """The run ends before it trains."""
    own = prior.draw

    def draw(*given):
        own(*given)
        raise SystemExit

    prior.draw = draw


def ends_without_models():
    """The same; of the models that drew none is left then, nor of text encoders where the others are loaded."""
    own, load, before = prior.draw, text_to_image.load, set()
    models = lambda: {id(x) for x in gc.get_objects() if type(x) is torch.nn.Parameter and not x.is_meta}  # noqa: E731

    def draw(*given):
        gc.collect()
        before.update(models())
        own(*given)
        assert models() <= before
        raise SystemExit

    def loading(*given):
        assert models() <= before
        return load(*given)

    prior.draw, text_to_image.load = draw, loading


def on_a_machine_of_its_own():
    """A process that shares no disk with the others."""
    own, rank = prior.asked, os.environ["RANK"]
    prior.asked = lambda *given: replace((wanted := own(*given)), folder=wanted.folder / rank)
    prior.socket = types.SimpleNamespace(gethostname=lambda: rank)
    ends_when_drawn()


def unused():
    """Nothing may be drawn: for a fork in which class images are there already."""
    prior.untouched = prior.fill = lambda *_: 1 / 0


@pytest.fixture(scope="module")
def ready(built, photos, tmp_path_factory):  # noqa: F811
    """name -> a folder with the class images of a checkpoint, and the digest of the run that drew them; each made once, of
    Qwen-Image by `finetune`."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("ready")
        fine(cli(folder, *command(folder, built(name), photos, task=TASKS.get(name, "lora"))))
        return folder / "class", digest(folder / "out")

    return make


@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_the_pipeline_draws_on_one_process_and_on_two(tmp_path, built, photos, ready, name):  # noqa: F811
    """Of the checkpoint as it is on the disk, whatever the task, the batch size and the seed."""
    line = functools.partial(command, tmp_path, built(name), photos, data__train_batch_size=1, base__seed=3)
    one = images(ready(name)[0])
    assert list(one) == [f"drawn-0000{n}.png" for n in range(6)] and len(set(one.values())) == 6

    def compare():
        pipe = diffusers.DiffusionPipeline.from_pretrained(built(name))
        s = command_line.parse(line())[1].lora
        call = text_to_image.family(s).arguments(s, SIDE, SIDE)
        call |= {key: [x] * 4 for key, x in call.items() if key == "negative_prompt"}
        generators = Rng.of(0, range(4), "class").generators("sample")
        theirs = pipe(prompt=[PROMPT] * 4, generator=generators, output_type="np", **call).images
        for n, image in enumerate(theirs):
            ours = np.asarray(Image.open(ready(name)[0] / f"drawn-0000{n}.png")).astype(float)
            assert np.abs(ours - 255 * image).max() < 0.51

    in_fork(tmp_path, compare)
    patches = {"sdxl": on_a_machine_of_its_own, "FluxPipeline": ends_without_models}
    for result in cli_many(tmp_path, 2, *line("two"), patch=patches.get(name, ends_when_drawn)):
        fine(result)
    folders = [tmp_path / "class" / rank for rank in "01"] if name == "sdxl" else [tmp_path / "class"]
    assert all(images(folder) == one for folder in folders)


@pytest.fixture
def filled(tmp_path, ready):
    """name -> a test's own copy of them."""
    return lambda name="sd": shutil.copytree(ready(name)[0], tmp_path / "class") and tmp_path / "class"


def asked(folder, model, **more):
    """What a run would draw, as it finds out itself."""
    cfg = command_line.parse(command(folder, model, folder / "photos", **more))[1]
    return drawn.look(prior.asked(finetune.task if "task" in more else lora.task, cfg))


@pytest.mark.parametrize("name", ["sd", "QwenImagePipeline"])
def test_killed_while_they_are_drawn(tmp_path, built, photos, ready, name):  # noqa: F811
    """Between two images and inside one; what was there is not drawn again, and the run ends in the same bits."""
    line, count = command(tmp_path, built(name), photos, task=TASKS.get(name, "lora")), iter(range(100))

    def die():
        own = os.replace

        def replace(one, other):
            if "drawn-" in str(other) and next(count) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            own(one, other)

        os.replace = replace

    def only_what_is_missing():
        write = drawn.write
        drawn.write = lambda wanted, n, image: write(wanted, n, image) if n > 1 else 1 / 0

    assert cli(tmp_path, *line, patch=die).code == -signal.SIGKILL
    assert list(images(tmp_path / "class")) == ["drawn-00000.png", "drawn-00001.png"]
    assert list((tmp_path / "class" / ".oneloop").glob("drawn-00002.png.*"))
    fine(cli(tmp_path, *line, patch=only_what_is_missing))
    folder, whole = ready(name)
    assert images(tmp_path / "class") == images(folder) and digest(tmp_path / "out") == whole
    assert not (tmp_path / "class" / ".oneloop").exists()


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


def slow():
    """An image takes a while."""
    own = drawn.write
    drawn.write = lambda *given: (own(*given), time.sleep(0.5))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_they_are_drawn(tmp_path, built, photos, ready, processes):  # noqa: F811
    """It leaves at once, with its code, and what was drawn stays."""
    line = command(tmp_path, built("sd"), photos, data__num_class_images=40)
    runs = start_many(tmp_path, 2, *line, patch=slow) if processes == 2 else [start(tmp_path, *line, patch=slow)]
    deadline = time.monotonic() + 60
    while len(images(tmp_path / "class")) < 2 * processes:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    for run in runs:
        os.kill(run.pid, signal.SIGINT)
    done = [run.wait(30) for run in runs]
    assert time.monotonic() - began < 10 and not (tmp_path / "out").exists()
    assert all(result.code == 130 and "Traceback" not in result.err for result in done), done[0].err
    there = images(tmp_path / "class")
    same = images(ready("sd")[0])
    assert len(there) < 40 and all(there[name] == same[name] for name in there.keys() & same.keys())
    assert len(asked(tmp_path, built("sd"), data__num_class_images=40)[0]) == 40 - len(there)


def test_two_runs_that_draw_into_one_folder(tmp_path, built, photos, ready):  # noqa: F811
    """The second waits, finds what the first drew and loads no model for it; another prompt's is refused then."""
    line = functools.partial(command, tmp_path, built("sd"), photos)
    first = start(tmp_path, *line("one"), patch=slow)
    while not images(tmp_path / "class"):
        time.sleep(0.05)
    second, third = start(tmp_path, *line("two"), patch=unused), start(tmp_path, *line("three", data__class_prompt="a cat"))
    fine(first.wait())
    done = fine(second.wait())
    assert f"waiting for process {first.pid} on" in done.err and "drawing" not in done.err
    refused(third.wait(), "prompt was 'a photo of a dog' and is now 'a cat'")
    assert images(tmp_path / "class") == images(ready("sd")[0])


def test_a_full_disk_while_they_are_drawn(tmp_path, built, photos, ready):  # noqa: F811
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


def test_a_folder_of_something_else_is_refused(tmp_path, built, photos, filled):  # noqa: F811
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


def test_a_run_takes_as_many_as_it_asks_for(tmp_path, filled, photos):  # noqa: F811
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


def test_folders_and_tasks_that_do_not_fit(tmp_path, built, photos):  # noqa: F811
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


def test_checks_and_estimates_draw_nothing(tmp_path, built, photos, filled):  # noqa: F811
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
