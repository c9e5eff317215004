"""The official LoRA scripts beside `lora`: the same checkpoint, image, noise and noise levels, step by step.

    python -m benchmarks.official CHECKOUT_OF_DIFFUSERS [flux sd3 ...]

Runs train_dreambooth_lora_*.py of the checkout, and `lora` after it, on the tests' tiny checkpoint of each family. Nothing of
the task is changed: its draws are functions of (seed, example), so the script is handed them, in the place of torch.randn_like,
the posterior's noise and its table of sigmas. Both start from the same adapters, large numbers on the script's layers. Compared
are loss and gradient norm of every step, the adapters after the last and

    layers    whether the task's own choice is the script's; no gradient reaches some, and the task leaves those out
    shift     of the noise levels: the script's training / the checkpoint's inference, which is the task's
    ms        of CPU in a step, outside the model's forward and backward pass: the script with --cache_latents / the task
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STEPS, SIDE, CAPTION = 24, 32, "a dog"
SCRIPTS: dict[str, tuple[str, list[str]]] = {
    # script: pipeline, flags without which it trains another objective (docs/lora.md says which)
    "flux": ("FluxPipeline", ["--guidance_scale", "1"]),
    "sd3": ("StableDiffusion3Pipeline", ["--precondition_outputs", "0"]),
    "qwen_image": ("QwenImagePipeline", []),
    "z_image": ("ZImagePipeline", []),
    "sana": ("SanaPipeline", []),
    "lumina2": ("Lumina2Pipeline", []),
}


@contextmanager
def watched(model: type, out: Path) -> Iterator[None]:
    """Note the loss, the gradient's norm and the CPU time of every step that accelerate takes; in `out` at the end."""
    from accelerate import Accelerator

    spent, begun, losses, norms = [0.0], [], [], []
    backward, clip, forward = Accelerator.backward, Accelerator.clip_grad_norm_, model.forward

    def timed(function: Callable) -> Callable:
        def call(*args: Any, **more: Any) -> Any:
            began = time.process_time()
            made = function(*args, **more)
            spent[0] += time.process_time() - began
            return made

        return functools.wraps(function)(call)

    def noted(self: Any, loss: Any, **more: Any) -> None:
        begun.append(time.process_time() - spent[0])
        losses.append(loss.detach())
        timed(backward)(self, loss, **more)

    def clipped(*args: Any, **more: Any) -> Any:
        norms.append(clip(*args, **more))
        return norms[-1]

    Accelerator.backward, Accelerator.clip_grad_norm_, model.forward = noted, clipped, timed(forward)
    yield
    outside = [b - a for a, b in itertools.pairwise(begun)]
    found = {"loss": [*map(float, losses)], "norm": [*map(float, norms)], "seconds": statistics.median(outside[4:])}
    (out / "watched.json").write_text(json.dumps(found))


def parsed(folder: Path, out: Path) -> tuple[Any, Any, type]:
    """The task, its settings, and the class of its transformer."""
    import diffusers

    from oneloop.settings import command_line

    flags = ["lora", "--lora.pretrained-model-name-or-path", folder / "model", "--data.train-data-dir", folder / "photos"]
    flags += ["--lora.init-lora", folder / "start", "--base.output-dir", out, "--base.max-train-steps", STEPS]
    flags += ["--data.resolution", SIDE, "--base.num-samples", 1, "--lora.num-inference-steps", 1, "--base.no-use-ema"]
    flags += ["--base.logger", "none"]
    flags += ["--lora.learning-rate", 1e-3, "--base.lr-scheduler", "constant", "--base.logging-steps", 1]
    flags += ["--base.mixed-precision", "no", "--base.no-validate-first", "--base.validation-steps", 0]
    module, cfg = command_line.parse([*map(str, flags)])
    index = json.loads((folder / "model" / "model_index.json").read_text())
    return module.task, cfg, getattr(diffusers, index["transformer"][1])


def run_ours(folder: Path, out: Path) -> None:
    """What `loop.py lora` does."""
    from oneloop import loop

    task, cfg, model = parsed(folder, out)
    with watched(model, out):
        loop.run(task, cfg)


def compare(folder: Path, scripts: Path, name: str) -> str:
    """A line of the table."""
    import tiny_families
    import torch
    import transformers  # noqa: F401  as much as forks would import each for itself
    from PIL import Image
    from safetensors.torch import load_file
    from warm import fork

    from benchmarks.injected import run_theirs
    from oneloop import loop  # noqa: F401

    torch.set_num_threads(1)
    kind, more = SCRIPTS[name]
    tiny_families.build(kind, folder).rename(folder / "model")
    picture = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for place in ("images", "photos"):
        (folder / place).mkdir()
        Image.fromarray(picture.numpy()).save(folder / place / "a.png")
    (folder / "photos" / "a.txt").write_text(CAPTION)
    script = scripts / f"train_dreambooth_lora_{name}.py"
    theirs = lambda out, flags: lambda: run_theirs(folder, out, script, name, [*more, *flags])  # noqa: E731
    sides = {"theirs": theirs(folder / "theirs", []), "cached": theirs(folder / "cached", ["--cache_latents"])}
    for side, run in (sides | {"ours": lambda: run_ours(folder, folder / "ours")}).items():
        (folder / side).mkdir()
        if (done := fork(run, folder).wait(600)).code:
            return f"| {name} | {side} failed: {(done.err.strip().splitlines() or ['?'])[-1]} |"
    theirs, cached, ours = (json.loads((folder / side / "watched.json").read_text()) for side in ("theirs", "cached", "ours"))
    seen = json.loads((folder / "theirs" / "seen.json").read_text())
    far = lambda key: max(abs(a - b) / abs(a) for a, b in zip(theirs[key], ours[key], strict=True))  # noqa: E731
    a, b = (load_file(path / "pytorch_lora_weights.safetensors") for path in (folder / "theirs", folder / "ours" / "export"))
    start = load_file(folder / "start" / "pytorch_lora_weights.safetensors")
    wide = max(float((a[key] - b[key]).abs().max()) for key in b)
    moved = max(float((a[key] - start[key]).abs().max()) for key in b)
    silent = {key.removeprefix("transformer.").partition(".lora_")[0] for key in a.keys() - b.keys()}
    parts = {"script alone": seen["layers"][0], "task alone": seen["layers"][1], "without gradient, left out": sorted(silent)}
    layers = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    shift, seconds = (f"{x:.2f} / {y:.2f}" for x, y in (seen["shift"], [1e3 * w["seconds"] for w in (cached, ours)]))
    cells = [name, f"{far('loss'):.0e}", f"{far('norm'):.0e}", f"{wide:.0e} of {moved:.0e}", layers or "same", shift, seconds]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("scripts", nargs="*", default=[*SCRIPTS], metavar="script")
    args = parser.parse_args()
    scripts = args.checkout.resolve() / "examples" / "dreambooth"
    for name in args.scripts:
        if name not in SCRIPTS or not (scripts / f"train_dreambooth_lora_{name}.py").is_file():
            parser.error(f"{name} in {scripts}; expected scripts of a checkout of diffusers: {', '.join(SCRIPTS)}")
    heads = "| script | loss, relative | gradient's norm, relative | adapters | layers | shift | ms outside the model |"
    print(f"{heads}\n{'|---' * 7}|")
    for name in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(Path(folder), scripts, name), flush=True)


if __name__ == "__main__":
    main()
