"""Samples of a model from scratch, by any scheduler of diffusers; an export's load.py draws with this very code."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oneloop.families.classes import Classes, in_turn
from oneloop.tasks import Rng

if TYPE_CHECKING:
    from torch import Tensor, nn


def guided(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, null: int, scale: float) -> Tensor:
    """What the model answers to x [N, C, H, W] at t, for these labels [N] or for none: u + scale (c - u), where it answers c to
    the labels and u to `null` (Ho and Salimans 2022, arXiv:2207.12598, eq. 6, whose w is scale - 1)."""
    import torch

    t = t.to(x.device).expand(len(x))
    if labels is None or scale == 1:
        given = {} if labels is None else {"class_labels": labels}
        return model(x, t, **given, return_dict=False)[0].float()
    labels = torch.cat([labels, torch.full_like(labels, null)])
    c, u = model(torch.cat([x, x]), torch.cat([t, t]), class_labels=labels, return_dict=False)[0].float().chunk(2)
    return u + scale * (c - u)


def draw(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    steps: int,
    labels: Tensor | None = None,
    null: int = 0,
    guidance_scale: float = 1.0,
    generator: Any = None,
) -> Tensor:
    """What the scheduler makes of standard normal noise [N, C, H, W] in so many steps; `generator`, or one for each sample,
    draws what noise it adds."""
    import torch

    scheduler.set_timesteps(steps)
    x, scaled = noise * getattr(scheduler, "init_noise_sigma", 1.0), getattr(scheduler, "scale_model_input", lambda x, t: x)
    takes = {"generator": generator} if generator is not None else {}
    for t in scheduler.timesteps:
        with torch.no_grad():
            answer = guided(model, scaled(x, t), t, labels, null, guidance_scale)
        x = scheduler.step(answer, t, x, **takes).prev_sample
    return x


def samples(model: nn.Module, scheduler: Any, rng: Rng, shape: Sequence[int], steps: int, s: Classes) -> Tensor:
    """Samples [N, *shape] of the keys, of the classes in turn where the settings have classes."""
    noise, labels = rng.normal("start", *shape), in_turn(rng, s)
    return draw(model, scheduler, noise, steps, labels, s.num_classes or 0, s.guidance_scale, rng.generators("sample"))


def arguments(shape: Sequence[int], steps: int, s: Classes) -> str:
    """What load.py calls `draw` with after a model and a scheduler: a sample of each class, or one."""
    noise = f"torch.randn({', '.join(map(str, (s.num_classes or 1, *shape)))})"
    given = f", torch.arange({s.num_classes}), null={s.num_classes}, guidance_scale={s.guidance_scale}"
    return f"{noise}, {steps}{given if s.class_conditional else ''}"


def lines(kinds: dict[str, str], call: str, decoded: str = "x / 2 + 0.5") -> str:
    """The lines of a load.py, for `str.format`: the parts of the export by their classes, `name` -> class, in folders of these
    names beside each other; the code above; `x = draw(...)` with the arguments `call`; and what makes images [N, 3, H, W] in
    [0, 1] of x."""
    parts = "".join(f'{name} = {kind}.from_pretrained({{path}} + "/{name}")\n' for name, kind in kinds.items())
    code = "\n\n".join(inspect.getsource(function) for function in (guided, draw)).replace("{", "{{").replace("}", "}}")
    return (
        "from typing import Any\n\nimport torch\n"
        f"from diffusers import {', '.join(sorted(kinds.values()))}\n"
        "from torch import Tensor, nn\nfrom torchvision.utils import save_image\n\n"
        f"{parts}\n\n{code}\n\nx = draw({call})\nsave_image(({decoded}).clamp(0, 1), 'sample.png')"
    )
