"""What frozen models make of columns before the loss: in the step, or once, cached on disk (inputs/cache.py).

A task's encodings (tasks/__init__.py) say what may be cached. A value is named by what was encoded, and its folder by the
encoder's own weights, so nothing in the cache goes stale, and folders may be shared by runs.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneloop import configs
from oneloop.configs import BadInput
from oneloop.data import Examples, Fixed, to_device
from oneloop.inputs.cache import Cache, as_marks, digest
from oneloop.inputs.files import reason
from oneloop.inputs.sources import content_hash
from oneloop.machine.memory import is_out_of_memory
from oneloop.machine.placement import halves, place
from oneloop.machine.processes import on_main
from oneloop.tasks import Batch, Encoders, Encoding, Models, Rng, Task


def reads(name: str, encoding: Encoding) -> tuple[str, ...]:
    """The columns that an encoding reads: its own, or that of its name."""
    return encoding.columns or (name,)


def remarks(examples: Examples, encodings: Mapping[str, Encoding], cfg: Any) -> Iterator[str]:
    """What the encodings have to say of the captions they will be given."""
    for name, encoding in encodings.items():
        if encoding.remark is not None and "caption" in reads(name, encoding) and (texts := examples.texts()):
            yield from filter(None, [encoding.remark(sorted(texts), cfg)])


def encode(encodings: Mapping[str, Encoding], models: Models, batch: Batch, cfg: Any) -> Batch:
    """The batch with the columns that encodings read replaced by what they make of them; what is cached was replaced before."""
    made: Batch = {}
    for name, encoding in encodings.items():
        if all(column in batch for column in reads(name, encoding)):
            made |= _encode(encoding, models, [batch[column] for column in reads(name, encoding)], cfg)
    used = {column for name, encoding in encodings.items() for column in reads(name, encoding)} if made else set()
    return {name: value for name, value in batch.items() if name not in used} | made


@torch.no_grad()
def _encode(encoding: Encoding, models: Models, values: Sequence[Any], cfg: Any) -> dict[str, Tensor]:
    return dict(encoding.fn(models, *values, cfg))


def encode_once(
    examples: Examples,
    encodings: Mapping[str, Encoding],
    models: Models,
    cfg: Any,
    accelerator: Any,
    say: Callable[[str], None],
) -> set[str]:
    """Encode all that the run may ask for, where that can be listed, and have the stream read it from the cache.

    Processes share the work. What earlier runs encoded is not encoded again. Returns the names of the models that nothing calls
    any more.

    Raises:
        BadInput: the folder cannot be written.
    """
    if (folder := configs.example_cache(cfg)) is None:
        return set()
    for name, encoding in encodings.items():
        fill = functools.partial(_fill, examples, name, encoding, lambda: models, cfg, accelerator, say)
        fill(lambda e=encoding, n=name: folder / f"{n}-{encoder_identity(e, models, cfg)}")
    cached = set(examples.encoded) & set(encodings)
    _hide(examples, encodings)
    called = {model for name, e in encodings.items() if name not in cached for model in e.models}
    return {model for name in cached for model in encodings[name].models if model in models} - called


def encode_first(
    encoders: Encoders | None,
    task: Task,
    cfg: Any,
    accelerator: Any,
    opened: Callable[[], tuple[Examples, Examples | None]],
    grids: Sequence[tuple[int, range]],
    say: Callable[[str], None],
) -> dict[str, Tensor] | None:
    """What the task's encoders make of constants, and of the prompts of `grids`: (images of a grid, numbers of those that are
    drawn together). What they make of all examples, and of those held out, is in
    the cache, from which the stream and the validation read it. They are loaded where something of this is missing, and are
    gone when this returns.

    None: the task has no encoders, or `make_models` has to make them: there is no cache, or not every value can be listed.

    Raises:
        BadInput: the encoders cannot be loaded, or the folder cannot be written.
    """
    folder = configs.example_cache(cfg)
    if encoders is None or folder is None:
        return None
    own = {name: e for name, e in task.encodings.items() if set(e.models) <= set(encoders.models)}
    sets = [examples for examples in opened() if examples]
    if any(examples.values(reads(name, e)) is None for examples in sets for name, e in own.items()):
        return None
    try:
        return _encode_first(encoders, own, task, cfg, accelerator, sets, folder, grids, say)
    except BadInput:
        raise
    except Exception as error:  # whatever a pipeline raises: what is wrong with the checkpoint `make_models` finds
        if is_out_of_memory(error):
            raise
        say(f"warning: what samples ask of the encoders cannot be made ahead ({reason(error)}); they stay in memory")
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _encode_first(
    encoders: Encoders,
    own: Mapping[str, Encoding],
    task: Task,
    cfg: Any,
    accelerator: Any,
    sets: Sequence[Examples],
    folder: Path,
    grids: Sequence[tuple[int, range]],
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    @functools.cache
    def models() -> Models:
        made = encoders.load(cfg)
        place(made, accelerator, False, task.float32)
        return made

    files = (encoders.files(cfg), accelerator.mixed_precision)
    for examples in sets:
        for name, e in own.items():
            path = folder / f"{name}-{content_hash(*_function(e, cfg), files)[:16]}"
            _fill(examples, name, e, models, cfg, accelerator, say, lambda path=path: path)
        _hide(examples, task.encodings)
    for held_out in sets[1:]:
        held_out.measured = True

    # What samples ask for, in all the parts of a grid that `placement.draw` may draw at a time.
    fixed = lambda num, part: Fixed(sets[0], len(part), accelerator.device, num, part.start, True)  # noqa: E731
    shown = sorted({"caption", *(column for name, e in own.items() for column in reads(name, e))})
    told = lambda x: digest(_bytes(x)) if isinstance(x, Tensor) else x  # noqa: E731
    firsts = (next(iter(fixed(num, part))) for num, part in grids)
    texts = [[told(batch.get(column)) for column in shown] for batch in firsts]
    cache = Cache(folder / f"constants-{content_hash(files)[:16]}").refresh()
    marks = as_marks([digest(repr((encoders.key(cfg), [*grids], "halves", texts)).encode())])

    def make(some: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        with torch.no_grad():
            made, todo = dict(encoders.constants(models(), cfg)), [*grids]
            while todo:
                num, part = todo.pop()
                todo += [(num, half) for half in halves(part)]
                with accelerator.autocast():
                    rng = Rng.of(cfg.base.seed, part, "samples", accelerator.device)
                    made |= encoders.prompts(models(), fixed(num, part), rng, cfg)
        yield 0, made

    on_main(accelerator, lambda: cache.fill(marks, cache.missing(marks).tolist(), 1, make))
    cache.fill(marks, cache.refresh().missing(marks).tolist(), 1, make)  # main's disk is not seen from here
    return {name: x[0] for name, x in cache.refresh().read(marks).items()}


def _fill(
    examples: Examples,
    name: str,
    encoding: Encoding,
    models: Callable[[], Models],
    cfg: Any,
    accelerator: Any,
    say: Callable[[str], None],
    folder: Callable[[], Path],
) -> None:
    """Encode what is missing in a folder, and have the examples read it from there; where values cannot be listed, nothing."""
    columns, size = reads(name, encoding), cfg.data.train_batch_size
    values = examples.values(columns)
    if values is None:
        return
    cache = Cache(folder()).refresh()
    missing = cache.missing(values.marks)
    if len(missing):
        say(f"encoding {' and '.join(columns)} once: {len(missing):,} of {len(values.marks):,}, into {cache.folder}")

    def make(some: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        # Always as many as a batch has, of one size: the same shapes as in a step, and so the same bits.
        made = {i: values.make(i) for i in some}
        shapes = lambda i: [tuple(getattr(x, "shape", ())) for x in made[i]]  # noqa: E731
        for _, alike in itertools.groupby(sorted(some, key=shapes), shapes):
            group = list(alike)
            several = zip(*(made[i] for i in (group * size)[:size]), strict=True)
            batch = {
                k: torch.stack(xs) if isinstance(xs[0], Tensor) else list(xs) for k, xs in zip(columns, several, strict=True)
            }
            batch = to_device(batch, accelerator.device, examples.source.columns, cfg.data.mask_minimum)
            encoded = _encode(encoding, models(), list(batch.values()), cfg)
            yield from ((i, {key: x[at] for key, x in encoded.items()}) for at, i in enumerate(group))

    alike = lambda some: sorted(some.tolist(), key=values.sizes) if values.sizes else some.tolist()  # noqa: E731
    accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
    mine = alike(missing[accelerator.process_index :: accelerator.num_processes])
    cache.fill(values.marks, mine, size, make, len(missing))
    accelerator.wait_for_everyone()
    elsewhere = cache.refresh().missing(values.marks)  # what others wrote to a disk that is not seen from here
    cache.fill(values.marks, alike(elsewhere), size, make)
    accelerator.wait_for_everyone()
    examples.substitute(name, columns, cache.read, cache.refresh().nbytes)


def _hide(examples: Examples, encodings: Mapping[str, Encoding]) -> None:
    """Leave out of the stream what cached encodings read and no others do."""
    cached = {c for columns, _ in examples.encoded.values() for c in columns}
    examples.hide(cached - {c for name, e in encodings.items() if name not in examples.encoded for c in reads(name, e)})


def _function(encoding: Encoding, cfg: Any) -> list[Any]:
    return [encoding.fn.__module__, encoding.fn.__qualname__, encoding.key(cfg)]


def encoder_identity(encoding: Encoding, models: Models, cfg: Any) -> str:
    """A hash of everything but the value that decides an encoding: function, weights in their precision, configs, key."""
    parts = _function(encoding, cfg)
    for name in encoding.models:
        if name in models:
            config = getattr(models[name], "config", {})
            config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            own = sorted((k, str(v)) for k, v in config.items() if not k.startswith("_"))  # not where it was loaded from
            parts += [name, type(models[name]).__name__, own]
            for key, x in models[name].state_dict().items():
                parts += [key, x.dtype, x.shape, _bytes(x)]
    return content_hash(*parts)[:16]


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
