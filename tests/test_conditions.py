"""Conditions that are made of the image: what the functions give, and that they are cut, mirrored and kept as the image is."""

import hashlib
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from test_plane import draw
from test_streaming import parquet

from benchmarks import pixels
from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.evaluation import drawings
from oneloop.families import control_conditions
from oneloop.inputs import conditions, shapes, sources, store
from oneloop.settings.ranges import hints
from oneloop.tasks import COLUMNS, ddpm, dpo

MADE = COLUMNS | {"conditioning": control_conditions.COLUMNS["conditioning"]}


def examples(columns=MADE, seed=0, **settings):
    cfg = Data(**{"resolution": 32, "train_batch_size": 2} | settings)
    return data.Examples(sources.open_source(cfg, columns), cfg, seed)


def made(name, image):
    """[H, W, 3] uint8 -> [H, W, 3] uint8."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return conditions.make(name, x.contiguous()).permute(1, 2, 0).numpy()


def pictures():
    """Patches, a smooth one, noise and rings."""
    rng = [np.random.default_rng(seed) for seed in range(3)]
    patches = np.kron(rng[0].integers(0, 256, (5, 7, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    small = Image.fromarray(rng[1].integers(0, 256, (8, 6, 3), dtype=np.uint8))
    rings = np.hypot(*(np.indices((96, 80)) - 40)) * 5 % 256
    noise = rng[2].integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return [patches, np.asarray(small.resize((48, 64), Image.BICUBIC)), noise, np.stack([rings] * 3, -1).astype(np.uint8)]


def test_edges_are_those_of_opencv():
    """The hashes are of cv2.Canny(image, 100, 200) of OpenCV 5.0.0, and so are those of 4.x for whoever has it."""
    hashes = ["79ede68dd0969380", "8a9c3f8699d71135", "9a0d68fd869ec78b", "339bc74844ea6d85"]
    for image, expected in zip(pictures(), hashes, strict=True):
        found = made("edges", image)
        assert (found == found[..., :1]).all() and set(np.unique(found)) == {0, 255}
        assert hashlib.sha256(np.ascontiguousarray(found[..., 0]).tobytes()).hexdigest()[:16] == expected


def test_edges_of_what_has_none_and_of_one():
    assert not made("edges", np.full((9, 12, 3), 77, np.uint8)).any() and made("edges", pictures()[2][:1, :1]).shape == (
        1,
        1,
        3,
    )
    half = np.zeros((8, 12, 3), np.uint8)
    half[:, 6:] = 60
    (columns,) = np.nonzero(made("edges", half)[4, :, 0])
    assert columns.tolist() in ([5], [6])


def test_greyscale_and_blur_are_those_of_pil():
    for image in pictures():
        grey, whole = np.asarray(Image.fromarray(image).convert("L")), Image.fromarray(image)
        assert (made("greyscale", image) == grey[..., None]).all()
        expected = np.asarray(whole.filter(ImageFilter.GaussianBlur(min(image.shape[:2]) / 32)))
        assert (made("blur", image) == expected).all() and (made("blur", image) != image).any()


@pytest.mark.parametrize("name", conditions.FUNCTIONS)
@pytest.mark.parametrize("budget", [2.0, 0.0])
def test_a_condition_is_that_of_the_image_as_it_is_trained_on(tmp_path, name, budget):
    """Resized, cut in the middle and mirrored alike; decoded at once, or for each batch."""
    folder = draw(tmp_path / "images", [(40, 60), (50, 34), (64, 64)])
    settings = {"train_data_dir": str(folder), "center_crop": True, "random_flip": True, "memory_budget": budget}
    found, mirrored = examples(conditioning=name, **settings), 0
    assert (found.images.pixels is None) == (budget == 0)
    for first in range(0, 24, 2):
        batch = found[range(first, first + 2)]
        for x, y, flip in zip(batch["pixel_values"], batch["conditioning"], batch["mirrored"], strict=True):
            x, y = (z.flip(-1) if flip else z for z in (x, y))
            assert torch.equal(conditions.make(name, x.contiguous()), y)
            mirrored += int(flip)
    assert 0 < mirrored < 24


def test_a_condition_is_cropped_where_its_image_is(tmp_path):
    """At random places: a grey of what is seen, to the pixel."""
    found = examples(conditioning="greyscale", train_data_dir=str(draw(tmp_path / "images", [(32, 90), (80, 32)])))
    corners = set()
    for first in range(0, 12, 2):
        batch = found[range(first, first + 2)]
        for x, y in zip(batch["pixel_values"], batch["conditioning"], strict=True):
            assert torch.equal(conditions.greyscale(x), y)
        corners |= set(map(tuple, batch["crop_top_left"].tolist()))
    assert len(corners) > 4


def test_it_is_kept_with_the_image_and_is_another_set(tmp_path, monkeypatch):
    folder = str(draw(tmp_path / "images", [(32, 32)] * 3))
    plain, edges, grey = (examples(train_data_dir=folder, conditioning=name, columns=columns) for name, columns in (
        (None, COLUMNS), ("edges", MADE), ("greyscale", MADE)))  # fmt: skip
    assert len({found.fingerprint for found in (plain, edges, grey)}) == 3
    paths = {store.path_of(tmp_path / "cache", found.source, found.cfg) for found in (plain, edges, grey)}
    assert len(paths) == 3
    path = store.path_of(tmp_path / "cache", edges.source, edges.cfg)
    store.write(edges.images, path, edges.cfg, pytest.fail)
    monkeypatch.setattr(conditions, "make", lambda *_: pytest.fail("made again"))
    again = data.opened(edges.source, edges.cfg, 0, tmp_path / "cache")
    batch, other = edges[range(2)], again[range(2)]
    assert again.cached and again.fingerprint == edges.fingerprint and torch.equal(batch["conditioning"], other["conditioning"])
    monkeypatch.setattr(conditions, "VERSION", 99)
    assert store.path_of(tmp_path / "cache", edges.source, edges.cfg) not in paths


def test_of_a_stream_and_of_a_mixture(tmp_path):
    cfg = Data(stream=str(parquet(tmp_path / "set")), resolution=8, center_crop=True, train_batch_size=4, conditioning="edges")
    batch = next(iter(data.opened(sources.open_source(cfg, MADE), cfg, 0, None).fixed(4)))
    for x, y in zip(batch["pixel_values"], batch["conditioning"], strict=True):
        assert torch.equal(conditions.edges(x), y)
    parts = (sources.Part(train_data_dir=str(draw(tmp_path / "more", [(32, 32)] * 2, shade=1))),)
    found = examples(
        train_data_dir=str(draw(tmp_path / "images", [(32, 32)] * 2)), mixture=parts, conditioning="blur", validation_split=None
    )
    batch = found.at(torch.arange(4))
    assert len(batch["conditioning"]) == 4 and torch.equal(conditions.blur(batch["pixel_values"][3]), batch["conditioning"][3])


def test_shapes_have_outlines_for_those_who_ask():
    """Without a colour of the shape; for the others the set is what it was, to the name of its cache."""
    plain, asked = examples(COLUMNS, num_shapes=24, resolution=8), examples(num_shapes=24, resolution=8)
    assert plain.fingerprint == "a1e67de11c125fca84cc217fcfa5e609"
    assert plain.source.identity() == "42715a9bc048f3166d646280b85e900a" != asked.source.identity()
    assert plain.fingerprint != asked.fingerprint and "conditioning" not in plain[range(1)]
    batch, wide = asked.at(torch.arange(6)), examples(num_shapes=24, resolution=32).at(torch.arange(6))
    assert torch.equal(batch["pixel_values"], plain.at(torch.arange(6))["pixel_values"])
    for row in range(6):
        shape, size, _, _, x, y = shapes.describe_shape(row)
        cover = shapes.cover_shape(shape, size, x, y, 32)
        line = wide["conditioning"][row]
        assert (line == line[:1]).all() and line.max() == 255
        crossed = (cover > 0.25) & (cover < 0.75)
        inside = shapes.cover_shape(shape, size, x, y, 32) == 1
        assert (line[0].numpy()[crossed] > 200).all()
        assert not line[0].numpy()[(cover == 0) | inside].all()
        assert line[0, 0, 0] == 0 and line[0, 16, 16] == 0
    assert torch.equal(examples(num_shapes=24, conditioning="edges").at(torch.arange(2))["conditioning"][0],
                       conditions.edges(examples(num_shapes=24).at(torch.arange(2))["pixel_values"][0]))  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"conditioning": "edges", "conditioning_column": "x"}, "expected one source of conditioning images"),
        ({"conditioning": "edges", "conditioning_data_dir": "x"}, "expected one source of conditioning images"),
        ({"conditioning": "sketch"}, "--data.conditioning is 'sketch'; expected one of edges, greyscale, blur"),
        (
            {"train_data_dir": True},
            "found none with a folder of images; --data.conditioning-column names their column, or --data.cond",
        ),
        ({"train_data_dir": True}, "--data.conditioning (edges, greyscale, blur, inpainting, depth, pose) makes it"),
    ],
)
def test_bad_settings_are_a_line(tmp_path, settings, says):
    if "train_data_dir" in settings:
        settings = {"train_data_dir": str(draw(tmp_path / "images", [(32, 32)] * 2))}
    with pytest.raises(BadInput) as refused:
        examples(**settings)
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value


def test_the_settings_say_the_functions_that_there_are():
    literal, _ = get_args(hints(Data)["conditioning"])
    assert get_args(literal) == sources.MAKERS


def test_the_reader_says_where_a_shape_is():
    """To a fifth of a pixel, on drawings as they are."""
    drawn = torch.stack([torch.from_numpy(shapes.draw_shape(row, 16)[0]) for row in range(12)]).permute(0, 3, 1, 2)
    reading = drawings.read(drawn)
    for row, (kind, place) in enumerate(zip(reading.kind.tolist(), reading.place, strict=True)):
        *looks, x, y = shapes.describe_shape(row)
        assert drawings.KINDS[kind] == tuple(looks) and (place - torch.tensor([x, y])).abs().max() < 0.012, row


def test_an_autoencoder_whose_latents_are_pixels():
    """What the benchmarks on shapes train in."""
    vae, x = pixels.identity(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        assert (posterior.mean - x).abs().max() < 1e-4 and posterior.std.max() < 1e-5
        assert (vae.decode(posterior.mean).sample - x).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["conditioning", "conditioning_column", "conditioning_data_dir"])
def test_what_a_task_does_not_read_is_a_line(name):
    """A condition that nothing of the task asks for would be left out unseen."""
    given = {"conditioning": "edges", "conditioning_column": "x", "conditioning_data_dir": "."}[name]
    with pytest.raises(BadInput, match=f"--data.{name.replace('_', '-')} is .*; expected None: ddpm has no"):
        sources.open_for(ddpm.task, ddpm.Config(data=Data(**{name: given})))


# ---------------------------------------------------------------------------------------------------------------------
# Folders of partners, and several sources.


def beside(tmp_path, names):
    """A folder `subject` of 00.png to 02.png, one `class` of images of these names, and `edges` of partners for all, whose grey
    says whose they are."""
    draw(tmp_path / "subject", [(32, 32)] * 3), draw(tmp_path / "drawn", [(32, 32)] * 3, shade=1)
    for folder in ("class", "edges"):
        (tmp_path / folder).mkdir()
    for i, name in enumerate(names):
        (tmp_path / "drawn" / f"0{i}.png").rename(tmp_path / "class" / name)
    for i, name in enumerate(("00.png", "01.png", "02.png", *names)):
        if not (tmp_path / "edges" / name).exists():
            Image.new("RGB", (32, 32), (40 * i,) * 3).save(tmp_path / "edges" / name)
    return {"train_data_dir": str(tmp_path / "subject"), "conditioning_data_dir": str(tmp_path / "edges")}


def test_class_images_have_partners_of_their_own(tmp_path):
    """Names decide; where two images would have one partner, that is a line."""
    settings = beside(tmp_path, ("a.png", "b.png", "c.png"))
    found = examples(**settings, class_data_dir=str(tmp_path / "class"))
    batch = found.at(torch.arange(6))
    assert (batch["conditioning"][:, 0, 0, 0] // 40).tolist() == [0, 1, 2, 3, 4, 5] and batch["source"].tolist() == 3 * [
        0
    ] + 3 * [1]
    (tmp_path / "class" / "b.png").rename(tmp_path / "class" / "01.png")
    (tmp_path / "subject" / "01.png").rename(tmp_path / "subject" / "01.webp")  # whatever they end in
    with pytest.raises(BadInput) as refused:
        examples(**settings, class_data_dir=str(tmp_path / "class"))
    said = str(refused.value)
    assert "--data.conditioning-data-dir: " in said and "edges/01.png would be the conditioning image of " in said
    assert "subject/01.webp and " in said and "class/01.png; expected names that differ" in said and "\n" not in said
    made = examples(train_data_dir=settings["train_data_dir"], class_data_dir=str(tmp_path / "class"), conditioning="greyscale")
    batch = made.at(torch.arange(6))
    for x, y in zip(batch["pixel_values"], batch["conditioning"], strict=True):
        assert torch.equal(conditions.greyscale(x), y)


def test_other_sources_too_but_not_the_same_images_again(tmp_path):
    settings, other = beside(tmp_path, ("00.png", "01.png", "02.png")), str(tmp_path / "class")
    for more in ({"mixture": (sources.Part(train_data_dir=other),)}, {"validation_data_dir": other}):
        with pytest.raises(BadInput, match=r"edges/00.png would be the conditioning image of .*subject/00.png and .*class/00"):
            examples(**settings, **more)
    again = (sources.Part(train_data_dir=settings["train_data_dir"], repeats=2),)
    assert len(examples(**settings, mixture=again).at(torch.arange(6))["conditioning"]) == 6
    own = (sources.Part(train_data_dir=other, conditioning_data_dir=other),)
    assert len(examples(**settings, mixture=own).at(torch.arange(6))["conditioning"]) == 6


def test_a_class_image_is_no_partner_of_what_is_rejected(tmp_path):
    """The same of the folder that `dpo` has, which is a setting of its own."""
    settings = beside(tmp_path, ("00.png", "b.png", "c.png"))
    own = dpo.Settings(rejected_data_dir=settings.pop("conditioning_data_dir"))
    settings |= {"trigger": "a dog", "class_prompt": "a dog"}
    columns = COLUMNS | dpo.task.columns
    read = lambda **more: sources.open_source(Data(train_batch_size=2, **settings, **more), columns, own=own)  # noqa: E731
    assert read().size == 3
    with pytest.raises(BadInput, match=r"--dpo.rejected-data-dir: .*00.png would be the rejected image of .*expected names"):
        read(class_data_dir=str(tmp_path / "class"))
    (tmp_path / "class" / "00.png").unlink()
    assert read(class_data_dir=str(tmp_path / "class")).size == 5
