"""Make an average of another length of a finished run, from those that its checkpoints hold.

    python loop.py edm --base.ema-lengths 0.05 0.1 --base.checkpoints-total-limit 100 --base.output-dir runs/edm
    python loop.py ema runs/edm --length 0.07 --to runs/edm-0.07
    python loop.py evaluate runs/edm-0.07

Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv:2312.02696, section 3): which
length is best is known after training, and every length is close to a sum of two, stored a few times. The result is a run's
folder with one checkpoint, which `sample`, `evaluate` and `compare` take, and which cannot be trained on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from oneloop.configs import BadInput, Name, Range, changes, check, require
from oneloop.views import check_writable

FAR, TOO_FAR = 0.1, 0.5
"""Distances of the sum from the average that is asked for, as a share of it: to be said, and to be refused."""


@dataclass(frozen=True)
class Settings:
    """Make an average of another length, of a run with `--base.ema-lengths`."""

    folder: Positional[Name]
    """The output folder of a run, or one checkpoint-N in it: the average is of that step, made of all checkpoints up to it."""
    length: Annotated[float, Range(0.001, 0.28)]
    """Its length, a share of the steps so far: the standard deviation of the steps that it averages."""
    to: Name
    """A new folder, which becomes that of a run whose samples and export are of this average."""
    task: Name | None = None
    """The task that trained, where it is not one of oneloop's: its import path."""

    def __post_init__(self):
        check(self)
        folder, to = (Path(name).expanduser() for name in (self.folder, self.to))
        if not folder.is_dir():
            raise BadInput(f"{self.folder}: there is no such folder; expected a run's output folder or a checkpoint-N in it")
        run = folder.resolve().parent if folder.name.startswith("checkpoint-") else folder.resolve()
        free = not to.exists() and not to.is_symlink() and not to.resolve().is_relative_to(run)
        require(free, "to", self.to, "a name that is not taken, outside the run")
        check_writable(to)


def stored(last: Path, facts: dict[str, Any], cfg: Any) -> Iterator[tuple[Path, int]]:
    """This checkpoint and those beside it that are of its run and before it, with their steps. What is left out is said."""
    from oneloop import checkpoint

    yield last, facts["step"]
    for path in sorted(last.parent.glob("checkpoint-*")):
        try:
            manifest = checkpoint.read(path)
            if manifest["step"] >= facts["step"]:
                continue
            checkpoint.verify(path)
        except checkpoint.Damaged as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        same = all(manifest.get(key) == facts.get(key) for key in ("task", "data", "stream", "made_of"))
        if not same or changes(manifest["settings"], cfg):
            print(f"left out: {path} is of another run", file=sys.stderr)
        elif manifest["step"]:
            yield path, manifest["step"]


def main(settings: Settings) -> None:
    """Make the average, and say where it is and how near.

    Raises:
        BadInput: the folder holds no run with such averages, or none that come near. StorageError: the result could not be
            written.
    """
    from oneloop.views.sample import opened

    saved, facts, task, cfg = opened(settings.folder, settings.task, "ema")
    lengths, to = cfg.base.ema_lengths, Path(settings.to).expanduser()
    if not lengths:
        raise BadInput(f"{settings.folder}: its checkpoints hold no averages; expected a run with --base.ema-lengths 0.05 0.1")

    from oneloop.training import ema

    each = list(stored(saved, facts, cfg))
    pairs = [(path, step, length) for path, step in each for length in lengths]
    factors, apart = ema.coefficients([pair[1:] for pair in pairs], facts["step"], settings.length)
    where = f"{len(each)} checkpoint{'s' * (len(each) > 1)}"
    near = f"the averages of length {', '.join(map(str, lengths))} in {where} come within {apart:.1%} of it"
    require(apart <= TOO_FAR, "length", settings.length, f"one that they can make: {near}")
    terms: dict[Path, dict[str, float]] = {}
    for factor, (path, _, length) in zip(factors, pairs, strict=True):
        terms.setdefault(path / "state" / "ema.safetensors", {})[f"{length}/"] = factor
    write(saved, facts, task, replace(cfg, base=replace(cfg.base, output_dir=str(to))), terms)
    warning = "warning: not near: " if apart > FAR else ""
    print(f"{to}: the average of length {settings.length:g} at step {facts['step']}; {warning}{near}")


def write(saved: Path, facts: dict[str, Any], task: Any, cfg: Any, terms: dict[Path, dict[str, float]]) -> None:
    """A folder with the checkpoint `saved`, whose average is the sum of the terms: file -> prefix of values in it -> factor."""
    import torch
    from safetensors import safe_open

    from oneloop import checkpoint, configs, data
    from oneloop.machine import placement
    from oneloop.views.loading import load_file
    from oneloop.views.sample import Unopened, loaded

    out = Path(cfg.base.output_dir)
    quiet = replace(cfg, base=replace(cfg.base, logger=("none",), push_to_hub=False, compile=False))
    accelerator, models, weights, shown = loaded(saved, task, quiet)
    for value in shown.values():
        value.zero_()
    for file, factors in terms.items():
        with safe_open(file, "pt") as tensors:
            for prefix, factor in factors.items():
                for key, value in shown.items():
                    value.add_(tensors.get_tensor(prefix + key).to(value.device), alpha=factor)

    def export(folder: Path) -> None:
        examples = data.Fixed(Unopened(task, quiet), cfg.data.train_batch_size, accelerator.device)
        with placement.at_rest(models, weights, shown), torch.no_grad():
            lines = task.export_fn(models, examples, folder, cfg)
        (folder / "load.py").write_text(load_file(lines), "utf-8")

    manifest = {key: value for key, value in facts.items() if key not in ("files", "sha256")}
    with checkpoint.lock(out, accelerator, "--to"), checkpoint.Saves(accelerator, out, None, lambda text: None) as saves:
        saves.save(facts["step"], manifest | {"settings": configs.to_dict(cfg)}, export)
        saves.settle()
        checkpoint.write(out / "run.json", json.dumps(configs.run_file(cfg), indent=2) + "\n")
