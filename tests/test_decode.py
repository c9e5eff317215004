"""Images are decoded once: for a run's next life, its other processes, and other runs on the same images."""

import dataclasses
import io
import os
import pathlib
import shutil
import time
import types

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from test_settings import refused
from warm import SHARED, cli, cli_many, digest, fork, start, start_many, tiny

from oneloop import data
from oneloop.configs import Data
from oneloop.inputs import decoding, sources, store
from oneloop.inputs import shapes as embedded

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
    return cfg, sources.open_source(cfg)


def equal(a, b):
    """Whether two passes found the same."""
    lists = [None if x.pixels is None else list(x.pixels["pixel_values"]) for x in (a, b)]
    same = lists[0] is lists[1] or all(torch.equal(x, y) for x, y in zip(*lists, strict=True))
    columns = a.columns.keys() == b.columns.keys() and all(torch.equal(x, b.columns[k]) for k, x in a.columns.items())
    return same and columns and (a.modes, a.changes, a.broken) == (b.modes, b.changes, b.broken)


@pytest.mark.parametrize("more", [{}, {"center_crop": True}, {"memory_budget": 0.0}], ids=lambda more: "".join(more) or "whole")
@pytest.mark.parametrize("sizes", SQUARES)
def test_what_is_kept_is_what_was_decoded(tmp_path, sizes, more):
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES[sizes]), **more)
    found, path = store.decode(source, cfg), store.path_of(tmp_path / "shelf", source, cfg)
    assert store.load(path, cfg) is None
    there = store.write(found, path, cfg, pytest.fail)
    again = store.load(path, cfg)
    assert equal(found, there) and equal(found, again) and [p.name for p in path.parent.iterdir()] == [path.name]
    assert (again.pixels is None) == ("memory_budget" in more)
    held = again.pixels and isinstance(again.pixels["pixel_values"], torch.Tensor)
    assert bool(held) == ((not more and sizes == "one shape") or "center_crop" in more)
    a, b = data.Examples(source, cfg, 0, found), data.Examples(source, cfg, 0, again)
    assert a.fingerprint == b.fingerprint and torch.equal(a[range(4)]["pixel_values"], b[range(4)]["pixel_values"])


def test_another_set_has_another_place(tmp_path, monkeypatch):
    """A changed, added, or removed image, another resolution, cut or part of the set, another version of the decoder."""
    folder = draw(tmp_path / "images", 3 * SQUARES["several shapes"])

    def place(**more):
        cfg = Data(**{"train_data_dir": str(folder), "resolution": 16, "train_batch_size": 2} | more)
        return store.path_of(tmp_path, sources.open_source(cfg), cfg)

    shapes = [place(train_data_dir=None), place(train_data_dir=None, num_shapes=99)]
    places = [
        *shapes,
        place(),
        place(resolution=12),
        place(center_crop=True),
        place(interpolation="bicubic"),
        place(max_train_samples=4),
        place(validation_split="0.5"),
    ]
    whole = places[2]
    assert place() == whole == place(random_flip=True) == place(train_batch_size=1)
    (folder / "0.txt").write_text("a caption is no image")
    assert place() == whole
    shutil.copy2(folder / "1.png", folder / "0.png")
    places.append(place())
    os.utime(folder / "0.png")
    places.append(place())
    status = [os.stat(folder / name) for name in ("0.png", "1.png")]
    assert status[0].st_size == status[1].st_size
    for name in ("0.png", "1.png"):
        os.utime(folder / name, (1, 1))
    places.append(place())
    (folder / "0.png").rename(tmp_path / "kept")  # the same sizes and times of writing
    (folder / "1.png").rename(folder / "0.png")
    (tmp_path / "kept").rename(folder / "1.png")
    places.append(place())
    (folder / "0.png").unlink()
    places.append(place())
    monkeypatch.setitem(embedded.SIZES, "small", 0.3)
    places.append(place(train_data_dir=None))
    for module, name in ((store.PIL, "__version__"), (store, "FORMAT")):
        monkeypatch.setattr(module, name, "another")
        places.append(place())
    monkeypatch.setattr(store.features, "version", lambda name: "another")
    places.append(place())
    assert len(set(places)) == len(places) == 17


