"""Settings: `Base` is the run and `Data` the examples; each task adds a group of its own.

Groups are frozen and check themselves; they never change what they were given. Nothing here imports torch. How the command line
and settings files become settings: settings/command_line.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from oneloop.settings.ranges import (
    Amount,
    BadInput,
    Count,
    CountOrZero,
    Folder,
    Images,
    Name,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    Words,
    check,
    hints,
    require,
)
from oneloop.settings.templates import expanded

T = TypeVar("T")
Live = Annotated[T, "live"]
"""A setting that may differ between two starts of one run. A change in any other would make another run: it is refused."""


@dataclass(frozen=True)
class Base:
    """The run: its length, its precision, what it writes and where."""

    output_dir: Live[Folder | None] = None
    """Folder for checkpoints, samples, logs and the export. None: runs/<task>. The same folder again continues the run."""
    seed: Seed = 0
    """Together with the settings this decides everything: weights, order, crops, noise."""
    num_epochs: Live[Annotated[float, Range(0, 10**6, without=0)]] = 10.0
    """Length as passes over the data; fractions are allowed. Ignored where max_train_steps is given."""
    max_train_steps: Live[Count | None] = None
    """Length as optimizer steps."""
    gradient_accumulation_steps: Live[Annotated[int, Range(1, 10**6)]] = 1
    """Batches added up for one optimizer step."""
    mixed_precision: Live[Literal["auto", "no", "fp16", "bf16"]] = "auto"
    """auto: bf16 where the hardware computes it, else no."""
    weights: Literal["float32", "bf16"] = "float32"
    """What holds the weights that train. bf16, with mixed_precision bf16: 4 bytes fewer for each, 2 of the weight and 2 of its
    gradient, and no casts; steps are taken in float32 and rounded at random, right on average. Samples and exports are bf16."""
    compile: Live[bool] = False
    """Compile what trains, by torch.compile: quicker steps after a start that says what it cost and when it is repaid. Sums
    have another order: the weights end close to those of a run without it, not equal to them."""
    attention: Live[
        Literal["auto", "native", "flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "flex", "xformers"]
        | Literal["_native_cudnn", "_native_efficient", "_native_flash", "_native_math"]
    ] = "auto"
    """Kernels of attention, by diffusers' names, for models that have the choice: transformers. auto: PyTorch's own."""
    deterministic: Live[bool] = False
    """Kernels whose sums have one order, where a GPU has several."""
    gradient_checkpointing: Live[bool] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    fused_backward_pass: Live[bool] = False
    """Each parameter steps in the backward pass, when its gradient is complete, and lets go of it: gradients take no memory.
    The same bits as without it; with max_grad_norm 0, one process, and neither accumulation, fp16 nor skipped updates."""
    max_grad_norm: Live[Amount] = 1.0
    """Gradients are scaled down to this norm, for each optimizer; 0 leaves them."""
    scale_lr: Live[bool] = False
    """Multiply the learning rate by batch x accumulation x processes."""
    lr_scheduler: Live[
        Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    ] = "cosine"
    """Shape of the learning rate over the run: a function of the optimizer step alone."""
    lr_warmup_steps: Live[CountOrZero | None] = None
    """Optimizer steps from zero to the full rate; unused by `constant`. None: a twentieth of the run, at most 500."""
    lr_num_cycles: Live[Count] = 1
    """Restarts of cosine_with_restarts."""
    lr_power: Live[Annotated[float, Range(0, 1000)]] = 1.0
    """Power of polynomial."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights; samples and exports use it."""
    offload_ema: Live[bool] = False
    """Keep the average in the machine's memory, not the GPU's: the same bits, for two copies a step."""
    ema_decay: Live[ShareBelowOne] = 0.9999
    """Largest decay of the average."""
    ema_power: Live[Annotated[float, Range(0, 1000)]] = 0.75
    """The decay after k updates is 1 - (1 + k) ** -ema_power: short memory early, long memory late."""
    ema_lengths: tuple[Annotated[float, Range(0.001, 0.28)], ...] = ()
    """Lengths of averages that checkpoints hold beside it, such as 0.05 0.1: `python loop.py ema` makes one of any length of
    them, after the run (docs/from-scratch.md). A length is a share of the steps so far, as Karras et al. 2024 measure it."""
    logger: Live[tuple[Name, ...]] = ("tensorboard",)
    """Trackers known to accelerate, such as tensorboard wandb; several may be named, and `none` is none."""
    logging_steps: Live[Count] = 10
    """Optimizer steps between two lines of metrics."""
    validation_steps: Live[CountOrZero] = 500
    """Optimizer steps between two validations, a grid of samples and the loss on data.validation_split; 0: only at the end."""
    evaluate_steps: Live[CountOrZero] = 0
    """Optimizer steps between two judgements of 256 samples by what `evaluate` measures, in the log, the report and the
    trackers (docs/evaluating.md); 0: none."""
    num_samples: Live[Images] = 16
    """Images in a grid; the same seeds each time."""
    checkpointing_steps: Live[Count] = 500
    """Optimizer steps between two checkpoints; there is always one at the end."""
    checkpoints_total_limit: Live[Count | None] = 3
    """Checkpoints kept; older ones are removed after the new one is committed. None: all."""
    resume_from_checkpoint: Live[Name] = "latest"
    """latest, none (start over: refused where the folder holds a run), or the path of a checkpoint."""
    validate_first: Live[bool] = False
    """Validate before the first step too, where validation_steps is more than 0."""
    max_skipped_updates: Live[CountOrZero] = 0
    """Updates with a non-finite loss or gradient that are skipped before the run stops with exit code 3."""
    check: Live[bool] = False
    """Only open every image and say what is found: sizes, captions, labels, duplicates, broken files."""
    dry_run: Live[bool] = False
    """Only say what the run would take in time, memory and disk, from a few real steps; nothing is left behind."""
    assume_gpu: Live[Annotated[float, Range(0, 100_000, without=0)] | None] = None
    """With dry_run: say whether the run fits on a GPU of so many GB, which need not be there, and what would make it fit."""
    profile_steps: Live[CountOrZero] = 0
    """Trace so many of the first steps with torch's profiler, into the output folder's profile."""
    push_to_hub: Live[bool] = False
    """Upload the export at the end; the login is taken from the environment or `hf auth login`."""
    hub_model_id: Live[Name | None] = None
    """Repository to upload to. None: the output folder's name, in your own account."""

    def __post_init__(self):
        check(self, "base")
        narrow = self.weights == "float32" or self.mixed_precision == "bf16"
        require(narrow, "base.weights", self.weights, "--base.mixed-precision bf16 beside it")
        several = len(set(self.ema_lengths)) == len(self.ema_lengths) and (self.use_ema or not self.ema_lengths)
        require(several, "base.ema_lengths", self.ema_lengths, "different lengths, and --base.use-ema")
        if self.fused_backward_pass:
            beside = "with --base.fused-backward-pass, which never has all gradients at once"
            for name, only in {"max_grad_norm": 0, "gradient_accumulation_steps": 1, "max_skipped_updates": 0}.items():
                require(getattr(self, name) == only, f"base.{name}", getattr(self, name), f"{only} {beside}")
            require(self.mixed_precision != "fp16", "base.mixed_precision", "fp16", f"auto, bf16 or no {beside}")


