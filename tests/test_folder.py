"""A folder of images: nothing in it vanishes without a word, and what is wrong with it is one line."""

import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image
from test_settings import refused
from warm import cli, tiny

from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.inputs import decoding, files, sources


def draw(folder, *names):
    """Red images of these names."""
    for name in names:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path, "JPEG" if path.suffix == ".mpo" else None)
    return folder


def opened(folder, **more):
    return sources.open_source(Data(**{"train_data_dir": str(folder), "train_batch_size": 1, "resolution": 8} | more))


def names(source):
    return [source.name(row) for row in range(source.size)]


def line(folder, **more):
    """What a refusal says: one line."""
    with pytest.raises(BadInput) as refusal:
        opened(folder, **more)
    text = str(refusal.value)
    assert "\n" not in text and len(text) <= 2000 and text.isprintable() and "BytesIO" not in text
    return text


def test_every_format_that_pil_reads(tmp_path):
    endings = ("png", "jpg", "webp", "tiff", "bmp", "gif", "avif", "qoi", "mpo", "ppm", "tga", "pcx", "ico", "jp2")
    every = [f"{i}.{ending}" for i, ending in enumerate(endings)]
    draw(tmp_path, *every)
    Image.new("F", (8, 8), 0.5).save(tmp_path / "x.pfm")
    source = opened(tmp_path)
    assert sorted(names(source)) == sorted([*every, "x.pfm"]) and not source.notes
    assert not data.Examples(source, Data(train_batch_size=1, resolution=8), 0).images.broken


def test_heic_is_named_where_it_cannot_be_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    monkeypatch.setattr(files.Image, "ID", [name for name in files.Image.ID if name != "HEIF"])  # nor registered before
    files.formats.cache_clear()
    assert {".heic", ".heif", ".hif"} <= files.endings()
    for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        with pytest.raises(ValueError, match="pip install pillow-heif"):
            files.opened(b"\0\0\0\x18ftyp" + brand + bytes(99))
    for raw, why in ((b"", "empty"), (b"junk", "not an image that PIL reads")):
        with pytest.raises(ValueError, match=why):
            files.opened(raw)
    monkeypatch.undo()
    files.formats.cache_clear()


def test_heic_is_read_as_it_is_seen(tmp_path):
    """Where pillow-heif is installed, which the extra `test` does: turned as the camera was held, a damaged one named."""
    heif = pytest.importorskip("pillow_heif", reason="the extra `heif` is not installed")
    heif.register_heif_opener()
    image, turned, read = Image.linear_gradient("L").resize((60, 40)).convert("RGB"), Image.Exif(), {}
    turned[0x0112] = 6  # to be turned by a quarter
    for ending in ("heic", "jpg"):
        image.save(tmp_path / f"a.{ending}", "HEIF" if ending == "heic" else None, exif=turned.tobytes(), quality=95)
        read[ending] = np.asarray(decoding.to_rgb(files.opened((tmp_path / f"a.{ending}").read_bytes()))).astype(int)
    assert read["heic"].shape == (60, 40, 3) and abs(read["heic"] - read["jpg"]).mean() < 3
    raw = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "a.heic").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match=r"1 of 2 images cannot be read: a.heic \("):
        data.Examples(opened(tmp_path), Data(train_batch_size=1, resolution=8), 0)


