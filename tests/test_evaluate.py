"""`python loop.py evaluate`: what is measured of samples, and that it is measured rightly."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from PIL import Image
from test_settings import refused
from warm import cli, digest, flags, metrics, tiny

from oneloop.configs import BadInput, Data
from oneloop.evaluation import drawings, features, judge, measures, models
from oneloop.families import text_to_image
from oneloop.inputs import sources
from oneloop.inputs.shapes import describe_shape, draw_shape
from oneloop.settings import command_line
from oneloop.tasks import Rng, lora
from oneloop.views import evaluate, page, sample


def drawn(numbers, side=16):
    """Embedded examples as images [N, 3, H, H] uint8."""
    return torch.stack([torch.from_numpy(draw_shape(n, side)[0]).permute(2, 0, 1) for n in numbers])


@pytest.fixture(scope="module")
def clouds():
    """Two sets of features, [300, 12] and [260, 12], that overlap."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(12, 12)) / 3
    return torch.tensor(rng.normal(size=(300, 12)) @ mix), torch.tensor(0.3 + rng.normal(size=(260, 12)))


def test_distances_are_their_formulas(clouds):
    """Written here a second time, another way, to 1e-6; and they are torch-fidelity's."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = (z.numpy() for z in clouds)
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    frechet = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    kernel = lambda u, v: (u @ v.T / 12 + 1) ** 3  # noqa: E731
    u, v = x[:260], y
    off = lambda k: (k.sum() - np.trace(k)) / (260 * 259)  # noqa: E731
    kid = off(kernel(u, u)) + off(kernel(v, v)) - 2 * kernel(u, v).mean()
    apart = lambda u, v: np.sqrt(((u[:, None] - v[None]) ** 2).sum(-1))  # noqa: E731
    reach = lambda u: np.sort(apart(u, u), 1)[:, 3]  # noqa: E731
    within = lambda u, v: (apart(u, v) <= reach(v)).any(1).mean()  # noqa: E731
    found = measures.measure(torch.tensor(u), torch.tensor(v))
    own = fid_statistics_to_metric(*(fid_features_to_statistics(z) for z in clouds), False)
    whole = measures.measure(*clouds)
    assert whole["frechet"] == pytest.approx(frechet, abs=1e-6)
    assert whole["frechet"] == pytest.approx(own["frechet_inception_distance"], abs=1e-6)
    assert found["kid"] == pytest.approx(kid, abs=1e-6)
    assert whole["precision"] == pytest.approx(within(x, y), abs=1e-6) and 0.1 < whole["precision"] < 1
    assert whole["recall"] == pytest.approx(within(y, x), abs=1e-6) and 0 < whole["recall"] < whole["precision"]


def test_inception_s_distance_is_torch_fidelity_s(monkeypatch, tmp_path):
    """From images to the distance, with weights in the place of those that it would fetch."""
    import torch_fidelity
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(0)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *given, **more: {})
    monkeypatch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save(theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), tmp_path / "weights.pth")
    monkeypatch.undo()
    weights = torch.load(tmp_path / "weights.pth")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *given, **more: weights)
    one, sets = models.open_model("inception"), [drawn(range(8), 16), drawn(range(50, 58), 16)]
    ours = measures.measure(*(one(images) for images in sets))["frechet"]
    whole = torch_fidelity.calculate_metrics(
        **{f"input{i}": torch.utils.data.Subset(images, range(8)) for i, images in enumerate(sets, 1)},
        **{"fid": True, "cuda": False, "verbose": False, "cache": False, "batch_size": 8},
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
    )
    assert ours == pytest.approx(whole["frechet_inception_distance"], rel=1e-6) and ours > 0


def test_intervals():
    """The jackknife of a mean is its standard error; Wilson's interval is no point at 0; sets of one law are not told apart."""
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).double()
    one = measures.jackknife(lambda a, b: {"mean": float(a.mean())}, x, x, 400)["mean"]
    assert one["high"] - one["value"] == pytest.approx(1.96 * float(x.std()) / 20, rel=1e-6)
    none = measures.share(torch.zeros(256, dtype=torch.bool))
    assert none["value"] == none["low"] == 0 and none["high"] == pytest.approx(1.96**2 / (256 + 1.96**2))
    a, b, c = torch.randn(3, 200, 6, generator=torch.Generator().manual_seed(2)).double()
    same, other = measures.compare(a, b)["kid"], measures.compare(a, c + 0.5)["kid"]
    assert same["low"] < 0 < same["high"] < other["low"] < other["value"] < other["high"]


