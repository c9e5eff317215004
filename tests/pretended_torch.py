"""What torch and its tensors answer to Python about the pretended GPU of pretended.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pretended import CPU, CUDA, FOREIGN, SEPARATE, Device, Seen, Tensor, tensors_in


class Generator(torch._C.Generator):
    """One that says it is the device's draws other numbers than the CPU's of the same seed."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls)
        made.foreign = torch.device(device).type == "cuda"
        FOREIGN.update({made._cdata: made} if made.foreign else {})
        return made

    device = property(lambda self: CUDA if self.foreign else CPU)

    def manual_seed(self, seed: int) -> Any:
        super().manual_seed(seed ^ self.foreign)
        return self


def attributes(seen: Seen, mode: Device) -> dict[str, Any]:
    """What a tensor answers to Python."""
    own = {name: getattr(Tensor, name) for name in ("device", "to", "tolist", "numpy", "pin_memory", "__deepcopy__")}
    place = lambda x: CUDA if seen.on(x) else own["device"].__get__(x)  # noqa: E731

    def to(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if sum(isinstance(arg, bool) for arg in args) == 2:  # non_blocking, copy
            *args, copy = args
        other = kwargs.pop("other", args[0] if args and isinstance(args[0], Tensor) else None)
        if other is not None:
            args = (place(other), other.dtype, *args[1:])
        device, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
        if "meta" in (own["device"].__get__(x).type, device and device.type):
            return own["to"](x, *args, copy=copy, **kwargs)
        more = {} if form is None else {"memory_format": form}
        leaves = device is not None and device.type == "cpu" and seen.on(x)
        if device is None or (device.type == "cuda") is seen.on(x):
            return own["to"](x, dtype=dtype or x.dtype, non_blocking=non_blocking, copy=copy, **more)
        if leaves and not non_blocking:
            seen.wait("a copy to the host")
        mode.leaving = leaves
        try:
            more |= {"dtype": dtype or x.dtype, "device": CPU if leaves else CUDA, "non_blocking": non_blocking}
            return torch.ops.aten._to_copy(x, **more)
        finally:
            mode.leaving = False

    def tolist(x: Tensor) -> Any:
        seen.wait("tolist") if seen.on(x) else None
        return own["tolist"](x)

    def numpy(x: Tensor, **more: Any) -> Any:
        if seen.on(x):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return own["numpy"](x, **more)

    def pin_memory(x: Tensor, device: Any = None) -> Tensor:
        if seen.on(x):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        made = x.detach().clone()
        seen.pinned.add(made)
        return made

    def deepcopy(x: Tensor, memo: Any) -> Tensor:
        made = own["__deepcopy__"](x, memo)
        seen.put(made) if seen.on(x) else None
        return made

    return {
        "device": property(place),
        "is_cuda": property(seen.on),
        "is_cpu": property(lambda x: place(x) == CPU),
        "get_device": lambda x: 0 if seen.on(x) else -1,
        "to": to,
        "cpu": lambda x, **more: to(x, CPU, **more),
        "cuda": lambda x, device=None, **more: to(x, CUDA, **more),
        "tolist": tolist,
        "numpy": numpy,
        "pin_memory": pin_memory,
        "is_pinned": lambda x, device=None: x in seen.pinned,
        "__deepcopy__": deepcopy,
    }


def functions(seen: Seen, mode: Device, memory: int) -> dict[str, Any]:
    """What torch answers of the device."""
    grouped, init = torch._C._group_tensors_by_device_and_dtype, torch.autocast.__init__
    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    facts = SimpleNamespace(total_memory=memory, major=9, minor=0, multi_processor_count=132, name="pretended")

    def autocast(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        """The device's is the CPU's; within it, what is said of the CPU's concerns nothing on the device."""
        if device_type == "cpu" and torch.is_autocast_enabled("cuda"):
            dtype, enabled = dtype_of("cpu"), True
        init(self, "cpu" if device_type == "cuda" else device_type, dtype, enabled, cache_enabled)

    def by_device(lists: Any, indices: bool = False) -> Any:
        groups = {}
        for (_, dtype), (parts, order) in grouped(lists, indices).items():
            places = {x.device for part in parts for x in part if x is not None and x.ndim}
            if len(places) > 1:
                raise RuntimeError(f"{SEPARATE} (in a list)")
            groups[next(iter(places), parts[0][0].device), dtype] = parts, order
        return groups

    def follows(own: Any) -> Any:
        """One that is made of others in C++, which makes tensors on the device of what it is given."""

        def call(*args: Any, **more: Any) -> Any:
            mode.follows = any(map(seen.on, tensors_in((*args, *more.values()))))
            try:
                return own(*args, **more)
            finally:
                mode.follows = False

        return call

    def placed(own: Any) -> Any:
        """torch.tensor and torch.as_tensor, which make it on the host first."""
        there = lambda device: device is not None and torch.device(device).type != "meta"  # noqa: E731

        def make(value: Any, *args: Any, device: Any = None, **more: Any) -> Tensor:
            return own(value, *args, **more).to(device) if there(device) else own(value, *args, device=device, **more)

        return make

    kind = lambda device: {None: "cpu", "cuda": "cpu"}.get(device, device)  # noqa: E731
    rng = {"get_rng_state": lambda *_: seen.rng.get_state(), "set_rng_state": lambda state, *_: seen.rng.set_state(state)}
    rng |= {"get_rng_state_all": lambda: [seen.rng.get_state()], "set_rng_state_all": lambda s: seen.rng.set_state(s[0])}
    rng |= dict.fromkeys(("manual_seed", "manual_seed_all"), lambda seed: seen.rng.manual_seed(seed))
    yes = dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), lambda *_, **__: True)
    none = dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect"), lambda *_: None)
    held = dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: seen.there.nbytes())
    cuda = rng | yes | none | held | {"device_count": lambda: 1, "current_device": lambda: 0}
    cuda |= {"get_device_properties": lambda *_: facts, "get_device_capability": lambda *_: (9, 0), "_initialized": True}
    cuda |= {"mem_get_info": lambda *_: (memory, memory), "synchronize": lambda *_: seen.wait("synchronize")}
    cuda |= {"device": lambda *_: contextlib.nullcontext()}
    cuda |= {"set_sync_debug_mode": lambda mode: setattr(seen, "strict", mode in ("error", 2))}
    found = {"is_available": lambda: True, "current_accelerator": lambda *_, **__: torch.device("cuda")}
    found |= {"current_stream": lambda *_: SimpleNamespace(is_capturing=lambda: False)}
    found |= {"current_device_index": lambda: 0, "set_device_index": lambda *_: None, "device_count": lambda: 1}
    made = {f"torch.cuda.{name}": value for name, value in cuda.items()}
    made |= {f"torch.accelerator.{name}": value for name, value in found.items()}
    return made | {
        "torch.autocast.__init__": autocast,
        "torch.is_autocast_enabled": lambda device=None: enabled(kind(device)),
        "torch.get_autocast_dtype": lambda device: dtype_of(kind(device)),
        "torch._C._group_tensors_by_device_and_dtype": by_device,
        "torch.Generator": Generator,
        "torch.tensor": placed(torch.tensor),
        "torch.as_tensor": placed(torch.as_tensor),
        "torch.quantile": follows(torch.quantile),
        "torch._C._nn.pad_sequence": follows(torch._C._nn.pad_sequence),
    }


@contextlib.contextmanager
def gpu(root: str, memory: int = 24 * 2**30) -> Iterator[Seen]:
    """Have torch say that there is a GPU of so many bytes. `root` is the folder whose lines waits are attributed to."""
    torch.utils._device._device_constructors()  # which keeps what it finds under these names
    seen = Seen(f"{root}/")
    mode = Device(seen)
    with contextlib.ExitStack() as stack:
        for name, value in attributes(seen, mode).items():
            stack.enter_context(mock.patch.object(Tensor, name, value))
        for name, value in functions(seen, mode, memory).items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mode)
        yield seen
