"""One thread, nothing from the network, and the project on the path: then the tests are repeatable and may fork."""

import os
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
for name in ("WANDB_API_KEY", "HF_TOKEN", "WANDB_MODE"):
    os.environ.pop(name, None)
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import accelerate  # noqa: F401
import diffusers  # noqa: F401
import torch
import torchvision  # noqa: F401
from diffusers import DDPMPipeline, UNet2DModel  # noqa: F401
from diffusers.optimization import get_scheduler  # noqa: F401

torch.set_num_threads(1)

import device

device.computes_bf16 = lambda: False  # float32 where a test does not ask for bf16, so that its figures hold on every processor