@dataclass(frozen=True)
class Part:
    """One more source of the examples, beside that which the other settings name: what is None is as there."""

    train_data_dir: Folder | None = None
    dataset_name: Name | None = None
    stream: Name | None = None
    dataset_config_name: Name | None = None
    split: Name | None = None
    image_column: Name | None = None
    caption_column: Name | None = None
    label_column: Name | None = None
    conditioning_column: Name | None = None
    conditioning_data_dir: Folder | None = None
    mask_column: Name | None = None
    mask_data_dir: Folder | None = None
    max_train_samples: Count | None = None
    trigger: Words | None = None
    repeats: Annotated[float, Range(0, 10**6, without=0)] = 1.0
    """How often a pass of the run has each of its images; fractions are exact over several passes."""
    share: Annotated[float, Range(0, 1, without=1)] | None = None
    """Share of the run's examples that are its own, in place of repeats."""
    loss_weight: Amount = 1.0
    """How much the loss of its examples counts."""

    def __post_init__(self):
        check(self, "data.mixture")
        alone = self.share is None or self.repeats == 1
        require(alone, "data.mixture", {"repeats": self.repeats, "share": self.share}, "repeats or a share, above 0")
        require(self.share != 0, "data.mixture", {"share": self.share}, "a share above 0")
        named = [self.train_data_dir, self.dataset_name, self.stream]
        require(any(named), "data.mixture", asdict(self), "the train_data_dir, dataset_name or stream of a source")


