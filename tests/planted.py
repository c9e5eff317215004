"""Device bugs of the kinds that people met on real GPUs, each planted into the package by itself: which does the pretended GPU
catch? `python tests/planted.py` says it of all, or of those whose numbers follow; 0 is none, with which nothing shall be wrong.

What each is like: timesteps, noise or tables left on the CPU (Color-diffusion#1, sd_dreambooth_extension#1435); an EMA or an
optimizer's state that a checkpoint brought back to the CPU (DALLE2-pytorch#87, diffusers#3871, pytorch_optimizer#266,
accelerate#3372); generators of another device (pytorch#62152); reads and copies that drain the queue at every step
(OneTrainer#1608, diffusers#9475, diffusers#13564). None is a bug where there is no GPU.
"""

import functools
import gc
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).parent.parent
BUGS = [  # what, file, line, the same with the bug
    ("the schedule of ddpm on the CPU", "maths/diffusion.py", ".alphas_cumprod.to(device)", ".alphas_cumprod"),
    ("the schedule of SD on the CPU", "families/stable_diffusion.py", ".alphas_cumprod.to(device)", ".alphas_cumprod"),
    ("timesteps on the CPU", "tasks/__init__.py", ".clamp_(max=high - 1)", ".clamp_(max=high - 1).cpu()"),
    (
        "noise on the CPU",
        "tasks/__init__.py",
        "philox().normal(self._keys(purpose, len(shape)), (len(self), *shape)).to(self.device)",
        "philox().normal(self._keys(purpose, len(shape)), (len(self), *shape)).cpu()",
    ),
    ("masks on the CPU", "inputs/batches.py", "moved[name] = x / 255 if", "moved[name] = (x / 255).cpu() if"),
    (
        "the examples' weights on the CPU",
        "inputs/batches.py",
        "non_blocking=True) if isinstance(v, Tensor)",
        'non_blocking=True) if isinstance(v, Tensor) and k != "weight"',
    ),
    (
        "cached encodings on the CPU",
        "inputs/batches.py",
        "non_blocking=True) if isinstance(v, Tensor)",
        'non_blocking=True) if isinstance(v, Tensor) and k != "latent_mean"',
    ),
    ("the EMA begins on the CPU", "training/ema.py", '"cpu" if offload else p.device', '"cpu"'),
    (
        "an offloaded EMA meets the weights",
        "training/ema.py",
        "value.copy_(torch.lerp(there, weight.to(value.dtype), 1 - decay), non_blocking=True)",
        "value.lerp_(weight, 1 - decay)",
    ),
    (
        "an offloaded EMA is shown where it is",
        "machine/placement.py",
        "weights[key].data = value.to(weights[key])",
        "weights[key].data = value",
    ),
    (
        "an offloaded EMA is checked where it is",
        "training/guard.py",
        "x.detach().isfinite().all().to(self.accelerator.device)",
        "x.detach().isfinite().all()",
    ),
    ("a loaded EMA on the CPU", "checkpoint.py", "ema[key].copy_(value)", "ema[key].data = value"),
    (
        "a loaded optimizer's state on the CPU",
        "checkpoint.py",
        "    accelerator.step = 0  #",
        "    for values in (values for o in optimizers for values in o.state.values()):\n"
        "        values.update({key: x.cpu() for key, x in values.items() if isinstance(x, Tensor)})\n"
        "    accelerator.step = 0  #",
    ),
    (
        "encoders are not brought back for samples",
        "views/showing.py",
        "    move(learner.models, run.idle, accelerator.device)\n",
        "",
    ),
    (
        "encoders stay on the device after samples",
        "views/showing.py",
        '    on_main(accelerator, told)\n    move(learner.models, run.idle, "cpu")\n',
        "    on_main(accelerator, told)\n",
    ),
    (
        "modules of buffers alone are not placed",
        "machine/placement.py",
        "for _ in itertools.chain(module.parameters(), module.buffers())):",
        "for _ in module.parameters()):",
    ),
    (
        "SDXL's sizes on the CPU",
        "families/stable_diffusion.py",
        '"target_size")], 1).float()',
        '"target_size")], 1).float().cpu()',
    ),
    (
        "captions' tokens on the CPU",
        "families/stable_diffusion.py",
        "transfer(words.input_ids, device)",
        "words.input_ids",
    ),
    (
        "the loss read at every step",
        "training/meter.py",
        "self.open.pop(loss.name, 0) + loss.value.detach()",
        "self.open.pop(loss.name, 0) + loss.value.detach().item()",
    ),
    ("the gradient's norm read at every step", "loop.py", '"grad_norm", name, norm)', '"grad_norm", name, norm.item())'),
    (
        "finite or not, asked at every step",
        "training/guard.py",
        'self.now = accelerator.device.type == "cpu" or most > 0',
        "self.now = True",
    ),
    (
        "statistics of latents on the CPU",
        "families/latents.py",
        "transfer(x, device).float().view(1, -1, 1, 1)",
        "x.float().view(1, -1, 1, 1)",
    ),
    ("positions on the CPU", "families/latents.py", "torch.zeros(h, w, axes, device=device)", "torch.zeros(h, w, axes)"),
    (
        "the order of validation on the CPU",
        "training/validation.py",
        "torch.tensor(ranks, dtype=torch.float32, device=device)",
        "torch.tensor(ranks, dtype=torch.float32)",
    ),
    ("batches are not pinned", "inputs/batches.py", "pin_memory=torch.cuda.is_available()", "pin_memory=False"),
    ("batches' copies block", "inputs/batches.py", "v.to(device, non_blocking=True)", "v.to(device)"),
    (
        "keys are not pinned",
        "tasks/__init__.py",
        "x.pin_memory().to(device, non_blocking=True)",
        "x.to(device, non_blocking=True)",
    ),
    ("SSIM's window on the CPU", "maths/image_quality.py", "torch.arange(side, device=x.device)", "torch.arange(side)"),
    (
        "offloaded blocks compute where they are",
        "families/offload.py",
        "p.data.to(device, non_blocking=True, copy=True)",
        "p.data",
    ),
    ("offloaded blocks are not pinned", "families/offload.py", "pinned = torch.cuda.is_available()", "pinned = False"),
    (
        "dropout on the device is not seeded",
        "machine/placement.py",
        "torch.get_device_module(device).manual_seed(seed)",
        "pass",
    ),
    (
        "autocast of the CPU switched off around the autoencoder",
        "families/stable_diffusion.py",
        "with torch.autocast(z.device.type, enabled=False):\n        return (vae",
        'with torch.autocast("cpu", enabled=False):\n        return (vae',
    ),
    (
        "samples' noise by the device's generator",
        "tasks/__init__.py",
        "torch.Generator().manual_seed(seed & 0xFFFFFFFF)",
        'torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed & 0xFFFFFFFF)',
    ),
    (
        "noise on the device by the CPU's generator",
        "tasks/vae.py",
        'noise = rng.normal("posterior", *latent_shape(vae, x))',
        "generator = torch.Generator().manual_seed(rng.numbers[0])\n"
        "    noise = torch.randn(len(x), *latent_shape(vae, x), generator=generator, device=x.device)",
    ),
    ("the resident images on the CPU", "data.py", "self.resident = pixels.to(device)", "self.resident = pixels"),
    (
        "places of crops on the CPU",
        "data.py",
        "torch.arange(side, device=images.device) for side in size",
        "torch.arange(side) for side in size",
    ),
    (
        "the lengths of texts read from the device",
        "families/flow.py",
        'lengths = on_host(columns["prompt_mask"]).sum(1).tolist()',
        'lengths = columns["prompt_mask"].sum(1).tolist()',
    ),
]
FIRST = {"tasks/vae.py": "vae", "maths/image_quality.py": "vae", "families/offload.py": "flux offloaded"}
FIRST |= {
    "training/ema.py": "ddpm buckets",
    "families/stable_diffusion.py": "sdxl text",
    "families/latents.py": "finetune flux2",
    "families/flow.py": "z-image",
}
"""File -> the case that is tried first; then all the others."""


