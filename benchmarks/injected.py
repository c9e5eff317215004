"""An official script, run with the draws of the task beside it (benchmarks/official.py)."""

from __future__ import annotations

import collections
import inspect
import itertools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import distilled
from benchmarks.official import CAPTION, PARTS, SENTENCE, STEPS, TOKEN, Script, parsed, watched


def run_theirs(script: Script, folder: Path, out: Path, checkout: Path, more: list[str]) -> None:
    """The script, with the draws of the task."""
    import diffusers
    import torch
    import transformers
    from accelerate import Accelerator
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    from oneloop.families import edit, latents, text_to_image, transformer
    from oneloop.tasks import Rng

    _, cfg, model = parsed(script, folder, out)
    s, name = text_to_image.settings(cfg), script.path.rpartition("_lora_")[2]
    own, flow = text_to_image.family(s), text_to_image.family(s) is transformer
    counts, seen = collections.Counter(), {"shift": [], "layers": [[], []]}
    posteriors = itertools.cycle(script.posteriors)

    def rng(n: int) -> Rng:
        return Rng.of(cfg.base.seed, range(n, n + 1))

    def draw(purpose: str, like: torch.Tensor) -> torch.Tensor:
        squeezed = like.squeeze(2) if like.ndim == 5 else like  # a frame axis; latents of FLUX.2 are drawn in patches
        packed = like.ndim == 3  # tokens
        seen["shape"] = seen["shape"] if packed else squeezed.shape
        made = rng(counts[purpose]).normal(purpose, *seen["shape"][1:])
        counts[purpose] += 1
        made = made if packed else made.view(1, *like.shape[1:]).expand_as(like)  # of a pair, the same for both
        return (latents.pack(made) if packed else made).to(like)

    torch.randn_like = lambda like, **more: draw("noise", like)

    def sample(self: Any, generator: Any = None) -> torch.Tensor:
        purpose = next(posteriors)
        return self.mean if purpose == "mode" else self.mean + self.std * draw(purpose, self.mean)

    DiagonalGaussianDistribution.sample = sample
    if flow:
        inject_sigmas(s, name, counts, seen, rng)
    else:
        inject_timesteps(counts, rng, int(script.task == "lcm"))
    if script.pairs and not flow:
        inject_widening(counts, rng)
    if script.adapts:
        given = edit.targets(s) if script.pairs else s.target_modules
        given = given or (transformer.family(s).targets if flow else own.TARGETS)
        start_adapters(given, own.TRAINED, folder, seen)
    teacher = "pretrained_teacher_model" if script.task == "lcm" else "pretrained_model_name_or_path"
    flags: dict[str, Any] = {teacher: folder / "model", "resolution": script.side, "output_dir": out}
    flags |= {"max_train_steps": STEPS, "train_batch_size": 1, "learning_rate": 1e-3, "adam_weight_decay": 1e-2}
    flags |= {"lr_warmup_steps": 0, "mixed_precision": "no", "seed": 0}
    if script.task == "textual_inversion":
        flags |= {"train_data_dir": folder / "images", "placeholder_token": TOKEN, "initializer_token": "dog", "num_vectors": 2}
        flags["lr_scheduler"] = "constant"
        inject_sentence()
    elif script.dreambooth and script.pairs:
        flags |= {"dataset_name": folder / "images", "instance_prompt": CAPTION, "caption_column": "text"}
        flags |= {"image_column": "image", "cond_image_column": "source"}
    elif script.task == "lcm":
        flags |= distilled.inject(script, folder, rng, counts)
    elif script.task == "dpo":
        flags |= distilled.pairs(folder)
    elif script.dreambooth:
        flags |= {"instance_data_dir": folder / "images", "instance_prompt": CAPTION}
    elif flow and script.pairs:
        flags |= {"jsonl_for_train": folder / "rows.jsonl", "caption_column": "text", "image_column": "image"}
        flags |= {"conditioning_image_column": "source"}
        rows = {"text": CAPTION, "image": str(folder / "images" / "a.png"), "source": str(folder / "images" / "b.png")}
        (folder / "rows.jsonl").write_text(json.dumps(rows))
    elif script.pairs:
        flags |= {"train_data_dir": folder / "images", "cache_dir": folder / "cache", "edit_prompt_column": "text"}
        flags |= {"edited_image_column": "image", "original_image_column": "source"}
    else:
        flags |= {"train_data_dir": folder / "images", "cache_dir": folder / "cache", "caption_column": "text"}
    if script.adapts:
        flags["lora_rank" if script.task == "lcm" else "rank"] = 4
    if script.conditioned:
        flags |= {f"{PARTS[script.task]}_model_name_or_path": folder / "start", "image_column": "image"}
        flags["conditioning_image_column"] = "conditioning"
    if name.endswith("_flux") and script.conditioned:
        flags["jsonl_for_train"] = folder / "pairs.jsonl"
        pair = {"image": str(flags.pop("train_data_dir") / "a.png"), "conditioning": str(folder / "conditions" / "a.png")}
        flags["jsonl_for_train"].write_text(json.dumps(pair | {"text": CAPTION}))
    elif flow and (script.dreambooth or script.conditioned):
        flags["max_sequence_length"] = transformer.family(s).length
    path = checkout / "examples" / f"{script.path}.py"
    sys.argv = [str(path), *(text for key, x in flags.items() for text in (f"--{key}", str(x))), *more]
    sys.path.insert(0, str(path.parent))
    # Gemma is cast to bfloat16 there, whatever the run's precision.
    transformers.PreTrainedModel.to = lambda self, *args, dtype=None, **more: torch.nn.Module.to(self, *args, **more)
    if name == "sana":  # its captions lack the instruction that inference puts before every prompt
        encode, drawn = diffusers.SanaPipeline.encode_prompt, inspect.signature(diffusers.SanaPipeline.__call__).parameters
        told = {"complex_human_instruction": drawn["complex_human_instruction"].default}
        diffusers.SanaPipeline.encode_prompt = lambda *args, **more: encode(*args, **more | told)
    if name.endswith("controlnet_sd3"):  # its conditions are in [0, 1], and its pipeline gives the autoencoder [-1, 1]
        own = diffusers.AutoencoderKL.encode
        wide = lambda x: 2 * x - 1 if counts["posterior"] > counts["condition"] else x  # noqa: E731
        diffusers.AutoencoderKL.encode = lambda self, x, *more: own(self, wide(x), *more)
    Accelerator.init_trackers = Accelerator.log = lambda *args, **more: None
    with watched(model, out):
        runpy.run_path(str(path), run_name="__main__")
    (out / "seen.json").write_text(json.dumps({key: seen[key] for key in ("shift", "layers")}))