@dataclass(frozen=True)
class Data:
    """The examples: where they come from, how they are cut, how many make a batch."""

    dataset_name: Live[Name] = "shapes"
    """`shapes` (drawn by the program itself, nothing to download), a name on the hub, or a local data set's folder."""
    dataset_config_name: Live[Name | None] = None
    """Configuration of the data set, where it has several."""
    split: Live[Name] = "train"
    """Split to train on."""
    validation_split: Live[Name | None] = None
    """What is held out of the training to measure the loss on: the name of another split, or a fraction, such as 0.1:
    that share of the rows, rounded, one of every ten by a hash of its number. Where rows are appended, all of those held out
    but the last stay. Of a stream: rows of few shards, in a keyed order. None: nothing."""
    train_data_dir: Live[Folder | None] = None
    """Folder of images, instead of dataset_name, in every format that PIL reads, and HEIC with pillow-heif: captions from
    metadata.jsonl, metadata.csv or a .txt beside each image, labels from subfolders. Hidden files are left out."""
    stream: Live[Name | None] = None
    """Shards that are read while training, instead of dataset_name, of a set larger than memory or disk: parquet with images in
    it, as the hub has them, or WebDataset tars. A folder, a pattern such as shards/*.parquet or shards/{000..127}.tar, or an
    index of wids (.json), here or behind http://, hf:// and whatever else fsspec opens."""
    stream_lanes: Annotated[int, Range(1, 65_536)] = 8
    """Parts into which the streamed rows are cut; batches take turns among them. Where the number of processes divides it, each
    process reads its own shards alone."""
    stream_window: Annotated[int, Range(1, 65_536)] = 4
    """Shards of a lane whose rows are mixed: so many for each lane are read at a time."""
    stream_memory: Live[Annotated[float, Range(0, 2**20)]] = 4.0
    """GiB in each process for shards that were read, shared by its loader workers; those in use are there in any case."""
    cache_dir: Live[Folder | None] = None
    """Where downloads and prepared data sets are kept. None: the library's own place."""
    validation_data_dir: Live[Folder | None] = None
    """Folder of images to measure the loss on, in place of validation_split."""
    max_train_samples: Live[Count | None] = None
    """Train on as many images, spread evenly over the set; of a stream, on those of few shards. None: all."""
    mixture: Live[tuple[Part, ...]] = ()
    """More sources, each an object in JSON, or a list of objects in a settings file: {"train_data_dir": "cats", "repeats": 3}.
    Also the other settings that say where images are, a stream beside a stream, trigger, share (of the run's examples) and
    loss_weight."""
    class_data_dir: Live[Folder | None] = None
    """Folder of images of the class, half of the examples, which keep the model from forgetting what else is one."""
    num_class_images: Live[Annotated[int, Range(0, 10**6)]] = 0
    """At least so many images of class_data_dir are trained on: all its own, and those that it lacks, which are drawn of
    class_prompt by the model as it was, before training, and stay there for other runs. 0: what it has, and none is drawn."""
    class_prompt: Live[Words | None] = None
    """Their caption, such as "a photo of a dog", or what stands before it. None: their own captions."""
    prior_loss_weight: Amount = 1.0
    """How much the loss of an example of class_data_dir counts."""
    num_shapes: Annotated[int, Range(1, 10**7)] = 2560
    """Images in the embedded `shapes`."""
    image_column: Live[Name | None] = None
    """Column of images. None: found by its type."""
    caption_column: Live[Name | None] = None
    """Column of captions, one or a list for each image. None: found by its usual names."""
    conditioning_column: Live[Name | None] = None
    """Column of the images that a task is conditioned on."""
    conditioning_data_dir: Live[Folder | None] = None
    """Folder with conditioning images of the same file names, in place of a column."""
    conditioning: Literal["edges", "greyscale", "blur", "inpainting", "depth", "pose"] | None = None
    """What conditioning images are made of the images by, in place of a column: Canny's edges, greyscale, blur; depth or pose,
    by a model; or, to learn inpainting, hiding what is white in masks, or parts that are drawn for each example."""
    conditioning_model: Live[Name | None] = None
    """The model that depth or pose are made by: a folder, or a name on the hub, of any model of transformers for depth
    estimation, such as Depth Anything, or of VitPose."""
    mask_column: Live[Name | None] = None
    """Column of masks, in grey: the loss counts what is white. With conditioning inpainting: what is white is hidden."""
    mask_data_dir: Live[Folder | None] = None
    """Folder with masks of the same file names, in place of a column."""
    mask_from_alpha: bool = False
    """The mask is the image's own transparency: the loss counts what is opaque."""
    mask_minimum: Share = 0.0
    """How much the loss counts what is black in a mask."""
    trigger: Words | None = None
    """Words put in front of every caption, with a space between; alone where an image has no caption. `{label}` in them is the
    name of the image's class."""
    shuffle_tags: bool = False
    """Captions are tags: their order is drawn anew for every example."""
    keep_tags: CountOrZero = 0
    """The first tags, which are neither moved nor left out."""
    tag_dropout: Share = 0.0
    """Probability of each other tag to be left out."""
    tag_separator: Words = ","
    """What stands between tags."""
    caption_templates: tuple[Words, ...] = ()
    """One is drawn for every example, and the caption put where it has {}, as in "a photo of {}". `object` and `style` are sets
    of such sentences about a subject or a style (settings/templates.py)."""
    caption_dropout: Share = 0.0
    """Share of the examples whose caption is replaced by the empty one, which guidance compares with."""
    label_column: Live[Name | None] = None
    """Column of class labels. None: found by its type or usual names."""
    resolution: Annotated[int, Range(1, 16_384)] = 32
    """Side of the square images in pixels: the shorter side is resized to it, then a square is cut. Transparent images
    are laid on white. With buckets: the root of their area."""
    more_resolutions: tuple[Annotated[int, Range(1, 16_384)], ...] = ()
    """Further resolutions below it, such as 512 768, at each of which the run sees every image equally often; where one would
    enlarge an image, the next lower one has it instead."""
    buckets: bool = False
    """Aspect-ratio buckets: each image gets the size of about resolution squared of the nearest ratio; a batch has one size."""
    bucket_ratio: Annotated[float, Range(1, 16)] = 2.0
    """The largest ratio of a bucket's sides; what is longer is cropped."""
    bucket_multiple: Annotated[int, Range(1, 1024)] | None = None
    """What the sides of a bucket are multiples of. None: of what the model needs, doubled up to a 16th of the resolution."""
    bucket_block: Annotated[int, Range(1, 65_536)] | None = None
    """Examples in a row that have one size; any batch size that divides it trains on the same examples. None: the batch size
    with which the run began."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """How images are resized, with antialiasing."""
    center_crop: bool = False
    """Cut the square from the middle rather than from a random place."""
    random_flip: bool = False
    """Mirror every second image, at random."""
    train_batch_size: Live[Annotated[int, Range(1, 65_536)]] = 32
    """Examples in a batch, for each process."""
    dataloader_num_workers: Live[Annotated[int, Range(0, 1024)]] = 0
    """Processes that read images beside the training, where the decoded set is larger than memory_budget."""
    skip_broken: Live[bool] = False
    """Leave out images that cannot be read, and list them in the output folder's broken.txt. The run's length counts them."""
    memory_budget: Live[Annotated[float, Range(0, 2**20)]] = 2.0
    """GiB for decoded images, and as much for encoded ones. A set that fits is decoded once and kept; of a larger one every
    batch is read from the disk."""
    example_cache: Live[Name] = "auto"
    """Where what is made of the examples once is kept for the next start: decoded images, and what frozen encoders make of
    images and captions. A folder, which several runs may share; auto: `examples` in cache_dir, or else in the output folder;
    no: images are decoded at each start and encoded in every step. Images that are cut at random are encoded in every step
    anyway (center_crop cuts from the middle)."""

    def __post_init__(self):
        check(self, "data")
        share, expected = fraction(self.validation_split), "the name of a split, or a fraction between 0 and 1"
        require(share is None or 0 < share < 1, "data.validation_split", self.validation_split, expected)
        cache = self.example_cache
        require(self.tag_separator != "", "data.tag_separator", "", "at least a character")
        for template in self.templates():
            require("{}" in template, "data.caption_templates", template, "a text with {} in it, or object, or style")
        for side in self.more_resolutions:
            require(side < self.resolution, "data.more_resolutions", side, f"less than the resolution, {self.resolution}")
        if self.num_class_images:
            plain = "none with --data.num-class-images, whose images are drawn of data.class_prompt as it is"
            require(not self.caption_templates, "data.caption_templates", self.caption_templates, plain)
            beside, prompt = "with --data.num-class-images", self.class_prompt
            require(self.class_data_dir is not None, "data.class_data_dir", None, f"a folder {beside}")
            drawable = bool(prompt) and "{label}" not in prompt
            require(drawable, "data.class_prompt", prompt, f"what to draw {beside}, such as 'a photo of a dog'")
        share = sum(part.share or 0 for part in self.parts())
        require(share < 1, "data.mixture", share, "shares below 1 altogether; the rest is that of the other sources")
        alone = ("train_data_dir", "more_resolutions", "conditioning_data_dir", "mask_data_dir")
        for name in alone if self.stream is not None else ():
            value = getattr(self, name)
            require(not value, f"data.{name}", value, "nothing beside --data.stream, whose images have not been seen")
        given = {k: getattr(self, k) for k in ("conditioning_column", "conditioning_data_dir", "conditioning")}
        several = {k: value for k, value in given.items() if value is not None}
        require(len(several) < 2, f"data.{next(iter(several), '')}", [*several.values()], "one source of conditioning images")
        by_model, asked = self.conditioning in ("depth", "pose"), self.conditioning
        model, expected = self.conditioning_model, f"a model's folder, or its name on the hub, for --data.conditioning {asked}"
        require(not by_model or model is not None, "data.conditioning_model", model, expected)
        alone = "None: depth and pose alone, of --data.conditioning, are made by a model"
        require(by_model or model is None, "data.conditioning_model", model, alone)
        mask = [self.mask_column, self.mask_data_dir, self.mask_from_alpha or None]
        require(len(mask) - mask.count(None) < 2, "data.mask_column", mask, "one source of masks")
        is_file = cache not in ("auto", "no") and os.path.isfile(os.path.expanduser(cache))
        require(not is_file, "data.example_cache", cache, "auto, no, or the path of a folder")

    def templates(self) -> tuple[str, ...]:
        """The caption templates, those of a set in the place of its name."""
        return expanded(self.caption_templates)

    def parts(self) -> tuple[Part, ...]:
        """The further sources, class images first."""
        if self.class_data_dir is None:
            return self.mixture
        part = Part(self.class_data_dir, trigger=self.class_prompt or "", share=0.5, loss_weight=self.prior_loss_weight)
        return (part, *self.mixture)


def fraction(given: str | None) -> float | None:
    """The number in a setting that may as well be a name."""
    with contextlib.suppress(TypeError, ValueError):
        return float(given)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What others ask of settings.


def task_group(config: Any) -> str:
    """The name of the task's own group in its `Config` (a class or an instance): the one beside `base` and `data`."""
    return next(f.name for f in fields(config) if f.name not in ("base", "data"))