def test_what_is_left_out_is_counted(tmp_path):
    draw(tmp_path, "a.png", "b.png", ".hidden.png", "__MACOSX/c.png", "deep/er/d.png")
    for name in ("movie.mp4", "notes.txt", "a.txt", "other.mp4", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    source = opened(tmp_path)
    assert names(source) == ["a.png", "b.png", "deep/er/d.png"]
    assert source.notes == (
        "1 hidden images",
        "3 images that are no files (links to nothing, pipes)",
        "1 links to folders that are there already",
        "4 files that are no images (.mp4 2, .db 1, .txt 1)",
    )


@pytest.mark.parametrize("name", ["a\nb.png", "a::b.png", b"\xff\xfe.png", "zip://x::y.png", "é.png", "%00.png"], ids=ascii)
def test_any_name(tmp_path, name):
    draw(tmp_path, name)
    caption = (tmp_path / os.fsdecode(name)).with_suffix(".txt")
    caption.write_text("about it")
    source = opened(tmp_path)
    assert source.captions == [["about it"]] and source.read(0)[0].size == (8, 8) and source.name(0).isprintable()
    assert source.name(0).encode() and source.identity()
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(BadInput, match="1 of 1 images cannot be read") as refusal:
        data.Examples(source, Data(train_batch_size=1), 0)
    assert str(refusal.value).isprintable() and "the file is empty" in str(refusal.value)


def test_captions_in_other_encodings(tmp_path):
    draw(tmp_path, *(f"{i}.png" for i in range(4)))
    texts = ["\ufeffa café".encode(), "a café".encode("utf-16"), "a café".encode(), b""]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    source = opened(tmp_path)
    assert source.captions == [["a café"], ["a café"], ["a café"], [""]] and source.notes == ("byte order marks of 1 captions",)
    (tmp_path / "2.txt").write_bytes("a café".encode("latin-1"))
    (tmp_path / "3.txt").write_bytes("a café".encode("utf-16-le"))
    assert "2 captions cannot be read: 2.txt (not in UTF-8); 3.txt (not in UTF-8" in line(tmp_path)


def test_metadata_say_what_they_say(tmp_path):
    """A csv's NA, None and null are texts; a byte order mark is none; labels are numbers; the order is the file's."""
    draw(tmp_path, "b.png", "a.png", "sub/c.png", "d.png")
    rows = "\ufefffile_name,text,label\nb.png,NA,2\na.png,None,0\nsub/c.png,null,1\n"
    (tmp_path / "metadata.csv").write_text(rows)
    source = opened(tmp_path)
    assert source.captions == [["NA"], ["None"], ["null"]] and source.labels == [2, 0, 1]
    assert names(source) == ["b.png", "a.png", "sub/c.png"] and source.notes == ("1 images without a row in metadata.csv",)
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_name": "d.png", "text": ["\ufeffone", "two", None]}, {"file_name": "./a.png", "text": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert source.captions == [["one", "two"], []]
    assert source.notes == ("2 images without a row in metadata.jsonl", "byte order marks of 1 captions")


def test_metadata_of_subfolders_and_other_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    draw(tmp_path, "x/a.png", "x/m.png", "y/b.png", "y/n.png")
    for folder, names in (("x", ("a.png", "m.png")), ("y", ("b.png", "n.png"))):
        table = {"file_name": [names[0]], "mask_file_name": [names[1]], "text": [folder]}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / folder / "metadata.parquet")
    source = opened(tmp_path)
    assert names_and_captions(source) == [("x/a.png", ["x"]), ("y/b.png", ["y"])] and not source.notes
    assert names_and_captions(opened(tmp_path, image_column="mask")) == [("x/m.png", ["x"]), ("y/n.png", ["y"])]
    assert "--data.image-column text does not hold images" in line(tmp_path, image_column="text")


def names_and_captions(source):
    return list(zip(names(source), source.captions, strict=True))


