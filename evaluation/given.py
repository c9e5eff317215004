"""Images that another program drew, a folder of them, in the place of a run's samples: only their pixels are looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneloop.configs import BadInput
from oneloop.evaluation import measures
from oneloop.evaluation.judge import spread
from oneloop.inputs import crop, decoding, files
from oneloop.inputs.folder import ending, files_in


def listed(folder: str) -> list[Path]:
    """The image files of a folder, to be judged in the place of samples, in the order of their names.

    Raises:
        BadInput: they are fewer than the distances take.
    """
    root = Path(folder).expanduser()
    found = [root / name for name in files_in(root, "--images")[0] if ending(name) in files.endings()]
    if len(found) < measures.LEAST:
        raise BadInput(f"--images {folder}: {len(found)} images to judge; expected at least {measures.LEAST}")
    return found


def read(paths: list[Path], num: int, like: Tensor, cfg: Any) -> Tensor:
    """At most `num` of the image files, spread evenly over them, in the size of `like` [M, 3, H, W], whose middle is cut out;
    [N, 3, H, W] uint8.

    Raises:
        BadInput: one cannot be read.
    """
    size, found, cfg = tuple(like.shape[2:]), [], replace(cfg.data, center_crop=True)
    for path in (paths[i] for i in spread(torch.arange(len(paths)), num).tolist()):
        try:
            image = decoding.to_rgb(files.opened(path.read_bytes()))
            found.append(decoding.fit(image, tuple(crop.resized(image.size[::-1], size).tolist()), size, cfg))
        except Exception as error:  # whatever PIL raises of a broken file
            raise BadInput(f"--images: {files.shown(path)} cannot be read: {files.reason(error)}; move it elsewhere") from None
    return torch.stack(found)