def read_model_config(path: str, flag: str, kind: str) -> dict[str, Any]:
    """The diffusers config of a `kind` of model at a path: a JSON file, or a folder with a config.json.

    Raises:
        BadInput: there is none, or it is of another class.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is no file")
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"--{flag} {path}: cannot read {file} as JSON: {error}") from None
    if not isinstance(config, dict) or config.get("_class_name", kind) != kind:
        raise BadInput(f"--{flag} {path}: expected an object, the config of a model whose _class_name is {kind}")
    return config


def group_type(config: type, name: str) -> type:
    """The dataclass behind one group of a `Config`."""
    return hints(config)[name]


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain settings."""
    return json.loads(json.dumps(asdict(cfg)))


def portable(value: T, cfg: Any) -> T:
    """Settings or a text, as others may read them: each path of this machine in the settings of `cfg` is its last name.

    `value` is made of dicts, lists and texts, such as `to_dict(cfg)`; in a text a path may stand as Python or JSON quotes it.
    """
    pairs: dict[str, str] = {}
    for path in filter(is_path, texts(to_dict(cfg))):
        for form in (path, os.path.expanduser(path), os.path.abspath(os.path.expanduser(path))):
            name = os.path.basename(os.path.abspath(os.path.expanduser(path)))
            pairs |= {quote(form): quote(name) for quote in (str, lambda x: repr(x)[1:-1], lambda x: json.dumps(x)[1:-1])}

    def shorten(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: shorten(x) for key, x in inner.items()}
        if isinstance(inner, list):
            return list(map(shorten, inner))
        for path in sorted(pairs, key=len, reverse=True) if isinstance(inner, str) else ():
            inner = inner.replace(path, pairs[path]) if os.sep in path or inner == path else inner
        return inner

    return shorten(value)


