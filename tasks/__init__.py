"""The contract between the loop and a task: plain functions over plain data.

A task is one module: a frozen dataclass of settings, a `Config(base, data, <task>)`, a few functions, and at its end
`task = Task(...)`. Its functions know nothing of devices, processes, files or optimizer steps; the loop owns those. This
module imports nothing heavy, so that a task's settings can be read in a moment.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

C = TypeVar("C")
X = TypeVar("X")
BySettings = X | Callable[[Any], X]
"""The same for all settings, or a function of them."""
Models = dict[str, "nn.Module"]
"""name -> module. What trains is what requires a gradient; the rest is frozen, moved, cast and kept in eval().
Parts of what trains that a task puts in eval(), such as the norms of a pretrained model, stay in it."""
Optims = dict[str, "torch.optim.Optimizer"]
"""name -> optimizer. One `Loss` of the same name is one step of it."""
Batch = dict[str, Any]
"""Columns of B examples. The task's own (`Task.columns`): images [B, 3, H, W] in [-1, 1], masks [B, 1, H, W] in [0, 1], texts
(a list of B strings), labels [B] int64. About each example, [B] or [B, 2] with height before width:

    n               its number in the run
    index, source   its row in the data set, and which source of a mixture that row is of
    key             a list: what names its row in messages, such as its file
    target_size     H and W of `pixel_values`, the same for the whole batch
    original_size   of the image file, upright
    crop_top_left   of the crop, in pixels of the resized image as the model sees it (of a mirrored one: in the mirrored image)
    mirrored        bool
    weight          float32: how much its loss counts (`tasks.mean`)

In `loss_fn` also `step`, one int: the optimizer steps taken before this one, the same for every batch and process that share a
step; `total`, the run's optimizer steps; and `phase`: "train", "validate", or "warm-up" for a pass whose gradients are thrown
away (its `step` is `total`)."""
Images = dict[str, "Tensor"]
"""What validation shows: name -> images [N, 3, H, W] in [0, 1]; one grid for each name."""


@dataclass(frozen=True)
class Column:
    """What a batch has under a name, and where the data set has it."""

    kind: Literal["image", "mask", "text", "label"]
    """Images become [-1, 1], masks (grey, white counts) [0, 1]."""
    like: str | None = None
    """The image column whose size, crop and mirror it shares, whatever its own pixels; its images have the same shape, up to
    rounding. None: an image of a size of its own, cropped by itself, and mirrored where `pixel_values` is."""
    setting: str | None = None
    """The setting that names the data set's column, such as "data.mask_column" or "mine.rejected_column". None, or a setting
    that is None: the column called as here."""
    folder: str | None = None
    """The setting that names a folder with images of the same names, in place of a column."""
    made: str | None = None
    """The setting that names what it is made by of the image that it is like (inputs/conditions.py), in place of a column."""
    optional: bool = False
    """Whether the task works without it. An optional image or mask is looked for where a setting names it."""


COLUMNS: dict[str, Column] = {
    "pixel_values": Column("image", setting="data.image_column"),
    "caption": Column("text", setting="data.caption_column", optional=True),
    "label": Column("label", setting="data.label_column", optional=True),
    "mask": Column("mask", like="pixel_values", setting="data.mask_column", folder="data.mask_data_dir", optional=True),
}
"""What every task may find in a batch; `Task.columns` adds to it, or says that one is not optional."""


@dataclass(frozen=True)
class Facts:
    """What is known of the data before an image is read."""

    rows: int
    classes: tuple[str, ...] = ()
    """Names of the labels, by number; none without labels."""
    columns: tuple[str, ...] = ("pixel_values",)
    """Those that a batch will have."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Height and width that `pixel_values` may have."""


@dataclass(frozen=True)
class Loss:
    """One loss to descend: the loop runs `value.backward()` and, when a batch is complete, the optimizer called `name`."""

    name: str
    value: Tensor
    """Scalar: the mean over the B examples, so that layouts of the same batch agree."""
    logs: Mapping[str, Any] = field(default_factory=dict)
    """More scalars to average and log."""
    step: bool = True
    """False: backward alone. Its gradient is added to that of the next losses of this name, up to the one that steps, which
    the same batch has to yield. Call the models anew for each loss, after the one before it was yielded."""


@dataclass(frozen=True)
class Follow:
    """A model that is the EMA of another: a frozen copy in eval(), moved once an optimizer step and never in between.

    Its parameters are ema <- decay ema + (1 - decay) weight for what trains in the model it follows; parameters frozen there
    and all buffers are that model's own. It starts as that model starts, checkpoints have it, and no gradient reaches it.
    """

    of: str
    """The model that it follows, one that trains; it must survive `copy.deepcopy`."""
    decay: float | str | Callable[[int, int], float]
    """In [0, 1]; or the setting that has it, such as "mine.decay"; or a function of the optimizer steps taken (1, 2, ...) and
    the run's total."""


