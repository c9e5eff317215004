"""What frozen models make of columns before the loss: in the step, or once, cached on disk (inputs/cache.py).

A task's encodings (tasks/__init__.py) say what may be cached. A value is named by what was encoded, and its folder by the
encoder's own weights, so nothing in the cache goes stale, and folders may be shared by runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oneloop import configs
from oneloop.data import Examples, to_device
from oneloop.inputs.cache import Cache
from oneloop.inputs.sources import content_hash
from oneloop.tasks import Batch, Encoding, Models


def reads(name: str, encoding: Encoding) -> tuple[str, ...]:
    """The columns that an encoding reads: its own, or that of its name."""
    return encoding.columns or (name,)


def remarks(examples: Examples, encodings: Mapping[str, Encoding], cfg: Any) -> Iterator[str]:
    """What the encodings have to say of the captions they will be given."""
    for name, encoding in encodings.items():
        if encoding.remark is not None and "caption" in reads(name, encoding):
            yield from filter(None, [encoding.remark(sorted(examples.texts() or ()), cfg)])


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
    folder, size, budget = configs.example_cache(cfg), cfg.data.train_batch_size, cfg.data.memory_budget * 2**30
    if folder is None:
        return set()
    for name, encoding in encodings.items():
        columns = reads(name, encoding)
        values = examples.values(columns)
        if values is None:
            continue
        cache = Cache(folder / f"{name}-{encoder_identity(encoding, models, cfg)}").refresh()
        missing = cache.missing(values.marks)
        if len(missing):
            say(f"encoding {' and '.join(columns)} once: {len(missing):,} of {len(values.marks):,}, into {cache.folder}")

        def make(
            some: Sequence[int], columns: tuple[str, ...] = columns, encoding: Encoding = encoding, values: Any = values
        ) -> Iterator[tuple[int, dict[str, Tensor]]]:
            # Always as many as a batch has, of one size: the same shapes as in a step, and so the same bits.
            made = {i: values.make(i) for i in some}
            shapes = lambda i: [tuple(getattr(x, "shape", ())) for x in made[i]]  # noqa: E731
            for _, alike in itertools.groupby(sorted(some, key=shapes), shapes):
                group = list(alike)
                several = zip(*(made[i] for i in (group * size)[:size]), strict=True)
                batch = {
                    k: torch.stack(xs) if isinstance(xs[0], Tensor) else list(xs)
                    for k, xs in zip(columns, several, strict=True)
                }
                batch = to_device(batch, accelerator.device, examples.source.columns)
                encoded = _encode(encoding, models, list(batch.values()), cfg)
                yield from ((i, {key: x[at] for key, x in encoded.items()}) for at, i in enumerate(group))

        accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
        cache.fill(values.marks, missing[accelerator.process_index :: accelerator.num_processes].tolist(), size, make)
        accelerator.wait_for_everyone()
        elsewhere = cache.refresh().missing(values.marks)  # what others wrote to a disk that is not seen from here
        cache.fill(values.marks, elsewhere.tolist(), size, make)
        accelerator.wait_for_everyone()
        budget -= cache.refresh().nbytes
        examples.substitute(name, columns, cache.read, budget >= 0)
    cached = set(examples.encoded)
    examples.hide(
        {c for name in cached for c in reads(name, encodings[name])}
        - {c for name, e in encodings.items() if name not in cached for c in reads(name, e)}
    )
    called = {model for name, e in encodings.items() if name not in cached for model in e.models}
    return {model for name in cached for model in encodings[name].models if model in models} - called


def encoder_identity(encoding: Encoding, models: Models, cfg: Any) -> str:
    """A hash of everything but the value that decides an encoding: function, weights in their precision, configs, key."""
    parts: list[Any] = [encoding.fn.__module__, encoding.fn.__qualname__, encoding.key(cfg)]
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
