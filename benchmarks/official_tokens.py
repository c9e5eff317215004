"""The official textual inversion scripts beside `textual_inversion`: the same checkpoint, image, noise and timesteps.

    python -m benchmarks.official_tokens CHECKOUT_OF_DIFFUSERS [textual_inversion textual_inversion_sdxl]

Runs them on the tests' tiny checkpoints, with the draws of the task handed to the script. Compared are the loss of every step
and the vectors after the last. The script's mirroring and its choice of a sentence are switched off, and so is the task's
clipping, which the script has not.
"""

from __future__ import annotations

import argparse
import collections
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STEPS, SIDE, RATE = 12, 32, 5e-3
SCRIPTS = {"textual_inversion": "sd", "textual_inversion_sdxl": "sdxl"}


def run_theirs(folder: Path, script: Path) -> None:
    """The script, with the draws of the task."""
    import random

    import diffusers.utils
    import torch
    import torchvision
    from accelerate import Accelerator
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    from oneloop.tasks import Rng

    counts, losses, backward = collections.Counter(), [], Accelerator.backward
    flip, randint = torchvision.transforms.RandomHorizontalFlip, torch.randint

    def of(purpose: str) -> Rng:
        counts[purpose] += 1
        return Rng.of(0, [counts[purpose] - 1])

    def noted(self: Any, loss: torch.Tensor, **more: Any) -> None:
        losses.append(loss.item())
        backward(self, loss, **more)

    def integers(low: int, high: int, *rest: Any, **more: Any) -> torch.Tensor:
        return of("timestep").integers("timestep", high) if high == 1000 else randint(low, high, *rest, **more)

    torch.randn_like, torch.randint = lambda x, **_: of("noise").normal("noise", *x.shape[1:]), integers
    Posterior.sample = lambda self, generator=None: (
        self.mean + self.std * of("posterior").normal("posterior", *self.mean.shape[1:])
    )
    random.choice, diffusers.utils.check_min_version = lambda sentences: "a photo of a {}", lambda version: None
    torchvision.transforms.RandomHorizontalFlip, Accelerator.backward = lambda p: flip(p=0.0), noted
    flags = {
        "pretrained_model_name_or_path": folder / "model",
        "train_data_dir": folder / "photos",
        "output_dir": folder / "theirs",
    }
    flags |= {"placeholder_token": "<dog>", "initializer_token": "dog", "num_vectors": 2, "resolution": SIDE, "seed": 0}
    flags |= {"train_batch_size": 1, "max_train_steps": STEPS, "learning_rate": RATE, "lr_scheduler": "constant"}
    sys.argv = [str(script), "--center_crop", *(part for key, x in flags.items() for part in (f"--{key}", str(x)))]
    runpy.run_path(str(script), run_name="__main__")
    (folder / "theirs.json").write_text(json.dumps(losses))


def run_ours(folder: Path) -> None:
    """What `loop.py textual_inversion` does."""
    from oneloop import loop
    from oneloop.settings import command_line

    own = {"pretrained-model-name-or-path": folder / "model", "placeholder-tokens": "<dog>", "initializer-tokens": "dog"}
    own |= {"num-vectors": 2, "learning-rate": RATE, "num-inference-steps": 1}
    base = {"output-dir": folder / "ours", "max-train-steps": STEPS, "lr-scheduler": "constant", "max-grad-norm": 0}
    base |= {
        "num-samples": 1,
        "logging-steps": 1,
        "logger": "none",
        "mixed-precision": "no",
        "validation-steps": 0,
    }
    data = {"train-data-dir": folder / "photos", "resolution": SIDE, "train-batch-size": 1, "trigger": "a photo of a <dog>"}
    groups = {"textual-inversion": own, "base": base, "data": data}
    flags = [part for group, given in groups.items() for key, x in given.items() for part in (f"--{group}.{key}", str(x))]
    module, cfg = command_line.parse(["textual_inversion", *flags, "--base.no-use-ema"])
    loop.run(module.task, cfg)


def compare(folder: Path, script: Path) -> str:
    """A line of the table."""
    import tiny_models
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from warm import fork, metrics

    torch.set_num_threads(1)
    tiny_models.build(folder, SCRIPTS[script.stem]).rename(folder / "model")
    picture = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (folder / "photos").mkdir()
    Image.fromarray(picture.numpy()).save(folder / "photos" / "a.png")
    for side, run in {"theirs": lambda: run_theirs(folder, script), "ours": lambda: run_ours(folder)}.items():
        if (done := fork(run, folder).wait(600)).code:
            return f"| {script.stem} | {side} failed: {(done.err.strip().splitlines() or ['?'])[-1]} |"
    losses = zip(
        json.loads((folder / "theirs.json").read_text()),
        (m["loss"] for m in metrics(folder / "ours") if "loss" in m),
        strict=True,
    )
    theirs = [load_file(path)["<dog>"] for path in sorted((folder / "theirs").glob("learned_embeds*.safetensors"))]
    ours = load_file(folder / "ours" / "export" / "learned_embeds.safetensors")
    ours = [ours[key] for key in ("clip_l", "clip_g", "<dog>") if key in ours]
    far = max(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True))
    return f"| {script.stem} | {max(abs(a - b) for a, b in losses):.0e} | {far:.0e} of {STEPS * RATE:g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("scripts", nargs="*", default=[*SCRIPTS], metavar="script")
    args = parser.parse_args()
    scripts = args.checkout.resolve() / "examples" / "textual_inversion"
    for name in args.scripts:
        if name not in SCRIPTS or not (scripts / f"{name}.py").is_file():
            parser.error(f"{name} in {scripts}; expected scripts of a checkout of diffusers: {', '.join(SCRIPTS)}")
    print("| script | loss | vectors, of the most that they may move |\n|---|---|---|")
    for name in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(Path(folder), scripts / f"{name}.py"), flush=True)


if __name__ == "__main__":
    main()
