"""The official scripts beside the tasks that do their work, step by step: the same checkpoint, images and draws.

    python -m benchmarks.official CHECKOUT_OF_DIFFUSERS [flux sd finetune_sd ...]

Runs scripts of the checkout's examples, and the task after them, on the tests' tiny checkpoint of each family. Nothing of the
task is changed: its draws are functions of (seed, example), so the script is handed them, in the place of torch.randn_like, the
posterior's noise, and timesteps or its table of sigmas. Both start from the same weights, adapters from large numbers on the
script's layers. Compared are loss and gradient norm of every step, the trained weights after the last and

    layers    whether the task's own choice is the script's; no gradient reaches some, and the task leaves those out
    shift     of the noise levels: the script's training / the checkpoint's inference, which is the task's
    ms        of CPU in a step, outside the model's forward and backward pass: the script (with --cache_latents where it has
              that) / the task
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STEPS, SIDE, CAPTION, TOKEN, SENTENCE = 24, 32, "a dog", "<dog>", "a photo of a {}"


PARTS = {"controlnet": "controlnet", "t2i_adapter": "adapter"}
"""Tasks on image conditions -> what trains."""


@dataclass(frozen=True)
class Script:
    """An official script, and what of this project does its work."""

    path: str
    """Below `examples`, without its ending."""
    checkpoint: str
    """Which of the tests': a pipeline's class, or a kind of Stable Diffusion."""
    flags: tuple[str, ...] = ()
    """Those without which it trains another objective (docs/lora.md says which)."""
    task: str = "lora"
    clips: bool = True
    """Whether gradients are clipped there: not in textual inversion, and not where the list of parameters is an iterator,
    which the optimizer has used up."""
    pinned: bool = False
    """It draws each image's posterior once, so that the checkpoint's VAE must have none."""
    posteriors: tuple[str, ...] = ("posterior",)
    """What it draws of posteriors in a step, by the task's names; `mode`: what the task takes the mode of."""
    settings: tuple[tuple[str, str], ...] = ()
    """The task's settings that are not its defaults."""
    side: int = SIDE
    """Of images, in pixels."""

    @property
    def adapts(self) -> bool:
        """Whether it trains adapters."""
        return "lora" in self.path or self.task == "dpo"

    @property
    def dreambooth(self) -> bool:
        """Whether it takes one prompt for a folder of images."""
        return self.path.startswith("dreambooth")

    @property
    def conditioned(self) -> bool:
        """Whether it takes a second image."""
        return self.task in PARTS

    @property
    def caches(self) -> bool:
        """Whether it can encode images once."""
        return self.dreambooth and self.task == "lora"

    @property
    def pairs(self) -> bool:
        """Whether it is trained on pairs of images."""
        return self.task == "edit"


