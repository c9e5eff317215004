"""The data plane: columns, aspect-ratio buckets, mixtures, masks, captions; example n is a function of settings, seed and n."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from warm import cli, cli_many, digest, flags, tiny

from oneloop import data
from oneloop.configs import BadInput, Data, Part
from oneloop.inputs import sources, store
from oneloop.tasks import COLUMNS, Column, mean

WIDE, TALL, SQUARE = (24, 48), (48, 24), (32, 32)  # height, width
CONDITIONED = COLUMNS | {
    "conditioning": Column(
        "image", like="pixel_values", setting="data.conditioning_column", folder="data.conditioning_data_dir"
    )
}


def draw(folder, shapes, ending="png", shade=0):
    """Images of these shapes, noise that depends on their number; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, shape in enumerate(shapes):
        noise = np.random.default_rng((i, shade)).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.{ending}")
    return folder


def examples(seed=0, columns=COLUMNS, multiple=8, block=None, **settings):
    cfg = Data(**{"resolution": 32, "train_batch_size": 2} | settings)
    return data.Examples(sources.open_source(cfg, columns, multiple), cfg, seed, block=block)


def bucketed(tmp_path, **more):
    folder = draw(tmp_path / "images", [WIDE] * 5 + [TALL] * 3 + [SQUARE])
    return examples(train_data_dir=str(folder), buckets=True, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Buckets.


def test_a_batch_has_one_size_and_every_image_is_seen_equally_often(tmp_path):
    found = bucketed(tmp_path, random_flip=True)
    counts, sizes = np.zeros(9, int), set()
    for first in range(0, 9 * 40, 2):
        batch = found[range(first, first + 2)]
        x = batch["pixel_values"]
        assert batch["target_size"].tolist() == [list(x.shape[-2:])] * 2
        sizes.add(tuple(x.shape[-2:]))
        np.add.at(counts, batch["index"].numpy(), 1)
    assert sizes == {(24, 40), (40, 24), (32, 32)}
    bounds = np.array([found.plan.bound(i) for i in range(3)])
    assert np.abs(counts - 40).max() <= bounds.max() and counts.min() > 0


def test_the_layout_changes_nothing(tmp_path):
    """Any batch size that divides the block, any number of processes: example n is the same, to the bit."""
    whole = bucketed(tmp_path, train_batch_size=4, random_flip=True)
    small = bucketed(tmp_path, train_batch_size=1, random_flip=True, block=4)
    for first in range(0, 40, 4):
        batch = whole[range(first, first + 4)]
        for i in range(4):
            alone = small[range(first + i, first + i + 1)]
            for name, x in batch.items():
                same = torch.equal(x[i], alone[name][0]) if torch.is_tensor(x) else x[i] == alone[name][0]
                assert same, name


def test_a_crop_is_where_it_says(tmp_path):
    """From the position that the batch has, what was trained on is found again in the file."""
    found = bucketed(tmp_path, random_flip=True)
    for first in range(0, 24, 2):
        batch = found[range(first, first + 2)]
        for i, name in enumerate(batch["key"]):
            image = Image.open(tmp_path / "images" / name)
            high, wide = batch["target_size"][i].tolist()
            scale = max(high / image.height, wide / image.width)
            whole = np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.BILINEAR))
            whole = whole[:, ::-1] if batch["mirrored"][i] else whole
            top, left = batch["crop_top_left"][i].tolist()
            x = batch["pixel_values"][i].permute(1, 2, 0).numpy()
            assert np.abs(whole[top : top + high, left : left + wide].astype(int) - x).max() <= 1
            assert batch["original_size"][i].tolist() == [image.height, image.width]


