"""Put a finished LoRA into its base, or what was fine-tuned, or into one file of weights.

    python loop.py merge runs/my-dog --to my-model                    the whole pipeline, which `from_pretrained` opens
    python loop.py merge runs/my-dog --to my-unet.safetensors         the UNet or transformer alone, for `from_single_file`
    python loop.py merge runs/my-dog --to my-model.safetensors --original     all of a Stable Diffusion or SDXL in one file

Where nothing can load adapters, or several are to be one. The result needs no LoRA, takes as much memory as the base, and its
strength is fixed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from oneloop.configs import BadInput, Name, Range, check, require
from oneloop.views import check_writable


@dataclass(frozen=True)
class Settings:
    """Add what a run of `lora`, `finetune`, `edit`, `lcm`, `dmd` or `dpo` learned to the weights of its base."""

    folder: Positional[Name]
    """The output folder of a run of one of these tasks, whose last checkpoint is taken, or one checkpoint-N in it."""
    to: Name
    """A new folder for the whole pipeline, or a .safetensors file for the UNet or transformer."""
    strength: Annotated[float, Range(-100, 100)] = 1.0
    """Factor on what was learned."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the result, but for the autoencoder's, which is float32."""

    original: bool = False
    """Of Stable Diffusion and SDXL: the whole pipeline as one .safetensors file in the names of the original code, which
    ComfyUI and other programs read as a checkpoint."""

    def __post_init__(self):
        check(self)
        alone = not self.original or self.to.endswith(".safetensors")
        require(alone, "to", self.to, "a .safetensors file, as --original asks for")
        if not Path(self.folder).expanduser().is_dir():
            raise BadInput(f"{self.folder}: there is no such folder; expected a run's output folder or a checkpoint-N in it")
        to = Path(self.to).expanduser()
        require(not to.exists(), "to", self.to, "a name that is not taken")
        check_writable(to)


def main(settings: Settings) -> None:
    """Merge, and say where the result is.

    Raises:
        BadInput: the folder holds no run of these tasks. StorageError: the result could not be written.
    """
    import torch
    from safetensors.torch import save_file

    from oneloop import checkpoint
    from oneloop.families import original, stable_diffusion, text_to_image
    from oneloop.machine import files
    from oneloop.views.sample import opened

    saved, _, _, cfg = opened(settings.folder)
    merged = getattr(sys.modules[type(cfg).__module__], "merged", None)
    if merged is None:
        raise BadInput(f"{settings.folder}: holds no run of lora, finetune, edit, lcm, dmd or dpo")
    s = text_to_image.settings(cfg)
    if settings.original and text_to_image.family(s) is not stable_diffusion:
        kinds = " or a ".join(stable_diffusion.PIPELINES)
        raise BadInput(f"--original with a {stable_diffusion.kind(s)}; expected a {kinds}; leave it out")
    precision = "bf16" if settings.dtype == "bfloat16" else "no"
    pipeline, part = merged(cfg, saved, settings.strength, precision)
    if not settings.original:  # whose names have no place for new words; they stay in a file of their own
        text_to_image.settle_tokens(pipeline, saved, cfg)
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            module.to(torch.float32 if name == "vae" else getattr(torch, settings.dtype))
    if settings.original:
        original.check(pipeline.unet.config)
        if (predicts := stable_diffusion.prediction_type(s)) != "epsilon" and not stable_diffusion.is_xl(s):
            print(f"the file cannot say that its model predicts {predicts}: tell the program that reads it")
    to = Path(settings.to).expanduser()
    staged = files.staged(to)
    made = staged / to.name
    try:
        staged.mkdir()
        if settings.to.endswith(".safetensors"):
            state = original.state(pipeline) if settings.original else getattr(pipeline, part).state_dict()
            save_file({key: x.contiguous() for key, x in state.items()}, made, {"format": "pt"})
        else:
            pipeline.save_pretrained(made)
        files.as_masked(staged)
        made.rename(to)
    except OSError as error:
        raise checkpoint.StorageError(f"writing {to} failed: {error.strerror or error}") from None
    finally:
        files.erase(staged)
    print(f"{saved.name} at strength {settings.strength:g} merged into {to}")