def test_a_saved_set_that_was_saved_anew_is_another(tmp_path):
    """Though it was made by the same steps, which is all that its fingerprint knows."""
    import datasets

    def saved(shade):
        Image.new("RGB", (16, 16), (shade, 0, 0)).save(tmp_path / "x.png")
        rows = datasets.Dataset.from_dict({"path": 4 * [str(tmp_path / "x.png")]})
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        kinds = datasets.Features(path=datasets.Value("string"), image=datasets.Image())
        rows.map(with_picture, features=kinds, load_from_cache_file=False).save_to_disk(tmp_path / "set")
        cfg = Data(dataset_name=str(tmp_path / "set"), resolution=16, train_batch_size=2)
        source = sources.open_source(cfg)
        return store.path_of(tmp_path, source, cfg), data.Examples(source, cfg, 0).fingerprint

    (first, one), (second, two) = saved(10), saved(200)
    assert one != two and first != second


def with_picture(row):
    with open(row["path"], "rb") as file:
        return {"image": {"bytes": file.read(), "path": None}}


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    """Some formats turn it themselves, and there are orientations that mean nothing."""
    for name, orientation in (("0.tiff", 6), ("1.jpg", 6), ("2.jpg", 9), ("3.jpg", 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (640, 320)).save(tmp_path / name, exif=exif)
    cfg, source = pictures_of(tmp_path)
    for skim in (False, True):
        assert store.decode(source, cfg, skim=skim).columns["size"].tolist() == 2 * [[640, 320]] + 2 * [[320, 640]]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["bilinear", "lanczos"])
