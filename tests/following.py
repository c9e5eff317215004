"""A toy like consistency training (Song et al. 2023, arXiv:2303.01469, algorithm 3): its loss sees a target, the EMA of what
trains. With it come a state of its own, two losses in one step, and a metric that some batches alone have."""

from dataclasses import dataclass, field

import torch

from oneloop.configs import Base, Data
from oneloop.tasks import Follow, Loss, Task


@dataclass(frozen=True)
class Settings:
    """The toy."""

    moving: bool = False
    """With what the layout of a run changes: batch norm, and a state that counts batches."""
    twice: bool = False
    """Two losses share a step."""
    ahead: bool = False
    """Call the model for both before the first is yielded, which is a mistake."""
    alone: bool = False
    """Log `late`, for every second batch of two examples, which of two processes is the second's."""


@dataclass(frozen=True)
class Config:
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    following: Settings = field(default_factory=Settings)


class Net(torch.nn.Module):
    """x [B, 3, H, W] and a noise level t [B] to [B, 3, H, W]."""

    def __init__(self, moving):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(3) if moving else torch.nn.Identity()

    def forward(self, x, t):
        t = t[:, None, None, None]
        return x * (1 - t) + t * self.norm(self.conv(x))


class Seen(torch.nn.Module):
    """State that is not trained: the mean error so far, and of how many batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))


def decay(step, total):
    return 0.9 - 0.5 * step / total


def loss_fn(models, batch, rng, cfg):
    x, t, seen = batch["pixel_values"], 0.8 * rng.uniform("timestep"), models["seen"]
    noise = rng.normal("noise", *x.shape[1:])
    near, far = (x + level[:, None, None, None] * noise for level in (t, t + 0.1))
    goal = models["target"](near, t)
    assert not goal.requires_grad and not models["target"].training
    error = (models["net"](far, t + 0.1) - goal).square().mean() * (1 + seen.mean)
    second = lambda: 0.1 * models["net"](near, t).square().mean()  # noqa: E731
    early = second() if cfg.following.ahead else None
    logs = {"late": float(batch["n"][0])} if cfg.following.alone and batch["n"][0] % 4 >= 2 else {}
    yield Loss("net", error, logs, step=not cfg.following.twice)
    if cfg.following.moving:  # without regard to the phase: what a pass moves beside the training, it puts back
        seen.count += 1
        seen.mean += (error.detach() - seen.mean) / seen.count
    if cfg.following.twice:
        yield Loss("net", second() if early is None else early)


task = Task(
    config=Config,
    make_models=lambda cfg: {"net": Net(cfg.following.moving), "seen": Seen()},
    make_optim=lambda models, cfg: {"net": torch.optim.AdamW(models["net"].parameters(), 0.05)},
    loss_fn=loss_fn,
    sample_fn=lambda models, examples, rng, cfg: {},
    export_fn=lambda models, examples, path, cfg: "load",
    follows={"target": Follow(of="net", decay=decay)},
    keeps=("seen",),
)