def test_several_resolutions(tmp_path):
    """Each image is seen equally often at each, but where that would enlarge it."""
    folder = draw(tmp_path / "images", [(64, 64)] * 3 + [(32, 32)])
    found = examples(train_data_dir=str(folder), resolution=64, more_resolutions=(32,), train_batch_size=1)
    seen = {}
    for n in range(4 * 20):
        batch = found[range(n, n + 1)]
        key = batch["index"].item(), batch["pixel_values"].shape[-1]
        seen[key] = seen.get(key, 0) + 1
    assert set(seen) == {(0, 32), (0, 64), (1, 32), (1, 64), (2, 32), (2, 64), (3, 32)}
    assert max(abs(count - (20 if row == 3 else 10)) for (row, _), count in seen.items()) <= 3
    assert [batch["pixel_values"].shape[-1] for batch in found.fixed(4)] == [64, 32]  # shown at its largest


def test_what_is_shown_of_buckets(tmp_path):
    """Samples begin with a batch of one size; exports see every image once, a size at a time."""
    found = bucketed(tmp_path)
    (first,) = found.fixed(4, 4, alike=True)
    assert first["pixel_values"].shape == (4, 3, 24, 40)
    every = [batch["index"].tolist() for batch in found.fixed(4)]
    assert sorted(itertools.chain.from_iterable(every)) == list(range(9)) and every == [[0, 1, 2, 3], [4], [5, 6, 7], [8]]


def test_buckets_are_cached_and_read_from_the_disk_alike(tmp_path):
    found = bucketed(tmp_path, random_flip=True)
    path = store.path_of(tmp_path / "cache", found.source, found.cfg)
    store.write(found.images, path, found.cfg, pytest.fail)
    again = data.opened(found.source, found.cfg, 0, tmp_path / "cache")
    read = bucketed(tmp_path, random_flip=True, memory_budget=0)
    assert again.cached and read.images.pixels is None and again.fingerprint == found.fingerprint == read.fingerprint
    for first in range(0, 18, 2):
        x, y, z = (e[range(first, first + 2)]["pixel_values"] for e in (found, again, read))
        assert torch.equal(x, y) and torch.equal(x, z)


def test_a_batch_size_that_does_not_divide_the_block(tmp_path):
    """Is refused when a run resumes: its batches would mix sizes."""
    folder = draw(tmp_path / "images", [WIDE] * 5 + [TALL] * 3)
    common = {"data__train_data_dir": folder, "data__buckets": True, "data__resolution": 16}
    assert (result := cli(tmp_path, *tiny(tmp_path, "out", 2, data__train_batch_size=4, **common))).code == 0, result.err
    result = cli(tmp_path, *tiny(tmp_path, "out", 4, data__train_batch_size=3, **common))
    assert result.code == 2 and "--data.train-batch-size is 3; expected a divisor of 4" in result.err
    assert cli(tmp_path, *tiny(tmp_path, "out", 4, data__train_batch_size=2, **common)).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Several columns.


def test_two_folders_of_the_same_names(tmp_path):
    """One crop and mirror for both, whatever their own pixels and endings."""
    draw(tmp_path / "images", [WIDE, TALL, SQUARE, WIDE])
    (tmp_path / "edges").mkdir()
    for path in (tmp_path / "images").iterdir():
        image = Image.open(path)
        image.resize((2 * image.width, 2 * image.height), Image.NEAREST).save(tmp_path / "edges" / f"{path.stem}.bmp")
    flags = {"train_data_dir": str(tmp_path / "images"), "conditioning_data_dir": str(tmp_path / "edges")}
    for more in ({}, {"buckets": True, "center_crop": True}, {"memory_budget": 0}):
        found = examples(columns=CONDITIONED, train_batch_size=1, random_flip=True, **flags, **more)
        for n in range(12):
            batch = found.ready(found[range(n, n + 1)], "cpu")
            x, y = batch["pixel_values"], batch["conditioning"]
            assert x.shape == y.shape and (x - y).abs().mean() < 0.25 < (x - y.flip(-1)).abs().mean()