def inject_sentence() -> None:
    """One sentence, and no image mirrored."""
    import random

    import torchvision

    flip = torchvision.transforms.RandomHorizontalFlip
    random.choice = lambda sentences: SENTENCE
    torchvision.transforms.RandomHorizontalFlip = lambda p: flip(p=0.0)


def inject_timesteps(counts: dict[str, int], rng: Callable[[int], Any], before: int = 0) -> None:
    """Hand a script of Stable Diffusion the timestep of the example whose noise it drew, or, `before` that, will draw."""
    import torch

    draw, uniform = torch.randint, torch.rand

    def timesteps(low: int, high: int, size: tuple[int, ...], **more: Any) -> torch.Tensor:
        asked = (low, size) == (0, (1,)) and counts["noise"] + before
        return rng(counts["noise"] - 1 + before).integers("timestep", high) if asked else draw(low, high, size, **more)

    def levels(*size: Any, **more: Any) -> torch.Tensor:
        """Of a T2I-Adapter's script."""
        asked = size == ((1,),) and counts["noise"]
        return rng(counts["noise"] - 1).uniform("timestep") if asked else uniform(*size, **more)

    torch.randint, torch.rand = timesteps, levels


def inject_widening(counts: dict[str, int], rng: Callable[[int], Any]) -> None:
    """Hand a script of InstructPix2Pix what decides the dropout of the example whose noise it drew, and to its new first layer
    the bias of the old one, which it does not copy."""
    import diffusers
    import torch

    kind, layer, draw = diffusers.UNet2DConditionModel, torch.nn.Conv2d, torch.rand
    register, reset = kind.register_to_config, layer.reset_parameters

    def rand(*size: Any, generator: Any = None, **more: Any) -> torch.Tensor:
        drops = generator is not None and size == (1,) and counts["noise"]
        return rng(counts["noise"] - 1).uniform("dropout") if drops else draw(*size, generator=generator, **more)

    def registered(self: Any, **more: Any) -> None:
        def kept(made: Any) -> None:
            reset(made)
            layer.reset_parameters = reset
            made.bias.data.copy_(self.conv_in.bias)

        if more == {"in_channels": 8}:
            layer.reset_parameters = kept
        register(self, **more)

    torch.rand, kind.register_to_config = rand, registered