def test_the_reader_reads():
    """Every drawing as what it was drawn, in two sizes; plain, noisy and blurred images as what they are."""
    for side in (16, 32):
        reading = drawings.read(drawn(range(500, 600), side))
        assert [drawings.KINDS[k] for k in reading.kind.tolist()] == [describe_shape(n)[:4] for n in range(500, 600)]
        assert reading.named.all() and not reading.blank.any() and reading.distance.median() < 4
    plain = torch.tensor([drawings.COLOURS[name] for name in ("red", "black", "white")], dtype=torch.uint8)
    noise = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blank = drawings.read(plain[:, :, None, None].expand(-1, -1, 16, 16))
    assert blank.blank.all() and not blank.named.any()
    assert not drawings.read(noise).named.any()
    half = (drawn(range(40)).float() + drawn(range(40, 80)).float()) / 2
    assert drawings.read(half.to(torch.uint8)).named.float().mean() < 0.2
    judged = drawings.judge(drawn(range(300, 400)), drawn(range(400, 500)))
    covered = judged["samples"]["coverage"]
    assert covered["expected low"] <= covered["value"] <= covered["expected high"] < 100 / 180
    assert covered["value"] == len({describe_shape(n)[:4] for n in range(300, 400)}) / 180


def sets(count=200):
    """Embedded shapes, with labels."""
    labels = lambda rows: torch.tensor([draw_shape(n, 16)[2] for n in rows])  # noqa: E731
    held_out, trained = range(count, 2 * count), range(count)
    return judge.Sets(drawn(held_out), labels(held_out), drawn(trained), labels(trained), None, "drawings", True)


def test_copies_and_floor(monkeypatch, tmp_path):
    """Training images are copies, fresh drawings as often as those held out; the classifier is the same each time, and kept."""
    monkeypatch.setattr(features, "STEPS", 12)
    these = sets()
    judges = judge.judges(these, (), tmp_path)
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    again = judge.judges(these, (), tmp_path)
    fresh = judge.judges(these, (), tmp_path / "other")
    assert kept.stat().st_mtime_ns == before and judges[0].name == again[0].name == fresh[0].name
    assert torch.equal(judges[0](these.held_out), again[0](these.held_out))
    assert torch.equal(judges[0](these.held_out), fresh[0](these.held_out))
    copied = judge.judge(these.trained, these, judges)
    assert (
        copied["copies"]["value"] == 1
        and copied["features"]["classifier"]["samples"] == copied["features"]["classifier"]["floor"]
    )
    unseen = judge.judge(drawn(range(400, 600)), these, judges)
    assert unseen["copies"]["low"] < 0.05 < unseen["copies"]["high"] < 0.15
    assert json.dumps(unseen) and any("copies of training images" in line for line in judge.told(unseen))


