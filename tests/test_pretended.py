"""The unmodified loop on a pretended GPU (pretended.py): the bits of a run on the CPU, and no wait in a step."""

import contextlib
import dataclasses
import gc
import hashlib
import json
import re

import diffusers
import numpy as np
import planted
import pretended_torch
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from warm import flags, fork, metrics, tiny

from oneloop import loop
from oneloop.inputs import encodings
from oneloop.machine import internals, placement
from oneloop.settings import command_line

diffusers.utils.logging.set_verbosity_error()
TEXT = {"train_text_encoder": True, "example_cache": "no"}
EACH = {"validation_split": 0.4, "validation_steps": 1}
PRESERVED = {"preservation_weight": 0.5, "preservation_prompt": "a dog"}
NARROW = {"mixed_precision": "bf16", "gradient_checkpointing": True}
RUN = {"max_train_steps": 4, "num_samples": 2, "logger": "none", "validation_steps": 0, "validate_first": False}
RUN |= {"logging_steps": 2, "lr_scheduler": "constant", "mixed_precision": "no", "train_batch_size": 2, "resolution": 32}
AGAIN = {"validation_steps": 2, "checkpointing_steps": 2}
"""What a run stops half way with, and is resumed."""
CASES = {  # task, its checkpoint, what is not as in RUN
    "ddpm": ("ddpm", None, AGAIN | {"random_flip": True, "validation_split": 0.4}),
    "ddpm buckets": ("ddpm", None, AGAIN | {"buckets": True, "offload_ema": True, "optimizer": "muon", "masks": True}),
    "ddpm accumulated": ("ddpm", None, {"gradient_accumulation_steps": 2, "max_skipped_updates": 1, "use_ema": False}),
    "vae": ("vae", None, AGAIN | {"validation_split": 0.4, "random_flip": True}),
    "sd cached": ("lora", "sd", AGAIN | NARROW | {"masks": True, "buckets": True} | EACH),
    "sd text": ("lora", "sd", TEXT | {"offload_ema": True, "gradient_checkpointing": True, "random_flip": True}),
    "sdxl text": ("lora", "sdxl", TEXT | {"validation_split": 0.4, "gradient_accumulation_steps": 2}),
    "sdxl cached": ("lora", "sdxl", AGAIN | PRESERVED | {"offload_ema": True}),
    "flux offloaded": ("lora", "FluxPipeline", {"group_offload": True, "gradient_checkpointing": True}),
    "qwen int8": ("lora", "QwenImagePipeline", NARROW | {"base_precision": "int8"}),
    "sana preserved": ("lora", "SanaPipeline", PRESERVED),
    "z-image": ("lora", "ZImagePipeline", AGAIN | {"buckets": True}),
    "sd3 text": ("lora", "StableDiffusion3Pipeline", TEXT | {"masks": True, "optimizer": "schedulefree"}),
    "lcm": ("lcm", "sdxl", AGAIN | NARROW | {"masks": True, "target_decay": 0.5, "offload_ema": True}),
    "dpo": ("dpo", "sd", AGAIN | {"worse": True, "gradient_accumulation_steps": 2, "random_flip": True}),
    "dmd": ("dmd", "FluxPipeline", AGAIN | NARROW | {"fake_updates": 2, "checkpointing_steps": 1}),
    "consistency": ("consistency", None, AGAIN | {"validation_split": 0.4, "random_flip": True}),
    "finetune flux2": ("finetune", "Flux2KleinPipeline", {"offload_ema": True, "buckets": True}),
}
MORE = {
    "lcm all": ("lcm", "sd", AGAIN | NARROW | {"trains": "all", "example_cache": "no"}),
    "dpo flux": ("dpo", "FluxPipeline", AGAIN | NARROW | {"worse": True, "masks": True}),
    "vae bf16": ("vae", None, {"mixed_precision": "bf16", "use_ema": False, "optimizer": "prodigy", "learning_rate": 1.0}),
    "sdxl in the step": ("lora", "sdxl", {"example_cache": "no", "optimizer": "adafactor"}),
    "flux float8": ("lora", "FluxPipeline", AGAIN | NARROW | {"base_precision": "float8", "offload_ema": True}),
    "flux nf4": ("lora", "FluxPipeline", AGAIN | NARROW | {"base_precision": "nf4"}),
    "z-image text": ("lora", "ZImagePipeline", {"example_cache": "no", "buckets": True}),
    "sana": ("lora", "SanaPipeline", {"buckets": True}),
    "finetune": ("finetune", "sd", AGAIN | {"trains": "attention", "gradient_checkpointing": True, "validation_split": 0.4}),
}
"""What `python tests/planted.py` runs too, without a bug and with each."""
BETWEEN = {"read", "save", "settle", "validate"}
"""What `loop.train` calls between steps: there the host may wait."""
ONCE = ("alphas_cumprod", "_alphas_cumprod", "z_image_velocity")
"""Functions that make a table, or have diffusers make one, in the first step of a process: there alone they may wait."""
KNOWN = {
    "ddpm accumulated": ("finite",),  # what --base.max-skipped-updates is for
    "sdxl in the step": ("step_optimizer",),  # Adafactor's first state, in the first step alone
    "vae bf16": ("step_optimizer",),  # Prodigy reads its step size
    "qwen int8": ("qwen_image_velocity",),  # diffusers' positions
    "sd3 text": ("sd3_text",),  # diffusers' own encode_prompt
    "z-image text": ("z_image_text",),
}
"""Case -> functions that wait in a step."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"))


def draw_photos(folder):
    """A folder of captioned images of two shapes, one of masks, and one of other images."""
    noise = np.random.default_rng(0)
    for name, mode in (("images", "RGB"), ("masks", "L"), ("worse", "RGB")):
        (folder / name).mkdir()
        for i in range(12):
            pixels = noise.integers(0, 256, (3, 4, 3) if mode == "RGB" else (3, 4), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 72) if i % 2 else (72, 48), Image.BICUBIC).save(folder / name / f"{i}.png")
            (folder / "images" / f"{i}.txt").write_text(["a dog", "a red circle", 'a small "dog" on white'][i % 3])
    return folder


def line(case, folder, photos, built):
    """The command line of a case, whose output is in the folder."""
    task, model, more = (CASES | MORE)[case]
    own = RUN | more
    if own.pop("masks", False):
        own["mask_data_dir"] = photos / "masks"
    if own.pop("worse", False):
        own["rejected_data_dir"] = photos / "worse"
    if model or own.get("buckets"):
        own["train_data_dir"] = photos / "images"
    if model:
        own = {"pretrained_model_name_or_path": built(model), "num_inference_steps": 1, "learning_rate": 1e-3} | own
        own |= {"rank": 2} if task in ("lora", "lcm", "dpo", "dmd") and "trains" not in own else {}
    cfg = command_line.parse([task])[1]
    group = lambda name: next(g for g in (task, "data", "base") if hasattr(getattr(cfg, g), name))  # noqa: E731
    given = [] if model else tiny(folder, steps=None, task=task)[1:]
    return [task, *given, *flags(task, {f"{group(k)}.{k}": v for k, v in own.items()})[1:], "--base.output-dir", folder / "out"]


def trained(argv, folder, there):
    """In a fork: a run, on the pretended GPU or not. What that saw is added to seen.jsonl."""
    gc.freeze()
    module, cfg = command_line.parse(list(map(str, argv)))
    held = []

    def loss_fn(models, batch, *given):
        assert not any(p.is_cuda for module in models.values() for p in getattr(module, "offloaded", ()))
        if there and batch["phase"] == "train" and cfg.base.validation_steps == 1:
            gc.collect()
            held.append(torch.cuda.memory_allocated())
        yield from module.task.loss_fn(models, batch, *given)

    for user in (placement, encodings) if not there else ():
        user.place = moved(user.place)
    with pretended_torch.gpu(loop.__file__.removesuffix("/loop.py")) if there else contextlib.nullcontext() as seen:
        loop.run(dataclasses.replace(module.task, loss_fn=loss_fn), cfg)
    if there:
        with open(folder / "seen.jsonl", "a") as file:
            file.write(json.dumps({"waits": list(map(dataclasses.asdict, seen.waits)), "held": held}) + "\n")


def moved(place):
    """Placed, and copied as on the way to a GPU: the last bit of a product may depend on where in memory weights lie."""

    def call(models, *given):
        place(models, *given)
        for p in (p for module in models.values() for p in module.parameters() if type(p.data) is torch.Tensor):
            p.data = p.data.clone()

    return call


def left(out):
    """What a run leaves that is a function of its settings: the file's name -> its content; and its metrics without speeds."""
    made = [p for folder in ("checkpoint-*", "samples", "export") for p in sorted(out.glob(f"{folder}/**/*")) if p.is_file()]
    made = {p.relative_to(out).as_posix(): p for p in made if not re.search(r"manifest.json|random_states|README", p.name)}
    content = {name: digest(p) if p.suffix == ".safetensors" else p.read_bytes() for name, p in made.items()}
    speeds = ("images_per_second", "data_wait")
    return content | {"metrics": [{k: v for k, v in x.items() if k not in speeds} for x in metrics(out)]}


