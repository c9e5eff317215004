"""On which GPUs a run fits, and what would make it fit: computed from the tensors of a step, so that no GPU need be there.

Weights, gradients, optimizer and EMA are counted; of activations what the backward pass keeps (families/footprint.py), at two
bytes a number in bf16. SPARE GiB of a card are left to CUDA, to what lasts a moment and to samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from oneloop import configs
from oneloop.families import footprint
from oneloop.families.flow import recomputable
from oneloop.families.footprint import Footprint, Kept
from oneloop.families.settings import flag
from oneloop.tasks import Models, Task
from oneloop.training import optimizers

CARDS = (12, 24, 48, 80)
"""GB of usual cards."""
SPARE = 2.0
"""GiB of a card that a run cannot have."""


@dataclass
class Held:
    """The models of a run and what one pass of them keeps."""

    models: Models
    kept: Kept
    wide: int
    """Bytes of a number that this pass kept."""


def blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """What gradient checkpointing computes again: a UNet's layers, or the blocks of a transformer."""
    named = dict(module.named_modules())
    lists = [m for name, m in named.items() if name.rpartition(".")[2] in ("resnets", "attentions") and len([*m.children()])]
    return [block for blocks in lists for block in blocks] or list(recomputable(module))


def watch(models: Models, call: Callable[[], Any]) -> tuple[Held, Any]:
    """A pass of the models, and its result."""
    made: list[Any] = []
    parts = [block for module in models.values() for block in blocks(module)]
    kept = footprint.activations(torch.nn.ModuleList(models.values()), parts, lambda: made.append(call()))
    return Held(models, kept, 2 if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") else 4), made[0]


def counted(held: Held, task: Task, cfg: Any, precision: str = "auto", optimizer: str | None = None) -> Footprint:
    """Bytes on a GPU, with another storage of the base or another optimizer."""
    s = getattr(cfg, configs.task_group(cfg))
    width = 4 if cfg.base.mixed_precision == "no" else 2
    chosen = optimizer or (optimizers.kind(s) if hasattr(s, "optimizer") else "adamw")
    trains = {name for name, module in held.models.items() if any(p.requires_grad for p in module.parameters())}
    cached = [e for e in task.encodings.values() if cfg.data.example_cache != "no" and not trains & set(e.models)]
    away = {m for e in cached for m in e.models}
    precision = getattr(s, "base_precision", "auto") if precision == "auto" else precision
    weights, trained, copies = 0, [], {}
    for name, module in held.models.items():
        own = list(module.parameters())
        trained += [p for p in own if p.requires_grad]
        if name in away:
            continue
        if any(p.requires_grad for p in own) and precision not in ("auto", "bf16"):
            weights += footprint.weight_bytes(module, precision)
            narrow = footprint.stored_narrow(module, precision) if precision != "nf4" else ()
            layers = [module.get_submodule(layer).weight for layer in narrow]
            copies |= {footprint.internals.storage_id(p.untyped_storage()): 2 * p.numel() for p in layers}
        else:
            weights += sum(p.numel() for p in own if not p.requires_grad) * (4 if name in task.float32 else width)
    numbers = sum(p.numel() for p in trained)
    largest = max((p.numel() for p in trained), default=0)
    gradients = largest if cfg.base.fused_backward_pass else numbers
    state = sum(optimizers.state_bytes(chosen, tuple(p.shape)) for p in trained)
    ema = 4 * numbers * (cfg.base.use_ema + len(cfg.base.ema_lengths)) * (not cfg.base.offload_ema)
    both = (n * min(width, held.wide) // held.wide for n in held.kept.with_copies(copies))
    size = 2 if cfg.base.weights == "bf16" else 4
    return Footprint(weights, size * numbers, size * gradients, state, ema, *both)


def ways(held: Held, task: Task, cfg: Any) -> Iterator[tuple[str, int]]:
    """(flags, the peak in bytes with them and all before them), from what changes least on."""
    base, group, size = cfg.base, configs.task_group(cfg), cfg.data.train_batch_size
    s, recompute = getattr(cfg, group), cfg.base.gradient_checkpointing
    now = counted(held, task, cfg)
    yield "", now.peak(recompute)
    if not recompute and now.recomputed < now.activations:
        recompute = True
        yield "--base.gradient-checkpointing", now.peak(True)
    if now.ema:
        now = replace(now, ema=0)
        yield "--base.offload-ema", now.peak(recompute)
    share = 1.0
    peak = lambda: int(now.peak(recompute) - (1 - share) * (now.recomputed if recompute else now.activations))  # noqa: E731
    while size > 1:
        share, size = share / 2, size // 2
        steps = base.gradient_accumulation_steps * (cfg.data.train_batch_size // size)
        yield f"--data.train-batch-size {size} --base.gradient-accumulation-steps {steps}", peak()
    optimizer = None
    if getattr(s, "optimizer", None) == "adamw":
        optimizer = "adamw8bit"
        now = replace(now, optimizer=counted(held, task, cfg, optimizer=optimizer).optimizer)
        yield f"{flag(group, 'optimizer')} {optimizer}", peak()
    for precision in ("float8", "nf4") if getattr(s, "base_precision", None) in ("auto", "bf16") else ():
        ema, now = now.ema, counted(held, task, cfg, precision, optimizer)
        now = replace(now, ema=ema)
        yield f"{flag(group, 'base-precision')} {precision} --base.mixed-precision bf16", peak()
    share /= 4
    yield f"--data.resolution {cfg.data.resolution // 2}", peak()


def line(held: Held, task: Task, cfg: Any) -> str:
    """For the card that is asked for, or the usual ones up to that which it fits as it is: with which flags, or not."""
    steps, said = list(ways(held, task, cfg)), []
    for card in (cfg.base.assume_gpu,) if cfg.base.assume_gpu else CARDS:
        flags: dict[str, str] = {}
        for given, peak in steps:
            flags |= {given.split()[0]: given} if given else {}
            if fitted := peak / 2**30 <= card * 1e9 / 2**30 - SPARE:
                break
        how = f"with {' '.join(flags.values())} ({peak / 2**30:.2f} GiB)" if flags else "as it is"
        said.append(f"{card:g} GB {'' if fitted else 'not even '}{how}")
        if not flags:
            break
    return f"fits        {steps[0][1] / 2**30:.2f} GiB at the peak of a step, computed: {'; '.join(said)}"