BROKEN = {
    "empty": ("metadata.jsonl", "", "has no rows"),
    "a header alone": ("metadata.csv", "file_name,text\n", "has no rows"),
    "broken": ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_na', "line 2: "),
    "a list": ("metadata.jsonl", "[1]", "line 1: expected an object"),
    "deep": ("metadata.jsonl", "[" * 100_000, ""),
    "without file_name": ("metadata.jsonl", '{"text": "x"}', "line 1: it has no file_name"),
    "without file_name in a csv": ("metadata.csv", "name,text\na.png,x\n", "line 2: it has no file_name"),
    "null": ("metadata.jsonl", '{"file_name": null}', "line 1: file_name is None"),
    "above": ("metadata.jsonl", '{"file_name": "x/../../a.png"}', "'x/../../a.png'; expected a path inside the folder"),
    "absolute": ("metadata.csv", "file_name\n/etc/a.png\n", "'/etc/a.png'; expected a path inside the folder"),
    "of Windows": ("metadata.jsonl", r'{"file_name": "C:\\a.png"}', "expected a path inside the folder"),
    "http": ("metadata.jsonl", '{"file_name": "http://x/a.png"}', "'http://x/a.png'; expected a path inside the folder"),
    "zero": ("metadata.jsonl", r'{"file_name": "a\u0000.png"}', "expected a path inside the folder"),
    "a comma": ("metadata.csv", "file_name,text\na.png,red, round\n", "line 2: 3 values for 2 columns"),
    "in Latin-1": ("metadata.csv", "file_name,text\na.png,café\n".encode("latin-1"), "not in UTF-8"),
    "no parquet": ("metadata.parquet", "PAR1", "metadata.parquet cannot be read"),
    "half a pair": ("metadata.jsonl", r'{"file_name": "a.png", "prompt": "\ud800"}', "half a surrogate pair in row 0"),
    "no texts": ("metadata.jsonl", '{"file_name": "a.png", "prompt": {"raw": "x"}}', "holds dict in row 0; expected texts"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_metadata_are_one_line(tmp_path, what):
    name, content, words = BROKEN[what]
    draw(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    more = {"caption_column": "prompt"} if "prompt" in str(content) else {}
    assert words in line(tmp_path, **more)


def test_two_kinds_of_metadata(tmp_path):
    draw(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")
    assert "metadata of one kind, and there are: metadata.csv; metadata.jsonl" in line(tmp_path)


def test_columns_that_cannot_be_used(tmp_path):
    """Refused where they were asked for, and else not used, which is said; a missing image is one that cannot be read."""
    import datasets

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    image = {"bytes": (tmp_path / "x.png").read_bytes(), "path": None}
    rows = {"image": [image, None, image], "text": ["\ufeffa", None, "b"], "label": [1, None, -1], "n": [{"a": 1}] * 3}
    number = datasets.Value("int64")
    kinds = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), label=number, n={"a": number})
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "set")
    given = {"train_data_dir": None, "dataset_name": str(tmp_path / "set")}
    source = opened("", **given)
    assert source.captions == [["a"], [], ["b"]] and source.labels is None
    assert source.notes == (
        "the column 'label', which has None in row 1; expected a label from 0 to 999,999, or a name",
        "byte order marks of 1 captions",
    )
    with pytest.raises(BadInput, match=r"1 of 3 images cannot be read: row 1 \(the image is missing\)"):
        data.Examples(source, Data(train_batch_size=1), 0)
    assert "--data.label-column is 'label', which has None in row 1" in line("", **given, label_column="label")
    assert "--data.caption-column is 'n', which holds dict in row 0" in line("", **given, caption_column="n")
    assert "does not hold images" in line("", **given, image_column="n")


def test_labels_are_numbers_of_classes():
    """Each class below the largest has a name, so a number that is an id of something else would fill the memory."""
    assert sources._numbered([0, 2, 999_999])[0] == [0, 2, 999_999]
    for label in (10**6, 2**40, 10**30, -1):
        with pytest.raises(ValueError, match="expected a label from 0 to 999,999, or a name"):
            sources._numbered([0, label])


def test_settings_without_meaning_are_named(tmp_path):
    given = {"data__image_column": "x", "data__caption_column": "y", "data__split": "z"}
    said = "--data.split, --data.image-column, --data.caption-column: no effect with shapes"
    assert f"warning: {said}\n" in cli(tmp_path, *tiny(tmp_path, steps=1, **given)).err
    assert f"\n{said}\n" in cli(tmp_path, *tiny(tmp_path, base__check=True, **given)).out
    assert sources.unused(Data(train_data_dir="x", num_shapes=7)) == "--data.num-shapes: no effect with a folder of images"
    assert "--data.conditioning-column, --data.mask-data-dir: " in sources.unused(
        Data(conditioning_column="x", mask_data_dir="y")
    )
    assert sources.unused(Data()) == sources.unused(Data(dataset_name="x", split="y", image_column="z")) == ""


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """Refused: what is in them is unknown. Root may read everything, so the refusal is the system's, made here."""
    draw(tmp_path, "a.png", "locked/b.png")
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert re.search(r"locked cannot be read: Permission denied$", line(tmp_path))


def test_three_thousand_broken_files(tmp_path):
    """Ten are named in a line of at most 2,000 characters, all in broken.txt; a check lists them, and is not of batches."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3000):
        (folder / f"{'x' * 200}-{i:04d}.png").write_bytes(b"no image")
    result = cli(tmp_path, *tiny(tmp_path, data__train_data_dir=folder))
    refused(result, "3000 of 3000 images cannot be read", "-0009.png (not an image", "and 2,990 more (all are in", "broken.txt")
    assert len(result.err) <= 2000 and "-0010.png" not in result.err
    assert len((tmp_path / "out" / "broken.txt").read_text().splitlines()) == 3000
    checked = cli(tmp_path, *tiny(tmp_path, "new", base__check=True, data__train_data_dir=folder))
    refused(checked, "3000 images cannot be read", "and 2,990 more (all are listed above)")
    assert checked.out.count("\nbroken      ") == 3000 and "batch" not in checked.err and not (tmp_path / "new").exists()


def test_a_check_of_fewer_than_a_batch(tmp_path):
    """Is a check all the same; broken images are what it names, though few are left."""
    folder = draw(tmp_path / "images", "a.png", "b.png")
    flags = tiny(tmp_path, base__check=True, data__train_data_dir=folder)
    result = cli(tmp_path, *flags)
    assert result.code == 0 and "2 can be read" in result.out and "too few     2 images" in result.out, result.err
    (folder / "b.png").write_bytes(b"")
    refused(cli(tmp_path, *flags), "1 images cannot be read: b.png (the file is empty)")


def test_what_was_left_out_or_changed_is_said(tmp_path):
    folder = draw(tmp_path / "images", *(f"{i}.png" for i in range(5)))
    (folder / "movie.mp4").write_text("x")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "z.gif", save_all=True, append_images=frames[1:])
    said = "left out or changed: 1 files that are no images (.mp4 1); 1 image with several frames, of which the first is taken"
    flags = tiny(tmp_path, data__train_data_dir=folder, steps=1)
    checked, ran = cli(tmp_path, *flags, "--base.check"), cli(tmp_path, *flags)
    assert checked.code == ran.code == 0 and said in checked.out and f"warning: {said}" in ran.err, ran.err
    assert f"warning: {said}" in cli(tmp_path, *flags, "--base.max-train-steps", "2").err  # of those that were decoded before


def test_changed_data_name_what_changed(tmp_path):
    folder = draw(tmp_path / "images", *(f"{i}.png" for i in range(6)))
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"caption {i}")
    flags = tiny(tmp_path, data__train_data_dir=folder, steps=1)
    assert (result := cli(tmp_path, *flags)).code == 0, result.err
    again = [*flags, "--base.max-train-steps", "2"]
    (folder / "4.txt").write_text("another")
    refused(cli(tmp_path, *again), "the first caption or label that differs is that of 4.png;")
    Image.new("RGB", (8, 8), "blue").save(folder / "2.png")
    refused(cli(tmp_path, *again), "the first image that differs is that of 2.png;")
    (folder / "5.png").unlink()
    refused(cli(tmp_path, *again), "it had 6 images and has 5;")
    (tmp_path / "out" / "check.json").write_text('{"pictures": "x"}')  # advice, which may be damaged
    refused(cli(tmp_path, *again), "data was")


def test_one_image(tmp_path):
    draw(tmp_path, "a.png")
    cfg = Data(train_data_dir=str(tmp_path), train_batch_size=1, resolution=8)
    assert data.Examples(sources.open_source(cfg), cfg, 0)[range(7, 8)]["index"].tolist() == [0]


def test_very_wide_images(tmp_path):
    draw(tmp_path, "a.png")
    Image.new("RGB", (100_000, 1)).save(tmp_path / "b.png")
    Image.new("L", (100_000, 100)).save(tmp_path / "c.png")
    with pytest.raises(BadInput, match=r"1 of 3 images cannot be read: b.png \(100000 x 1 is too narrow for a size of 64 x 64"):
        data.Examples(opened(tmp_path, resolution=64), Data(train_batch_size=1, resolution=64), 0)