def digest(path):
    """Of tensors and not of the file, whose header is in any order."""
    return {key: hashlib.sha256(x.contiguous().view(torch.uint8).numpy()).hexdigest() for key, x in load_file(path).items()}


def started(case, folder, photos, built, there, *more, patch=lambda: None):
    """A fork that runs a case."""
    (folder / "gpu" if there else folder / "cpu").mkdir(exist_ok=True)
    folder /= "gpu" if there else "cpu"
    argv = [*line(case, folder, photos, built), *more]
    return fork(lambda: (patch(), narrow_muon(), trained(argv, folder, there)), folder)


def narrow_muon():
    """Muon multiplies in bf16 on the CPU too, as on a GPU: internals.widen_muon has it in float32 on most CPUs."""
    internals.cpu_computes_bf16 = lambda: True


def compared(case, folder):
    """What is wrong with the run on the pretended GPU, in words; nothing where nothing is."""
    ours, theirs = (left(folder / name / "out") for name in ("cpu", "gpu"))
    yield from (f"{name} differs" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name))
    parts = [json.loads(text) for text in (folder / "gpu" / "seen.jsonl").read_text().splitlines()]
    waits = [(2 * life, wait) for life, part in enumerate(parts) for wait in part["waits"] if wait["step"] is not None]
    for first, wait in waits:
        functions, once = set(wait["where"].split()[1].split(".")), ONCE if wait["step"] == first else ()
        if wait["during"] not in BETWEEN and not functions & {*once, *KNOWN.get(case, ())}:
            yield f"in step {wait['step']} {wait['where']} waits for {wait['what']}"
    held = parts[-1]["held"]
    if held and held[-1] > held[-2] + 8192:
        yield f"a validation leaves {held[-1] - held[-2]} bytes on the device"


def gpu_run(case, folder, photos, built, patch=lambda: None):
    """A case on the pretended GPU, to its end; what is wrong with how it ended, in words, or None."""
    parts = (("--base.max-train-steps", "2"), ()) if "checkpointing_steps" in (CASES | MORE)[case][2] else ((),)
    for more in parts:
        done = started(case, folder, photos, built, True, *more, patch=patch).wait()
        if done.code or "no samples" in done.err:
            return done.err
    return None


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_a_cpu_and_no_wait(case, tmp_path, photos, built):
    """Beside the whole run on the CPU one on the pretended GPU, which may stop half way and be resumed."""
    whole = started(case, tmp_path, photos, built, False)
    assert gpu_run(case, tmp_path, photos, built) is None
    whole = whole.wait()
    assert whole.code == 0 and "no samples" not in whole.err, whole.err
    assert list(compared(case, tmp_path)) == []


def test_bugs_can_be_planted():
    """The lines that `python tests/planted.py` puts a bug into are those of the code."""
    for what, file, line, bug in planted.BUGS:
        assert (planted.ROOT / file).read_text().count(line) == 1 and line != bug, what