def test_columns_of_metadata(tmp_path):
    folder = draw(tmp_path / "images", [SQUARE] * 4)
    rows = [{"file_name": f"0{i}.png", "conditioning_file_name": f"0{i + 1}.png", "text": str(i)} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = examples(columns=CONDITIONED, train_data_dir=str(folder), center_crop=True)
    x, y = (next(found.fixed(3))[name] for name in ("pixel_values", "conditioning"))
    assert torch.equal(x[1:], y[:2])


def test_a_column_of_its_own_size(tmp_path):
    """A reference has its own bucket and crop; batches have one size of both."""
    images, refs = [WIDE] * 4 + [TALL] * 4, [SQUARE, WIDE] * 4
    draw(tmp_path / "images", images), draw(tmp_path / "refs", refs, shade=1)
    columns = COLUMNS | {"reference": Column("image", folder="data.conditioning_data_dir")}
    found = examples(
        columns=columns,
        train_data_dir=str(tmp_path / "images"),
        conditioning_data_dir=str(tmp_path / "refs"),
        buckets=True,
    )
    shapes = set()
    for first in range(0, 32, 2):
        batch = found[range(first, first + 2)]
        shapes.add((tuple(batch["pixel_values"].shape[-2:]), tuple(batch["reference"].shape[-2:])))
    assert shapes == {(a, b) for a in ((24, 40), (40, 24)) for b in ((32, 32), (24, 40))}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing", r"--data.conditioning-data-dir .*: 1 images have no partner.*: 02.png has none"),
        ("two", r"02.png has 02.bmp, 02.jpg"),
        ("shape", r"02.png \(its conditioning, 02.png, is 24 x 24 where it is 48 x 24\)"),
        ("broken", r"02.png \(the file is empty\)"),
        (
            "absent",
            r"the task needs a conditioning image for each image and found none with [a-z ]+; --data.conditioning-col",
        ),
        ("column", r"--data.conditioning-column is 'nothing'; the data set has the columns image"),
    ],
)
def test_partners_that_do_not_fit(tmp_path, wrong, message):
    draw(tmp_path / "images", [WIDE] * 4), draw(tmp_path / "edges", [WIDE] * 4)
    flags, path = {"conditioning_data_dir": str(tmp_path / "edges")}, tmp_path / "edges" / "02.png"
    if wrong in ("missing", "two"):
        path.rename(tmp_path / "out.png")
        for ending in ("bmp", "jpg") if wrong == "two" else ():
            Image.new("RGB", (48, 24)).save(path.with_suffix(f".{ending}"))
    elif wrong == "shape":
        Image.new("RGB", (24, 24)).save(path)
    elif wrong == "broken":
        path.write_bytes(b"")
    else:
        flags = {"conditioning_column": "nothing"} if wrong == "column" else {}
    with pytest.raises(BadInput, match=message):
        examples(columns=CONDITIONED, train_data_dir=str(tmp_path / "images"), **flags)