@dataclass(frozen=True, kw_only=True)
class Encoding(Generic[C]):
    """What frozen models make of columns before the loss: a function of each example's values alone, the same whenever it is
    called, and whatever else is in the batch.

    The loop puts the new columns in the place of those that are read: in the step, or from a cache that holds every value.
    """

    fn: Callable[..., Mapping[str, Tensor]]
    """(models, B values of each column that it reads, settings) -> new columns, [B, ...] each, of shapes that are the same for
    all values of one shape: what differs in length is padded to a fixed one, with a mask. Called without gradients, in the
    precision of the weights."""
    columns: tuple[str, ...] = ()
    """The columns that it reads; none: the one that it is called by in `Task.encodings`."""
    models: tuple[str, ...]
    """Models that it calls and the loss does not: with everything cached they leave the device but for samples. While one of
    them trains, or where the task made none, the loop leaves the column as it is."""
    key: Callable[[C], Any] = lambda cfg: None
    """What decides the result beside the values and the models, such as a tokenizer; compared by its repr."""
    remark: Callable[[list[str], C], str | None] | None = None
    """What there is to say of all the texts of such a column, said once before training."""


@dataclass(frozen=True, kw_only=True)
class Encoders(Generic[C]):
    """Frozen models that encodings and samples alone call: the loop loads them, uses them and drops them before it calls
    `make_models`, so that they and the model that trains are never in memory at once. It does not load them at all where the
    cache on disk has everything that they would make.

    Without such a cache, or where the values of their encodings cannot be listed, `make_models` makes them beside the others.
    """

    models: tuple[str, ...]
    """Their names. Encodings that call only these are made before `make_models`."""
    load: Callable[[C], Models]
    """Makes those that there are, on the CPU."""
    files: Callable[[C], Any]
    """What tells their weights from all others, known without loading them; compared by its repr."""
    constants: Callable[[Models, C], Mapping[str, Tensor]]
    """What they make of texts that the settings give: the second argument of `make_models`, with the next ones."""
    prompts: Callable[[Models, Iterable[Batch], Rng, C], Mapping[str, Tensor]]
    """What they make of the prompts of a part of a grid; called with what `sample_fn` will be called with, but with these
    models alone."""
    key: Callable[[C], Any]
    """What decides `constants` and `prompts` beside the models and the examples; compared by its repr."""


@dataclass(frozen=True, kw_only=True)
class Prior(Generic[C]):
    """How class images (`--data.num-class-images`) are drawn before training, by the models as they are before it: as
    `Task.sample_fn` draws, image n from a key that n alone decides, and `--data.class-prompt`."""

    settings: Callable[[C], C]
    """The settings with which `sample_fn` and `Encoders.prompts` draw the class's prompt, and look at no examples."""
    load: Callable[[C, Mapping[str, Tensor] | None], Models]
    """Makes the models, on the CPU, all frozen; without encoders where these have made something of the prompt."""
    of: Callable[[C], Mapping[str, Any]]
    """What the images are of, in words and their values, such as the prompt and what tells the model's files from all others:
    images of something else are never among them."""
    how: Callable[[C], Mapping[str, Any]]
    """How they are drawn, such as size and steps: in one folder all are drawn alike. Values of either are compared as JSON."""


