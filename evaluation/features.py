"""Where features come from: a classifier trained here, or a model of torchvision, transformers or diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oneloop.tasks import hash64

STEPS, BATCH, RATE, WIDTH = 500, 64, 3e-3, 64
"""Of the classifier's training: some 10 s of a CPU with images of 16x16, whatever their number."""


@dataclass(frozen=True)
class Features:
    """A judge: what makes features of images."""

    name: str
    """What it is, in a line: two results may be compared where this is the same."""
    of: Callable[[Tensor], Tensor]
    """Images [B, 3, H, W] uint8 -> features [B, D]."""
    text: Callable[[list[str]], Tensor] | None = None
    """Texts -> features [B, D] of the same space, where the model has some."""
    angles: bool = False
    """Whether how alike two images are is the cosine of their features: of models that others trained."""

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.of(part).float().flatten(1).cpu() for part in images.split(64)])

    def texts(self, texts: list[str]) -> Tensor:
        """Features of texts, [B, D], each made once."""
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        each = list(place)
        with torch.no_grad():
            made = torch.cat([self.text(each[i : i + 64]).float().cpu() for i in range(0, len(each), 64)])
        return made[[place[text] for text in texts]]


def network(classes: int) -> nn.Sequential:
    """Three stages of convolutions, the mean over the image, which is the features, [B, WIDTH], and a linear layer on them."""
    block = lambda a, b, stride: [nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU()]  # noqa: E731
    body = [*block(3, 16, 1), *block(16, 32, 2), *block(32, WIDTH, 2), *block(WIDTH, WIDTH, 1)]
    return nn.Sequential(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(WIDTH, classes))


def scaled(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_classifier(images: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor] | None, cache: Path) -> Features:
    """A classifier of these images [N, 3, H, W] uint8 with labels [N], and the share of held-out ones that it names right.

    It is a function of the images and labels alone: its seed and length are fixed, and what is in `cache` for the same images
    is taken from there.
    """
    known, classes = hash64(images.numpy().tobytes(), labels.tolist(), STEPS), int(labels.max()) + 1
    path = cache / f"classifier-{known:016x}.safetensors"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = network(classes)
        if path.is_file():
            model.load_state_dict(load_file(path))
        else:
            _fit(model, images, labels)
            cache.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), staged := path.with_suffix(".writing"))
            staged.rename(path)
    model.eval()
    said = ""
    if held_out is not None:
        with torch.no_grad():
            right = [(model(scaled(x)).argmax(1) == y).float() for x, y in zip(*(z.split(64) for z in held_out), strict=True)]
        said = f", {torch.cat(right).mean():.1%} of {len(held_out[1])} held-out images right"
    return Features(f"classifier of {classes} classes ({known:016x}{said})", lambda x: model[0](scaled(x)))


def _fit(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optim = torch.optim.AdamW(model.parameters(), RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optim, RATE, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(scaled(images[rows])), labels[rows])
        loss.backward()
        optim.step()
        optim.zero_grad()
        rates.step()
