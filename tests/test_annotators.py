"""Conditions by pretrained models: depth and poses, by tiny models in transformers' own format."""

import json
import shutil
import types

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from test_conditions import MADE, examples, pictures
from test_plane import draw
from test_streaming import parquet
from warm import cli

from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.inputs import annotators, poses, sources, store
from oneloop.machine.memory import is_out_of_memory

NAMES = "nose l_eye r_eye l_ear r_ear l_shoulder r_shoulder l_elbow r_elbow l_wrist r_wrist l_hip r_hip l_knee r_knee l_ankle"
POINTS = {name: i for i, name in enumerate(f"{NAMES} r_ankle".split())}
"""COCO's."""


@pytest.fixture(autouse=True)
def forgotten():
    yield
    annotators.forget()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of `depth`, of `metric` depth and of `pose`, with random weights."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        DPTImageProcessor,
        VitPoseConfig,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    root = tmp_path_factory.mktemp("annotators")
    torch.manual_seed(0)
    backbone = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28}
    backbone |= {"patch_size": 14, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True}
    for name in ("relative", "metric"):
        config = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            head_hidden_size=8,
            depth_estimation_type=name,
            **({"max_depth": 20} if name == "metric" else {}),
        )
        net = DepthAnythingForDepthEstimation(config)
        with torch.no_grad():
            for key, p in net.named_parameters():  # larger than they begin, that it sees the image
                torch.nn.init.normal_(p, std=0.5) if p.ndim > 1 else None
                torch.nn.init.constant_(p, 3.0) if key == "head.conv3.bias" else None
        net.save_pretrained(root / name)
        size = {"height": 28, "width": 28}
        DPTImageProcessor(size=size, ensure_multiple_of=14, keep_aspect_ratio=True).save_pretrained(root / name)
    body = {"model_type": "vitpose_backbone", "image_size": [64, 48], "patch_size": [16, 16], "hidden_size": 16}
    body |= {"num_hidden_layers": 1, "num_attention_heads": 2, "out_indices": [1], "mlp_ratio": 2}
    net = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=body, num_labels=17))
    with torch.no_grad():
        for p in net.head.parameters():
            torch.nn.init.normal_(p, std=0.5)
    net.save_pretrained(root / "pose")
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(root / "pose")
    return root


def made(kind, folder, image):
    """[h, w, 3] uint8 -> the same."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return annotators.named(kind, str(folder))(x).permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Depth.


def test_depth_is_what_the_pipeline_of_transformers_gives(models):
    from transformers import pipeline

    own = pipeline("depth-estimation", model=str(models / "relative"), device="cpu")
    for image in pictures():
        found, wanted = made("depth", models / "relative", image), np.asarray(own(Image.fromarray(image))["depth"]).astype(int)
        assert found.shape == image.shape and (found == found[..., :1]).all() and (found.min(), found.max()) == (0, 255)
        assert np.abs(found[..., 0] - wanted).max() <= 1 and wanted.std() > 10


def test_distances_become_their_inverse(models):
    """What is near is white, whichever way a model has it."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    image = Image.fromarray(pictures()[0])
    net = AutoModelForDepthEstimation.from_pretrained(models / "metric")
    processor = AutoImageProcessor.from_pretrained(models / "metric")
    with torch.no_grad():
        outputs = net(**processor(images=image, return_tensors="pt"))
    (far,) = processor.post_process_depth_estimation(outputs, target_sizes=[(image.height, image.width)])
    found, far = made("depth", models / "metric", image)[..., 0].ravel(), far["predicted_depth"].numpy().ravel()
    assert far.std() > 0.01 and found[far.argmin()] == 255 and found[far.argmax()] == 0
    order = np.argsort(far)
    assert (np.diff(found[order].astype(int)) <= 0).all()


def test_models_of_metres_whose_configs_do_not_say_so():
    """GLPN's config has no word of what it gives: its distances become their inverse by its type."""
    from transformers import BatchFeature

    far = torch.linspace(1, 5, 48).view(1, 6, 8)

    class Net:
        device = "cpu"

        def __init__(self, kind):
            self.config = types.SimpleNamespace(model_type=kind)

        def __call__(self, pixel_values):
            return types.SimpleNamespace(predicted_depth=far)

    def prepare(images, return_tensors):
        return BatchFeature({"pixel_values": torch.zeros(1, 3, 6, 8)})

    image = Image.new("RGB", (8, 6))
    near, same = (annotators.depth(Net(kind), prepare, image)[0].ravel() for kind in ("glpn", "dpt"))
    assert near[0] == 255 and near[-1] == 0 and same[0] == 0 and same[-1] == 255


