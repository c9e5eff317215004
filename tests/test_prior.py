"""Class images: drawn by the model as it was, the same however they are drawn, never mixed with others, kept and used again."""

import functools
import gc
import os
import signal
import time
import types
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_lora_families import SIDE, in_fork, photos  # noqa: F401  a fixture
from warm import brief, cli, cli_many, digest, flags, start, start_many

from oneloop.configs import Base, Data
from oneloop.families import text_to_image
from oneloop.inputs import drawn
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
    settings = (
        brief(folder, out, photos, SIDE)
        | {
            "data.class_data_dir": folder / "class",
            "data.class_prompt": PROMPT,
            "data.num_class_images": 6,
            f"{task}.pretrained_model_name_or_path": model,
            f"{task}.num_inference_steps": 2,
        }
        | ({"lora.rank": 2} if task == "lora" else {})
    )
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
