"""Conditions that a pretrained model makes of an image (`--data.conditioning depth` or `pose`, `--data.conditioning-model`): by
any model of transformers for depth estimation, or by VitPose (poses.py).

An annotator is known by its kind and by the content of its model's files, wherever these lie: that is in the name of what is
cached. It is called once for each image, in float32, on the GPU where there is one.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from oneloop.configs import BadInput, Data, require
from oneloop.families import hub
from oneloop.inputs import poses
from oneloop.machine import memory

FLAG = "--data.conditioning-model"
KINDS = {"depth": "ForDepthEstimation", "pose": "ForPoseEstimation"}
"""Kind -> what the class of its model ends in."""
METRIC = ("zoedepth", "glpn", "depth_pro")
"""Types of models that give distances, rather than their inverse, whose configs do not say so."""
READ, WEIGHTS = ("config.json", "preprocessor_config.json"), (".safetensors", ".bin")
"""The files of a model that decide what it makes."""
LOCK = threading.Lock()
"""Images are decoded by several threads; a model is called by one at a time."""


@dataclass(frozen=True)
class Annotator:
    """What makes a condition of an image: [3, h, w] uint8 -> the same."""

    kind: str
    identity: str
    """Of its model's files."""
    model: str = field(repr=False)
    """Its folder, or its name on the hub."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.model}"

    def __call__(self, x: Tensor) -> Tensor:
        """The condition of an image [3, h, w] uint8.

        Raises:
            ValueError: the model makes none. torch.OutOfMemoryError: the memory does not suffice, whatever the image.
        """
        image = Image.fromarray(x.permute(1, 2, 0).numpy())
        with LOCK, torch.inference_mode(), torch.autocast("cuda", enabled=False):
            try:
                return MAKE[self.kind](*self.load(), image).clone()
            except (RuntimeError, MemoryError, TypeError, ValueError, AttributeError) as error:
                said = f"{self}: {' '.join(str(error).split())[:200]}"
                if memory.is_out_of_memory(error):
                    raise torch.OutOfMemoryError(f"out of memory: {said}") from None
                raise ValueError(said) from None  # whatever is wrong with someone's model

    def load(self) -> tuple[Any, Any]:
        """Its model and what prepares images for that, held until `forget`.

        Raises:
            BadInput: they cannot be loaded.
        """
        return _loaded(self.kind, self.model)

    def check_kept(self, cfg: Data, size: int) -> None:
        """Refuse images whose conditions, since they take more than `size` bytes, would be made anew for each batch."""
        budget, needed = cfg.memory_budget, size / 2**30
        once = f"at least {needed:.3g}: {self.kind} is made once for each image, and kept with it decoded"
        require(needed <= budget, "data.memory_budget", budget, once)


def named(kind: str, model: str) -> Annotator:
    """The annotator of this model, whose weights are not read as a whole.

    Raises:
        BadInput: there is no such model, or it is one for something else.
    """
    what, expected = f"{FLAG} {model}", f"a folder that save_pretrained wrote, or a name on the hub, of a model {KINDS[kind]}"
    with hub.readable(what, f"a model for --data.conditioning {kind}", expected):
        made = _class_of(model)
        if not made.endswith(KINDS[kind]):
            raise BadInput(f"{what} is a {made}; --data.conditioning {kind} expects a model whose class ends in {KINDS[kind]}")
        files = hub.stamp(model, None, "") if hub.is_local(model) else [hub.file(model, None, "config.json").parent.name]
    if hub.is_local(model):
        files = [(name, size, blocks) for name, size, _, blocks in files if name in READ or name.endswith(WEIGHTS)]
    known = repr(files).encode()
    return Annotator(kind, hashlib.blake2b(known, digest_size=8).hexdigest(), model)


def _class_of(model: str) -> str:
    return str((hub.read(model, None, "config.json").get("architectures") or ["model of no class"])[0])


@functools.cache
def _loaded(kind: str, model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    local, what = hub.is_local(model), f"{FLAG} {model}"
    net = hub.load("transformers", _class_of(model), model, what).float().eval().requires_grad_(False)
    where = Path(model).expanduser() if local else model
    try:
        with hub.readable(what, "a model with an image processor", "its preprocessor_config.json beside its config.json"):
            offline = not local and hub.unreachable() is not None
            processor = AutoImageProcessor.from_pretrained(where, local_files_only=offline)
    except ImportError as error:
        raise BadInput(f"{what}: {' '.join(str(error).split())[:200]}") from None
    return net.to("cuda" if torch.cuda.is_available() else "cpu"), processor


forget: Callable[[], None] = _loaded.cache_clear
"""Let go of all models."""


# ---------------------------------------------------------------------------------------------------------------------
# Depth.


def depth(net: Any, processor: Any, image: Image.Image) -> Tensor:
    """What is near is white, scaled to the image's own extremes, as of the MiDaS that the published ControlNets for depth were
    trained on: the inverse of the distance up to a scale and a shift, [3, h, w]."""
    size = (image.height, image.width)
    made = net(**processor(images=image, return_tensors="pt").to(net.device))
    if finish := getattr(processor, "post_process_depth_estimation", None):
        known = inspect.signature(finish).parameters
        told = {name: [size] for name in ("target_sizes", "source_sizes") if name in known}
        found = finish(made, **told)[0]["predicted_depth"]
    else:
        found = F.interpolate(made.predicted_depth[:, None], size, mode="bicubic", align_corners=False)[0, 0]
    found = found.float().cpu().view(size)
    if net.config.model_type in METRIC or getattr(net.config, "depth_estimation_type", None) == "metric":
        found = 1 / found.clamp(min=1e-3)  # in metres
    low, high = found.aminmax()
    return ((found - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8).expand(3, -1, -1)


MAKE: dict[str, Callable[..., Tensor]] = {"depth": depth, "pose": poses.pose}
"""Kind -> (model, processor, image) -> the condition."""
