"""A pretended GPU: tensors that say they are on `cuda:0`, compute on the CPU, and refuse to meet those that are there.

Which device a tensor is on is a property of its storage, so that views, parameters, gradients and what autograd keeps have it
without being told; all else of a tensor is a CPU's, and so are the bits. `Device` sees every operation below autograd, in the
backward pass too, and decides where its results are; pretended_torch.py has what torch and its tensors answer to Python.
What the host would wait for is noted with the line that waits.

It cannot know: what a kernel of CUDA computes, how long it takes, how much memory there is, and code in C++ that asks for the
device itself (the choice of an attention or convolution kernel; the operations that autocast casts are the CPU's).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
Tensor = torch.Tensor
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "unique_consecutive"}
"""Operations whose result, or its shape, the host has to know."""
FOREIGN: dict[int, Any] = {}
"""The device's generators, kept so that no other has their address."""
COPIES = {"copy_", "_foreach_copy_"}
SINGLE = {"fill", "fill_", "masked_fill", "masked_fill_"}
"""Operations beside those by element that take a single number from the CPU."""
INDEXES = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
SEPARATE = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


@dataclass(frozen=True)
class Wait:
    """The host waits for the device."""

    what: str
    where: str
    """The innermost line of the package, and its function."""
    step: int | None = None
    """Optimizer steps taken before; None: outside the loop."""
    during: str = ""
    """What `loop.train` called."""


class Storages:
    """A set of storages, which they leave as they die. A weak reference keeps the address from being given to another."""

    def __init__(self):
        self.refs: dict[int, StorageWeakRef] = {}

    def __contains__(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.refs

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self.refs:
            self.refs[storage._cdata] = StorageWeakRef(storage)

    def nbytes(self) -> int:
        """Bytes of those that live."""
        self.refs = {key: ref for key, ref in self.refs.items() if not ref.expired()}
        return sum(torch.UntypedStorage._new_with_weak_ptr(key).nbytes() for key in self.refs)


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@dataclass
class Seen:
    """What the device saw."""

    root: str
    waits: Counter[Wait] = field(default_factory=Counter)
    launched: int = 0
    there: Storages = field(default_factory=Storages)
    pinned: Storages = field(default_factory=Storages)
    flying: Storages = field(default_factory=Storages)
    """On the host, with a copy from the device on its way that nothing has waited for."""
    rng: torch.Generator = field(default_factory=torch.Generator)
    inside: bool = False
    """Whether a kernel runs: one in Python shall see a CPU."""
    strict: bool = False
    """Whether a wait raises, as `torch.cuda.set_sync_debug_mode("error")` has it."""

    def on(self, x: Tensor) -> bool:
        """Whether a tensor is on the device; of one that consists of others, whether those are."""
        if self.inside:
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return self.on(torch._C._functorch.get_unwrapped(x))
        if hasattr(x, "__tensor_flatten__"):
            return any(self.on(getattr(x, name)) for name in x.__tensor_flatten__()[0])
        return x in self.there

    def put(self, x: Tensor) -> None:
        """Have it on the device."""
        for part in map(x.__getattribute__, x.__tensor_flatten__()[0]) if hasattr(x, "__tensor_flatten__") else ():
            self.put(part)
        self.there.add(x)

    def wait(self, what: str) -> None:
        if self.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        frame, called, where = sys._getframe(1), None, "?"
        self.flying = Storages()
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(self.root):
                line = f"{code.co_filename[len(self.root) :]}:{frame.f_lineno} {code.co_qualname}"
                where = line if where == "?" else where
                if code.co_name == "train" and code.co_filename.endswith("/loop.py"):
                    self.waits[Wait(what, where, frame.f_locals["state"].step, called.f_code.co_name)] += 1
                    return
            called, frame = frame, frame.f_back
        self.waits[Wait(what, where)] += 1

    def arrives(self, source: Tensor, waits_not: bool) -> None:
        """A copy from the host."""
        if not waits_not:
            self.wait("a blocking copy to the device")
        elif source not in self.pinned:
            self.wait("a copy from memory that is not pinned")


class Device(TorchDispatchMode):
    """Decides where each operation's results are, and refuses what a GPU would."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen, self.leaving, self.follows = seen, False, False

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, seen = dict(kwargs or {}), self.seen
        name = op._schema.name.removeprefix("aten::")
        given = list(tensors_in((*args, *kwargs.values())))
        here = [x for x in given if seen.on(x)]
        asked = kwargs.get("device") is not None and (kwargs["device"].type == "cuda" or (self.follows and not given))
        placed = asked or (bool(here) and not self.leaving and name not in COPIES)
        if any(x in seen.flying for x in given) and not (here or asked):
            raise RuntimeError(f"the host reads what the device still writes ({name})")
        if here and len(here) < len(given):
            self.meet(op, name, args, kwargs, [x for x in given if not seen.on(x)])
        if here and not self.leaving:
            self.read(name, args, kwargs)
        if asked:
            kwargs["device"] = CPU
            if name == "_to_copy" and not here:
                seen.arrives(args[0], kwargs.get("non_blocking", False))
        pin = kwargs.pop("pin_memory", None)
        seen.launched += placed
        seen.inside = True
        try:
            made = self.draw(op, placed, args, kwargs) if torch.Tag.nondeterministic_seeded in op.tags else op(*args, **kwargs)
        finally:
            seen.inside = False
        for x in tensors_in([made]) if placed or pin else ():
            seen.put(x) if placed else seen.pinned.add(x)
        return made

    def meet(self, op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], strangers: list[Tensor]) -> None:
        """Tensors of both kinds: copies, indices on the CPU, and single numbers where the arithmetic is by element, may."""
        seen = self.seen
        if name in COPIES:
            waits_not = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            for to, source in zip(tensors_in([args[0]]), tensors_in([args[1]]), strict=True):
                if seen.on(to) and not seen.on(source):
                    seen.arrives(source, waits_not)
                elif seen.on(source) and not seen.on(to):
                    seen.flying.add(to) if waits_not and to in seen.pinned else seen.wait("a copy to the host")
            return
        if name in INDEXES and seen.on(args[0]) and all(any(x is i for i in args[1]) for x in strangers if x.ndim):
            return seen.wait("an index on the host")
        target = next(tensors_in(args[:1]), None) if op._schema.is_mutable else None
        single = all(x.ndim == 0 and x is not target for x in strangers)
        if not (single and (torch.Tag.pointwise in op.tags or name in SINGLE or name.startswith("_foreach"))):
            raise RuntimeError(f"{SEPARATE} ({name})")

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the host has to wait for."""
        if name in INDEXES and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            if not (name.startswith(("index_put", "_index_put")) and args[2].numel() == 1):  # that is a masked_fill
                self.seen.wait("an index that is a mask")
        elif name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.seen.wait(name)

    def draw(self, op: Any, placed: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A random operation: by a generator of its device, or that device's own."""
        generators = [x for x in (*args, *kwargs.values()) if isinstance(x, torch._C.Generator)]
        wanted = "cuda" if placed else "cpu"
        for found in ("cuda" if g._cdata in FOREIGN else "cpu" for g in generators):
            if found != wanted:
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")
        if generators or not placed:
            return op(*args, **kwargs)
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.seen.rng.get_state())
        try:
            return op(*args, **kwargs)
        finally:
            self.seen.rng.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)
