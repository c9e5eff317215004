"""What frozen models make of columns: the cache on disk under writers, damage and time; several columns in and out."""

import json
import os
import resource
import shutil
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from warm import fork

from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.inputs import cache as caches
from oneloop.inputs import encodings, sources, store
from oneloop.inputs.cache import Cache, as_marks
from oneloop.tasks import COLUMNS, Column, Encoding


def marks_of(numbers):
    return as_marks([data.digest(str(i).encode()) for i in numbers])


def value(i):
    return {"x": torch.full((2, 3), float(i)), "y": torch.tensor(i, dtype=torch.bfloat16)}


def filled(folder, numbers, size=4):
    cache, marks = Cache(folder).refresh(), marks_of(numbers)
    cache.fill(marks, cache.missing(marks).tolist(), size, lambda some: ((i, value(numbers[i])) for i in some))
    return cache.refresh()


def test_what_was_written_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "SHARD_ROWS", 3)
    cache = filled(tmp_path / "a", list(range(10)))
    assert len(cache.shards) == 4 and len(list((tmp_path / "a").iterdir())) == 4 and cache.nbytes > 0
    found = cache.read(marks_of([9, 0, 4, 0]))
    assert found["x"].shape == (4, 2, 3) and found["y"].dtype == torch.bfloat16
    assert found["x"][:, 0, 0].tolist() == found["y"].tolist() == [9, 0, 4, 0]
    again = filled(tmp_path / "a", list(range(8, 12)))  # appended: what is there is not written anew
    assert len(again.shards) == 5 and again.missing(marks_of(range(12))).tolist() == []
    assert again.missing(marks_of([12, 3, 12])).tolist() == [0]
    monkeypatch.setattr(caches, "SHARD_BYTES", 52)
    assert len(filled(tmp_path / "b", [0, 1, 2, 3]).shards) == 2


def test_values_of_other_shapes_lie_in_other_shards(tmp_path):
    cache, marks = Cache(tmp_path / "a"), marks_of(range(6))
    cache.fill(marks, [0, 2, 4, 1, 3, 5], 2, lambda some: ((i, {"x": torch.full((1 + i % 2,), float(i))}) for i in some))
    assert len(cache.refresh().shards) == 2 and cache.read(marks_of([1, 3]))["x"].tolist() == [[1, 1], [3, 3]]


def test_marks_that_share_their_first_half(tmp_path):
    halves = np.array([[7, 1], [7, 2], [5, 1], [7, 3]], np.uint64)
    cache, marks = Cache(tmp_path / "a"), halves.view(np.uint8)
    cache.fill(marks[:3], range(3), 4, lambda some: ((i, value(i)) for i in some))
    assert cache.refresh().read(marks[[1, 0, 2]])["y"].tolist() == [1, 0, 2] and cache.missing(marks).tolist() == [3]


@pytest.mark.parametrize("damage", ["a bit", "cut off", "header", "moved", "another folder's"])
def test_damage_is_noticed(tmp_path, damage):
    """Before a value is trained on; the next start encodes anew what was lost."""
    cache = filled(tmp_path / "a", [1, 2, 3])
    (path,) = cache.shards
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-1] ^= 1
    elif damage == "cut off":
        content = content[:-1]
    elif damage == "header":
        content[:9] = b"x" * 9
    elif damage == "another folder's":
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    else:  # the rows of two values are exchanged
        x = load_file(path)
        x["x"] = x["x"].flip(0)
        save_file(x, path, {"hash": "0"})
        content = bytearray(path.read_bytes())
    path.write_bytes(content)
    cache = Cache(tmp_path / ("b" if "folder" in damage else "a")).refresh()
    if len(cache.missing(marks_of([1]))) == 0:
        with pytest.raises(
            BadInput, match=r"--data.example-cache: .* is not what was written .*encodes its values anew"
        ) as refusal:
            cache.read(marks_of([1]))
        assert "\n" not in str(refusal.value) and not cache.shards[0].exists()
    assert filled(cache.folder, [1, 2, 3]).read(marks_of([2]))["y"].tolist() == [2]


def test_several_writers_and_one_that_is_killed(tmp_path):
    """All read whole values in the end; of the killed one the last shard is lost, and what it left has our name."""
    began = time.time() + 0.3

    def write(first):
        def function():
            time.sleep(max(0, began - time.time()))
            caches.SHARD_ROWS = 5
            if first == 60:
                real, count = caches.save_file, []

                def save(*given):
                    count.append(real(*given))
                    if len(count) == 3:
                        os._exit(9)

                caches.save_file = save
            filled(tmp_path / "a", list(range(first, first + 40)))

        return function

    codes = [process.wait().code for process in [fork(write(first), tmp_path) for first in (0, 20, 60)]]
    assert codes == [0, 0, 9]
    cache = Cache(tmp_path / "a").refresh()
    assert cache.missing(marks_of(range(60))).tolist() == [] and len(cache.missing(marks_of(range(60, 100)))) == 30
    assert cache.read(marks_of(range(60)))["y"].float().tolist() == torch.arange(60).bfloat16().float().tolist()
    left = [path.name for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]
    assert len(left) == 1 and caches.re.fullmatch(caches.WRITING, left[0])
    os.utime(tmp_path / "a" / left[0], (time.time() - 2 * caches.DAY,) * 2)
    filled(tmp_path / "a", [100])
    assert not list((tmp_path / "a").glob(".*"))