def test_large_jpegs_are_decoded_smaller(tmp_path, monkeypatch, kind, orientation):
    """Within the difference that is stated, at the sizes of the file, and the same bits when read for a batch."""
    photo = Image.open(SHARED / "dog" / "00.jpg").resize((1500, 1100), Image.Resampling.LANCZOS)
    noisy = np.asarray(photo) + np.random.default_rng(0).normal(0, 4, (1100, 1500, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "x.jpg", quality=92, exif=exif)
    cfg = Data(train_data_dir=str(tmp_path), resolution=128, train_batch_size=1, interpolation=kind)
    source, real, sizes = sources.open_source(cfg), store.fit, []
    monkeypatch.setattr(store, "fit", lambda image, *more: (sizes.append(image.size), real(image, *more))[1])
    small = store.decode(source, cfg)
    assert max(sizes[0]) == 375 and small.columns["size"].tolist() == [[1100, 1500] if orientation == 1 else [1500, 1100]]
    read = data.Examples(source, dataclasses.replace(cfg, memory_budget=0), 0)
    assert torch.equal(read._pixels("pixel_values", 0), small.pixels["pixel_values"][0])
    monkeypatch.setattr(store, "shrink", lambda *given: None)
    whole = store.decode(source, cfg).pixels["pixel_values"][0]
    apart = (small.pixels["pixel_values"][0].float() - whole.float()).abs()
    assert 0 < apart.mean() < 0.4 and apart.max() <= 4


@pytest.mark.parametrize("decoder", ["simplejpeg", "torchvision"])
def test_plain_jpegs_are_decoded_to_the_same_bits(tmp_path, monkeypatch, decoder):
    """Of every subsampling and size, progressive, grey, in other colours, turned, with a profile or cut off: as PIL alone."""
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="an optional decoder, which is not installed")
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    ways = [{"subsampling": s, "quality": q} for s in (0, 1, 2) for q in (30, 92, 100)]
    ways += [{"progressive": True}, {"keep_rgb": True}, {"restart_marker_rows": 1}, {"optimize": True}]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    kinds, fast = [("RGB", way) for way in ways], 0
    kinds += [("L", {}), ("CMYK", {}), ("RGB", {"icc_profile": profile}), ("RGB", {"exif": exif}), ("RGB", {"cut": True})]
    for side in ((64, 64), (61, 47), (8, 129)):
        for mode, way in kinds:
            image, out = Image.fromarray(noise).resize(side, Image.BICUBIC).convert(mode), io.BytesIO()
            image.save(out, "JPEG", **{key: value for key, value in way.items() if key != "cut"})
            raw = out.getvalue()[: -len(out.getvalue()) // 3 if "cut" in way else None]
            whole, cfg = side[::-1], Data(center_crop=True)
            size = tuple(max(edge // 2, 1) for edge in whole)
            found = decoding.plain(Image.open(io.BytesIO(raw)), raw, whole, size, cfg)
            if mode != "RGB" or {"icc_profile", "exif", "cut"} & way.keys():
                assert found is None, (mode, way)
                continue
            assert torch.equal(found, decoding.fit(Image.open(io.BytesIO(raw)).convert("RGB"), whole, size, cfg)), (side, way)
            fast += 1
            assert decoding.plain(Image.open(io.BytesIO(raw)), raw, size, size, cfg) is None  # which has to be resized
    assert fast == 3 * len(ways)


def test_small_pictures_are_decoded_by_few_threads(monkeypatch):
    monkeypatch.setattr(store.os, "cpu_count", lambda: 16)
    found = [store._Row([({"size": (side, side)}, {})], "RGB", []) for side in (8, 64, 130, 512)]
    assert [store.threads(first) for first in (*found, "broken.png (it is broken)")] == [1, 1, 4, 16, 16]


def test_the_format_has_a_number():
    """What is made of these images is pinned: whoever changes it raises store.FORMAT, and writes the new marks here."""
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    clear = Image.new("RGBA", (16, 20), (200, 30, 40, 128))
    plain = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(20, 20, 3).astype(np.uint8))
    pictures = [plain.crop((0, 0, 16, 20)), deep, clear]
    images = types.SimpleNamespace(read=lambda i: (pictures[i], b""), name=str)
    cfg = Data(num_shapes=3, train_batch_size=1, resolution=16)
    columns = store.decode(dataclasses.replace(sources.open_source(cfg), images={"pixel_values": images}), cfg).columns
    marks = [store.content_hash(*(columns[name][i].tolist() for name in ("mark", "thumb", "room"))) for i in range(3)]
    assert (store.FORMAT, [mark[:8] for mark in marks]) == (3, ["ce64e1f9", "652b7830", "49bd9559"])


@pytest.mark.parametrize("part", ["pixels", "columns.safetensors"])
@pytest.mark.parametrize("how", ["changed", "cut off", "removed"])
def test_damage_is_noticed_and_mended(tmp_path, part, how):
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES["several shapes"]))
    found, path = store.decode(source, cfg), store.path_of(tmp_path / "shelf", source, cfg)
    store.write(found, path, cfg, pytest.fail)
    content = bytearray((path / part).read_bytes())
    content[-1] ^= 1
    (path / part).unlink()
    if how != "removed":
        (path / part).write_bytes(content if how == "changed" else content[:-1])
    assert store.load(path, cfg) is None
    examples = data.opened(source, cfg, 0, tmp_path / "shelf")
    examples.cache(pytest.fail)
    assert equal(examples.images, found) and equal(store.load(path, cfg), found)


def test_facts_are_part_of_what_is_checked(tmp_path):
    """No bit of the file's header can be turned without notice, and no header is a reason to end."""
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES["one shape"]))
    store.write(store.decode(source, cfg), path := tmp_path / "kept", cfg, pytest.fail)
    file = path / "columns.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for i in range(8 + size):
        for bit in (0, 1, 5):
            turned = content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]
            file.write_bytes(turned)
            if (found := store.load(path, cfg)) is not None:  # only what JSON reads alike
                assert equal(found, store.decode(source, cfg)), (i, turned[:size])
    columns = store.decode(source, cfg).columns
    for facts in (
        {},
        {"facts": "[]", "hash": store._hash(columns, "[]")},
        {"facts": "1", "hash": store._hash(columns, "1")},
    ):
        store.save_file(columns, file, facts or None)
        assert store.load(path, cfg) is None