def test_further_texts_and_labels(tmp_path):
    folder = draw(tmp_path / "images", [SQUARE] * 4)
    rows = [{"file_name": f"0{i}.png", "edit": f"edit {i}", "score": i} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = COLUMNS | {"edit": Column("text"), "score": Column("label")}
    batch = examples(columns=columns, train_data_dir=str(folder))[range(2)]
    assert batch["edit"] == [f"edit {i}" for i in batch["index"].tolist()] and torch.equal(batch["score"], batch["index"])
    with pytest.raises(BadInput, match=r"the task needs an other for each image and found none with [a-z ]+; a column other"):
        examples(columns=columns | {"other": Column("text")}, train_data_dir=str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Masks.


@pytest.mark.parametrize("way", ["folder", "alpha"])
def test_masks_weight_the_loss_by_pixel(tmp_path, way):
    """The left half counts: of an error of 1 everywhere that is a half, and by the minimum more."""
    half = np.zeros((32, 32), np.uint8)
    half[:, :16] = 255
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(2):
        image = Image.new("RGB", (32, 32), "red")
        if way == "alpha":
            image.putalpha(Image.fromarray(half))
        image.save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(half).save(tmp_path / "masks" / f"{i}.png")
    flags = {"mask_from_alpha": True} if way == "alpha" else {"mask_data_dir": str(tmp_path / "masks")}
    for least in (0.0, 0.5):
        found = examples(train_data_dir=str(tmp_path / "images"), random_flip=True, mask_minimum=least, **flags)
        for first in (0, 2, 4):
            batch = found.ready(found[range(first, first + 2)], "cpu")
            mask = batch["mask"]
            assert mask.shape == (2, 1, 32, 32)
            kept = torch.where(batch["mirrored"], mask[:, 0, 0, -1], mask[:, 0, 0, 0])
            assert kept.tolist() == [1, 1] and abs(mean(torch.ones(2, 4, 4, 4), batch).item() - (1 + least) / 2) < 1e-6


def test_a_mask_is_not_looked_for(tmp_path):
    """A column of that name weights nothing, unless a setting names it."""
    folder = draw(tmp_path / "images", [SQUARE] * 3)
    rows = [{"file_name": f"0{i}.png", "mask_file_name": f"0{i}.png"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "mask" not in examples(train_data_dir=str(folder))[range(2)]
    assert "mask" in examples(train_data_dir=str(folder), mask_column="mask")[range(2)]
    with pytest.raises(BadInput, match=r"--data.mask-column is .*; expected one source of masks"):
        Data(mask_column="mask", mask_from_alpha=True)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures.


def test_class_images_are_half_of_the_examples(tmp_path):
    draw(tmp_path / "dog", [SQUARE] * 3), draw(tmp_path / "dogs", [SQUARE] * 10, shade=1)
    found = examples(
        train_data_dir=str(tmp_path / "dog"),
        trigger="a photo of sks dog",
        class_data_dir=str(tmp_path / "dogs"),
        class_prompt="a photo of a dog",
        prior_loss_weight=0.5,
    )
    assert found.source.pass_length() == 6
    captions, weights = [], []
    for first in range(0, 60, 2):
        batch = found[range(first, first + 2)]
        captions += batch["caption"]
        weights += batch["weight"].tolist()
        assert [(0.5 if source else 1.0) for source in batch["source"].tolist()] == batch["weight"].tolist()
    assert abs(captions.count("a photo of a dog") - 30) <= 1 and abs(captions.count("a photo of sks dog") - 30) <= 1
    error = torch.arange(1.0, 3)
    assert mean(error, {"weight": torch.tensor([1.0, 0.5])}).item() == 1.0


def test_repeats_and_shares(tmp_path):
    for name, count in (("a", 4), ("b", 2), ("c", 5)):
        draw(tmp_path / name, [SQUARE] * count)
    parts = (Part(str(tmp_path / "b"), repeats=3), Part(str(tmp_path / "c"), share=0.2))
    found = examples(train_data_dir=str(tmp_path / "a"), mixture=parts, train_batch_size=1)
    counts = np.zeros(3, int)
    for n in range(500):
        counts[found[range(n, n + 1)]["source"].item()] += 1
    assert found.source.pass_length() == 12.5 and np.abs(counts - [160, 240, 100]).max() <= 2


def test_classes_of_one_name_are_one(tmp_path):
    for name, classes in (("a", "xy"), ("b", "yz")):
        for label in classes:
            draw(tmp_path / name / label, [SQUARE])
    found = examples(train_data_dir=str(tmp_path / "a"), mixture=(Part(str(tmp_path / "b")),))
    assert found.source.classes == ["x", "y", "z"] and found.source.labels == [0, 1, 1, 2]


def test_a_mixture_from_a_settings_file(tmp_path):
    """And from flags; what is resumed with other repeats is another run."""
    draw(tmp_path / "a", [SQUARE] * 4), draw(tmp_path / "b", [SQUARE] * 4)
    mixture = [{"train_data_dir": str(tmp_path / "b"), "repeats": 2}]
    (tmp_path / "mix.json").write_text(json.dumps({"data": {"mixture": mixture}}))
    flags = tiny(tmp_path, "out", 2, data__train_data_dir=tmp_path / "a")
    assert (result := cli(tmp_path, flags[0], str(tmp_path / "mix.json"), *flags[1:])).code == 0, result.err
    assert "source 1" not in result.err and (tmp_path / "out" / "run.json").is_file()
    flags = tiny(tmp_path, "out", 4, data__train_data_dir=tmp_path / "a")
    assert (result := cli(tmp_path, *flags, "--data.mixture", json.dumps(mixture[0]))).code == 0, result.err
    mixture[0]["repeats"], flags = 3, tiny(tmp_path, "out", 6, data__train_data_dir=tmp_path / "a")
    result = cli(tmp_path, *flags, "--data.mixture", json.dumps(mixture[0]))
    assert result.code == 2 and "another run" in result.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "expected objects in JSON"),
        ("[]", "expected objects in JSON"),
        ('{"folder": "x"}', "'folder': 'x'; expected one of train_data_dir"),
        ('{"train_data_dir": 3}', "'train_data_dir': '3'; expected str"),
        ('{"train_data_dir": "x", "repeats": -1}', "expected more than 0"),
        ('{"train_data_dir": "x", "repeats": 2, "share": 0.5}', "repeats or a share"),
        ('{"repeats": 2}', "the train_data_dir, dataset_name or stream"),
        ('{"train_data_dir": "x", "share": 1}', "below 1"),
        ('{"train_data_dir": "nowhere"}', "there is no such folder"),
    ],
)
def test_a_mixture_that_is_none(tmp_path, given, message):
    result = cli(tmp_path, *tiny(tmp_path, "out", 2), "--data.mixture", given)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err, result.err


def test_a_validation_folder(tmp_path):
    draw(tmp_path / "a", [SQUARE] * 4), draw(tmp_path / "v", [SQUARE, WIDE] * 3)
    cfg = Data(train_data_dir=str(tmp_path / "a"), validation_data_dir=str(tmp_path / "v"), resolution=32, train_batch_size=2)
    assert sources.open_source(cfg).held_out.size == 6
    result = cli(
        tmp_path, *tiny(tmp_path, "out", 2, data__train_data_dir=tmp_path / "a", data__validation_data_dir=tmp_path / "v")
    )
    assert result.code == 0 and "validation/loss" in (tmp_path / "out" / "metrics.jsonl").read_text(), result.err
    with pytest.raises(BadInput, match="expected one of them"):
        sources.open_source(dataclasses.replace(cfg, validation_split="0.5"))


# ---------------------------------------------------------------------------------------------------------------------
# Captions.


def test_captions_by_their_settings(tmp_path):
    folder = draw(tmp_path / "images", [SQUARE] * 2)
    for i in range(2):
        (folder / f"0{i}.txt").write_text("sks, a, b, c, d")
    more = {"shuffle_tags": True, "keep_tags": 1, "tag_dropout": 0.3, "caption_templates": ("{}", "photo of {}")}
    found = examples(train_data_dir=str(folder), **more)
    texts = [text for first in range(0, 80, 2) for text in found[range(first, first + 2)]["caption"]]
    tails = {text.removeprefix("photo of ") for text in texts}
    assert all(text.startswith("sks") for text in tails) and len(tails) > 20 and {len(t.split(", ")) for t in tails} > {4, 5}
    assert {text.startswith("photo of") for text in texts} == {True, False}
    assert (
        found.texts() is None and found.values(("caption",)) is None and next(found.fixed(1))["caption"] == ["sks, a, b, c, d"]
    )
    plain = examples(train_data_dir=str(folder), caption_templates=("{}", "photo of {}"), caption_dropout=0.1)
    assert plain.texts() == ["sks, a, b, c, d", "photo of sks, a, b, c, d", ""]


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def test_runs_with_all_of_it_end_in_the_same_bits(tmp_path):
    """Buckets of three shapes, two sources with repeats, masks, workers: resumed, accumulated, read from the disk."""
    draw(tmp_path / "a", [WIDE] * 3 + [TALL] * 2 + [SQUARE]), draw(tmp_path / "b", [WIDE, TALL], shade=1)
    for name in ("a", "b"):
        (tmp_path / f"masks-{name}").mkdir()
        for path in (tmp_path / name).iterdir():
            Image.open(path).convert("L").save(tmp_path / f"masks-{name}" / path.name)
    part = {"train_data_dir": str(tmp_path / "b"), "mask_data_dir": str(tmp_path / "masks-b"), "repeats": 2}
    common = {"data__train_data_dir": tmp_path / "a", "data__mask_data_dir": tmp_path / "masks-a", "data__buckets": True}
    common |= {"base__lr_scheduler": "constant", "data__resolution": 16, "data__random_flip": True}

    def run(out, steps, *flags, **more):
        given = tiny(tmp_path, out, steps, **{"data__train_batch_size": 4, **common, **more})
        result = cli(tmp_path, *given, "--data.mixture", json.dumps(part), "--data.bucket-block", "4", *flags)
        assert result.code == 0, result.err
        return digest(tmp_path / out)

    whole = run("whole", 6)
    run("stopped", 3)
    assert run("stopped", 6) == whole
    assert run("disk", 6, data__memory_budget=0, data__dataloader_num_workers=2) == whole
    halves = run("halves", 6, data__train_batch_size=2, base__gradient_accumulation_steps=2)
    given = tiny(tmp_path, "two", 6, **{"data__train_batch_size": 2, **common})
    results = cli_many(tmp_path, 2, *given, "--data.mixture", json.dumps(part), "--data.bucket-block", "4")
    assert all(result.code == 0 for result in results), results[0].err
    assert digest(tmp_path / "two") == halves


# ---------------------------------------------------------------------------------------------------------------------
# Two tasks that were written from the documentation, as anyone's modules.


def edges_and_pairs(tmp_path):
    """Shapes of colour, with their outline as a condition, and a darker image that is not preferred."""
    for name in ("images", "edges"):
        (tmp_path / name).mkdir()
    rows = []
    for i in range(8):
        x = np.full((16, 24 if i % 2 else 16, 3), 255, np.uint8)
        x[4 : 8 + i % 4, 4:12] = np.random.default_rng(i).integers(0, 256, 3)
        Image.fromarray(x).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(x // 4).save(tmp_path / "images" / f"{i}-dark.png")
        Image.fromarray(np.where(x < 255, 0, 255).astype(np.uint8)).save(tmp_path / "edges" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "rejected_file_name": f"{i}-dark.png", "text": "a box"})
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("name", ["conditioned", "preference"])
def test_tasks_of_several_images(tmp_path, name):
    """They train, and end in the same bits when resumed, and on two processes as with two batches accumulated."""
    edges_and_pairs(tmp_path)
    common = {
        "base.max_train_steps": 4,
        "base.logger": "none",
        "base.lr_scheduler": "constant",
        "base.checkpointing_steps": 2,
        "base.num_samples": 2,
        "data.train_data_dir": tmp_path / "images",
        "data.resolution": 16,
        "data.train_batch_size": 2,
        "data.random_flip": True,
        "data.buckets": True,
        "data.bucket_multiple": 4,
    }
    if name == "conditioned":
        common["data.conditioning_data_dir"] = tmp_path / "edges"

    def run(out, *more, **settings):
        given = flags(name, common | {"base.output_dir": tmp_path / out} | settings)
        result = cli(tmp_path, *given, *more)
        assert result.code == 0, result.err
        return digest(tmp_path / out)

    whole = run("whole")
    run("resumed", **{"base.max_train_steps": 2})
    assert run("resumed") == whole
    accumulated = run("accumulated", **{"base.gradient_accumulation_steps": 2})
    two = flags(name, common | {"base.output_dir": tmp_path / "two"})
    results = cli_many(tmp_path, 2, *two)
    assert all(result.code == 0 for result in results), results[0].err
    assert digest(tmp_path / "two") == accumulated
    if name == "conditioned":
        assert Image.open(next((tmp_path / "whole").glob("samples/4*.png"))).width > 3 * 16
        result = cli(tmp_path, *flags(name, {k: v for k, v in common.items() if "conditioning" not in k}))
        assert result.code == 2 and "the task needs a conditioning image for each image" in result.err