def test_large_images_are_compared_small():
    """Ten thousand of them, at 1024, would be 126 GB of pixels."""
    x, y = (torch.randint(256, (n, 3, 96, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)) for n in (5, 7))
    small = lambda z: F.interpolate(z.float(), (64, 64), mode="area")  # noqa: E731
    distance, which = measures.nearest(x, y)
    difference = (small(x)[:, None] - small(y)).square().mean((2, 3, 4)).sqrt()  # [5, 7]
    torch.testing.assert_close(distance, difference.amin(1), rtol=1e-3, atol=1e-3)
    assert torch.equal(which, difference.argmin(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that held out a tenth of 400 shapes, judged."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"data__num_shapes": 400, "data__resolution": 16, "data__validation_split": 0.1}
    result = cli(folder, *tiny(folder, **settings))
    assert result.code == 0, result.err
    result = cli(folder, "evaluate", "out", "--num", "70", patch=quick)
    assert result.code == 0, result.err
    return folder, result


def quick():
    """A classifier of a few steps."""
    features.STEPS = 4


def quicker():
    """And of few images."""
    quick()
    evaluate.Settings.num = 40


def test_judged_while_it_trains(run, tmp_path):
    """Figures in the log and a file of each step, those that `evaluate` finds; the weights have the bits of a run without."""
    folder, _ = run
    settings = {"data__num_shapes": 400, "data__resolution": 16, "data__validation_split": 0.1, "base__evaluate_steps": 4}
    result = cli(tmp_path, *tiny(tmp_path, **settings), patch=quicker)
    assert result.code == 0 and "step 6/6, evaluate/blank " in result.err, result.err
    figures = {line["step"]: line for line in metrics(tmp_path / "out") if "evaluate/named" in line}
    files = {int(path.stem): json.loads(path.read_text()) for path in (tmp_path / "out" / "evaluation").glob("*.json")}
    assert list(figures) == sorted(files) == [4, 6] and digest(tmp_path / "out") == digest(folder / "out")
    for path in (
        *(tmp_path / "out" / "evaluation").glob("6.*"),
        *(tmp_path / "out").glob("export*"),
    ):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = cli(tmp_path, *tiny(tmp_path, **settings), patch=quicker)
    assert again.code == 0 and json.loads((tmp_path / "out" / "evaluation" / "6.json").read_text()) == files[6], again.err
    assert cli(tmp_path, "evaluate", "out", "--num", "40", patch=quick).code == 0
    assert json.loads((tmp_path / "out" / "evaluation" / "6.json").read_text()) == files[6] and files[6]["num"] == 40
    for name, kind in (("frechet", files[6]["features"]["classifier"]), ("median distance", files[6]["drawings"])):
        assert figures[6][f"evaluate/{name}"] == kind["samples"][name]["value"]
    nothing = cli(tmp_path, *tiny(tmp_path, "none", data__train_data_dir=".", base__evaluate_steps=4))
    assert nothing.code == 2 and "error: --base.evaluate-steps: the run held out no images: --data.validation" in nothing.err
    assert not (tmp_path / "none" / "run.json").exists() and not (tmp_path / "none" / "evaluation").exists()


def test_a_run_is_judged(run):
    """What it writes; drawn once, by key; a part that was lost is drawn again, the rest is kept."""
    folder, result = run
    path = folder / "out" / "evaluation" / "6.json"
    found = json.loads(path.read_text())
    assert found["step"] == 6 and found["num"] == 70 and found["held out"] == "40 images that the run held out"
    assert found["drawings"]["samples"]["named"]["value"] < 0.5 < found["drawings"]["held out"]["named"]["value"]
    assert (
        found["features"]["classifier"]["samples"]["frechet"]["value"]
        > found["features"]["classifier"]["floor"]["frechet"]["value"]
    )
    assert "drew 70 of 70 images" in result.err and str(path.name) in result.out
    first, second = sorted(folder.glob("out/evaluation/6-*/*.npy"))
    kept, images = first.stat().st_mtime_ns, np.load(second)
    second.unlink()
    again = cli(folder, "evaluate", "out", "--num", "70", patch=quick)
    assert again.code == 0 and "drew 64" not in again.err and first.stat().st_mtime_ns == kept, again.err
    assert np.array_equal(np.load(second), images) and json.loads(path.read_text()) == found
    grid = cli(folder, "sample", "out", "--num", "2", "--to", "two.png")
    assert grid.code == 0 and np.load(first).shape == (64, 3, 16, 16)


def test_another_set(run, tmp_path):
    """A folder of images in the place of what was held out; sizes and numbers that do not fit are refused."""
    folder, _ = run
    from torchvision.utils import save_image

    (tmp_path / "images").mkdir()
    for n, image in enumerate(drawn(range(700, 740))):
        save_image(image / 255, tmp_path / "images" / f"{n}.png")
    done = cli(folder, "evaluate", "out", "--num", "70", "--data", tmp_path / "images", patch=quick)
    assert done.code == 0 and f"compared with {tmp_path / 'images'}" in done.out, done.err
    for n in range(20):
        (tmp_path / "images" / f"{n}.png").unlink()
    refused(
        cli(folder, "evaluate", "out", "--data", tmp_path / "images", patch=quick),
        "20 images to compare with; expected at least 32",
    )


def test_images_of_another_program(run, tmp_path):
    """They are judged as the run's own samples are, and leave those alone; what is no image is said of the flag."""
    folder, place = tmp_path / "run", tmp_path / "images"
    shutil.copytree(run[0] / "out", folder)
    assert cli(tmp_path, "evaluate", "run", "--num", "70", patch=quick).code == 0
    page_before, before = (folder / "report.html").stat().st_mtime_ns, files_of(folder / "evaluation")
    own = np.concatenate([np.load(path) for path in sorted(folder.glob("evaluation/6-*/*.npy"))])
    place.mkdir()
    for n, image in enumerate(own):
        Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{n:03}.png")
    (place / "000.txt").write_bytes(b"\xff no caption is read")
    (place / "metadata.jsonl").write_text("nor this\n")
    done = cli(tmp_path, "evaluate", "run", "--images", "images", patch=quick)
    assert done.code == 0 and "70 of 70 images in images, judged: " in done.out and "drew" not in done.err, done.err
    assert files_of(folder / "evaluation") | before == files_of(folder / "evaluation")
    assert (folder / "report.html").stat().st_mtime_ns == page_before
    (path,) = folder.glob("evaluation/images-*.json")
    found, of_the_run = json.loads(path.read_text()), json.loads((folder / "evaluation" / "6.json").read_text())
    assert found["images"] == str(place) and found["num"] == 70 and path.with_suffix(".png").exists()
    assert [found[key] for key in ("features", "copies", "drawings")] == [
        of_the_run[key] for key in ("features", "copies", "drawings")
    ]
    for n in range(20):
        wide = np.pad(draw_shape(900 + n, 40)[0], ((0, 0), (10, 10), (0, 0)), "edge")
        Image.fromarray(wide).save(place / f"{n:03}.png")  # resized, and its middle cut out
    done = cli(tmp_path, "evaluate", "run", "--images", "images", "--num", "40", patch=quick)
    assert done.code == 0 and json.loads(path.read_text())["num"] == 40, done.err
    assert json.loads(path.read_text())["drawings"]["samples"]["named"]["value"] == pytest.approx(12 / 40)  # 0, 1, 3, 5, 7, ...
    (place / "zz.png").write_bytes(b"no image")
    refused(
        cli(tmp_path, "evaluate", "run", "--images", "images", "--num", "999"),
        "error: --images: ",
        "zz.png cannot be read: not an image that PIL reads; move it elsewhere",
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").mkdir()
    for n in range(40):
        shutil.copy(place / f"{n:03}.png", tmp_path / "broken")
    shutil.copy(place / "zz.png", tmp_path / "broken")
    for given, words in (
        (["--images", "none"], "--images none: 0 images to judge; expected at least 32"),
        (["--data", "broken"], "error: --data: 1 of 41 images cannot be read: zz.png"),
        (["--data", "none"], "--data none: holds no images"),
        (["--images", "nowhere"], "--images nowhere: there is no such folder"),
        (["--images", "none", "--seed", "1"], "--seed is 1; expected none with --images"),
    ):
        refused(cli(tmp_path, "evaluate", "run", *given), words)
    for n in range(40):
        (place / f"{n:03}.png").unlink()
    shutil.rmtree(folder / "evaluation")
    refused(cli(tmp_path, "evaluate", "run", "--images", "images"), "--images images: 31 images to judge; expected at least 32")
    assert not (folder / "evaluation").exists()
    for name in ("zz.png", "zzz.png"):
        shutil.copy(place / "050.png", place / name)
    assert cli(tmp_path, "evaluate", "run", "--images", "images", patch=quick).code == 0
    assert all(path.is_file() for path in (folder / "evaluation").iterdir())


def test_what_is_said_of_other_data():
    """Mistakes name the flags of this command, not the settings of a run."""
    for said, expected in (
        ("--data.train-data-dir x: holds no images", "--data x: holds no images"),
        ("--data.dataset-name x, --data.split y: no such split", "--data x, --split y: no such split"),
        (
            "1 of 2 images cannot be read: a.png; --data.skip-broken leaves them out",
            "--data: 1 of 2 images cannot be read: a.png; move",
        ),
    ):
        with pytest.raises(BadInput) as error, judge.said_of_data():
            raise BadInput(said)
        assert str(error.value).startswith(expected)


def files_of(folder):
    """Name -> content of what lies in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_models_by_folder(tmp_path):
    """An autoencoder of diffusers and a vision model of transformers, each of one vector for an image, whatever the batch."""
    from diffusers import AutoencoderKL
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor
    from warm import VAE

    AutoencoderKL(**{k: v for k, v in VAE.items() if k != "_class_name"}).save_pretrained(tmp_path / "vae")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino")
    images = drawn(range(70), 32)
    for name, size in (("vae", 32), ("dino", 16)):
        made = models.open_model(str(tmp_path / name))(images)
        assert made.shape == (70, size) and torch.allclose(
            made[64:], models.open_model(str(tmp_path / name))(images[64:]), atol=1e-5
        )
        assert made.std(0).min() > 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP in the real format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder, words = tmp_path_factory.mktemp("clip"), tiny_models.tokenizer(24)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": words.eos_token_id}
    torch.manual_seed(4)
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": 28, "patch_size": 14}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_clip_score_and_similarity_are_their_formulas(clip):
    """Those of the model's own logits, which are the cosines times its scale; of a set with itself no image with itself."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    one, images = models.open_model(str(clip)), drawn(range(70), 32)
    prompts = [draw_shape(n, 32)[1] for n in range(70)]
    model, words = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    pixels = CLIPImageProcessor.from_pretrained(clip)(list(images), return_tensors="pt")
    with torch.no_grad():
        said = model(**words(prompts, padding=True, return_tensors="pt"), **pixels)
    cosines = said.logits_per_image / model.logit_scale.exp()
    own = 100 * cosines.diagonal().clamp(min=0)
    found = measures.clip_score(one(images), one.texts(prompts))
    assert found["value"] == pytest.approx(own.mean().item(), abs=1e-3) and own.std() > 1e-3
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * own.std().item() / 70**0.5, rel=1e-3)
    x, y = one(images[:5]), one(images[5:8])
    pairs = F.cosine_similarity(x[:, None], y[None], dim=-1)
    assert measures.similarity(x, y) == pytest.approx(pairs.mean().item(), abs=1e-5)
    within = F.cosine_similarity(x[:, None], x[None], dim=-1)[~torch.eye(5, dtype=bool)]
    assert measures.similarity(x, x) == pytest.approx(within.mean().item(), abs=1e-5)


def test_the_floor_is_of_training_images_with_their_own_captions(clip):
    """As many as there are samples, spread over the set, each with its caption."""
    one, trained = models.open_model(str(clip)), drawn(range(70), 32)
    captions = [draw_shape(n, 32)[1] for n in range(70)]
    sets = judge.Sets(None, None, trained, None, captions, "nothing", False)
    found = judge.scored(one, drawn(range(100, 132), 32), sets, ["a dog"] * 32)
    rows = [row * 70 // 32 for row in range(32)]
    own = measures.clip_score(one(trained[rows]), one.texts([captions[row] for row in rows]))
    assert found["floor"]["clip score"] == pytest.approx(own)
    others = measures.clip_score(one(trained[rows]), one.texts(captions[:32]))
    assert abs(own["value"] - others["value"]) > 1e-3


def test_few_images_and_their_prompts(clip, tmp_path):
    """A run on a few captioned images, as of one subject, that held out none: samples are like the training images, and like
    what they were drawn after; without a model of others there is nothing to compare with."""
    from test_lora import command, draw_photos

    photos, model = draw_photos(tmp_path / "photos"), tiny_models.build(tmp_path, "sd")
    asked = {"lora__validation_prompts": ("a cat", "a dog"), "data__example_cache": "None"}
    assert cli(tmp_path, *command(tmp_path, model, photos, **asked)).code == 0
    done = cli(tmp_path, "evaluate", "out", "--num", "32", "--model", clip)
    assert done.code == 0 and "compared with the training images: the run held out none" in done.out, done.err
    (found,) = json.loads((tmp_path / "out" / "evaluation" / "4.json").read_text())["features"].values()
    assert set(found["samples"]) == set(found["floor"]) == {"similarity", "clip score"}
    cfg = lora.Config(lora=lora.Settings(pretrained_model_name_or_path=str(model), validation_prompts=("a cat", "a dog")))
    prompts = text_to_image.drawn_after([], Rng.of(0, range(32), "samples"), cfg)
    assert prompts == ["a cat", "a dog"] * 16
    one = models.open_model(str(clip))
    images = torch.from_numpy(np.load(next((tmp_path / "out" / "evaluation").glob("4-*/*.npy"))))
    assert found["samples"]["clip score"] == pytest.approx(measures.clip_score(one(images), one.texts(prompts)))
    trained, _, captions = judge.images(sources.open_for(lora.task, opened := sample.opened(tmp_path / "out")[3]), opened)
    assert found["samples"]["similarity"]["value"] == pytest.approx(measures.similarity(one(images), one(trained)))
    assert found["floor"]["similarity"]["value"] == pytest.approx(measures.similarity(x := one(trained), x))
    assert found["floor"]["clip score"] == pytest.approx(measures.clip_score(one(trained), one.texts(captions)))
    assert "similarity/" in (tmp_path / "out" / "report.html").read_text()
    refused(cli(tmp_path, "evaluate", "out", "--num", "32"), "the run held out no images", "evaluate --model")
    one_photo = tmp_path / "one"
    one_photo.mkdir()
    for end in (".png", ".txt"):
        shutil.copy(photos / f"0{end}", one_photo)
    others = {"few": {"data__validation_data_dir": photos}, "buckets": {"data__buckets": True}, "single": {}}
    for name, more in others.items():  # without prompts of its own, those of the data
        images = one_photo if name == "single" else photos
        assert cli(tmp_path, *command(tmp_path, model, images, name, data__train_batch_size=1, **more)).code == 0
        done = cli(tmp_path, "evaluate", name, "--num", "32", "--model", clip)
        assert done.code == 0 and "clip score" in done.out and "compared with the training images" in done.out, done.err
        assert ("4 images to compare with, too few" in done.out) == (name == "few")
    bare = tmp_path / "bare"
    shutil.copytree(clip, bare, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    done = cli(tmp_path, "evaluate", "out", "--num", "32", "--model", bare)
    assert done.code == 2 and "bare reads texts, but has no tokenizer's files" in done.err.splitlines()[-1], done.err


def test_prompts_are_those_of_as_many_examples(monkeypatch, tmp_path):
    """Captions in the place of prompts are spread over the data by the number of images, in several parts."""
    monkeypatch.setattr(evaluate, "CHUNK", 16)
    model = str(tiny_models.build(tmp_path, "sd"))
    for num in (32, 70):
        cfg = lora.Config(
            data=Data(num_shapes=100, resolution=16, example_cache="None"),
            lora=lora.Settings(pretrained_model_name_or_path=model),
        )
        assert evaluate.texts(lora.task, cfg, 0, num) == [draw_shape(n * 100 // num, 16)[1] for n in range(num)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], ["nowhere: there is no such folder; expected a run's output folder"]),
        (["."], [".: holds neither run.json nor a checkpoint; expected"]),
        ([".", "--num", "31"], ["--num is 31; expected at least 32"]),
        ([".", "--mdoel", "x"], ["--mdoel is not a setting", "did you mean --model?"]),
    ],
)
def test_mistakes(tmp_path, argv, words):
    refused(cli(tmp_path, "evaluate", *argv), *words)


def test_what_measures_distances_is_asked_for_before_anything_is_drawn(run):
    def without():
        quick()
        sys.modules["torch_fidelity"] = None  # as where it is not installed

    done = cli(run[0], "evaluate", "out", "--num", "33", "--seed", "5", patch=without)
    refused(done, "torch-fidelity's, which is not installed")
    assert "drew" not in done.err


def test_a_model_that_is_not_there(run):
    folder, _ = run
    env = {"HF_HUB_OFFLINE": "1", "TORCH_HOME": str(folder / "none")}
    refused(cli(folder, "evaluate", "out", "--model", "no-such/model", env=env), "--model no-such/model cannot be loaded")
    shutil.copytree(folder / "out" / "checkpoint-6", folder / "alone")
    done = cli(folder, "evaluate", "alone", "--num", "32", env=env, patch=quick)
    assert done.code == 0, done.err


def test_the_pages_show_it(run, tmp_path):
    """The last evaluation in report.html, with its neighbours; curves over checkpoints in `compare`; damage is said."""
    folder, _ = run
    shutil.copytree(folder / "out", tmp_path / "out")
    assert '"Frechet"' not in (tmp_path / "out" / "report.html").read_text()  # one point is no curve
    place = tmp_path / "out" / "evaluation"
    earlier = json.loads((place / "6.json").read_text())
    earlier["features"]["classifier"]["samples"]["frechet"]["value"] = 1234.5
    (place / "3.json").write_text(json.dumps(earlier))
    (place / "4.json").write_text('{"features": {"classifier": []}}')
    seen = page.read(tmp_path / "out", (said := []).append)
    curve = seen.metrics["frechet/classifier"]
    assert [step for step, _ in curve] == [3, 6] and curve[0][1] == 1234.5
    assert said == [f"{place / '4.json'}: damaged; left out"]
    page.write(tmp_path / "out")
    shown = (tmp_path / "out" / "report.html").read_text()
    assert '"Frechet"' in shown
    assert [word in shown for word in ("<h2>Evaluation<", "nearest to them", "kid/classifier")] == [True] * 3
    assert cli(tmp_path, "compare", "out", folder / "out", "--to", "both.html").code == 0
    assert '"Frechet"' in (tmp_path / "both.html").read_text()


def test_what_is_drawn_beside_other_images_is_not_judged(tmp_path):
    """In a line: before a run has files where it was to be judged while it trains, and before anything is drawn of one."""
    tasks = {name: importlib.import_module(f"oneloop.tasks.{name}").task for name in command_line.task_names()}
    assert {name for name, task in tasks.items() if not task.judged} == {"controlnet", "t2i_adapter", "edit", "vae"}
    settings = {"base.output_dir": tmp_path / "out", "base.max_train_steps": 1, "base.num_samples": 1, "base.logger": "none"}
    small = flags("vae", settings | {"data.num_shapes": 64, "data.resolution": 32, "data.train_batch_size": 4})
    said = cli(tmp_path, *small, "--base.evaluate-steps", "5")
    shows = "vae shows what it makes of other images beside them; those that are drawn alone can be judged"
    assert said.code == 2 and f"--base.evaluate-steps is 5; expected 0: {shows}" in said.err, said.err
    assert not (tmp_path / "out" / "run.json").exists()
    assert cli(tmp_path, *small).code == 0
    said = cli(tmp_path, "evaluate", "out", "--num", "40")
    assert said.code == 2 and f"out: {shows}" in said.err and not (tmp_path / "out" / "evaluation").exists(), said.err
