"""An official LoRA script, run with the draws of `lora` (benchmarks/official.py)."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from benchmarks.official import CAPTION, SIDE, STEPS, parsed, watched


def run_theirs(folder: Path, out: Path, script: Path, name: str, more: list[str]) -> None:
    """The script, with the draws of the task."""
    import diffusers
    import torch
    import transformers
    from accelerate import Accelerator
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from safetensors.torch import save_file

    from oneloop.families import adapters, transformer
    from oneloop.tasks import Rng

    (folder / "start").mkdir(exist_ok=True)
    _, cfg, model = parsed(folder, out)
    s, own, seed = cfg.lora, transformer.family(cfg.lora), cfg.base.seed
    add, load = PeftAdapterMixin.add_adapter, diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained
    counts, seen = {"noise": 0, "posterior": 0}, {}

    def draw(purpose: str, like: torch.Tensor) -> torch.Tensor:
        rng = Rng.of(seed, range(counts[purpose], counts[purpose] + 1))
        counts[purpose] += 1
        squeezed = like.squeeze(2) if like.ndim == 5 else like  # a frame axis; latents of FLUX.2 are drawn in patches
        seen["shape"] = squeezed.shape
        return rng.normal(purpose, *squeezed.shape[1:]).view_as(like).to(like)

    def sample(self: Any, generator: Any = None) -> torch.Tensor:
        return self.mean + self.std * draw("posterior", self.mean)

    def scheduler(*args: Any, **kwargs: Any) -> Any:
        if "table" not in seen:
            seen["table"] = load(*args, **kwargs)
            seen["table"].__deepcopy__ = lambda memo: seen["table"]
            seen["odds"] = float(seen["table"].sigmas[500] / (1 - seen["table"].sigmas[500]))  # 1 where nothing is shifted
        return seen["table"]

    def density(*args: Any, **more: Any) -> torch.Tensor:
        """The sigma of this example into the script's table, and where it is there."""
        table, n, shape = seen["table"], counts["noise"] - 1, seen["shape"]
        sigma = transformer.noise_level(s, Rng.of(seed, range(n, n + 1)).uniform("timestep"), shape)
        table.sigmas[n] = 1 - sigma if name == "lumina2" else sigma  # its sigma is the share of the image
        table.timesteps[n] = 1000 * table.sigmas[n]
        inference = own.shift(
            transformer.parts(s)["scheduler"], shape[-2] * shape[-1] // own.patch**2, transformer.config(s, "")
        )
        seen["shift"] = [1 / seen["odds"] if name == "lumina2" else seen["odds"], inference]
        return torch.tensor([(n + 0.5) / 1000])

    def add_adapter(self: Any, config: Any, **more: Any) -> None:
        wanted = set(adapters.layers(self, own.targets))
        add(self, config, **more)
        state = {}
        for key, p in self.named_parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(state)))
                state[f"transformer.{key.replace('.default', '')}"] = p.detach().clone()
        save_file(state, folder / "start" / "pytorch_lora_weights.safetensors")
        found = {key.removeprefix("transformer.").partition(".lora_")[0] for key in state}
        seen["layers"] = [sorted(found - wanted), sorted(wanted - found)]

    torch.randn_like = lambda like, **more: draw("noise", like)
    DiagonalGaussianDistribution.sample, PeftAdapterMixin.add_adapter = sample, add_adapter
    diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained = scheduler
    diffusers.training_utils.compute_density_for_timestep_sampling = density
    given = {"pretrained_model_name_or_path": folder / "model", "instance_data_dir": folder / "images", "resolution": SIDE}
    given |= {"instance_prompt": CAPTION, "output_dir": out, "max_train_steps": STEPS, "train_batch_size": 1, "rank": 4}
    given |= {"learning_rate": 1e-3, "adam_weight_decay": 1e-2, "lr_warmup_steps": 0, "mixed_precision": "no", "seed": 0}
    given |= {"max_sequence_length": own.length}
    sys.argv = [str(script), *(text for key, x in given.items() for text in (f"--{key}", str(x))), *more]
    sys.path.insert(0, str(script.parent))
    # Gemma is cast to bfloat16 there, whatever the run's precision.
    transformers.PreTrainedModel.to = lambda self, *args, dtype=None, **more: torch.nn.Module.to(self, *args, **more)
    if name == "sana":  # its captions lack the instruction that inference puts before every prompt
        encode, drawn = diffusers.SanaPipeline.encode_prompt, inspect.signature(diffusers.SanaPipeline.__call__).parameters
        told = {"complex_human_instruction": drawn["complex_human_instruction"].default}
        diffusers.SanaPipeline.encode_prompt = lambda *args, **more: encode(*args, **more | told)
    Accelerator.init_trackers = Accelerator.log = lambda *args, **more: None
    with watched(model, out):
        runpy.run_path(str(script), run_name="__main__")
    (out / "seen.json").write_text(json.dumps({key: seen[key] for key in ("shift", "layers")}))