def codes(code: CodeType) -> dict[str, CodeType]:
    """The functions inside, by their qualified names."""
    inside = [x for x in code.co_consts if isinstance(x, CodeType)]
    return {x.co_qualname: x for x in inside} | {k: v for x in inside for k, v in codes(x).items()}


def plant(file: str, line: str, bug: str) -> None:
    """Give the functions of a module, wherever they are kept by now, the code that they would have with the bug."""
    source = (ROOT / file).read_text()
    assert source.count(line) == 1, (file, line)
    module = ".".join(["oneloop", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
    path = sys.modules[module].__file__
    old, new = (codes(compile(text, path, "exec")) for text in (source, source.replace(line, bug)))
    changed = {name for name in new if name in old and old[name] != new[name] and "<" not in name}
    functions = [f for f in gc.get_objects() if isinstance(f, FunctionType) and f.__code__.co_filename == path]
    found = [f for f in functions if f.__code__.co_qualname in changed]
    if not found:
        sys.exit(f"not planted: {file}, {line}")
    for function in found:
        function.__code__ = new[function.__code__.co_qualname]


def main(numbers: list[int]) -> None:
    import conftest  # noqa: F401
    import test_pretended as cases
    import tiny_families
    import tiny_models

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        photos = cases.draw_photos(folder / "photos")
        own = lambda kind: tiny_models.build(folder, kind) if kind.startswith("sd") else tiny_families.build(kind, folder)  # noqa: E731
        built = functools.cache(own)

        @functools.cache
        def reference(case: str) -> Path:
            place = folder / case.replace(" ", "-")
            place.mkdir()
            assert cases.started(case, place, photos, built, False).wait().code == 0
            return place

        def wrong(number: int, case: str, patch: Callable[[], None]) -> str | None:
            """What is wrong with a case on the pretended GPU, in a line."""
            place = folder / f"{number}-{case.replace(' ', '-')}"
            place.mkdir()
            (place / "cpu").symlink_to(reference(case) / "cpu")
            ended = cases.gpu_run(case, place, photos, built, patch)
            lines = re.findall(r"^.*(?:Error: |no samples).*$", ended or "", re.M) or (ended or "").splitlines()[-1:]
            return next(iter(lines[-1:] or cases.compared(case, place)), None)

        every, found = {**cases.CASES, **cases.MORE}, {}
        for number in numbers:
            if number == 0:
                print("without a bug:", [(case, text) for case in every if (text := wrong(0, case, lambda: None))], flush=True)
                continue
            what, file, *change = BUGS[number - 1]
            order = dict.fromkeys([FIRST.get(file, "ddpm"), "sd cached", "sdxl cached", *every])
            tried = ((case, wrong(number, case, functools.partial(plant, file, *change))) for case in order)
            found[number] = next((f"{case}: {text[:150]}" for case, text in tried if text), None)
            print(f"{number:2} {what}: {found[number] or 'not caught'}", flush=True)
        print(f"{sum(map(bool, found.values()))} of {len(found)} caught")


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])) or list(range(len(BUGS) + 1)))