def texts(value: Any) -> list[str]:
    """Every text in nested dicts and lists."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for x in inner for text in texts(x)]


def is_path(setting: str) -> bool:
    """Whether a text names a place on this machine: it is absolute, and its first folder is there, or it has several parts and
    is there. A name on the hub and a name alone are no paths."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = Path(setting).expanduser()
        return len(path.parts) > 1 and (Path(*path.parts[:2]) if path.is_absolute() else path).exists()
    return False


def run_file(cfg: Any) -> dict[str, Any]:
    """What run.json holds: the settings, and the import path of a task outside tasks/."""
    module = type(cfg).__module__
    return ({} if module.startswith("oneloop.tasks.") else {"task": module}) | to_dict(cfg)


def example_cache(cfg: Any) -> Path | None:
    """The folder for what is made of the examples once; None: nothing is kept."""
    given = cfg.data.example_cache
    if given == "no":
        return None
    return (Path(cfg.data.cache_dir or cfg.base.output_dir) / "examples" if given == "auto" else Path(given)).expanduser()


def trackers(base: Base) -> list[str]:
    """The trackers that the settings name."""
    return [logger for logger in base.logger if logger != "none"]


def changes(old: dict[str, Any], cfg: Any) -> list[str]:
    """The settings in which `old` (as `to_dict` wrote it) and `cfg` would be two different runs, as 'flag: old -> new'."""
    new, differences = to_dict(cfg), []
    for group in new:
        known = hints(group_type(type(cfg), group))
        for name, value in new[group].items():
            before = old.get(group, {}).get(name, value)  # a setting that a newer version brought
            if before != value and "live" not in getattr(known[name], "__metadata__", ()):
                differences.append(f"--{group}.{name}".replace("_", "-") + f" was {before!r} and is now {value!r}")
    return differences


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143} | ({signal.SIGUSR1: 75} if hasattr(signal, "SIGUSR1") else {})
"""Signal -> the exit code of a run that it stopped; 75 is: saved, wants to be run again."""


def one_line(text: str, most: int = 2000) -> str:
    """The text in one line of at most `most` printable characters; what is too long lacks its middle."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most * 2 // 3]} ... {line[5 - most // 3 :]}"


def fail(error: BaseException | str, code: int, everywhere: bool = False) -> NoReturn:
    """One line on standard error, from one process of several unless it is not of all, and out."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if everywhere or not rank.isdecimal() or int(rank) == 0:
        print(one_line(f"error: {error}"), file=sys.stderr)
    raise SystemExit(code)
