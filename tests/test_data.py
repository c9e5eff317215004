"""Images of every kind come out right, from every source, each once an epoch, in an order that is a function of the seed."""

import dataclasses
import json
import os
import signal
import struct
import threading
import types

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from test_settings import refused
from torch.utils.data import DataLoader
from torchvision import transforms
from warm import SHARED, cli, start, tiny

from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.families import hub
from oneloop.inputs import batches, cache, decoding, shapes, sources
from oneloop.inputs.crop import resized
from oneloop.tasks import ddpm, lora, vae


def gradient(n=16):
    """An image with every value from 0 to 255, [n, n] float in [0, 1]."""
    return np.linspace(0, 1, n * n).reshape(n, n)


KINDS = {
    "greyscale": (Image.fromarray((gradient() * 255).round().astype(np.uint8)), "png"),
    "16-bit": (Image.fromarray((gradient() * 65535).round().astype(np.uint16)), "png"),
    "16-bit tiff": (Image.fromarray((gradient() * 65535).round().astype(np.uint16)), "tiff"),
    "32-bit": (Image.fromarray((gradient() * 65535).round().astype(np.int32)), "tiff"),
    "32-bit to 255": (Image.fromarray((gradient() * 255).round().astype(np.int32)), "tiff"),
    "32-bit to a million": (Image.fromarray((gradient() * 1e6).round().astype(np.int32)), "tiff"),
    "float": (Image.fromarray(gradient().astype(np.float32)), "tiff"),
    "float to 255": (Image.fromarray((gradient() * 255).astype(np.float32)), "tiff"),
    "rgb": (Image.fromarray(np.repeat((gradient() * 255).round().astype(np.uint8)[..., None], 3, 2)), "png"),
    "palette": (Image.fromarray((gradient() * 255).round().astype(np.uint8)).convert("P"), "png"),
    "opaque alpha": (Image.fromarray((gradient() * 255).round().astype(np.uint8)).convert("RGBA"), "png"),
    "grey and alpha": (Image.fromarray((gradient() * 255).round().astype(np.uint8)).convert("LA"), "png"),
    "cmyk": (Image.fromarray((gradient() * 255).round().astype(np.uint8)).convert("RGB").convert("CMYK"), "tiff"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(tmp_path, kind):
    image, ending = KINDS[kind]
    image.save(tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as opened:
        x = np.asarray(decoding.to_rgb(opened)).astype(float)  # [16, 16, 3]
    assert x.shape == (16, 16, 3)
    assert np.abs(x - gradient()[..., None] * 255).max() <= 1.0


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    x = np.asarray(decoding.to_rgb(image))
    assert x[0, 0].tolist() == [0, 0, 255] and x[1, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(decoding.to_rgb(Image.open(tmp_path / "p.png"))).min() == 255


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    turned = decoding.to_rgb(Image.open(tmp_path / "x.png"))
    assert turned.size == (4, 8) and turned.getpixel((3, 0)) == (255, 255, 255)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_float_pictures_that_are_not_pictures(bad):
    x = gradient().astype(np.float32)
    x[3, 3] = bad
    with pytest.raises(ValueError, match="negative or not finite"):
        decoding.to_rgb(Image.fromarray(x))


def folder(tmp_path, count=6, size=(20, 12)):
    """A folder of images whose file names would scatter them over splits."""
    place = tmp_path / "images"
    place.mkdir()
    for i in range(count):
        name = ["test_0", "train_1", "validation_2"][i] if i < 3 else f"p{i}"
        Image.new("RGB", size, (i * 40, 0, 0)).save(place / f"{name}.png")
    return place


def test_a_folder_whole(tmp_path):
    place = folder(tmp_path)
    source = sources.open_source(Data(train_data_dir=str(place), train_batch_size=2))
    assert source.size == 6 and source.captions is None and source.labels is None


def test_captions_from_metadata_csv_and_txt(tmp_path):
    place = folder(tmp_path)
    files = sorted(p.name for p in place.glob("*.png"))
    cfg = Data(train_data_dir=str(place), train_batch_size=2)
    for name in files[:-1]:
        (place / name).with_suffix(".txt").write_text(f"about {name}\n")
    source = sources.open_source(cfg)
    by_name = {source.name(i).split("/")[-1]: source.captions[i] for i in range(6)}
    assert by_name == {name: [f"about {name}"] for name in files[:-1]} | {files[-1]: []}
    (place / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},csv {name}\n" for name in files))
    source = sources.open_source(cfg)
    assert {c[0] for c in source.captions} == {f"csv {name}" for name in files}
    (place / "metadata.csv").unlink()
    (place / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": f"json {n}"}) + "\n" for n in files))
    assert {c[0] for c in sources.open_source(cfg).captions} == {f"json {name}" for name in files}


def test_labels_from_subfolders(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "p" / kind).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), "red").save(tmp_path / "p" / kind / f"{i}.png")
    assert sorted(sources.open_source(Data(train_data_dir=str(tmp_path / "p"), train_batch_size=2)).labels) == [0, 0, 1, 1]


def test_local_data_sets(tmp_path):
    if not SHARED.exists():
        pytest.skip("the shared data is not beside the project")
    source = sources.open_source(Data(dataset_name=str(SHARED / "mnist")))
    assert source.size == 9000 and source.labels[:3] and source.captions is None
    rows = datasets.load_dataset(str(SHARED / "mnist"), split="test[:20]")
    rows.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"part": rows}).save_to_disk(tmp_path / "dict")
    assert sources.open_source(Data(dataset_name=str(tmp_path / "disk"), train_batch_size=2)).size == 20
    assert sources.open_source(Data(dataset_name=str(tmp_path / "dict"), split="part", train_batch_size=2)).size == 20
    with pytest.raises(BadInput, match=r"--data.split is 'train'.*has: part"):
        sources.open_source(Data(dataset_name=str(tmp_path / "dict")))


def test_shapes_are_drawn_from_the_index():
    small, caption, label = shapes.draw_shape(5, 16)
    large, again, _ = shapes.draw_shape(5, 64)
    assert caption == again and label in range(3) and small.shape == (16, 16, 3) and large.shape == (64, 64, 3)
    reduced = large.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 6  # the same composition
    captions = {shapes.draw_shape(i, 1)[1] for i in range(2000)}
    assert len(captions) == 3 * 2 * 6 * 5


@pytest.mark.parametrize("resolution", [8, 12, 20])
@pytest.mark.parametrize("size", [(20, 12), (12, 20), (16, 16)])
def test_geometry(tmp_path, size, resolution):
    """The shorter side becomes the resolution; a crop's corner says where it is, mirrored or not."""
    w, h = size
    ramp = np.stack([np.tile(np.arange(w) * 10, (h, 1)), np.tile(np.arange(h)[:, None] * 10, (1, w)), np.zeros((h, w))], -1)
    place = tmp_path / "p"
    place.mkdir()
    for i in range(4):
        Image.fromarray(ramp.astype(np.uint8)).save(place / f"{i}.png")
    cfg = Data(train_data_dir=str(place), train_batch_size=4, resolution=resolution, random_flip=True)
    examples = data.Examples(sources.open_source(cfg), cfg, seed=1)
    cover = tuple(resized((h, w), (resolution, resolution)).tolist())
    whole = decoding.fit(Image.fromarray(ramp.astype(np.uint8)), cover, (resolution, resolution), cfg).float()
    assert min(whole.shape[1:]) == resolution
    corners = set()
    for first in range(0, 64, 4):
        batch = examples[range(first, first + 4)]
        assert batch["original_size"].tolist() == [[h, w]] * 4
        for x, (top, left) in zip(batch["pixel_values"].float(), batch["crop_top_left"].tolist(), strict=True):
            mirrored = bool(x[0, 0, 0] > x[0, 0, -1])
            source = whole.flip(-1) if mirrored else whole
            assert torch.equal(x, source[:, top : top + resolution, left : left + resolution])
            corners.add((mirrored, top, left))
    assert {m for m, _, _ in corners} == {True, False}
    assert len(corners) > 2 or size == (16, 16)


def test_each_picture_once_an_epoch_whatever_the_layout():
    cfg = Data(num_shapes=30, resolution=8, train_batch_size=4, random_flip=True)
    source = sources.open_source(cfg)
    examples = data.Examples(source, cfg, seed=7)
    one = [next(stream) for stream in [examples.stream(0, 4)] for _ in range(15)]
    rows = torch.cat([b["index"] for b in one]).tolist()
    assert sorted(rows[:30]) == sorted(rows[30:60]) == list(range(30)) and rows[:30] != rows[30:60]
    two = [examples.stream(rank * 2, 4) for rank in range(2)]
    halves = data.Examples(source, Data(num_shapes=30, resolution=8, train_batch_size=2, random_flip=True), seed=7)
    two = [halves.stream(rank * 2, 4) for rank in range(2)]
    for batch in one:
        parts = [next(stream) for stream in two]
        assert torch.equal(batch["pixel_values"], torch.cat([p["pixel_values"] for p in parts]))
        assert batch["caption"] == parts[0]["caption"] + parts[1]["caption"]
    later = next(examples.stream(40, 4))
    assert torch.equal(later["pixel_values"], one[10]["pixel_values"])
    assert data.Examples(source, cfg, seed=8)[range(4)]["index"].tolist() != one[0]["index"].tolist()


def test_workers_and_memory_change_nothing(tmp_path):
    place = folder(tmp_path)
    common = {"train_data_dir": str(place), "train_batch_size": 2, "resolution": 8, "random_flip": True}
    held = Data(**common)
    read = Data(**common, memory_budget=0, dataloader_num_workers=2)
    a = data.Examples(sources.open_source(held), held, 3)
    b = data.Examples(sources.open_source(read), read, 3)
    assert a.images.pixels is not None and b.images.pixels is None and a.fingerprint == b.fingerprint
    x, y = a.stream(0, 2), b.stream(0, 2)
    for _ in range(5):
        p, q = next(x), next(y)
        assert torch.equal(p["pixel_values"], q["pixel_values"]) and torch.equal(p["index"], q["index"])


def test_decoded_once(tmp_path, monkeypatch):
    cfg = Data(train_data_dir=str(folder(tmp_path)), train_batch_size=2, resolution=8)
    source, reads = sources.open_source(cfg), []
    images = types.SimpleNamespace(name=source.name, read=lambda row: (reads.append(row), source.read(row))[1])
    counted = dataclasses.replace(source, images={"pixel_values": images})
    stream = data.Examples(counted, cfg, 0).stream(0, 2)
    for _ in range(9):
        next(stream)
    assert sorted(reads) == list(range(6))


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (16, 16)])
def test_a_set_on_the_device_gives_the_same_bits(tmp_path, shape, center_crop):
    """Cut and mirrored there by one gather: every column of the stream is what the host makes of it."""
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    cfg = Data(train_data_dir=str(tmp_path), resolution=16, train_batch_size=4, random_flip=True, center_crop=center_crop)
    host, there = (data.Examples(sources.open_source(cfg), cfg, 0) for _ in range(2))
    assert not there.reside(torch.device("cpu"))
    there.resident = there.images.pixels["pixel_values"]  # as after `reside`, and nothing else may be read
    there.images = dataclasses.replace(there.images, pixels=None)
    for expected, found, _ in zip(host.stream(0, 4), there.stream(0, 4), range(6), strict=False):
        assert "crop" in found
        expected, found = host.ready(expected, "cpu"), there.ready(found, "cpu")
        assert expected.keys() == found.keys() and expected["pixel_values"].is_contiguous()
        assert all(torch.equal(x, found[key]) if torch.is_tensor(x) else x == found[key] for key, x in expected.items())
        assert found["pixel_values"].stride() == expected["pixel_values"].stride()


