"""What goes with a stream: held-out rows, mixtures, buckets, and captions that are encoded before the large model is loaded."""

import io
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import settings as hypotheses
from hypothesis import strategies as st
from PIL import Image
from test_streaming import ROWS, SIZE, parquet, settings, streamed, tars
from warm import cli, cli_many, digest, flags, tiny

from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.inputs import cache, listing, sources, spans
from oneloop.inputs.buckets import nearest
from oneloop.inputs.lanes import Lanes, Mixed, positions, turns

# ---------------------------------------------------------------------------------------------------------------------
# Held out, and fewer.


@pytest.mark.parametrize("make", [parquet, tars])
def test_a_fraction_is_held_out_of_few_shards(tmp_path, make):
    """Never trained on, nor in the place of a broken image; the same for every seed; decoded once, as any set."""
    folder = make(tmp_path / "set", broken={7, 8})
    cfg = settings(folder, validation_split="0.25", skip_broken=True)
    source = sources.open_source(cfg)
    size = {len(source.streams[0].rows): rows for rows in (5, 10)}
    assert source.size == 45 and source.held_out.size == 15 and len(size) == 1 and "15 held out" in source.summary
    out = {source.held_out.captions[row][0] for row in range(15)}
    examples = data.opened(source, cfg, 0, None)
    trained = Counter(text for n in range(0, 180, 4) for text in examples[range(n, n + 4)]["caption"])
    assert not out & trained.keys() and len(out) == 15
    assert len(trained.keys() | out | {"image 7", "image 8"}) == ROWS
    shards_of = {int(text.split()[1]) // (5 if make is parquet else 10) for text in out}
    assert len(shards_of) <= 3 + (make is tars) and 15 % (5 if make is parquet else 10) < 10
    again = sources.open_source(settings(folder, validation_split="0.25", train_batch_size=2))
    assert {texts[0] for texts in again.held_out.captions} == out
    assert again.streams[0].identity() == source.streams[0].identity() != streamed(folder).source.streams[0].identity()


def test_fewer_rows_beside_those_held_out(tmp_path):
    """max_train_samples takes other rows than those held out, of few shards."""
    folder = parquet(tmp_path / "set")
    cfg = settings(folder, validation_split="0.1", max_train_samples=13)
    source = sources.open_source(cfg)
    examples = data.opened(source, cfg, 0, None)
    every = [int(row) for n in range(0, 52, 4) for row in examples[range(n, n + 4)]["index"]]
    texts = {text for n in range(0, 52, 4) for text in examples[range(n, n + 4)]["caption"]}
    assert source.size == 13 and set(Counter(every)) == set(range(13)) and len(texts) == 13
    assert not texts & {own[0] for own in source.held_out.captions}
    assert len({int(text.split()[1]) // 5 for text in texts}) <= 4
    with pytest.raises(BadInput, match=r"--data.validation-split is '0.01'|at least 4 images"):
        sources.open_source(settings(folder, validation_split="0.01"))


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures.


@hypotheses(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=6), min_size=2, max_size=3),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_sources_have_their_share_in_every_lane(rows, repeats, lanes, block):
    mixed = Mixed(tuple(Lanes(own, lanes, 2, block, i) for i, own in enumerate(rows)), tuple(repeats[: len(rows)]))
    count = lanes * block * 60
    part, shard, row = mixed.examples(range(count))
    weights = np.array([sum(own) * times for own, times in zip(rows, repeats, strict=False)])
    share = weights / weights.sum()
    lane = turns(range(count), lanes, block)[0]
    for g in range(lanes):
        own = np.array([mixed.parts[i].length(g) * repeats[i] for i in range(len(rows))])
        taken = (part[lane == g][:, None] == np.arange(len(rows))).cumsum(0)
        n = np.arange(1, len(taken) + 1)[:, None]
        bound = (1 - own / own.sum()) + own / own.sum() * (len(rows) - 1)
        assert (np.abs(taken - n * own / own.sum()) <= bound + 1e-9).all()
    assert (np.abs(np.bincount(part, minlength=len(rows)) / count - share) < 0.35).all()
    for i, own in enumerate(rows):
        counts = Counter(zip(shard[part == i].tolist(), row[part == i].tolist(), strict=True))
        assert counts.keys() <= {(s, r) for s, n in enumerate(own) for r in range(n)}
    some = np.random.default_rng(0).integers(0, count, 5)
    for n in some.tolist():
        assert [int(x[0]) for x in mixed.examples([n])] == [part[n], shard[n], row[n]]


def mixture(tmp_path, **more):
    photos = tmp_path / "photos"
    photos.mkdir(exist_ok=True)
    for i in range(4):
        Image.fromarray(np.full((SIZE, SIZE, 3), 10 * i, np.uint8)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"photo {i}")
    parts = ({"stream": str(tars(tmp_path / "tars", rows=30)), "share": 0.25, "loss_weight": 0.5},)
    parts += ({"train_data_dir": str(photos), "repeats": 5.0, "trigger": "sks"},)
    return settings(parquet(tmp_path / "set"), mixture=tuple(sources.Part(**part) for part in parts), **more)


def test_streams_and_folders_are_mixed(tmp_path):
    cfg = mixture(tmp_path)
    source = sources.open_source(cfg)
    examples = data.opened(source, cfg, 0, None)
    assert source.size == 94 and [s and len(s) for s in source.streams] == [60, 30, None] and source.labels is None
    batches = [examples[range(n, n + 4)] for n in range(0, 1600, 4)]
    of = torch.cat([batch["source"] for batch in batches])
    texts = [text for batch in batches for text in batch["caption"]]
    share = np.bincount(of) / len(of)
    assert np.abs(share - [0.5625, 0.25, 0.1875]).max() < 0.02
    assert {0.5 if i == 1 else 1.0 for i in of.tolist()} == {0.5, 1.0}
    weights = torch.cat([batch["weight"] for batch in batches])
    assert (weights == torch.where(of == 1, 0.5, 1.0)).all()
    assert {text for i, text in zip(of.tolist(), texts, strict=True) if i == 2} == {f"sks photo {i}" for i in range(4)}
    assert {text for i, text in zip(of.tolist(), texts, strict=True) if i == 1} == {f"image {i}" for i in range(30)}
    with pytest.raises(BadInput, match=r"--data.mixture has the stream 'x'; expected --data.stream to name the first"):
        sources.open_source(Data(num_shapes=8, mixture=(sources.Part(stream="x"),)))


def test_labels_of_streams_of_other_classes(tmp_path):
    """Classes of the same name are one."""
    first = parquet(tmp_path / "a")
    second = parquet(tmp_path / "b")
    for path in second.glob("*"):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"huggingface"])
        about["info"]["features"]["label"]["names"] = ["c", "d", "a"]
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path, row_group_size=5)
    source = sources.open_source(settings(first, mixture=(sources.Part(stream=str(second)),)))
    assert source.classes == ["a", "b", "c", "d"]
    assert [source.labels[row] for row in (0, 1, 2, 60, 61, 62)] == [0, 1, 2, 2, 3, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Buckets.


@hypotheses(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**40))
def test_each_row_of_a_span_is_dealt_once_in_blocks_of_one_size(block, count, sizes, key):
    of = np.random.default_rng(key).integers(0, sizes, block * count)
    order, chosen = spans.arranged(of, block, key)
    assert sorted(order) == list(range(len(of))) and len(chosen) == count
    apart = [(of[order[i * block : (i + 1) * block]] != size).sum() for i, size in enumerate(chosen)]
    assert sum(apart) < max(len(set(of.tolist())) * block, 1)
    for i, size in enumerate(chosen):
        own = of[order[i * block : (i + 1) * block]]
        assert np.bincount(own)[size] == np.bincount(own).max()
    whole = sum(n // block for n in Counter(of.tolist()).values())
    assert sum(n == 0 for n in apart) >= whole


def wide_and_tall(folder, rows=96, group=12):
    """Images of 3 ratios, their row in the caption."""
    folder.mkdir()
    made = []
    for row in range(rows):
        high, wide = [(16, 16), (16, 32), (32, 16)][row * row % 7 % 3]
        Image.fromarray(np.random.default_rng(row).integers(0, 256, (high, wide, 3), dtype=np.uint8)).save(
            f := io.BytesIO(), "PNG"
        )
        made.append({"image": {"bytes": f.getvalue(), "path": None}, "text": f"{row} {high}x{wide}"})
    pq.write_table(pa.Table.from_pylist(made), folder / "0.parquet", row_group_size=group)
    return folder


BUCKETS = {"resolution": 16, "buckets": True, "bucket_multiple": 4, "stream_window": 4, "random_flip": True}


def test_buckets_of_a_stream(tmp_path):
    """A batch has one size, each row is seen once a pass, most at the size nearest to its own; batches change nothing."""
    folder = wide_and_tall(tmp_path / "set")
    examples = streamed(folder, **BUCKETS)
    assert examples.span == 48 and examples.plan.block == 4 and len(examples.plan.sizes) > 2
    seen, nearly = Counter(), 0
    for n in range(0, 192, 4):
        batch = examples[range(n, n + 4)]
        size = tuple(batch["target_size"][0].tolist())
        assert batch["pixel_values"].shape[2:] == size and (batch["target_size"] == batch["target_size"][0]).all()
        own = examples.sized.index(size)
        nearly += int((nearest(batch["original_size"].numpy(), examples.sized) == own).sum())
        for text, original in zip(batch["caption"], batch["original_size"].tolist(), strict=True):
            assert text.split()[1] == "{}x{}".format(*original)
        seen.update(batch["caption"])
        halves = [streamed(folder, block=4, **BUCKETS | {"train_batch_size": 2})[range(m, m + 2)] for m in (n, n + 2)]
        for name in ("pixel_values", "index", "crop_top_left", "mirrored"):
            assert torch.equal(torch.cat([half[name] for half in halves]), batch[name]), name
    assert set(seen.values()) == {2} and len(seen) == 96 and 192 * (1 - 3 / 12) <= nearly < 192
    orders = [streamed(folder, seed, **BUCKETS)[range(4)]["index"].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_places_of_a_lane():
    lane, number = turns(range(240), 3, 4)
    for g in range(3):
        mine = np.flatnonzero(lane == g)
        assert (positions(g, number[lane == g], 3, 4) == mine).all()


def test_what_buckets_of_a_stream_cannot_do(tmp_path):
    from oneloop.tasks import COLUMNS, Column

    folder = parquet(tmp_path / "set")
    table = pq.read_table(folder / "000.parquet")
    for path in folder.glob("*"):
        pq.write_table(table.append_column("reference", table["image"]), path)
    cfg = settings(folder, buckets=True)
    with pytest.raises(BadInput, match=r"--data.buckets is True; expected no --data.stream with images of a size of their own"):
        sources.open_source(cfg, COLUMNS | {"reference": Column("image")})


# ---------------------------------------------------------------------------------------------------------------------
# Captions, encoded before.

DRAWN = [{}, {"shuffle_tags": True, "tag_dropout": 0.3}, {"caption_templates": ("{}", "a {}"), "caption_dropout": 0.2}, BUCKETS]


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("asked", [(range(4), range(20, 44)), (range(4), range(4, 500))])
def test_the_captions_that_a_run_asks_for_are_listed(tmp_path, drawn, asked):
    """From the texts alone, for as many examples as are asked for, broken images among them; of few examples few of them."""
    folder = parquet(tmp_path / "set", broken={3, 9, 21, 40})
    for path in folder.glob("*"):
        table = pq.read_table(path)
        tags = pa.array([f"{text}, one, two, three" for text in table["text"].to_pylist()])
        pq.write_table(table.set_column(2, "text", tags), path, row_group_size=5)
    cfg = settings(folder, skip_broken=True, **drawn)
    source = sources.replace(sources.open_source(cfg), asked=asked)
    examples = data.opened(source, cfg, 0, None)
    examples.group = examples.span or 8
    values = examples.values(("caption",))
    assert source.streams[0].fetched == 0
    listed = [values.make(i)[0] for i in range(len(values.marks))]
    assert (values.marks == cache.as_marks([cache.digest(repr(text).encode()) for text in listed])).all()
    assert len(set(listed)) == len(listed)
    needed = {t for r in asked for n in range(r.start, min(r.stop, 400), 4) for t in examples[range(n, n + 4)]["caption"]}
    assert needed <= set(listed) and (asked[1].stop > 100 or len(listed) <= 2 * 64)
    assert examples.values(("pixel_values",)) is None
    assert data.opened(sources.open_source(cfg), cfg, 0, None).values(("caption",)) is None


def test_groups_do_not_overlap(tmp_path):
    examples = streamed(parquet(tmp_path / "set"))
    examples.source = sources.replace(examples.source, asked=(range(4), range(100, 300), range(290, 400)))
    assert listing.groups(examples) == [range(128), range(128, 384), range(384, 512)]


def test_what_the_disk_cannot_hold_is_a_line(tmp_path):
    values = cache.Cache(tmp_path / "new" / "a")
    marks = cache.as_marks([cache.digest(b"1")])
    make = lambda some: ((i, {"x": torch.zeros(2**18)}) for i in some)  # noqa: E731
    with pytest.raises(
        BadInput, match=r"--data.example-cache: 1,000,000,000 encodings take 976,562.5 GiB, and .* are free"
    ) as no:
        values.fill(marks, [0], 1, make, 10**9)
    assert "\n" not in str(no.value) and not values.folder.exists()
    values.fill(marks, [0], 1, make)
    assert len(values.refresh().shards) == 1


def words(folder, rows=24):
    """A stream of noise, tagged, with images of two sizes."""
    folder.mkdir()
    made = []
    for row in range(rows):
        size = (16, 16) if row % 2 else (24, 12)
        Image.fromarray(np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8)).save(f := io.BytesIO(), "PNG")
        made.append({"image": {"bytes": f.getvalue(), "path": None}, "text": f"a dog, number {row}"})
    pq.write_table(pa.Table.from_pylist(made), folder / "0.parquet", row_group_size=6)
    return folder


def test_a_lora_on_a_stream_needs_no_text_encoder(tmp_path):
    """Its captions are encoded, those that a start asks for, and its encoders gone; on two processes, resumed, and with the
    encoders beside: the same bits."""
    model, stream = tiny_models.build(tmp_path, "sd"), words(tmp_path / "words")

    def command(out, steps, **more):
        settings_ = {
            **{"base.output_dir": tmp_path / out, "base.max_train_steps": steps, "base.num_samples": 1, "base.logger": "none"},
            **{"base.validation_steps": 0, "base.lr_scheduler": "constant", "base.lr_warmup_steps": 0},
            **{"lora.pretrained_model_name_or_path": model, "lora.num_inference_steps": 1, "lora.rank": 2},
            **{"data.stream": stream, "data.resolution": 16, "data.train_batch_size": 2, "data.stream_lanes": 2},
            **{"data.bucket_block": 2, "data.stream_window": 2, "data.random_flip": True, "data.shuffle_tags": True},
            **{"data.buckets": True, "data.bucket_multiple": 8},
        }
        return flags("lora", settings_ | {name.replace("__", "."): value for name, value in more.items()})

    accumulated = {"base__gradient_accumulation_steps": 2}
    whole = cli(tmp_path, *command("a", 2, **accumulated))
    assert whole.code == 0, whole.err
    assert "encoding caption once: " in whole.err and "text_encoder" not in said_of_models(whole.err)
    for result in cli_many(tmp_path, 2, *command("b", 1)):
        assert result.code == 0, result.err
    resumed = cli(tmp_path, *command("b", 2, **accumulated))
    assert resumed.code == 0, resumed.err
    inside = cli(tmp_path, *command("d", 2, data__example_cache="no", **accumulated))
    assert inside.code == 0 and "encoding" not in inside.err and "text_encoder" in said_of_models(inside.err), inside.err
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "d")


