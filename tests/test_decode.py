"""Pictures are decoded once: for a run's next life, its other processes, and other runs on the same pictures."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_settings import refused
from warm import cli, cli_many, digest, start, start_many, tiny

import data
import decode
from configs import Data

SQUARES = {"one shape": 6 * [(24, 24)], "several shapes": [(24, 24), (24, 40), (30, 24), (16, 16), (64, 20), (24, 24)]}


def draw(folder, sizes):
    """A folder of noise of these heights and widths."""
    folder.mkdir(exist_ok=True)
    for i, shape in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


def pictures_of(place, **more):
    """Settings and an opened source of a folder."""
    cfg = Data(train_data_dir=str(place), resolution=16, train_batch_size=2, **more)
    return cfg, data.open_source(cfg)


def equal(a, b):
    """Whether two passes found the same."""
    lists = [None if x.pixels is None else list(x.pixels) for x in (a, b)]
    same = lists[0] is lists[1] or all(torch.equal(x, y) for x, y in zip(*lists, strict=True))
    columns = a.columns.keys() == b.columns.keys() and all(torch.equal(x, b.columns[k]) for k, x in a.columns.items())
    return same and columns and (a.modes, a.broken) == (b.modes, b.broken)


@pytest.mark.parametrize("more", [{}, {"center_crop": True}, {"memory_budget": 0.0}], ids=lambda more: "".join(more) or "whole")
@pytest.mark.parametrize("sizes", SQUARES)
def test_what_is_kept_is_what_was_decoded(tmp_path, sizes, more):
    cfg, source = pictures_of(draw(tmp_path / "pictures", SQUARES[sizes]), **more)
    found, path = decode.decode(source, cfg), decode.place(tmp_path / "shelf", source, cfg)
    assert decode.kept(path, cfg) is None
    there = decode.keep(found, path, cfg, pytest.fail)
    again = decode.kept(path, cfg)
    assert equal(found, there) and equal(found, again) and [p.name for p in path.parent.iterdir()] == [path.name]
    assert (again.pixels is None) == ("memory_budget" in more)
    assert isinstance(again.pixels, torch.Tensor) == ((not more and sizes == "one shape") or "center_crop" in more)
    a, b = data.Examples(source, cfg, 0, found), data.Examples(source, cfg, 0, again)
    assert a.fingerprint == b.fingerprint and torch.equal(a[range(4)]["pixel_values"], b[range(4)]["pixel_values"])


def test_another_set_has_another_place(tmp_path, monkeypatch):
    """A changed, added, or removed picture, another resolution, cut or part of the set, another version of the decoder."""
    folder = draw(tmp_path / "pictures", 3 * SQUARES["several shapes"])

    def place(**more):
        cfg = Data(**{"train_data_dir": str(folder), "resolution": 16, "train_batch_size": 2} | more)
        return decode.place(tmp_path, data.open_source(cfg), cfg)

    places = [place(), place(resolution=12), place(center_crop=True), place(max_train_samples=4), place(validation_split="0.5")]
    assert place() == places[0] == place(random_flip=True) == place(train_batch_size=1)
    status = os.stat(folder / "0.png")
    os.utime(folder / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    places.append(place())
    os.utime(folder / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert place() == places[0]
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(content + b"more")
    os.utime(folder / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    places.append(place())
    (folder / "0.png").unlink()
    places.append(place())
    monkeypatch.setattr(decode.PIL, "__version__", "another")
    places.append(place())
    assert len(set(places)) == len(places) == 9


@pytest.mark.parametrize("part", ["pixels", "columns.safetensors"])
@pytest.mark.parametrize("how", ["changed", "cut off", "removed"])
def test_damage_is_noticed_and_mended(tmp_path, part, how):
    cfg, source = pictures_of(draw(tmp_path / "pictures", SQUARES["several shapes"]))
    found, path = decode.decode(source, cfg), decode.place(tmp_path / "shelf", source, cfg)
    decode.keep(found, path, cfg, pytest.fail)
    content = bytearray((path / part).read_bytes())
    content[-1] ^= 1
    (path / part).unlink()
    if how != "removed":
        (path / part).write_bytes(content if how == "changed" else content[:-1])
    assert decode.kept(path, cfg) is None
    examples = data.prepared(source, cfg, 0, tmp_path / "shelf", lambda fingerprint: None, pytest.fail)
    assert equal(examples.pictures, found) and equal(decode.kept(path, cfg), found)


def test_the_budget_may_change(tmp_path):
    """More: decoded again, since the pixels are not there. Less: they are left there."""
    folder = draw(tmp_path / "pictures", SQUARES["one shape"])
    path = tmp_path / "kept"
    for budget, held, there in [(0.0, False, False), (1.0, True, False), (0.0, False, True), (1.0, True, True)]:
        cfg, source = pictures_of(folder, memory_budget=budget)
        found = decode.kept(path, cfg)
        assert (found is not None) == (there or (budget == 0.0 and path.exists()))
        found = found or decode.keep(decode.decode(source, cfg), path, cfg, pytest.fail)
        assert (found.pixels is not None) == held


def no_decoding(*_, **__):
    raise AssertionError("pictures were decoded again")


def refuse_decoding():
    data.decode = no_decoding


def test_the_next_life_decodes_nothing(tmp_path):
    """Nor does another run on the same pictures with the same cache; both end in the bits of a run that kept nothing."""
    folder, given = draw(tmp_path / "pictures", 3 * SQUARES["several shapes"]), {"data__validation_split": "0.5"}
    common = given | {"data__train_data_dir": folder, "data__train_batch_size": 1, "data__random_flip": True}
    alone = cli(tmp_path, *tiny(tmp_path, "alone", data__example_cache="no", **common))
    assert alone.code == 0 and not (tmp_path / "alone" / "examples").exists(), alone.err
    shared = common | {"data__example_cache": tmp_path / "cache"}
    assert cli(tmp_path, *tiny(tmp_path, "a", 3, base__lr_scheduler="constant", **shared)).code == 0
    longer = start(tmp_path, *tiny(tmp_path, "a", base__lr_scheduler="constant", **shared), patch=refuse_decoding).wait()
    other = start(tmp_path, *tiny(tmp_path, "b", **shared), patch=refuse_decoding).wait()
    assert longer.code == 0 and "continuing after step 3" in longer.err, longer.err
    assert other.code == 0 and digest(tmp_path / "b") == digest(tmp_path / "alone"), other.err
    assert len(list((tmp_path / "cache").iterdir())) == 2  # what is trained on, and what is held out


def test_a_sample_decodes_nothing_that_is_kept(tmp_path):
    vae = tiny(tmp_path, task="vae", steps=2)
    assert cli(tmp_path, *vae).code == 0
    drawn = start(tmp_path, "sample", tmp_path / "out", patch=refuse_decoding).wait()
    assert drawn.code == 0, drawn.err


def test_processes_of_a_machine_decode_once(tmp_path):
    """And end in the same bits as where each decodes for itself."""

    def count():
        inner = data.decode

        def decode(*given):
            (tmp_path / f"decoded-{os.environ['RANK']}").touch()
            return inner(*given)

        data.decode = decode

    command = {"data__train_batch_size": 2}
    for process in start_many(tmp_path, 2, *tiny(tmp_path, **command), patch=count):
        assert (result := process.wait()).code == 0, result.err
    assert [path.name for path in tmp_path.glob("decoded-*")] == ["decoded-0"]
    for result in cli_many(tmp_path, 2, *tiny(tmp_path, "each", data__example_cache="no", **command)):
        assert result.code == 0, result.err
    assert digest(tmp_path / "out") == digest(tmp_path / "each")


def test_a_mistake_of_one_is_one_of_all(tmp_path):
    """The first of two processes finds a broken picture: both leave, with the line and the code of a run alone."""
    folder = draw(tmp_path / "pictures", SQUARES["one shape"])
    (folder / "3.png").write_bytes(b"no picture")
    results = cli_many(tmp_path, 2, *tiny(tmp_path, data__train_data_dir=folder, data__train_batch_size=1), timeout=60)
    assert [result.code for result in results] == [2, 2]
    refused(results[0], "1 of 6 pictures cannot be read", "3.png")
    assert not (tmp_path / "out").exists()


def test_left_out_pictures_are_kept_so(tmp_path):
    folder = draw(tmp_path / "pictures", SQUARES["several shapes"])
    (folder / "3.png").write_bytes(b"no picture")
    flags = tiny(tmp_path, data__train_data_dir=folder, data__train_batch_size=2, data__skip_broken=True)
    assert cli(tmp_path, *flags).code == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    again = start(tmp_path, *flags, patch=refuse_decoding).wait()
    assert again.code == 0 and "1 pictures cannot be read and are left out" in again.err, again.err
    (path,) = (tmp_path / "out" / "examples").iterdir()
    assert decode.kept(path, Data(resolution=8)) is None  # it may have been the disk that was broken: they are read again
    longer = tiny(tmp_path, data__train_data_dir=folder, data__train_batch_size=2, steps=7)
    refused(cli(tmp_path, *longer), "1 of 6 pictures cannot be read")


@pytest.mark.parametrize("refusal", ["no folder", "full"])
def test_a_disk_that_refuses_ends_nothing(tmp_path, refusal):
    def full():
        def save(*_):
            raise OSError(28, "No space left on device")

        decode.save_file = save

    plain = cli(tmp_path, *tiny(tmp_path, "plain", data__example_cache="no"))
    shelf = tmp_path / "unet.json" / "cache" if refusal == "no folder" else "auto"
    patch = full if refusal == "full" else lambda: None
    result = start(tmp_path, *tiny(tmp_path, data__example_cache=shelf), patch=patch).wait()
    assert plain.code == result.code == 0, result.err
    assert "warning: the decoded pictures are not kept" in result.err and "warning" not in plain.err
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")
    assert not list((tmp_path / "out").glob("examples/*")) + list((tmp_path / "out").glob("examples/.*"))