def test_to_device_range():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert data.to_device({"pixel_values": x}, "cpu")["pixel_values"].flatten().tolist() == [-1.0, 1.0]


def test_mistakes(tmp_path):
    def run(**more):
        return cli(tmp_path, *tiny(tmp_path, **more))

    place = folder(tmp_path)
    refused(run(data__train_data_dir=tmp_path / "no"), "--data.train-data-dir", "there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(run(data__train_data_dir=tmp_path / "empty"), "--data.train-data-dir", "holds no images")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    refused(run(data__train_data_dir=tmp_path / "empty"), "--data.train-data-dir", "holds no images")
    refused(run(data__dataset_name=tmp_path / "nothing"), "--data.dataset-name", "expected `shapes`, a folder")
    refused(run(data__dataset_name="nobody/nothing"), "--data.dataset-name nobody/nothing", "a name on the hub")
    refused(
        run(data__train_data_dir=place, data__caption_column="prompt"), "--data.caption-column is 'prompt'", "columns image"
    )
    refused(run(data__train_data_dir=place, data__train_batch_size=7), "--data.train-batch-size is 7", "6 images")
    (place / "p3.png").write_bytes((place / "p3.png").read_bytes()[:48])
    (place / "p4.png").write_text("not an image")
    refused(run(data__train_data_dir=place), "2 of 6 images cannot be read", "p3.png", "p4.png")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Colours, ranges, crops.


def profile(kind):
    """An ICC profile: of Display P3 (its primaries and sRGB's curve, SMPTE EG 432-1), or of grey with a plain gamma of 1.8."""
    s15 = lambda *numbers: b"".join(struct.pack(">i", round(x * 65536)) for x in numbers)  # noqa: E731
    text = lambda x: b"desc" + bytes(4) + struct.pack(">I", len(x) + 1) + x + bytes(1 + 4 + 4 + 2 + 1 + 67)  # noqa: E731
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + s15(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    if kind == "grey":
        tags = {b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(1.8 * 256))}
    else:  # adapted to D50
        columns = (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)
        tags = {name: b"XYZ " + bytes(4) + s15(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags |= {b"desc": text(b"test"), b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1, 0.8249), b"cprt": text(b"none")}
    start, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    space = b"GRAY" if kind == "grey" else b"RGB "
    head = bytes(8) + b"\x02\x20\0\0" + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + s15(0.9642, 1, 0.8249)
    return struct.pack(">I", start + len(body)) + head[4:].ljust(124, b"\0") + table + body


def test_colours_are_converted_to_srgb(tmp_path):
    """Display P3's (234, 51, 35) is sRGB's (255, 0, 0): phones store their reds so. What is sRGB already is not touched."""
    said = []

    def read(image, icc, ending="png"):
        image.save(tmp_path / f"x.{ending}", icc_profile=icc, **({"quality": 100} if ending == "jpg" else {}))
        said.clear()
        with Image.open(tmp_path / f"x.{ending}") as opened:
            return np.asarray(decoding.to_rgb(opened, said.append)).astype(int)

    red = Image.new("RGB", (8, 8), (234, 51, 35))
    for ending in ("png", "jpg", "tiff"):
        assert np.abs(read(red, profile("P3"), ending) - [255, 0, 0]).max() <= 3
        assert said == ["converted to sRGB from their colour profile"]
    clear = red.copy()
    clear.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]), (8, 4))))
    x = read(clear, profile("P3"))
    assert (x[:, ::2] == 255).all() and np.abs(x[:, 1::2] - [255, 0, 0]).max() <= 3
    assert np.abs(read(red.convert("P", palette=Image.Palette.ADAPTIVE), profile("P3")) - [255, 0, 0]).max() <= 3
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read(noise, srgb), np.asarray(noise)) and said == []
    grey = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (2, 1)))
    linear = (np.arange(256) / 255) ** 1.8
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    for image in (grey, grey.convert("LA")):
        assert np.abs(read(image, profile("grey"))[0, :, 0] - expected).max() <= 2, image.mode
    for image, icc in ((noise, b"junk"), (noise, profile("grey"))):
        assert np.array_equal(read(image, icc), np.asarray(image))
        assert said == ["read as sRGB, since their colour profile cannot be used"]


