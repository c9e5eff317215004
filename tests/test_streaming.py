"""Sets larger than memory: shards of parquet and tar, here and over HTTP; example n is a function of settings, seed and n."""

import http.server
import io
import json
import re
import tarfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from warm import UNET, cli, cli_many, digest, tiny

from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.inputs import batches, shards, sources
from oneloop.inputs.lanes import Lanes

SIZE = 8
ROWS = 60


def image(row, side=SIZE):
    """The PNG of a row: noise."""
    noise = np.random.default_rng(row).integers(0, 256, (side + row % 3, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def parquet(folder, files=3, group=5, broken=(), rows=ROWS, **more):
    """Parquet as the hub has it: images in a struct, captions, labels with names."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    features["text"] = {"dtype": "string", "_type": "Value"}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    for i in range(files):
        own = range(i * rows // files, (i + 1) * rows // files)
        table = pa.table(
            {
                "image": [{"bytes": b"no image" if row in broken else image(row), "path": f"{row}.png"} for row in own],
                "label": [row % 3 for row in own],
                "text": [f"image {row}" for row in own],
                **{name: [value] * len(own) for name, value in more.items()},
            }
        )
        pq.write_table(table.replace_schema_metadata(about), folder / f"{i:03}.parquet", row_group_size=group)
    return folder


def tars(folder, files=6, broken=(), rows=ROWS, index=None):
    """WebDataset: 0.png, 0.txt, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        with tarfile.open(folder / f"{i:03}.tar", "w") as tar:
            for row in range(i * rows // files, (i + 1) * rows // files):
                parts = {"png": b"no image" if row in broken else image(row), "txt": f"image {row}".encode()}
                for ending, raw in parts.items():
                    member = tarfile.TarInfo(f"{row:05}.{ending}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    if index:
        listed = [{"url": f"{i:03}.tar", "nsamples": rows // files} for i in range(files)]
        (folder / index).write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    return folder


MAKE = {"parquet": parquet, "tar": tars}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return {kind: make(folder / kind) for kind, make in MAKE.items()}


def settings(stream, **more):
    plain = {"resolution": SIZE, "train_batch_size": 4, "stream_lanes": 2, "stream_window": 2}
    return Data(stream=str(stream), **plain | more)


def streamed(stream, seed=0, block=None, report=None, say=print, folder=None, **more):
    cfg = settings(stream, **more)
    return data.opened(sources.open_source(cfg, folder=folder), cfg, seed, None, report, block, say)


def same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]) if torch.is_tensor(x) else x == b[name], name


# ---------------------------------------------------------------------------------------------------------------------
# What an example is.


@pytest.mark.parametrize("kind", MAKE)
def test_examples_are_the_rows_that_the_lanes_deal(places, kind):
    examples = streamed(places[kind], stream_memory=0.0)
    counts = [5] * 12 if kind == "parquet" else [10] * 6
    shard, own = Lanes(counts, 2, 2, 4, 0).examples(range(2 * ROWS))
    rows = (shard * counts[0] + own).tolist()
    batch = {k: [] for k in ("index", "caption", "pixel_values")}
    for first in range(0, 2 * ROWS, 4):
        for name, values in batch.items():
            values.extend(examples[range(first, first + 4)][name])
    assert list(map(int, batch["index"])) == rows and batch["caption"] == [f"image {row}" for row in rows]
    for row, pixels in zip(rows, batch["pixel_values"], strict=True):
        whole = np.asarray(Image.open(io.BytesIO(image(row))))
        assert any(np.array_equal(pixels.permute(1, 2, 0), whole[top : top + SIZE]) for top in range(row % 3 + 1))
    assert sorted(set(rows)) == list(range(ROWS))
    assert examples.source.classes == (["a", "b", "c"] if kind == "parquet" else None)
    if kind == "parquet":
        assert (examples[range(8)]["label"] == examples[range(8)]["index"] % 3).all()


@pytest.mark.parametrize("kind", MAKE)
def test_batches_and_workers_change_nothing(places, kind):
    """Of a batch of 4: the same examples one by one, in any order, by an instance that saw none before, and in workers."""
    more = {"random_flip": True, "caption_dropout": 0.3}
    examples = streamed(places[kind], **more)
    numbers = [range(n, n + 4) for n in (200, 4, 0, 10**9)]
    for some in numbers:
        whole = examples[some]
        for i, n in enumerate(some):
            one = streamed(places[kind], **more)[range(n, n + 1)]
            same(one, {k: v[i : i + 1] for k, v in whole.items()})
    loader = DataLoader(batches.Readable(examples), sampler=numbers, batch_size=None, num_workers=2)
    for some, batch in zip(numbers, loader, strict=True):
        same(batch, examples[some])
    assert (streamed(places[kind], 1)[range(4)]["index"] != examples[range(4)]["index"]).any()


def test_shards_in_memory_are_few(places):
    """Within the budget, and all that a window needs without one."""
    examples = streamed(places["parquet"], stream_memory=0.0)
    for first in range(0, ROWS, 4):
        examples[range(first, first + 4)]
        assert (
            len(examples.source.streams[0]._open) <= 4
        )  # a batch of one lane, from one window or the two that it begins and ends in
    roomy = streamed(places["parquet"])
    for first in range(0, ROWS, 4):
        roomy[range(first, first + 4)]
    assert roomy.source.streams[0].fetched == 12 < examples.source.streams[0].fetched
    before = roomy.source.streams[0].fetched
    roomy[range(ROWS)]
    assert roomy.source.streams[0].fetched == before


def test_fixed_examples_come_from_few_shards(places):
    examples = streamed(places["parquet"])
    made = list(examples.fixed(4, 10))
    assert [len(batch["n"]) for batch in made] == [4, 4, 2] and examples.source.streams[0].fetched <= 2
    rows = [row for batch in made for row in batch["index"].tolist()]
    assert len(set(rows)) == 10 and [r for b in streamed(places["parquet"], 5).fixed(3, 10, 6) for r in b["index"]] == rows[6:]
    assert sum(len(batch["n"]) for batch in examples.fixed(7)) == ROWS
    same(next(examples.fixed(4)), examples.at(made[0]["index"]))


# ---------------------------------------------------------------------------------------------------------------------
# Over HTTP.

DELAY = 0.05


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder, DELAY seconds late, in ranges; notes (method, path, bytes sent) of each request."""

    daemon_threads = True

    def __init__(self, folder):
        self.requests, self.failing = [], 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        time.sleep(DELAY)
        path = self.server.folder / self.path.lstrip("/")
        if self.server.failing or not path.is_file():
            self.server.failing = max(self.server.failing - 1, 0)
            return self.send_error(503 if path.is_file() else 404)
        raw, status = path.read_bytes(), 200
        extra = {"Accept-Ranges": "bytes", "ETag": str(path.stat().st_mtime_ns)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(raw)), len(raw) - 1)
            extra["Content-Range"] = f"bytes {start}-{end}/{len(raw)}"
            raw, status = raw[start : end + 1], 206
        self.send_response(status)
        for name, value in (extra | {"Content-Length": str(len(raw))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)
        self.server.requests.append((self.command, path.name, len(raw) if self.command == "GET" else 0))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(request):
    servers = []

    def serve(folder):
        servers.append(Server(folder))
        return servers[-1]

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()


def test_parquet_over_http_is_opened_by_footers_alone(tmp_path, server):
    """Two requests a file at the start, one at the next; then one a row group, and its file's footer: the same examples."""
    folder = parquet(tmp_path / "set", rows=240, group=40)
    size = sum(path.stat().st_size for path in folder.glob("*"))
    there = server(folder)
    pattern = there.url + "/{000..002}.parquet"
    examples = streamed(pattern, folder=tmp_path / "cache")
    assert len(there.requests) == 6 and sum(sent for *_, sent in there.requests) <= size  # small files are all footer
    there.requests.clear()
    examples = streamed(pattern, folder=tmp_path / "cache")
    assert [(method, sent) for method, _, sent in there.requests] == [("HEAD", 0)] * 3
    there.requests.clear()
    here = streamed(folder)
    batch = examples[range(8)]
    assert {k: v for k, v in batch.items() if k != "key"}.keys() == here[range(8)].keys() - {"key"}
    assert all(torch.equal(x, batch[name]) for name, x in here[range(8)].items() if torch.is_tensor(x))
    read = examples.source.streams[0].fetched
    files = len({path for _, path, _ in there.requests})
    assert len(there.requests) == read + files  # and a footer for each of their files


def test_tars_over_http(tmp_path, server):
    """With an index nothing is asked of the tars at the start; then each is fetched once."""
    folder = tars(tmp_path / "set", index="index.json")
    there = server(folder)
    for pattern in (there.url + "/{000..005}.tar", there.url + "/index.json"):
        there.requests.clear()
        examples = streamed(pattern)
        endings = [path for _, path, _ in there.requests]
        assert examples.size == ROWS and endings[0] == "index.json" and set(endings[1:]) <= {"000.tar"}
        there.requests.clear()
        here = streamed(folder)[range(16)]
        assert all(torch.equal(x, examples[range(16)][name]) for name, x in here.items() if torch.is_tensor(x))
        assert len(there.requests) == examples.source.streams[0].fetched == 4


def test_a_request_that_fails_is_tried_again(tmp_path, server, monkeypatch):
    monkeypatch.setattr(shards, "DELAYS", (0.01, 0.01))
    there = server(tars(tmp_path / "set", index="index.json"))
    examples = streamed(there.url + "/index.json")
    there.failing = 2
    assert len(examples[range(1)]["n"]) == 1
    there.failing = 100
    with pytest.raises(BadInput, match=r"the shard http\S+tar cannot be read .*resumes once it can be read"):
        for first in range(0, ROWS, 4):
            examples[range(first, first + 4)]


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with shards.


@pytest.mark.parametrize("kind", MAKE)
def test_broken_images_are_replaced_by_rule(tmp_path, kind):
    """By another row of its group, the same for every batch; logged and counted; or the run ends."""
    broken, said = {2, 3, 4, 17, 19}, []
    folder = MAKE[kind](tmp_path / "set", broken=broken)
    with pytest.raises(
        BadInput, match=r"the image of example \d+ cannot be read: row \d+ of \S+ \(not an image that PIL reads"
    ):
        for first in range(0, 2 * ROWS, 4):
            streamed(folder)[range(first, first + 4)]
    plain = streamed(MAKE[kind](tmp_path / "whole"))
    examples = streamed(folder, skip_broken=True, report=tmp_path / "broken.txt", say=said.append)
    examples.group = 8  # of a lane of 30 rows
    replaced, others = 0, {row: set() for row in broken}
    for first in range(0, 2 * ROWS, 4):
        numbers = range(first, first + 4)
        before, raw = plain[numbers], examples[numbers]
        batch = examples.ready(raw, "cpu")
        assert "replaced" not in batch
        for i, n in enumerate(numbers):
            was, now = int(before["index"][i]), int(batch["index"][i])
            assert now == was or (was in broken and now not in broken and now in examples.rows(group(n)))
            assert batch["caption"][i] == f"image {now}"
            replaced += now != was
            others.get(was, set()).add(now)
            same({k: v for k, v in examples[range(n, n + 1)].items() if k != "replaced"}, _one(raw, i))
        examples.ready(raw, "cpu")  # shown twice, counted once
    lines = (tmp_path / "broken.txt").read_text().splitlines()
    assert max(map(len, others.values())) > 1  # keyed by n, not by the row
    assert replaced == examples.replaced == len(lines) > 4 and said[0].startswith("warning: example ")
    assert "(1 images replaced; all are in" in said[0] and len(said) < 20


def group(n):
    """The places of 2 blocks of 4 in the lane of example n, of 2 lanes."""
    return [m for m in range(n // 16 * 16, n // 16 * 16 + 16) if m // 4 % 2 == n // 4 % 2]


def _one(batch, i):
    return {k: v[i : i + 1] for k, v in batch.items() if k != "replaced"}


def odd(folder):
    """name -> (what is at fault, what is said)."""
    parquet(folder / "ok", files=2, rows=20)
    table = pq.read_table(folder / "ok" / "000.parquet")

    def copied(name, write, ending="parquet"):
        made = parquet(folder / name, files=2, rows=20) if ending == "parquet" else tars(folder / name, files=2, rows=20)
        write(made / f"001.{ending}")
        return made

    cut = lambda path: path.write_bytes(path.read_bytes()[:-700])  # noqa: E731
    yield copied("empty", lambda path: path.write_bytes(b"")), r"1 of 2 files cannot be read: .*parquet.*\)"
    yield copied("damaged", cut), r"1 of 2 files cannot be read: .*parquet.*\)"
    yield copied("other", lambda path: pq.write_table(table.drop(["text"]), path)), "'text' is missing among image, label"
    images = lambda path: pq.write_table(table.set_column(0, "image", table["text"]), path)  # noqa: E731
    yield copied("texts", images), "column 'image' is of texts"
    yield copied("no rows", lambda path: [pq.write_table(table[:0], p) for p in path.parent.glob("*")]), "2 files have no rows"
    yield copied("no tar", lambda path: path.write_bytes(b"x" * 2000), "tar"), r"1 of 2 files cannot be read: .*\(no whole tar"
    yield copied("half a tar", lambda path: path.write_bytes(path.read_bytes()[:1500]), "tar"), r"\(it is damaged"
    middle = lambda path: path.write_bytes((raw := path.read_bytes())[:1024] + b"?" * 512 + raw[1536:])  # noqa: E731
    yield copied("damaged tar", middle, "tar"), r"\(it is damaged"
    yield folder / "nowhere", "it names no shards; expected .parquet or .tar files"
    yield folder / "ok" / "{000..002}.parquet", r"1 of 3 files cannot be read: .*\(there is no such file"
    (folder / "mixed").mkdir()
    for name in ("a.tar", "b.parquet"):
        (folder / "mixed" / name).touch()
    yield folder / "mixed", "names both .parquet and .tar"
    (folder / "x.json").write_text("[1]")
    yield folder / "x.json", "it lists no shards|it names no shards"


def test_odd_shards_are_one_line(tmp_path):
    for place, said in odd(tmp_path):
        with pytest.raises(BadInput) as refusal:
            streamed(place)
        assert re.search(said, str(refusal.value)) and "\n" not in str(refusal.value), (place, refusal.value)
        assert "--data.stream" in str(refusal.value)


def test_shards_that_change_while_it_trains(tmp_path):
    """Fewer rows than an index says, a file that goes."""
    folder = tars(tmp_path / "set", index="index.json")
    (folder / "index.json").write_text((folder / "index.json").read_text().replace('"nsamples": 10', '"nsamples": 11'))
    with pytest.raises(BadInput, match=r"the shard \S+tar has 10 rows, and 11 were expected"):
        streamed(folder)[range(4)]
    examples = streamed(parquet(tmp_path / "gone"))
    for path in (tmp_path / "gone").glob("*"):
        path.unlink()
    with pytest.raises(BadInput, match=r"cannot be read \(.*No such file.*resumes once it is there"):
        examples[range(4)]


def test_what_does_not_go_with_a_stream():
    for name, value in {"train_data_dir": "x", "more_resolutions": (4,), "mask_data_dir": "x"}.items():
        with pytest.raises(BadInput, match=f"--data.{name.replace('_', '-')} is .*--data.stream"):
            settings("x", **{name: value})


def test_what_tars_say_is_read_once(tmp_path, capsys):
    folder = tars(tmp_path / "set")
    for said in (True, False):
        assert streamed(folder, folder=tmp_path / "cache").size == ROWS
        assert ("6 tars without an index" in capsys.readouterr().err) is said
    tars(folder, rows=30)
    assert streamed(folder, folder=tmp_path / "cache").size == 30


def test_patterns():
    assert shards.expanded("a{08..10}.{x,y}") == ["a08.x", "a08.y", "a09.x", "a09.y", "a10.x", "a10.y"]
    assert shards.split_name("x/a.b.PNG") == ("x/a", "b.png")


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


@pytest.mark.parametrize("kind", MAKE)
def test_runs(tmp_path, places, kind):
    """2 accumulated x 2, 2 processes x 2, with workers, killed by a shorter length and resumed: the same bits."""

    def command(out, steps=8, stream=places[kind], **more):
        common = {"data__stream": stream, "data__bucket_block": 4, "data__stream_lanes": 2, "data__random_flip": True}
        flags = tiny(tmp_path, out, steps, **{"base__lr_scheduler": "constant"} | common | more)
        (tmp_path / "unet.json").write_text(json.dumps(UNET | {"dropout": 0.0}))
        return flags

    split = {"data__train_batch_size": 2}
    result = cli(tmp_path, *command("a", **split, base__gradient_accumulation_steps=2))
    assert result.code == 0 and "read while training" in result.err, result.err
    for result in cli_many(tmp_path, 2, *command("b", **split, data__dataloader_num_workers=1)):
        assert result.code == 0, result.err
    for steps in (3, 8):
        result = cli(tmp_path, *command("c", steps, **split, base__gradient_accumulation_steps=2, data__stream_memory=0))
        assert result.code == 0, result.err
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")
    if kind == "tar":
        return
    checked = cli(tmp_path, *command("a", base__check=True))
    assert checked.code == 0 and "images      60 can be read, 0 cannot" in checked.out, checked.err
    estimated = cli(tmp_path, *command("d", base__dry_run=True))
    assert estimated.code == 0 and "step " in estimated.out, estimated.err
    refused = cli(tmp_path, *command("e", stream="nowhere/*.tar"))
    assert refused.code == 2 and refused.err.count("\n") == 1 and "names no shards" in refused.err, refused.err