@dataclass(frozen=True, kw_only=True)
class Task(Generic[C]):
    """A recipe. Each function is called with what it needs and returns what is asked; none keeps state of its own."""

    config: type[C]
    """The dataclass of settings: `base: Base`, `data: Data`, and one group named after the task."""
    make_models: Callable[..., Models]
    """(settings) -> the modules, built or loaded, on the CPU in float32 unless frozen. Called once, with the global generators
    seeded. Its second argument, where `encoders` have done their work, is what they made of constants and prompts: it leaves
    them out."""
    make_optim: Callable[[Models, C], Optims]
    """The optimizers over what trains. Their learning rates are the peak; the loop scales them at each step."""
    loss_fn: Callable[[Models, Batch, Rng, C], Iterator[Loss]]
    """Yield each loss in the order of the steps. When control comes back after a `yield`, that step has been taken."""
    sample_fn: Callable[[Models, Iterable[Batch], Rng, C], Images]
    """Draw `len(rng)` images of a grid, those of `rng.numbers`, with the EMA in place; `examples` begins with a batch of as
    many fixed examples, whose `n` are rows of the data set. Called for at most a batch of the training at a time, for fewer
    where the memory does not suffice."""
    export_fn: Callable[[Models, Iterable[Batch], Path, C], str]
    """Write a folder that diffusers opens. Returns the lines of Python that load it, for `str.format`, with `{path}` for a
    variable that has the folder's name. The examples are fixed ones to measure on: all of them at the run's end, a part spread
    evenly over them at a checkpoint before it. Models that only encode may lie on the CPU."""
    encodings: BySettings[Mapping[str, Encoding]] = field(default_factory=dict)
    """column, or another name -> the frozen encoding that the loss sees in the place of the columns that it reads. Or the
    function of the settings that says so."""
    encoders: Callable[[C], Encoders | None] = lambda cfg: None
    """The models that are dropped before `make_models`; None: there are none. BadInput for what the settings and configs of
    pretrained models tell, before anything is read or written."""
    prior: Prior | None = None
    """How class images are drawn; None: this task draws none."""
    prompts: Callable[[Iterable[Batch], Rng, C], list[str]] | None = None
    """What `sample_fn` draws after, a text for each image; None: after none."""
    follows: Mapping[str, Follow] = field(default_factory=dict)
    """name -> the EMA of a model, which all functions but `make_models` see under that name beside the others. (The EMA that
    samples and exports show is made by the loop: `--base.use-ema`.)"""
    keeps: tuple[str, ...] = ()
    """Models whose persistent buffers are state of the run though nothing in them trains: checkpoints have them. (Those of
    a model that trains are in every checkpoint anyway.) A loss changes them in place while the phase is "train"; after each
    optimizer step all processes have those of the main one."""
    float32: tuple[str, ...] = ()
    """Frozen models that stay in float32, whatever the precision of the run."""
    remarks: Callable[[Models, C], Iterable[str]] = lambda models, cfg: ()
    """What there is to say of the models, a line each, said once before training."""
    judged: bool = True
    """Whether its samples are images alone, like those of its data, which `evaluate` compares with others."""
    card: Callable[[C], Mapping[str, Any]] = lambda cfg: {}
    """What the head of the export's README says beside its library: `base_model`, `license`, `pipeline_tag`, `tags`."""
    columns: BySettings[Mapping[str, Column]] = field(default_factory=dict)
    """name -> what a batch has under it, beside COLUMNS. {"caption": Column("text", setting="data.caption_column")} cannot work
    without captions. Or the function of the settings that says so."""
    resolve: Callable[[C, Facts], C] = lambda cfg, facts: cfg
    """Settings that the data decide, such as a number of classes: what it returns is `cfg` to all other functions, and in
    run.json. BadInput where the data do not fit the task."""
    multiple: Callable[[C], int] = lambda cfg: 1
    """What the sides of its images must be multiples of: aspect-ratio buckets keep to it."""


def of_settings(declared: BySettings[X], cfg: Any) -> X:
    """What a task declares, for these settings."""
    return declared(cfg) if callable(declared) else declared


@dataclass(frozen=True)
class Rng:
    """Randomness as an argument: every draw for an example is a function of (run seed, its number, purpose) alone.

    A purpose names a draw: the same purpose gives the same numbers again, another purpose independent ones, whatever else is
    drawn, in any order. "timestep" is the one that decides an example's noise level: validation spreads it evenly over the
    schedule (validate.py). Batch size, processes and devices do not enter. The generator is Philox4x32-10 (Salmon et al., 2011,
    Parallel random numbers: as easy as 1, 2, 3), keyed for each example, in torch's stateless form.
    """

    keys: Tensor
    """[B, 2] uint64, one Philox key (seed, offset) for each example; on the device that draws."""
    device: Any = "cpu"
    """Where results go."""
    numbers: tuple[int, ...] = ()
    """What each key is of: the numbers of the run's examples, or of the samples in a grid."""

    @classmethod
    def of(cls, seed: int, numbers: Iterable[int], stream: str = "train", device: Any = "cpu") -> Rng:
        """Keys for the examples with these numbers. Different streams of one run (training, samples) share no key."""
        import numpy as np
        import torch

        numbers = tuple(map(int, numbers))
        keys = np.zeros((len(numbers), 2), np.uint64)
        keys[:, 0] = [hash64(seed, stream, n) for n in numbers]
        keys = torch.from_numpy(keys)
        if torch.device(device).type == "cuda":  # where torch has the kernels
            keys = transfer(keys, device)
        return cls(keys, device, numbers)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, part: slice) -> Rng:
        """The keys of a part of the examples."""
        return replace(self, keys=self.keys[part], numbers=self.numbers[part])

    def _keys(self, purpose: str, ndim: int) -> Tensor:
        from oneloop.machine.internals import philox

        keys = philox().fold_in(self.keys, hash64(purpose))
        return keys.view(len(keys), *[1] * ndim, 2)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers, [B, *shape] float32."""
        from oneloop.machine.internals import philox

        return philox().normal(self._keys(purpose, len(shape)), (len(self), *shape)).to(self.device)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), [B, *shape] float32."""
        from oneloop.machine.internals import philox

        return philox().uniform(self._keys(purpose, len(shape)), (len(self), *shape)).to(self.device)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), [B, *shape] int64; `high` at most 2^24, the steps of a float32 in [0, 1)."""
        assert high <= 1 << 24, high
        return (self.uniform(purpose, *shape) * high).long().clamp_(max=high - 1)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One seeded CPU generator for each example, the form that diffusers' pipelines take."""
        import torch

        seeds = self._keys(purpose, 0)[:, 0].tolist()
        return [torch.Generator().manual_seed(seed & 0xFFFFFFFF) for seed in seeds]  # a CPU generator reads 32 bits