BOTH = ("posterior", "condition")
"""The posteriors of an image and of its condition."""
SCRIPTS = {
    "sd": Script("text_to_image/train_text_to_image_lora", "sd", clips=False),
    "sdxl": Script("text_to_image/train_text_to_image_lora_sdxl", "sdxl"),
    "flux": Script("dreambooth/train_dreambooth_lora_flux", "FluxPipeline", ("--guidance_scale", "1")),
    "flux2": Script("dreambooth/train_dreambooth_lora_flux2", "Flux2Pipeline", ("--guidance_scale", "1")),
    "flux2_klein": Script(
        "dreambooth/train_dreambooth_lora_flux2_klein", "Flux2KleinPipeline", ("--text_encoder_out_layers", "9", "18", "27")
    ),
    "sd3": Script("dreambooth/train_dreambooth_lora_sd3", "StableDiffusion3Pipeline", ("--precondition_outputs", "0")),
    "qwen_image": Script("dreambooth/train_dreambooth_lora_qwen_image", "QwenImagePipeline"),
    "z_image": Script("dreambooth/train_dreambooth_lora_z_image", "ZImagePipeline"),
    "krea2": Script("dreambooth/train_dreambooth_lora_krea2", "Krea2Pipeline", ("--lora_alpha", "4")),
    "sana": Script("dreambooth/train_dreambooth_lora_sana", "SanaPipeline"),
    "lumina2": Script("dreambooth/train_dreambooth_lora_lumina2", "Lumina2Pipeline"),
    "textual_inversion": Script("textual_inversion/textual_inversion", "sd", task="textual_inversion", clips=False),
    "textual_inversion_sdxl": Script("textual_inversion/textual_inversion_sdxl", "sdxl", task="textual_inversion", clips=False),
    "finetune_sd": Script("text_to_image/train_text_to_image", "sd", task="finetune"),
    "finetune_dreambooth": Script("dreambooth/train_dreambooth", "sd", task="finetune"),
    "finetune_flux": Script("dreambooth/train_dreambooth_flux", "FluxPipeline", ("--guidance_scale", "1"), "finetune"),
    "finetune_sd3": Script(
        "dreambooth/train_dreambooth_sd3", "StableDiffusion3Pipeline", ("--precondition_outputs", "0"), "finetune"
    ),
    "lcm_sd": Script(
        "consistency_distillation/train_lcm_distill_sd_wds",
        "sd",
        ("--loss_type", "huber", "--unet_time_cond_proj_dim", "64"),
        "lcm",
        settings=(("trains", "all"), ("w-min", "5"), ("unet-time-cond-proj-dim", "64")),
    ),
    "lcm_sdxl": Script(
        "consistency_distillation/train_lcm_distill_sdxl_wds",
        "sdxl",
        task="lcm",
        settings=(("trains", "all"), ("loss-type", "l2")),
    ),
    "lcm_lora_sdxl": Script(
        "consistency_distillation/train_lcm_distill_lora_sdxl",
        "sdxl",
        ("--num_ddim_timesteps", "20"),
        "lcm",
        settings=(("target-decay", "0"), ("num-ddim-timesteps", "20"), ("loss-type", "l2")),
        clips=False,
    ),
    "dpo_sd": Script(  # whose beta is twice that of the other one and of the paper's authors
        "research_projects/diffusion_dpo/train_diffusion_dpo",
        "sd",
        ("--beta_dpo", "50", "--no_hflip"),
        "dpo",
        settings=(("beta", "100"),),
        pinned=True,
    ),
    "dpo_sdxl": Script(
        "research_projects/diffusion_dpo/train_diffusion_dpo_sdxl",
        "sdxl",
        ("--beta_dpo", "100", "--no_hflip"),
        "dpo",
        settings=(("beta", "100"),),
        pinned=True,
    ),
    "finetune_sdxl": Script("text_to_image/train_text_to_image_sdxl", "sdxl", task="finetune", pinned=True),
    "edit_sd": Script(
        "instruct_pix2pix/train_instruct_pix2pix",
        "sd",
        ("--conditioning_dropout_prob", "0.2"),
        "edit",
        settings=(("conditioning-dropout", "0.2"),),
    ),
    "edit_sdxl": Script(  # which drops the text states alone, and not for what the pipeline shows in their place
        "instruct_pix2pix/train_instruct_pix2pix_sdxl",
        "sdxl",
        task="edit",
        posteriors=("posterior", "mode"),
        settings=(("conditioning-dropout", "0"),),
    ),
    "edit_kontext": Script(
        "dreambooth/train_dreambooth_lora_flux_kontext", "FluxKontextPipeline", ("--guidance_scale", "1"), "edit"
    ),
    "edit_flux2_klein": Script(
        "dreambooth/train_dreambooth_lora_flux2_klein_img2img", "Flux2KleinPipeline", task="edit", side=64
    ),
    "edit_flux": Script(
        "flux-control/train_control_lora_flux",
        "FluxPipeline",
        ("--guidance_scale", "1", "--gaussian_init_lora"),
        "edit",
        posteriors=("posterior", "source posterior"),
    ),
    "edit_flux_whole": Script(
        "flux-control/train_control_flux",
        "FluxPipeline",
        ("--guidance_scale", "1"),
        "edit",
        posteriors=("posterior", "source posterior"),
        settings=(("trains", "all"),),
    ),
    "controlnet": Script("controlnet/train_controlnet", "sd", task="controlnet"),
    "controlnet_sdxl": Script("controlnet/train_controlnet_sdxl", "sdxl", task="controlnet"),
    "controlnet_sd3": Script(
        "controlnet/train_controlnet_sd3",
        "StableDiffusion3Pipeline",
        ("--precondition_outputs", "0"),
        "controlnet",
        posteriors=BOTH,
    ),
    "t2i_adapter_sdxl": Script("t2i_adapter/train_t2i_adapter_sdxl", "sdxl", task="t2i_adapter"),
    "controlnet_flux": Script(
        "controlnet/train_controlnet_flux", "FluxPipeline", ("--guidance_scale", "1"), "controlnet", posteriors=BOTH
    ),
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


def parsed(script: Script, folder: Path, out: Path) -> tuple[Any, Any, type]:
    """The task, its settings, and the class of the model that trains."""
    import diffusers

    from oneloop.families import text_to_image
    from oneloop.settings import command_line

    flags: dict[str, Any] = {
        "pretrained-model-name-or-path": folder / "model",
        "learning-rate": 1e-3,
        "num-inference-steps": 1,
        "data.train-data-dir": folder / "photos",
        "data.resolution": script.side,
        "data.train-batch-size": 1,
        "base.output-dir": out,
        "base.max-train-steps": STEPS,
        "base.num-samples": 1,
        "base.logger": "none",
        "base.lr-scheduler": "constant",
        "base.logging-steps": 1,
        "base.mixed-precision": "no",
        "base.validation-steps": 0,
    }
    if not script.clips:
        flags["base.max-grad-norm"] = 0
    if script.task == "textual_inversion":
        flags |= {"placeholder-tokens": TOKEN, "initializer-tokens": "dog", "num-vectors": 2}
        flags["data.trigger"] = SENTENCE.format(TOKEN)
    switches = ("--base.no-use-ema", "--base.no-validate-first")
    if script.adapts:
        flags["init-lora"] = folder / "start"
    if script.pairs:
        flags["data.conditioning-data-dir"] = folder / "before"
    if script.conditioned:
        flags |= {f"{PARTS[script.task]}-model-name-or-path": folder / "start"}
        flags["data.conditioning-data-dir"] = folder / "conditions"
    if script.task == "dpo":
        flags["rejected-data-dir"] = folder / "worse"
    flags |= dict(script.settings)
    group = script.task.replace("_", "-")
    pairs = ((name if "." in name else f"{group}.{name}", str(value)) for name, value in flags.items())
    module, cfg = command_line.parse(
        [script.task, *(word for name, value in pairs for word in (f"--{name}", value)), *switches]
    )
    index = json.loads((folder / "model" / "model_index.json").read_text())
    s = text_to_image.settings(cfg)
    return module.task, cfg, getattr(diffusers, index[text_to_image.family(s).TRAINED][1])


def run_ours(script: Script, folder: Path, out: Path) -> None:
    """What `loop.py` does."""
    from oneloop import loop

    task, cfg, model = parsed(script, folder, out)
    with watched(model, out):
        loop.run(task, cfg)


def make_set(script: Script, folder: Path) -> None:
    """The checkpoint and the image, for both."""
    import tiny_families
    import tiny_models
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    build = tiny_models.build if script.checkpoint.startswith("sd") else lambda to, kind: tiny_families.build(kind, to)
    build(folder, script.checkpoint).rename(folder / "model")
    if script.pinned:
        vae = AutoencoderKL.from_pretrained(folder / "model" / "vae")
        with torch.no_grad():  # the second half of the channels is the logarithm of the variance
            vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30
        vae.save_pretrained(folder / "model" / "vae")
    place = {"edit": "before", "dpo": "worse"}.get(script.task, "conditions")
    second = [{"images": "b", place: "a"}] if script.pairs or script.conditioned else [{place: "a"}] if place == "worse" else []
    for seed, places in enumerate([{"images": "a", "photos": "a"}, *second]):
        draws = torch.Generator().manual_seed(seed)
        picture = torch.randint(256, (script.side, script.side, 3), dtype=torch.uint8, generator=draws)
        for place, name in places.items():
            (folder / place).mkdir(exist_ok=True)
            Image.fromarray(picture.numpy()).save(folder / place / f"{name}.png")
    if script.conditioned:
        start_control(script, folder)
    if script.task == "textual_inversion":  # its sentences are its own
        return
    (folder / "photos" / "a.txt").write_text(CAPTION)
    if not script.dreambooth or script.pairs:
        named = {"source_file_name": "b.png"} if script.pairs else {"conditioning_file_name": "b.png"}
        row = {"file_name": "a.png", "text": CAPTION} | (named if script.pairs or script.conditioned else {})
        (folder / "images" / "metadata.jsonl").write_text(json.dumps(row))


def start_control(script: Script, folder: Path) -> None:
    """A ControlNet or T2I-Adapter of which nothing is zero, for both."""
    import diffusers
    import torch

    from oneloop.families import stable_diffusion, text_to_image
    from oneloop.families.controls import CONTROLNETS
    from oneloop.tasks import controlnet, t2i_adapter

    s = controlnet.Settings(pretrained_model_name_or_path=str(folder / "model"))
    table = t2i_adapter.ADAPTERS if script.task == "t2i_adapter" else CONTROLNETS
    own, part = table[stable_diffusion.kind(s)], text_to_image.family(s).TRAINED
    base = getattr(diffusers, stable_diffusion.config(s, "")[part][1]).from_pretrained(folder / "model" / part)
    net = own.start(base, s, stable_diffusion.multiple(s))
    for i, p in enumerate(net.parameters()):
        if not p.any():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    net.save_pretrained(folder / "start")


def weights(script: Script, out: Path) -> dict[str, Any]:
    """What a side trained."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    from safetensors.torch import load_file

    if script.adapts:  # scripts of Stable Diffusion write an older form
        made = load_file(out / "pytorch_lora_weights.safetensors")
        return convert_unet_state_dict_to_peft(made) if script.checkpoint.startswith("sd") else made
    if script.task == "textual_inversion":
        return vectors(out)
    files = (out / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "transformer", ""))
    return load_file(next(file for file in files if file.is_file()))


def vectors(out: Path) -> dict[str, Any]:
    """Those of each text encoder: what a side learned, or, of a checkpoint, what they began as."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    if (out / "model_index.json").is_file() and out.name == "model":
        parts = DiffusionPipeline.from_pretrained(out).components
        both = [(parts.get(f"text_encoder{n}"), parts.get(f"tokenizer{n}")) for n in ("", "_2")]
        made = [m.get_input_embeddings().weight[words("dog").input_ids[1]].detach()[None] for m, words in both if m is not None]
    else:
        files = sorted(out.glob("learned_embeds*.safetensors"))  # the script's are one for each encoder
        made = [x for file in files for _, x in sorted(load_file(file).items(), reverse=True)]  # ours have clip_l and clip_g
    return {f"tokens.{i}": x for i, x in enumerate(made)}


def compare(folder: Path, checkout: Path, name: str) -> str:
    """A line of the table."""
    import torch
    import transformers  # noqa: F401  as much as forks would import each for itself
    from warm import fork

    from benchmarks.injected import run_theirs
    from oneloop import loop  # noqa: F401

    torch.set_num_threads(1)
    script = SCRIPTS[name]
    make_set(script, folder)
    theirs = lambda out, flags: lambda: run_theirs(script, folder, out, checkout, [*script.flags, *flags])  # noqa: E731
    sides = {"theirs": theirs(folder / "theirs", [])}
    if script.caches:
        sides["cached"] = theirs(folder / "cached", ["--cache_latents"])
    for side, run in (sides | {"ours": lambda: run_ours(script, folder, folder / "ours")}).items():
        (folder / side).mkdir()
        if (done := fork(run, folder).wait(600)).code:
            return f"| {name} | {side} failed: {(done.err.strip().splitlines() or ['?'])[-1]} |"
    read = lambda side: json.loads((folder / side / "watched.json").read_text())  # noqa: E731
    theirs, ours, seen = read("theirs"), read("ours"), json.loads((folder / "theirs" / "seen.json").read_text())
    far = lambda key: max(abs(a - b) / abs(a) for a, b in zip(theirs[key], ours[key], strict=True))  # noqa: E731
    a, b = weights(script, folder / "theirs"), weights(script, folder / "ours" / "export")
    start = weights(script, folder / ("start" if (folder / "start").is_dir() else "model"))
    wide = max(float((a[key] - b[key]).abs().max()) for key in b)
    known = {key: start.get(key, torch.zeros_like(x)) for key, x in a.items()}  # what is new begins at zero
    moved = max(float((a[key] - known[key]).abs().max()) for key in b if a[key].shape == known[key].shape)
    silent = {key.partition(".")[2].partition(".lora_")[0] for key in a.keys() - b.keys()}
    parts = {"script alone": seen["layers"][0], "task alone": seen["layers"][1], "without gradient, left out": sorted(silent)}
    layers = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    shift = " / ".join(f"{x:.2f}" for x in seen["shift"])
    seconds = [1e3 * side["seconds"] for side in (read("cached") if script.caches else theirs, ours)]
    norm = f"{far('norm'):.0e}" if any(theirs["norm"]) else "not clipped there"
    cells = [f"{far('loss'):.0e}", norm, f"{wide:.0e} of {moved:.0e}", layers or "same", shift]
    return f"| {' | '.join([name, *cells, ' / '.join(f'{x:.2f}' for x in seconds)])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("scripts", nargs="*", default=[*SCRIPTS], metavar="script")
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    for name in args.scripts:
        if name not in SCRIPTS or not (checkout / "examples" / f"{SCRIPTS[name].path}.py").is_file():
            parser.error(f"{name} in {checkout}; expected scripts of a checkout of diffusers: {', '.join(SCRIPTS)}")
    heads = "| script | loss, relative | gradient's norm, relative | weights | layers | shift | ms outside the model |"
    print(f"{heads}\n{'|---' * 7}|")
    for name in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(Path(folder), checkout, name), flush=True)


if __name__ == "__main__":
    main()