def test_the_budget_may_change(tmp_path):
    """More: decoded again, since the pixels are not there. Less: they are left there."""
    folder = draw(tmp_path / "images", SQUARES["one shape"])
    path = tmp_path / "kept"
    for budget, held, there in [(0.0, False, False), (1.0, True, False), (0.0, False, True), (1.0, True, True)]:
        cfg, source = pictures_of(folder, memory_budget=budget)
        found = store.load(path, cfg)
        assert (found is not None) == (there or (budget == 0.0 and path.exists()))
        found = found or store.write(store.decode(source, cfg), path, cfg, pytest.fail)
        assert (found.pixels is not None) == held


def no_decoding(*_, **__):
    raise AssertionError("images were decoded again")


def refuse_decoding():
    store.decode = no_decoding


def test_the_next_life_decodes_nothing(tmp_path):
    """Nor does another run on the same images with the same cache; both end in the bits of a run that kept nothing."""
    folder, given = draw(tmp_path / "images", 3 * SQUARES["several shapes"]), {"data__validation_split": "0.5"}
    common = given | {"data__train_data_dir": folder, "data__train_batch_size": 1, "data__random_flip": True}
    alone = cli(tmp_path, *tiny(tmp_path, "alone", data__example_cache="no", **common))
    assert alone.code == 0 and not (tmp_path / "alone" / "examples").exists(), alone.err
    shared = common | {"data__example_cache": tmp_path / "cache"}
    assert cli(tmp_path, *tiny(tmp_path, "a", 3, base__lr_scheduler="constant", **shared)).code == 0
    longer = start(tmp_path, *tiny(tmp_path, "a", base__lr_scheduler="constant", **shared), patch=refuse_decoding).wait()
    other = start(tmp_path, *tiny(tmp_path, "b", **shared), patch=refuse_decoding).wait()
    assert longer.code == 0 and "resuming after step 3" in longer.err, longer.err
    assert other.code == 0 and digest(tmp_path / "b") == digest(tmp_path / "alone"), other.err
    assert len(list((tmp_path / "cache").iterdir())) == 2  # what is trained on, and what is held out


def test_a_sample_decodes_nothing_that_is_kept(tmp_path):
    vae = tiny(tmp_path, task="vae", steps=2)
    assert cli(tmp_path, *vae).code == 0
    (tmp_path / "out").rename(tmp_path / "moved")  # its images go with it
    drawn = start(tmp_path, "sample", tmp_path / "moved", patch=refuse_decoding).wait()
    assert drawn.code == 0, drawn.err


def test_processes_of_a_machine_decode_once(tmp_path):
    """And end in the same bits as where each decodes for itself."""

    def count():
        inner = store.decode

        def decode(*given):
            (tmp_path / f"decoded-{os.environ['RANK']}").touch()
            return inner(*given)

        store.decode = decode

    command = {"data__train_batch_size": 2}
    for process in start_many(tmp_path, 2, *tiny(tmp_path, **command), patch=count):
        assert (result := process.wait()).code == 0, result.err
    assert [path.name for path in tmp_path.glob("decoded-*")] == ["decoded-0"]
    for result in cli_many(tmp_path, 2, *tiny(tmp_path, "each", data__example_cache="no", **command)):
        assert result.code == 0, result.err
    assert digest(tmp_path / "out") == digest(tmp_path / "each")


def test_a_mistake_of_one_is_one_of_all(tmp_path):
    """The first of two processes finds a broken image: both leave, with the line and the code of a run alone."""
    folder = draw(tmp_path / "images", SQUARES["one shape"])
    (folder / "3.png").write_bytes(b"no image")
    results = cli_many(tmp_path, 2, *tiny(tmp_path, data__train_data_dir=folder, data__train_batch_size=1), timeout=60)
    assert [result.code for result in results] == [2, 2]
    refused(results[0], "1 of 6 images cannot be read", "3.png")
    assert not (tmp_path / "out").exists()