def mean(error: Tensor, batch: Batch) -> Tensor:
    """The loss of a batch, a scalar: the mean over B examples of an error [B, ...], such as a squared one, each counted by its
    `weight`, and each pixel by the `mask` where the batch has one (averaged over the pixels of the image that a pixel of a
    latent stands for). Weights of 1 change nothing: it is a mean, so that half the weight is half the gradient."""
    return (batch.get("weight", 1.0) * masked(error, batch)).mean()


def masked(error: Tensor, batch: Batch) -> Tensor:
    """The mean of each example's error [B, ...], weighted by its `mask` where there is one, [B] float32."""
    import torch.nn.functional as F

    error = error.float()
    if "mask" in batch and error.ndim == 4:
        error = error * F.adaptive_avg_pool2d(batch["mask"], error.shape[-2:])  # [B, C, h, w] * [B, 1, h, w]
    return error.flatten(1).mean(1) if error.ndim > 1 else error


def hash64(*parts: Any) -> int:
    """A 64-bit hash of the parts, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def transfer(x: Tensor, device: Any) -> Tensor:
    """A tensor on a device. For one that was just made on the host nothing waits: the copy to a GPU is from pinned memory."""
    import torch

    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def on_host(x: Tensor) -> Tensor:
    """The values of a tensor, to be read by the host: as they were before it went to its device, where that is known; then
    nothing waits for the device."""
    return getattr(x, "host", x)


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, behind the wrapper that reduces gradients across processes."""
    return getattr(module, "module", module) if type(module).__name__ == "DistributedDataParallel" else module


def _fixed(module: nn.Module) -> nn.Module:
    """The module with parameters that require no gradient: new module objects around the same storage and the same buffers.

    The original is not touched, so there is nothing to undo; and what recomputes activations in the backward pass calls these
    objects again, and so does what the forward pass did. A `forward` that closes over the original escapes; the loop refuses
    the gradients that it leaves there.
    """
    from torch import nn

    modules = list(module.modules())
    trained = (p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad)
    twins: dict[int, Any] = {id(m): m.__new__(type(m)) for m in modules}
    twins |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in trained}

    def twin(x: Any) -> Any:
        kind = type(x)
        if kind in (dict, OrderedDict):
            return kind([(k, twin(v)) for k, v in x.items()])
        if kind in (list, tuple):
            return kind(map(twin, x))
        if kind is partial:
            return partial(twin(x.func), *map(twin, x.args), **twin(x.keywords))
        return MethodType(x.__func__, twin(x.__self__)) if kind is MethodType else twins.get(id(x), x)

    for m in modules:
        twins[id(m)].__setstate__({k: v if k == "_buffers" else twin(v) for k, v in m.__getstate__().items()})
    return twins[id(module)]


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The module as a fixed function: gradients flow through what it yields to its input, none is collected on its parameters.

    For a loss that looks at another optimizer's module, as a generator's loss looks at the discriminator. It holds beyond the
    context, in a backward pass that recomputes activations. It runs uncompiled.
    """
    yield _fixed(unwrap(module))


@contextlib.contextmanager
def without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The base inside a module with peft adapters, as a fixed function: the reference model of preference training (Rafailov et
    al. 2023, arXiv:2305.18290, section 4) at no memory of its own. The module itself keeps its adapters meanwhile.

    Raises:
        ValueError: it has no adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = _fixed(unwrap(module))
    layers = [m for m in base.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not layers:
        raise ValueError(f"tasks.without_adapters: this {type(base).__name__} has no peft adapter")
    for layer in layers:
        layer.enable_adapters(False)
    yield base
