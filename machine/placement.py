"""Models on the device: the precision they have there, what of them trains, and how they are shown.

What a run and whatever looks at its models (views/sample.py) do alike, for every task.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from oneloop.configs import BadInput
from oneloop.machine.kernels import choose_attention, undivide
from oneloop.machine.memory import is_out_of_memory
from oneloop.machine.narrow import narrow, widen
from oneloop.tasks import Batch, Encoders, Follow, Images, Models, Rng, Task, hash64


def make_models(task: Task, cfg: Any, accelerator: Accelerator, constants: Mapping[str, Tensor] | None = None) -> Models:
    """The task's models, seeded and placed; with what its encoders left, without the encoders."""
    torch.manual_seed(hash64(cfg.base.seed, "models"))
    models = task.make_models(cfg) if constants is None else task.make_models(cfg, constants)
    choose_attention(models, cfg.base.attention)
    if not cfg.base.compile:
        undivide(models)
    place(models, accelerator, cfg.base.gradient_checkpointing, task.float32, DTYPES[cfg.base.weights])
    return models | followers(models, task.follows)


def followers(models: Models, follows: Mapping[str, Follow]) -> Models:
    """The frozen copies that follow models, in eval(): float32 parameters of their own where the model trains, the model's own
    frozen parameters and buffers elsewhere, so that the copy of a model with adapters takes no more than the adapters.

    Raises:
        ValueError: a name is taken, or the model that is followed is missing, trains nothing or cannot be copied.
    """
    made: Models = {}
    for name, follow in follows.items():
        model = models.get(follow.of)
        if name in models or model is None or not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"the task's {name!r} follows {follow.of!r}; expected a new name and one of its models that train")
        if any(isinstance(vars(m).get("forward"), FunctionType) for m in model.modules()):
            raise ValueError(f"the task's {name!r} cannot copy {follow.of!r}: its forward is a closure; make it a method")
        shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        made[name] = copy.deepcopy(model, {id(x): x for x in shared}).requires_grad_(False).eval()
        widen(made[name])
        for own, other in zip(made[name].modules(), model.modules(), strict=True):
            own._buffers = other._buffers
        for key, p in made[name].named_parameters():
            p.data = p.data.float() if model.get_parameter(key).requires_grad else p.data
    return made


def saved(models: Models, task: Task) -> Models:
    """Those whose state a checkpoint has: what trains, and what the task keeps."""
    if missing := [name for name in task.keeps if name not in models]:
        raise ValueError(f"the task keeps {missing[0]!r}, and its models are: {', '.join(models)}")
    return {name: module for name, module in models.items() if trains(module) or name in task.keeps}


def describe(module: torch.nn.Module) -> str:
    """A model in a line."""
    digest = _digest([own_config(module), _shapes(module)])
    return f"{type(module).__name__} with {sum(p.numel() for p in module.parameters()):,} parameters ({digest})"


def own_config(module: torch.nn.Module) -> dict[str, Any]:
    """What a diffusers model was made of, as JSON has it; empty for others."""
    config = getattr(module, "config", None)
    config = {k: v for k, v in config.items() if not k.startswith("_")} if hasattr(config, "items") else {}
    return json.loads(json.dumps(config, default=str, sort_keys=True))


def _shapes(module: torch.nn.Module) -> list[Any]:
    return [(n, list(p.shape), p.requires_grad) for n, p in module.named_parameters()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:8]


def identity(models: Models, encoders: Encoders | None = None) -> dict[str, Any]:
    """What a manifest says of the models: each in a line, and what two runs that are one must agree in. Encoders, which may be
    gone by now, and what has no parameters are no part of it."""
    models = {k: m for k, m in models.items() if any(True for _ in m.parameters()) and not (encoders and k in encoders.models)}
    made = {k: {"class": type(m).__name__, "shapes": _digest(_shapes(m)), "config": own_config(m)} for k, m in models.items()}
    return {"models": {k: describe(m) for k, m in models.items()}, "made_of": made}


def altered(manifest: dict[str, Any], models: Models, encoders: Encoders | None = None) -> list[str]:
    """In what the models differ from those of a checkpoint's manifest, a line each. A key that the manifest does not know, as a
    newer diffusers brings it, is no difference while it is at its default."""
    now, found, gone = identity(models, encoders), [], encoders.models if encoders else ()
    if "made_of" not in manifest:  # of an earlier version
        lines = {k: line for k, line in manifest.get("models", now["models"]).items() if k not in gone}
        return [f"models was {lines} and is now {now['models']}"] if lines != now["models"] else []
    then = {k: m for k, m in manifest["made_of"].items() if k not in gone and m.get("shapes") != _digest([])}
    for name in sorted(then.keys() | now["made_of"].keys()):
        before, after = (made.get(name, {}) for made in (then, now["made_of"]))
        old, new = ({"class": m.get("class"), "shapes": m.get("shapes")} | m.get("config", {}) for m in (before, after))
        defaults = inspect.signature(type(models[name]).__init__).parameters if name in models else {}
        for key in sorted(old.keys() | new.keys()):
            known = old.get(key, json.loads(json.dumps(getattr(defaults.get(key), "default", None), default=str)))
            if known != new.get(key):
                found.append(f"{name}'s {key} was {known} and is now {new.get(key)}")
    return found