def said_of_models(err):
    return err.partition("models ")[2].partition("step")[0]


def test_a_run_on_a_mixture_with_buckets_and_held_out_rows(tmp_path):
    """Accumulated, on two processes with workers, and resumed: the same bits."""
    cfg = mixture(tmp_path)

    def command(out, steps=6, **more):
        about = {"data__stream": cfg.stream, "data__bucket_block": 4, "data__train_batch_size": 2, "data__stream_lanes": 2}
        about |= {
            "data__buckets": True,
            "data__bucket_multiple": 4,
            "data__validation_split": 0.1,
            "base__lr_scheduler": "constant",
        }
        about |= {"data__class_data_dir": tmp_path / "photos", "data__class_prompt": "a photo", "data__prior_loss_weight": 0.5}
        return tiny(tmp_path, out, steps, **about | more)

    (tmp_path / "unet.json").unlink(missing_ok=True)
    for steps in (3, 6):
        result = cli(tmp_path, *command("a", steps, base__gradient_accumulation_steps=2))
        assert result.code == 0 and "6 held out" in result.err, result.err
    for result in cli_many(tmp_path, 2, *command("b", data__dataloader_num_workers=1)):
        assert result.code == 0, result.err
    checked = cli(tmp_path, *command("a", base__check=True))
    assert checked.code == 0, checked.err