def test_nothing_is_kept_of_a_set_with_broken_pictures(tmp_path):
    """It may have been the disk that was broken: they are read again, by this run and by others."""
    folder = draw(tmp_path / "images", SQUARES["several shapes"])
    (folder / "3.png").write_bytes(b"no image")
    flags = tiny(tmp_path, data__train_data_dir=folder, data__train_batch_size=2, data__skip_broken=True)
    result = cli(tmp_path, *flags)
    assert result.code == 0 and "1 images cannot be read and are left out" in result.err, result.err
    assert not (tmp_path / "out" / "examples").exists()
    refused(cli(tmp_path, *tiny(tmp_path, data__train_data_dir=folder, data__train_batch_size=2, steps=7)), "1 of 6 images")


def test_a_changed_set_is_refused_before_anything_is_kept(tmp_path):
    """One that is held out too: a mistake in it leaves no folder behind."""
    folder = draw(tmp_path / "images", 3 * SQUARES["one shape"])
    common = {"data__train_data_dir": folder, "data__train_batch_size": 1}
    assert cli(tmp_path, *tiny(tmp_path, **common)).code == 0
    (kept,) = (tmp_path / "out" / "examples").iterdir()
    Image.new("RGB", (24, 24)).save(folder / "0.png")
    refused(cli(tmp_path, *tiny(tmp_path, steps=7, **common)), "data was", "the first image that differs is that of 0.png")
    assert list((tmp_path / "out" / "examples").iterdir()) == [kept]
    held_out = sources.held_out_rows(18, "0.5")
    source = sources.open_source(Data(train_data_dir=str(folder), train_batch_size=1))
    (tmp_path / "images" / source.name(held_out[0])).write_bytes(b"no image")
    refused(cli(tmp_path, *tiny(tmp_path, "new", data__validation_split="0.5", **common)), "1 of 9 images cannot be read")
    assert not (tmp_path / "new").exists()


def test_a_run_keeps_one_copy(tmp_path):
    """In its own folder; in one that is shared it removes nothing."""
    folder, common = draw(tmp_path / "images", SQUARES["one shape"]), {"data__train_batch_size": 2}
    for shelf, count in ((tmp_path / "shared", 2), ("auto", 1)):
        for steps in (6, 7):
            os.utime(folder / "0.png")
            flags = tiny(tmp_path, f"out-{count}", steps, data__train_data_dir=folder, data__example_cache=shelf, **common)
            assert (result := cli(tmp_path, *flags)).code == 0, result.err
        place = tmp_path / "shared" if count == 2 else tmp_path / "out-1" / "examples"
        assert len(list(place.iterdir())) == count


def test_writers_of_one_place(tmp_path):
    """The second finds what the first wrote, and leaves it: another process may have it mapped. What a killed one left goes."""
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES["several shapes"]))
    found, path = store.decode(source, cfg), tmp_path / "shelf" / "kept"
    for name, age in (("old", 2 * store.DAY), ("new", 0)):
        (left := path.with_name(f".kept.{name}.writing")).mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    store.write(found, path, cfg, pytest.fail)
    status = os.stat(path / "pixels")
    assert equal(store.write(found, path, cfg, pytest.fail), found) and os.stat(path / "pixels") == status
    assert sorted(p.name for p in path.parent.iterdir()) == [".kept.new.writing", "kept"]


def test_processes_that_keep_at_once(tmp_path):
    """All end with the images, and nobody is told of trouble."""
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES["several shapes"]))
    found, began = store.decode(source, cfg), time.time() + 0.5

    def check():
        for i in range(40):
            time.sleep(max(0, began + 0.02 * i - time.time()))
            assert equal(store.write(found, tmp_path / "shelf" / str(i), cfg, pytest.fail), found)

    for process in [fork(check, tmp_path) for _ in range(4)]:
        assert (result := process.wait()).code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "shelf").iterdir()) == sorted(map(str, range(40)))


def test_images_are_bound_to_their_name(tmp_path):
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES["one shape"]))
    store.write(store.decode(source, cfg), tmp_path / "a", cfg, pytest.fail)
    assert store.load(tmp_path / "a", cfg) is not None
    (tmp_path / "a").rename(tmp_path / "b")
    assert store.load(tmp_path / "b", cfg) is None