def test_a_writer_that_is_killed_in_the_middle_of_a_file(tmp_path):
    """What it left, whatever the library called it, lies in a folder of our name, and goes with it."""

    def function():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        cache, marks = Cache(tmp_path / "examples" / "x-1"), marks_of([1])
        cache.fill(marks, [0], 1, lambda some: [(0, {"x": torch.zeros(100_000)})])

    assert fork(function, tmp_path).wait().code == -signal.SIGXFSZ
    assert [
        caches.re.fullmatch(caches.WRITING, path.name) is not None for path in (tmp_path / "examples" / "x-1").iterdir()
    ] == [True]
    store.tidy(tmp_path / "examples", set())
    assert not list((tmp_path / "examples" / "x-1").iterdir())


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    save_file({"marks": torch.zeros(1, 16, dtype=torch.uint8)}, tmp_path / "a" / "mine.safetensors")
    (tmp_path / "a" / f"{'0' * 32}.safetensors").write_text("junk")
    (tmp_path / "a" / f"{'1' * 32}.safetensors").mkdir()
    cache = filled(tmp_path / "a", [1])
    assert len(cache.shards) == 1 and cache.read(marks_of([1]))["y"].tolist() == [1]
    assert (tmp_path / "a" / "mine.safetensors").exists()


def test_a_shard_that_another_run_removes(tmp_path):
    cache = filled(tmp_path / "a", [1, 2, 3])
    cache.shards[0].unlink()
    assert cache.nbytes == 0
    with pytest.raises(BadInput, match=r"--data.example-cache: .* cannot be read: .*; the same command encodes its values"):
        cache.read(marks_of([1]))


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(BadInput, match=r"--data.example-cache: .* cannot be written: .*; another folder, or `no` for none"):
        filled(tmp_path / "a", [1])


# ---------------------------------------------------------------------------------------------------------------------
# Several columns.


@dataclass
class Alone:
    """As much of an accelerator as encoding asks for."""

    device: str = "cpu"
    process_index: int = 0
    num_processes: int = 1

    def wait_for_everyone(self):
        pass


@pytest.mark.parametrize("buckets", [False, True])
def test_an_encoding_of_several_columns(tmp_path, buckets):
    """As a text encoder that sees the reference: cached or in the step, mirrored or not, of any size, the same; and what
    nothing else reads is not in the batch any more."""
    shapes = [(24, 48), (48, 24), (32, 32), (24, 48), (48, 24), (32, 32)]
    for name, seed in (("images", 0), ("refs", 1)):
        (tmp_path / name).mkdir()
        for i, shape in enumerate(shapes):
            noise = np.random.default_rng((i, seed)).integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    for i in range(6):
        (tmp_path / "images" / f"{i}.txt").write_text("word " * i)
    calls = []

    def both(models, captions, refs, cfg):
        calls.append(len(captions))
        length = torch.tensor([len(text) for text in captions])
        states = refs.mean((1, 2, 3))[:, None] + torch.arange(8) * (torch.arange(8) < length[:, None])
        return {"states": states, "states_mask": torch.arange(8) < length[:, None]}

    made = {
        "states": Encoding(fn=both, columns=("caption", "reference"), models=("text",)),
        "latent": Encoding(fn=lambda models, x, cfg: {"latent": x[..., ::8, ::8]}, columns=("pixel_values",), models=("vae",)),
    }
    columns = COLUMNS | {"reference": Column("image", like="pixel_values", folder="data.conditioning_data_dir")}

    @dataclass
    class Config:
        data: Data

    folders = {"train_data_dir": str(tmp_path / "images"), "conditioning_data_dir": str(tmp_path / "refs")}
    common = folders | {"center_crop": True, "random_flip": True, "resolution": 32, "train_batch_size": 4, "buckets": buckets}
    cfg = Config(Data(**common, example_cache=str(tmp_path / "cache"), caption_dropout=0.2))

    def examples():
        return data.Examples(sources.open_source(cfg.data, columns, 8), cfg.data, 0)

    plain, cached, said = examples(), examples(), []
    models = {"text": torch.nn.Linear(1, 1), "vae": torch.nn.Linear(1, 1)}
    assert encodings.encode_once(cached, made, models, cfg, Alone(), said.append) == {"text", "vae"}
    assert said[0].startswith("encoding caption and reference once: 22 of 22") and len(said) == 2
    assert set(calls) == {4} and len(calls) <= 22 / 4 + (3 if buckets else 1)  # as many as a step has; of one size in a row
    for first in range(0, 30, 2):
        expected = encodings.encode(made, models, plain.ready(plain[range(first, first + 2)], "cpu"), cfg)
        found = cached.ready(cached[range(first, first + 2)], "cpu")
        assert expected.keys() == found.keys() and not {"caption", "reference", "pixel_values"} & found.keys()
        assert all(torch.equal(x, found[name]) for name, x in expected.items() if torch.is_tensor(x))
    before = len(calls)
    assert encodings.encode_once(examples(), made, models, cfg, Alone(), said.append) == {"text", "vae"}
    assert len(calls) == before and len(said) == 2
    part = {"states": made["states"]}  # the loss reads the images, which stay
    assert encodings.encode_once(other := examples(), part, models, cfg, Alone(), said.append) == {"text"}
    assert {"pixel_values", "states"} <= other[range(2)].keys()
    random = data.Examples(sources.open_source(loose := Data(**common | {"center_crop": False}), columns, 8), loose, 0)
    assert random.values(("caption", "reference")) is None and random.values(("caption",)) is not None
    assert json.dumps(said)
