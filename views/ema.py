"""Make an average of another length of a finished run, from those that its checkpoints hold.

    python loop.py edm --base.ema-lengths 0.05 0.1 --base.checkpoints-total-limit None --base.output-dir runs/edm
    python loop.py ema runs/edm 0.07 --to runs/edm-0.07
    python loop.py evaluate runs/edm-0.07

Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv:2312.02696, section 3): which
length is best is known after training, and every length is close to a sum of two, stored a few times. The result is a run's
folder with one checkpoint, which `sample`, `evaluate` and `compare` take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from oneloop.configs import BadInput, Name, Range, check, require
from oneloop.views import check_writable


@dataclass(frozen=True)
class Settings:
    """Make an average of another length, of a run with `--base.ema-lengths`."""

    folder: Positional[Name]
    """The output folder of a run, or one checkpoint-N in it: the average is of that step, made of all checkpoints up to it."""
    length: Positional[Annotated[float, Range(0.001, 0.28)]]
    """Its length, a share of the steps so far: the standard deviation of the steps that it averages."""
    to: Name
    """A new folder, which becomes that of a run whose samples and export are of this average."""
    task: Name | None = None
    """The task that trained, where it is not one of oneloop's: its import path."""

    def __post_init__(self):
        check(self)
        if not Path(self.folder).expanduser().is_dir():
            raise BadInput(f"{self.folder}: there is no such folder; expected a run's output folder or a checkpoint-N in it")
        require(not Path(self.to).expanduser().exists(), "to", self.to, "a name that is not taken")
        check_writable(Path(self.to).expanduser())


def stored(last: Path, facts: dict[str, Any]) -> Iterator[tuple[Path, int]]:
    """The checkpoints of the run up to this one, of this one's settings, and their steps; damaged ones are left out."""
    from oneloop import checkpoint

    for path in sorted(last.parent.glob("checkpoint-*")):
        try:
            manifest = facts if path == last else checkpoint.verify(path)
        except checkpoint.Damaged as error:
            print(f"left out: {error}")
            continue
        same = all(manifest.get(key) == facts.get(key) for key in ("task", "data", "models"))
        same = same and manifest["settings"]["base"].get("ema_lengths") == facts["settings"]["base"]["ema_lengths"]
        if same and 0 < manifest["step"] <= facts["step"]:
            yield path, manifest["step"]


def main(settings: Settings) -> None:
    """Make the average, and say where it is and how near.

    Raises:
        BadInput: the folder holds no run with such averages. StorageError: the result could not be written.
    """
    from oneloop.views.sample import opened

    saved, facts, task, cfg = opened(settings.folder, settings.task)
    lengths, to = cfg.base.ema_lengths, Path(settings.to).expanduser()
    if not lengths:
        raise BadInput(f"{settings.folder}: its checkpoints hold no averages; expected a run with --base.ema-lengths 0.05 0.1")

    from oneloop.training import ema

    each = sorted(stored(saved, facts), key=lambda one: one[1])
    pairs = [(path, step, length) for path, step in each for length in lengths]
    factors, apart = ema.coefficients([pair[1:] for pair in pairs], facts["step"], settings.length)
    files = [(path / "state" / "ema.safetensors", f"{length}/") for path, _, length in pairs]
    write(saved, facts, task, replace(cfg, base=replace(cfg.base, output_dir=str(to))), list(zip(factors, files, strict=True)))
    made = f"made of {len(pairs)} averages in {len(each)} checkpoints, which come within {apart:.1%} of it"
    print(f"{to}: the average of length {settings.length:g} at step {facts['step']}, {made}")


def write(saved: Path, facts: dict[str, Any], task: Any, cfg: Any, terms: list[tuple[float, tuple[Path, str]]]) -> None:
    """A folder with the checkpoint `saved`, whose average is the sum of the terms: factor, file and prefix of the values."""
    import torch
    from safetensors import safe_open

    from oneloop import checkpoint, configs, data
    from oneloop.machine import placement
    from oneloop.views.loading import load_file
    from oneloop.views.sample import Unopened, loaded

    out = Path(cfg.base.output_dir)
    quiet = replace(cfg, base=replace(cfg.base, logger=("none",), push_to_hub=False, compile=False))
    accelerator, models, weights, shown = loaded(saved, task, quiet)
    for key, value in shown.items():
        value.zero_()
        for factor, (file, prefix) in terms:
            with safe_open(file, "pt") as tensors:
                value.add_(tensors.get_tensor(prefix + key).to(value.device), alpha=factor)

    def export(folder: Path) -> None:
        examples = data.Fixed(Unopened(task, quiet), cfg.data.train_batch_size, accelerator.device)
        with placement.at_rest(models, weights, shown), torch.no_grad():
            lines = task.export_fn(models, examples, folder, cfg)
        (folder / "load.py").write_text(load_file(lines), "utf-8")

    manifest = {key: value for key, value in facts.items() if key not in ("files", "sha256")}
    with checkpoint.lock(out, accelerator), checkpoint.Saves(accelerator, out, None, lambda text: None) as saves:
        saves.save(facts["step"], manifest | {"settings": configs.to_dict(cfg)}, export)
        saves.settle()
        checkpoint.write(out / "run.json", json.dumps(configs.run_file(cfg), indent=2) + "\n")