@pytest.mark.parametrize("comes", ["whole", "in part"])
@pytest.mark.parametrize("damaged", [False, True])
def test_one_that_comes_between(tmp_path, monkeypatch, comes, damaged):
    """Another process commits the same images between the look and the renaming, or a part is there of what a third removes."""
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES["several shapes"]))
    found, path, real = store.decode(source, cfg), tmp_path / "shelf" / "kept", store.os.rename
    if damaged:
        path.mkdir(parents=True)
        (path / "columns.safetensors").write_text("junk")

    def between(*given):
        monkeypatch.setattr(store.os, "rename", real)
        if comes == "whole":
            store.write(found, path, cfg, pytest.fail)
        else:
            path.mkdir(exist_ok=True)
            (path / "pixels").write_text("x")
        return real(*given)

    monkeypatch.setattr(store.os, "rename", between)
    assert equal(store.write(found, path, cfg, pytest.fail), found) and equal(store.load(path, cfg), found)
    assert [p.name for p in path.parent.iterdir()] == ["kept"]


def test_checkpoints_come_first(tmp_path, monkeypatch):
    """Images are kept where as much space is left after them as they take."""
    cfg, source = pictures_of(draw(tmp_path / "images", SQUARES["one shape"]))
    found, said = store.decode(source, cfg), []
    needed = found.nbytes(cfg) + sum(x.nbytes for x in found.columns.values())
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2 * needed - 1))
    assert store.write(found, tmp_path / "shelf" / "kept", cfg, said.append) is found
    assert "not cached" in said[0] and f"they take {needed:,} bytes, and {2 * needed - 1:,} are free" in said[0]
    assert not list((tmp_path / "shelf").iterdir())
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2 * needed))
    assert store.write(found, tmp_path / "shelf" / "kept", cfg, pytest.fail) is not found


@pytest.mark.parametrize("moment", ["mkdir", "save_file", "from_file", "rename", "after"])
def test_killed_while_it_keeps(tmp_path, moment):
    """The next start finds nothing, or all of it; it ends Equal, and nothing of the first is left."""

    def patch():
        def dies(*_, **__):
            os._exit(9)

        if moment == "mkdir":
            make = pathlib.Path.mkdir
            pathlib.Path.mkdir = lambda path, *a, **k: make(path, *a, **k) or (path.name.endswith(".writing") and dies())
        elif moment == "after":
            write = store.write
            store.write = lambda *given: dies(write(*given))
        else:
            setattr({"save_file": store, "from_file": store.torch, "rename": store.os}[moment], moment, dies)

    whole = cli(tmp_path, *tiny(tmp_path, "whole"))
    killed = start(tmp_path, *tiny(tmp_path), patch=patch).wait()
    place = tmp_path / "out" / "examples"
    assert killed.code == 9 and len(list(place.iterdir())) == 1, killed.err
    patch = refuse_decoding if moment == "after" else lambda: None
    again = start(tmp_path, *tiny(tmp_path), patch=patch).wait()
    assert whole.code == again.code == 0, again.err
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert [path.name[:7] for path in place.iterdir()] == ["images-"]


@pytest.mark.parametrize("refusal", ["no folder", "full", "no mapping"])
def test_a_disk_that_refuses_ends_nothing(tmp_path, refusal):
    def full():
        def save(*_, **__):
            raise OSError(28, "No space left on device") if refusal == "full" else RuntimeError("unable to mmap")

        store.save_file = save
        store.torch.from_file = save

    plain = cli(tmp_path, *tiny(tmp_path, "plain", data__example_cache="no"))
    shelf = tmp_path / "unet.json" / "cache" if refusal == "no folder" else "auto"
    patch = full if refusal != "no folder" else lambda: None
    result = start(tmp_path, *tiny(tmp_path, data__example_cache=shelf), patch=patch).wait()
    assert plain.code == result.code == 0, result.err
    assert "warning: the decoded images are not cached" in result.err and "warning" not in plain.err
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")
    assert not list((tmp_path / "out").glob("examples/*")) + list((tmp_path / "out").glob("examples/.*"))
