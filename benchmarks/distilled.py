"""What the official scripts of distillation and of preferences need to run here, with the draws of the task beside them
(benchmarks/official.py)."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.official import CAPTION, SIDE, STEPS, Script


def inject(script: Script, folder: Path, rng: Callable[[int], Any], counts: dict[str, int]) -> dict[str, Any]:
    """Flags of a script of latent consistency distillation, whose guidance is the task's and whose student begins as the
    teacher."""
    import torch
    import transformers
    from diffusers.models.embeddings import TimestepEmbedding

    draw, made = torch.rand, TimestepEmbedding.__init__

    def zeroed(self: Any, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        torch.nn.init.zeros_(self.cond_proj.weight) if getattr(self, "cond_proj", None) is not None else None

    TimestepEmbedding.__init__ = zeroed
    # Guidance is drawn after the noise.
    torch.rand = lambda *size, **more: rng(counts["noise"] - 1).uniform("guidance") if size == ((1,),) else draw(*size, **more)
    if not script.path.endswith("_wds"):
        (folder / "images" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": CAPTION}))
        named = {"image_column": "image", "caption_column": "text", "lora_alpha": 4}
        return {"train_data_dir": folder / "images", "cache_dir": folder / "cache", **named}
    stand_ins(script, folder)
    torch.autocast = lambda *args, **more: contextlib.nullcontext()  # its teacher is in half precision, whatever the run's
    call = transformers.PreTrainedTokenizerBase.__call__  # 77 tokens, though the tiny encoder has 16
    transformers.PreTrainedTokenizerBase.__call__ = lambda self, *args, **more: call(
        self, *args, **more | ({"max_length": self.model_max_length} if "max_length" in more else {})
    )
    zeros, width = torch.zeros, {(1, 77, 2048): (1, 16, 20), (1, 1280): (1, 12)}  # SDXL's, and the tiny one's
    torch.zeros = lambda *size, **more: zeros(*width.get(size, size), **more)
    return {"train_shards_path_or_url": "none", "max_train_samples": STEPS, "dataloader_num_workers": 1}


def stand_ins(script: Script, folder: Path) -> None:
    """Packages that read shards, of which none is needed for one image: their loader gives it in every step."""
    import torch
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            image = to_tensor(Image.open(folder / "images" / "a.png"))[None] * 2 - 1
            sizes = [[torch.tensor([SIDE])] * 2, [torch.tensor([0])] * 2]
            for _ in range(STEPS):
                yield (image, [CAPTION]) if self.plain else (image, [CAPTION], *sizes)

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **more: Anything("anything")

        def __call__(self, *args: Any, **more: Any) -> Any:
            return self

    web, tars, braces = Anything("webdataset"), Anything("webdataset.tariterators"), Anything("braceexpand")
    Loader.plain = script.checkpoint == "sd"
    web.WebLoader = lambda *args, **more: Loader()
    web.warn_and_continue = web.ignore_and_continue = None
    web.__path__ = tars.__path__ = []
    sys.modules |= {"webdataset": web, "webdataset.tariterators": tars, "braceexpand": braces}


def pairs(folder: Path) -> dict[str, Any]:
    """Flags of a script of preferences, and its data set of one pair."""
    import datasets

    (folder / "pairs").mkdir()
    both = {f"jpg_{i}": [(folder / place / "a.png").read_bytes()] for i, place in enumerate(("images", "worse"))}
    datasets.Dataset.from_dict(both | {"label_0": [1], "caption": [CAPTION]}).to_parquet(folder / "pairs" / "a.parquet")
    return {"dataset_name": folder / "pairs", "dataset_split_name": "train", "cache_dir": folder / "cache"}
