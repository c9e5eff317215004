"""One thread, nothing from the network, this checkout as the package `oneloop`: then tests are repeatable and may fork."""

import atexit
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has asked for a GPU cannot fork; tests/gpu.py is a process of its own
for name in ("WANDB_API_KEY", "HF_TOKEN", "WANDB_MODE"):
    os.environ.pop(name, None)
packages = tempfile.mkdtemp()  # holds the package under its name, for the processes that tests start too
atexit.register(shutil.rmtree, packages, ignore_errors=True)
Path(packages, "oneloop").symlink_to(Path(__file__).parent.parent)
sys.path[:0] = [packages, str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = packages

import accelerate  # noqa: F401
import diffusers  # noqa: F401
import pytest
import tiny_families
import tiny_models
import torch
import torchvision  # noqa: F401
from diffusers import DDPMPipeline, UNet2DModel  # noqa: F401
from diffusers.optimization import get_scheduler  # noqa: F401

torch.set_num_threads(1)

from oneloop.machine import accelerator

accelerator.computes_bf16 = lambda: False  # float32 where a test does not ask for bf16, so that its figures hold everywhere


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A pipeline's class, or a kind of Stable Diffusion (sd, sd2, sdxl) -> a tiny checkpoint's folder, each made once."""
    folder = tmp_path_factory.mktemp("models")
    make = lambda name: tiny_models.build(folder, name) if name.startswith("sd") else tiny_families.build(name, folder)  # noqa: E731
    return functools.cache(make)