@pytest.mark.parametrize(("low", "high"), [(0, 1.0001), (-0.01, 1.3), (0, 255.5), (-2, 300), (0, 66000)])
def test_floats_that_overshoot_are_clipped(low, high):
    top = 1 if high < 2 else 255 if high < 510 else 65535
    x, said = np.linspace(low, high, 256, dtype=np.float32).reshape(16, 16), []
    y = np.asarray(decoding.to_rgb(Image.fromarray(x), said.append)).astype(float)
    assert np.abs(y[..., 0] - x.clip(0, top) / top * 255).max() <= 0.51 and said == ["clipped to their range"]


@pytest.mark.parametrize("size", [(20, 15), (15, 20), (19, 15), (18, 15), (17, 15), (15, 22)])
def test_central_crops_are_torchvisions(tmp_path, size):
    """Its CenterCrop rounds half of the room to even: a pixel further where the room is 3 more than a multiple of 4."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    noise.save(tmp_path / "x.png")
    expected = torch.from_numpy(np.array(transforms.CenterCrop(15)(noise))).permute(2, 0, 1)
    for cut in (True, False):
        cfg = Data(train_data_dir=str(tmp_path), resolution=15, center_crop=cut, train_batch_size=1)
        batch = next(data.Examples(sources.open_source(cfg), cfg, 0).fixed(1))
        top, left = batch["crop_top_left"][0].tolist()
        assert torch.equal(batch["pixel_values"][0], expected)
        assert noise.crop((left, top, left + 15, top + 15)) == transforms.CenterCrop(15)(noise)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "lanczos"])
def test_interpolation_is_torchvisions(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    expected = transforms.Resize(16, interpolation=transforms.InterpolationMode(kind))(noise)
    found = decoding.fit(noise, (21, 16), (16, 16), Data(resolution=16, interpolation=kind))
    assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_interpolation_by_default():
    """As the official scripts have it: lanczos for the adapters of text-to-image models, else bilinear."""
    assert [task.Config().data.interpolation for task in (ddpm, vae, lora)] == ["bilinear", "bilinear", "lanczos"]


# ---------------------------------------------------------------------------------------------------------------------
# Workers.


@pytest.mark.parametrize("kind", ["shapes", "folder", "table"])
def test_workers_that_are_started_anew(tmp_path, kind):
    """As on macOS and Windows: what they are given pickles, part of a set and encodings in memory too."""
    cfg = Data(num_shapes=9, resolution=8, train_batch_size=2, memory_budget=0, validation_split="0.45")
    if kind != "shapes":
        cfg = dataclasses.replace(cfg, train_data_dir=str(folder(tmp_path, 9)), center_crop=True)
    if kind == "table":
        paths = sorted(map(str, (tmp_path / "images").iterdir()))
        kinds = datasets.Features(image=datasets.Image())
        datasets.Dataset.from_dict({"image": paths}, features=kinds).save_to_disk(tmp_path / "set")
        cfg = dataclasses.replace(cfg, train_data_dir=None, dataset_name=str(tmp_path / "set"))
    examples = data.Examples(sources.open_source(cfg), cfg, 0)
    if kind == "shapes":
        values, store = examples.values(("caption",)), cache.Cache(tmp_path / "cache")
        every = range(len(values.marks))
        store.fill(values.marks, every, 4, lambda some: ((i, {"embedding": torch.tensor(float(i))}) for i in some))
        examples.substitute("caption", ("caption",), store.refresh().read, 0)
        examples.hide({"caption"})
        examples[range(2)]  # what is open does not travel
    loader = DataLoader(
        batches.Readable(examples),
        sampler=[range(0, 2), range(2, 4)],
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    for i, batch in enumerate(loader):
        assert batch.keys() == examples[range(2 * i, 2 * i + 2)].keys()
        expected = examples[range(2 * i, 2 * i + 2)]
        assert all(torch.equal(x, batch[name]) if torch.is_tensor(x) else x == batch[name] for name, x in expected.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_while_it_trains(tmp_path, workers):
    """Is the user's, and is named: in one line, in a worker too."""
    place = folder(tmp_path, 4)
    cfg = Data(train_data_dir=str(place), train_batch_size=4, resolution=8, memory_budget=0, dataloader_num_workers=workers)
    stream = data.Examples(sources.open_source(cfg), cfg, 0).stream(0, 4)
    (place / "p3.png").unlink()
    with pytest.raises(BadInput, match=r"p3.png could be read at the start and cannot be any more \(No such file") as refusal:
        for _ in range(4):
            next(stream)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_goes_ends_a_run_with_its_name(tmp_path, workers):
    """And ends it: no signal ends loader workers, which a process waits for at its exit."""
    place = folder(tmp_path, 6)

    def patch():
        real = data.Examples.stream

        def stream(self, *given):
            (place / "p3.png").write_bytes(b"")
            return real(self, *given)

        data.Examples.stream = stream

    flags = {"data__train_data_dir": place, "data__memory_budget": 0, "data__dataloader_num_workers": workers}
    result = start(tmp_path, *tiny(tmp_path, **flags), patch=patch).wait()
    assert result.code == 2 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: the image p3.png could be read at the start") and "(the file is empty)" in last


