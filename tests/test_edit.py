"""Editing: the widened model, what the loss is of, dropout, runs, exports, bad input; InstructPix2Pix of both kinds."""

import functools
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_lora_families import in_fork
from warm import brief, cli, cli_many, digest, distance, flags

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import edit, edit_samples, stable_diffusion, text_to_image
from oneloop.settings import command_line
from oneloop.tasks import Rng
from oneloop.tasks import edit as task
from oneloop.tasks import finetune

SIDE = 32
CAPTIONS = ("a red circle", "a large dog", "a small square")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three captioned images of 80 x 70, and their sources."""
    folder, noise = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for part in ("after", "before"):
        (folder / part).mkdir()
        for i, caption in enumerate(CAPTIONS):
            small = noise.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            Image.fromarray(small).resize((80, 70), Image.BICUBIC).save(folder / part / f"{i}.png")
            (folder / "after" / f"{i}.txt").write_text(caption)
    return folder


def config(model, **settings):
    base = Base(output_dir="unused", logger=("none",))
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2)
    made = task.Settings(pretrained_model_name_or_path=str(model), **{"num_inference_steps": 2} | settings)
    return task.Config(base, sizes, made)


def command(folder, model, pairs, out="out", **more):
    """A command line for two steps of `edit`."""
    settings = brief(folder, out, pairs / "after", SIDE) | {
        "base.ema_power": 0,
        "data.conditioning_data_dir": pairs / "before",
        "edit.pretrained_model_name_or_path": model,
        "edit.learning_rate": 1e-3,
        "edit.num_inference_steps": 2,
    }
    return flags("edit", settings | {name.replace("__", "."): value for name, value in more.items()})


def test_try(tmp_path, built, pairs):
    def run():
        loop.run(task.task, command_line.parse(command(tmp_path, built("sd"), pairs))[1])
    r = in_fork(tmp_path, run)
    print(r.out, r.err)
    print((tmp_path/"out"/"export"/"load.py").read_text())
    shutil.copytree(tmp_path/"out", "/work/tmp/edit/out", dirs_exist_ok=True)