def inject_sigmas(s: Any, name: str, counts: dict[str, int], seen: dict[str, Any], rng: Callable[[int], Any]) -> None:
    """Hand a script of flow matching the noise level of the example whose noise it drew, in its table of sigmas."""
    import diffusers
    import torch

    from oneloop.families import transformer

    own, load = transformer.family(s), diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained

    def scheduler(*args: Any, **kwargs: Any) -> Any:
        if "table" not in seen:
            seen["table"] = load(*args, **kwargs)
            seen["table"].__deepcopy__ = lambda memo: seen["table"]
            seen["odds"] = float(seen["table"].sigmas[500] / (1 - seen["table"].sigmas[500]))  # 1 where nothing is shifted
        return seen["table"]

    def density(*args: Any, **more: Any) -> torch.Tensor:
        """The sigma of this example into the script's table, and where it is there."""
        table, n, shape = seen["table"], counts["noise"] - 1, seen["shape"]
        sigma = transformer.noise_level(s, rng(n).uniform("timestep"), shape)
        table.sigmas[n] = 1 - sigma if name == "lumina2" else sigma  # its sigma is the share of the image
        table.timesteps[n] = 1000 * table.sigmas[n]
        tokens = shape[-2] * shape[-1] // own.patch**2
        inference = own.shift(transformer.parts(s)["scheduler"], tokens, transformer.config(s, ""))
        seen["shift"] = [1 / seen["odds"] if name == "lumina2" else seen["odds"], inference]
        return torch.tensor([(n + 0.5) / 1000])

    diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained = scheduler
    diffusers.training_utils.compute_density_for_timestep_sampling = density


def start_adapters(targets: Any, part: str, folder: Path, seen: dict[str, Any]) -> None:
    """Large numbers into the adapters that a script makes, and into a file that the task starts from."""
    import torch
    from diffusers.loaders.peft import PeftAdapterMixin
    from safetensors.torch import save_file

    from oneloop.families import adapters

    (folder / "start").mkdir(exist_ok=True)
    add = PeftAdapterMixin.add_adapter

    def add_adapter(self: Any, config: Any, **more: Any) -> None:
        wanted = set(adapters.layers(self, targets))
        add(self, config, **more)
        state = {}
        for key, p in self.named_parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(state)))
                state[f"{part}.{key.replace('.default', '')}"] = p.detach().clone()
        save_file(state, folder / "start" / "pytorch_lora_weights.safetensors")
        found = {key.removeprefix(f"{part}.").partition(".lora_")[0] for key in state}
        seen["layers"] = [sorted(found - wanted), sorted(wanted - found)]

    PeftAdapterMixin.add_adapter = add_adapter