class Dying:
    """Its reader is lost while the other process takes it over, and ends a little later."""

    def __reduce__(self):
        return Dying.lost, (os.getpid(),)

    @staticmethod
    def lost(reader):
        threading.Timer(0.3, os.kill, (reader, signal.SIGKILL)).start()
        raise ConnectionResetError("Connection reset by peer")


@pytest.mark.parametrize("when", ["reading", "handing over"])
def test_a_reader_that_is_killed_ends_a_run_in_a_line(tmp_path, when):
    """As by a system without memory: no bug of ours, and the run can go on."""
    place, parent = folder(tmp_path, 6), os.getpid()

    def patch():
        real, run = data.Examples.__getitem__, os.getpid()

        def get(self, numbers):
            last = os.getpid() not in (run, parent) and numbers[0] > 12
            if last and when == "reading":
                os.kill(os.getpid(), signal.SIGKILL)
            return {"n": Dying()} if last else real(self, numbers)

        data.Examples.__getitem__ = get

    more = {"data__train_data_dir": place, "data__memory_budget": 0, "data__dataloader_num_workers": 1}
    result = cli(tmp_path, *tiny(tmp_path, steps=20, **more), patch=patch)
    assert result.code == 1 and "Traceback" not in result.err and "bug" not in result.err, result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: a process that reads images is gone: ") and "fewer --data.dataloader-num-workers" in last


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """By the question that models ask too, in a line, and not by the library for half a minute; what it may ask later is as
    before."""
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(hub, "unreachable", lambda: "the hub cannot be reached: why")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    usual = datasets.load_dataset

    def load(*given, **more):
        asked.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        return usual(*given, **more)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(BadInput, match=r"or a name on the hub \(the hub cannot be reached: why\)"):
        sources.open_source(Data(dataset_name="owner/none"))
    assert asked == [(True, True)] and not datasets.config.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE
