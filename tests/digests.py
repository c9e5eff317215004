"""The bits that short runs end in: a change of layout or words alone changes none of them.

python tests/digests.py

One line for each case: its name, and the sha256 of weights, EMA, optimizer state and learning rates. Equal lines before and
after a commit, on the same machine, are its proof.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: F401  one thread, nothing from the network
import tiny_models
from test_lora import command, draw_photos
from warm import cli, cli_many, digest, tiny


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, photos = tiny_models.build(folder, "sd"), draw_photos(folder / "photos")
        xl = tiny_models.build(folder, "sdxl")
        validated = {"data__validation_split": 0.4, "base__validation_steps": 2}
        cases = {
            "ddpm": lambda out, **more: tiny(folder, out, data__random_flip=True, **validated, **more),
            "vae": lambda out, **more: tiny(folder, out, task="vae", **more),
            "lora": lambda out, **more: command(folder, model, photos, out, data__caption_dropout=0.3, **more),
            "lora-xl": lambda out, **more: command(folder, xl, photos, out, data__random_flip=True, **more),
        }
        for task, flags in cases.items():
            layouts = {
                "one process": (1, {"data__train_batch_size": 4}),
                "accumulated": (1, {"data__train_batch_size": 2, "base__gradient_accumulation_steps": 2}),
                "two processes": (2, {"data__train_batch_size": 2}),
            }
            for layout, (count, more) in layouts.items():
                out = f"{task} {layout}".replace(" ", "-")
                argv = flags(out, **more)
                results = cli_many(folder, count, *argv) if count > 1 else [cli(folder, *argv)]
                bad = next((result.err for result in results if result.code), None)
                print(f"{task}, {layout}: {digest(folder / out) if bad is None else bad.strip()[-300:]}", flush=True)


if __name__ == "__main__":
    main()