def trained(models: Models) -> dict[str, Tensor]:
    """'model.parameter' -> the parameter, for what requires a gradient."""
    return {f"{k}.{n}": p for k, m in models.items() for n, p in m.named_parameters() if p.requires_grad}


def trains(module: torch.nn.Module) -> bool:
    """Whether anything in it requires a gradient."""
    return any(p.requires_grad for p in module.parameters())


BATCH_NORM = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
"""What computes in float32 whatever its input: its running statistics are."""
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def place(
    models: Models, accelerator: Accelerator, recompute: bool, float32: Iterable[str], weights: torch.dtype = torch.float32
) -> None:
    """Everything to the device; what trains in the type `weights`, what is frozen in the run's precision and in eval(). A
    module may be frozen in parts, as one with adapters is; `float32` names frozen models that the run's precision would
    spoil."""
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    found = [[getattr(m, n) for n in names if hasattr(m, n)] for m in models.values() if trains(m)]  # diffusers, transformers
    recomputes = [methods[0] for methods in found if methods]
    if recompute and not recomputes:
        kinds = ", ".join(type(m).__name__ for m in models.values() if trains(m))
        raise BadInput(f"--base.gradient-checkpointing: no model that trains ({kinds}) can recompute")
    lower = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for name, module in models.items():
        training, other = trains(module), torch.float32 if name in float32 else lower
        if not training and not any(True for _ in itertools.chain(module.parameters(), module.buffers())):
            continue
        stays = getattr(module, "offloaded", frozenset())
        batch = {p for m in module.modules() if isinstance(m, BATCH_NORM) for p in m.parameters(False)}
        for p in module.parameters():
            if type(p.data) is Tensor and p.dtype in WIDE:  # what is stored in less stays so
                where = p.device if p in stays else accelerator.device
                p.data = p.data.to(where, torch.float32 if p in batch else weights if p.requires_grad else other)
        if stays:
            for x in itertools.chain(module.parameters(), module.buffers()):
                x.data = x.data if x in stays else x.data.to(accelerator.device)
        else:
            module.to(accelerator.device)
        if training and weights == torch.bfloat16:
            narrow(module)
        if not (training and module.training):  # else what trains says itself which of its parts are in eval()
            module.train(training)
    for enable in recomputes if recompute else ():
        enable()
    for module in models.values():
        if getattr(module, "offloaded", None) and not trains(module):  # which brings the weights to the device
            module.enable_gradient_checkpointing()


def seed_layers(device: torch.device, seed: int) -> None:
    """Seed what layers draw from, as dropout does. `torch.manual_seed` would speak to every kind of device there might be, and
    for each that is not there write down the call's stack: a sixth of what a step costs beside its model."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def move(models: Models, names: Iterable[str], device: Any) -> None:
    """These models to a device, and the memory they leave given back."""
    for name in names:
        models[name].to(device)
    if names and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def at_rest(models: Models, weights: dict[str, Tensor], ema: dict[str, Tensor]) -> Iterator[None]:
    """The models as they are shown and exported: the EMA in place, eval(), no gradients.

    Each parameter points to its EMA meanwhile (to a copy of one that is offloaded or of another type), and to its own memory,
    at its address of before, afterwards. So what changes a parameter in place meanwhile changes the EMA.
    """
    training = [(part, part.training) for module in models.values() for part in module.modules()]
    own = {key: weights[key].data for key in ema}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for key, value in ema.items():
                weights[key].data = value.to(weights[key])
            for module in models.values():
                module.eval()
            yield
        finally:
            for key, value in own.items():
                weights[key].data = value
            for part, flag in training:  # each its own: a task may have put some of them in eval()
                part.training = flag


@contextlib.contextmanager
def same_buffers(models: Models) -> Iterator[None]:
    """Every buffer is afterwards what it was before, whatever passes move."""
    before = [(buffer, buffer.clone()) for module in models.values() for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def batches(num: int, size: int) -> list[range]:
    """The parts of a grid of `num` samples that are drawn together, at most `size` each."""
    return [range(i, min(i + size, num)) for i in range(0, num, size)]


def halves(part: range) -> list[range]:
    """What a part is drawn in where the memory does not suffice for it: nothing smaller than one sample."""
    middle = len(part) // 2
    return [part[:middle], part[middle:]] if middle else []


def draw(
    task: Task,
    models: Models,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor],
    shown: Callable[[int, int], Iterable[Batch]],
    rng: Rng,
    accelerator: Accelerator,
    cfg: Any,
) -> Images:
    """The task's samples, one for each key of `rng`, from the EMA, in the precision of the run; `shown(first, count)` are the
    fixed examples from number `first` on, `count` in a batch.

    They are drawn a batch of the training at a time, and half as many at once after the memory did not suffice.
    """
    todo, most, parts = batches(len(rng), cfg.data.train_batch_size), len(rng), []
    while todo:
        part = todo.pop(0)
        if len(part) > most:
            todo = [*halves(part), *todo]
            continue
        try:
            with at_rest(models, weights, ema), accelerator.autocast():
                some = rng[part.start : part.stop]
                parts.append(task.sample_fn(models, shown(part.start, len(part)), some, cfg))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(part) == 1:
                raise
            todo, most = [part, *todo], len(part) - 1
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