def test_a_model_is_known_by_what_is_read_of_it(tmp_path, models):
    """A note beside its files makes no other one of it, another number in its weights does."""
    place = shutil.copytree(models / "relative", tmp_path / "moved")
    before = annotators.named("depth", str(models / "relative")).identity
    (place / "README.md").write_text("a note")
    assert annotators.named("depth", str(place)).identity == before
    weights = next(place.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert annotators.named("depth", str(place)).identity != before


# ---------------------------------------------------------------------------------------------------------------------
# Poses.


def test_poses_are_those_of_the_processor_of_transformers(models, monkeypatch):
    """Which needs scipy to put an image into the model's size and to read points off heatmaps."""
    pytest.importorskip("scipy")
    from transformers import AutoImageProcessor, AutoModelForPoseEstimation

    seen = []
    monkeypatch.setattr(poses, "skeleton", lambda *args: seen.append(args) or torch.zeros(3, args[2], args[3]).byte())
    net, processor = (each.from_pretrained(models / "pose") for each in (AutoModelForPoseEstimation, AutoImageProcessor))
    for image in pictures():
        made("pose", models / "pose", image)
        boxes = [[[0.0, 0.0, image.shape[1], image.shape[0]]]]
        with torch.no_grad():
            outputs = net(**processor(images=Image.fromarray(image), boxes=boxes, return_tensors="pt"))
        [[person]] = processor.post_process_pose_estimation(outputs, boxes=boxes)
        points, scores, *size = seen.pop()
        assert tuple(size) == image.shape[:2] and np.abs(scores - person["scores"].numpy()).max() < 1e-3
        drawn = scores > poses.SURE
        off = np.abs(points - person["keypoints"].numpy()).max(1)[drawn]
        assert drawn.sum() > 8 and off.max() < 0.1 and np.ptp(points[drawn], axis=0).min() > 10, off


def test_a_peak_between_pixels_is_found():
    down, across = np.indices((16, 12))
    wanted = np.array([[4.3, 7.4], [6.0, 9.0], [2.75, 11.6]])
    heatmaps = np.stack([np.exp(-((across - x) ** 2 + (down - y) ** 2) / 8) for x, y in wanted]).astype(np.float32)
    points, scores = poses.peaks(heatmaps)
    assert np.abs(points - wanted).max() < 0.03 and (scores > 0.95).all()


def person(**low):
    """Points of someone who stands, x before y, and their scores."""
    where = {"nose": (60, 20), "l_eye": (66, 14), "r_eye": (54, 14), "l_ear": (74, 18), "r_ear": (46, 18)}
    where |= {"l_shoulder": (80, 40), "r_shoulder": (40, 40), "l_elbow": (95, 60), "r_elbow": (25, 60), "l_wrist": (105, 85)}
    where |= {"r_wrist": (15, 85), "l_hip": (72, 90), "r_hip": (48, 90), "l_knee": (75, 120), "r_knee": (45, 120)}
    where |= {"l_ankle": (76, 150), "r_ankle": (44, 150)}
    points = np.array([where[name] for name in POINTS], float)
    return points, np.array([low.get(name, 0.9) for name in POINTS])


def test_a_skeleton_has_the_colours_of_openpose():
    points, scores = person()
    drawn = poses.skeleton(points, scores, 160, 128).permute(1, 2, 0).numpy()
    colour = lambda x, y: tuple(drawn[round(y), round(x)].tolist())  # noqa: E731
    discs = {"nose": (255, 0, 0), "r_shoulder": (255, 170, 0), "r_elbow": (255, 255, 0), "r_wrist": (170, 255, 0)}
    discs |= {"l_shoulder": (85, 255, 0), "l_elbow": (0, 255, 0), "l_wrist": (0, 255, 85), "r_hip": (0, 255, 170)}
    discs |= {"r_knee": (0, 255, 255), "r_ankle": (0, 170, 255), "l_hip": (0, 85, 255), "l_knee": (0, 0, 255)}
    discs |= {"l_ankle": (85, 0, 255), "r_eye": (170, 0, 255), "l_eye": (255, 0, 255), "r_ear": (255, 0, 170)}
    discs |= {"l_ear": (255, 0, 85)}
    assert len(discs) == 17
    for name, wanted in discs.items():
        assert colour(*points[POINTS[name]]) == wanted, name
    neck = points[[POINTS["l_shoulder"], POINTS["r_shoulder"]]].mean(0)
    assert colour(*neck) == (255, 85, 0)
    thigh = points[[POINTS["l_hip"], POINTS["l_knee"]]].mean(0)
    assert colour(*thigh) == (0, 102, 153)  # 0.6 of (0, 170, 255)
    assert colour(5, 5) == (0, 0, 0) and 0.005 < (drawn.max(-1) > 0).mean() < 0.2


def test_what_is_not_seen_is_not_drawn():
    """A point of a low score, its limbs; without a shoulder there is no neck."""
    points, scores = person(l_knee=0.1, r_shoulder=0.2)
    drawn = poses.skeleton(points, scores, 160, 128).permute(1, 2, 0).numpy()
    at = lambda *names: drawn[tuple(points[[POINTS[name] for name in names]].mean(0).round().astype(int)[::-1])]  # noqa: E731
    assert not at("l_knee").any() and not at("l_hip", "l_knee").any() and not at("l_shoulder", "r_shoulder").any()
    assert at("l_hip").any() and at("l_ankle").any() and at("r_hip", "r_knee").any()
    assert not poses.skeleton(points, 0 * scores, 160, 128).any()


# ---------------------------------------------------------------------------------------------------------------------
# In the data plane.


@pytest.mark.parametrize(("kind", "name"), [("depth", "relative"), ("pose", "pose")])
def test_a_condition_is_that_of_the_image_as_it_is_trained_on(tmp_path, models, kind, name):
    """Made once, kept with the image and found again by the content of the model's files, wherever they are."""
    folder = str(draw(tmp_path / "images", [(40, 60), (50, 34), (64, 64)]))
    model = shutil.copytree(models / name, tmp_path / "model")
    settings = {"train_data_dir": folder, "center_crop": True, "random_flip": True, "conditioning": kind}
    found = examples(conditioning_model=str(model), **settings)
    assert annotators._loaded.cache_info().currsize == 0  # the model is gone
    batch = found[range(4)]
    for x, y, flip in zip(batch["pixel_values"], batch["conditioning"], batch["mirrored"], strict=True):
        x, y = (z.flip(-1) if flip else z for z in (x, y))
        assert torch.equal(annotators.named(kind, str(model))(x.contiguous()), y)
    path = store.path_of(tmp_path / "cache", found.source, found.cfg)
    store.write(found.images, path, found.cfg, pytest.fail)
    moved = model.rename(tmp_path / "moved")
    (moved / "config.json").touch()
    annotators.forget()
    again_cfg = Data(resolution=32, train_batch_size=2, conditioning_model=str(moved), **settings)
    again = data.opened(sources.open_source(again_cfg, MADE), again_cfg, 0, tmp_path / "cache")
    assert again.cached and again.fingerprint == found.fingerprint and annotators._loaded.cache_info().currsize == 0
    assert torch.equal(again[range(4)]["conditioning"], batch["conditioning"])
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    other = sources.open_source(again_cfg, MADE)
    assert store.path_of(tmp_path / "cache", other, again_cfg) != path and f"{kind} of {moved}" in other.summary


def test_what_does_not_fit_is_a_line(tmp_path, models):
    folder = str(draw(tmp_path / "images", [(32, 32)] * 3))
    broken, empty = shutil.copytree(models / "relative", tmp_path / "broken"), tmp_path / "empty"
    (broken / "model.safetensors").write_bytes(b"no weights")
    bare = shutil.copytree(models / "relative", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    few = shutil.copytree(models / "pose", tmp_path / "few")
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    stream = {"stream": str(parquet(tmp_path / "set")), "train_data_dir": None}
    for settings, says in (
        (
            {"conditioning": "depth"},
            "--data.conditioning-model is None; expected a model's folder, or its name",
        ),
        ({"conditioning": "edges", "model": few}, "--data.conditioning-model is "),
        ({"model": few}, "expected None: depth and pose alone"),
        ({"conditioning": "depth", "model": tmp_path / "nowhere"}, "nowhere: not a model for --data.conditioning depth"),
        ({"conditioning": "depth", "model": empty}, "empty: not a model for --data.conditioning depth"),
        (
            {"conditioning": "depth", "model": models / "pose"},
            "is a VitPoseForPoseEstimation; --data.cond",
        ),
        (
            {"conditioning": "pose", "model": models / "relative"},
            "is a DepthAnythingForDepthEstimation; --data.cond",
        ),
        ({"conditioning": "pose", "model": other}, "is a BertModel; --data.conditioning pose expects a model whose class ends"),
        ({"conditioning": "depth", "model": broken}, "broken cannot be loaded: "),
        ({"conditioning": "depth", "model": bare}, "bare: not a model with an image processor"),
        ({"conditioning": "depth", "model": models / "relative", "memory_budget": 0.0}, "is 0.0; expected at least 1.72e-05"),
        ({"conditioning": "depth", "model": models / "relative", **stream}, "--data.conditioning is 'depth'; expected one of"),
    ):
        settings = {"train_data_dir": folder} | settings
        if model := settings.pop("model", None):
            settings["conditioning_model"] = str(model)
        with pytest.raises(BadInput) as refused:
            examples(**settings)
        assert says in str(refused.value) and "\n" not in str(refused.value), refused.value


def test_what_could_not_be_kept_is_a_line(tmp_path, models, monkeypatch):
    """Before an image is read where the number of images tells, else once they are; and what was made is not let go."""
    folder = draw(tmp_path / "images", [(32, 90)] * 3)
    settings = {"train_data_dir": str(folder), "conditioning_model": str(models / "relative")}
    with pytest.raises(BadInput, match=r"--data.memory-budget is 3e-05; expected at least 4.83e-05: depth is made once"):
        examples(**settings, conditioning="depth", memory_budget=3e-5)
    monkeypatch.setattr(annotators.Annotator, "__call__", lambda *_: pytest.fail("made"))
    with pytest.raises(BadInput, match=r"--data.memory-budget is 1e-05; expected at least 1.72e-05: depth is made once"):
        examples(**settings, conditioning="depth", memory_budget=1e-5)
    cfg = Data(resolution=32, train_batch_size=2, conditioning="depth", memory_budget=0.0, **settings)  # as --base.check has it
    checked = store.decode(sources.open_source(cfg, MADE), cfg, skim=True)
    assert len(checked) == 3 and not checked.broken
    monkeypatch.undo()
    for kind, gone in (("depth", False), ("edges", True)):
        found = examples(**settings | ({} if kind == "depth" else {"conditioning_model": None}), conditioning=kind)
        found.hide({"pixel_values", "conditioning"})
        assert (found.images.pixels is None) == gone


def test_out_of_memory_is_no_broken_image(tmp_path, models, monkeypatch):
    """Neither dropped with --data.skip-broken nor named as broken: the run ends with what takes the memory."""
    folder = str(draw(tmp_path / "images", [(32, 32)] * 3))

    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999 bytes")

    monkeypatch.setitem(annotators.MAKE, "depth", full)
    for skip in (False, True):
        with pytest.raises(torch.OutOfMemoryError, match=r"depth of .*tried to allocate") as raised:
            examples(train_data_dir=folder, conditioning="depth", conditioning_model=str(models / "relative"), skip_broken=skip)
        assert is_out_of_memory(raised.value)
    task = ("controlnet", "--controlnet.pretrained-model-name-or-path", tiny_models.build(tmp_path, "sd"))
    given = ("--data.train-data-dir", folder, "--data.conditioning", "depth", "--data.conditioning-model", models / "relative")
    given += ("--data.trigger", "a dog", "--data.resolution", "32", "--data.train-batch-size", "2")
    for look in ("--base.check", "--base.dry-run", "--base.num-samples=1"):
        said = cli(
            tmp_path, *task, *given, "--data.trigger", "a dog", "--data.resolution", "32", "--data.train-batch-size", "2", look
        )
        assert said.code == 5 and "out of memory" in said.err and "Traceback" not in said.err, said.err


def test_a_model_of_too_few_points_is_a_line(tmp_path, models):
    from transformers import VitPoseForPoseEstimation

    net = VitPoseForPoseEstimation.from_pretrained(models / "pose")
    net.config.num_labels = 5
    VitPoseForPoseEstimation(net.config).save_pretrained(tmp_path / "few")
    shutil.copy(models / "pose" / "preprocessor_config.json", tmp_path / "few")
    folder = str(draw(tmp_path / "images", [(32, 32)] * 3))
    with pytest.raises(BadInput, match="its model finds 5 points; expected COCO's 17"):
        examples(train_data_dir=folder, conditioning="pose", conditioning_model=str(tmp_path / "few"))
