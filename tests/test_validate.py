"""The validation loss is a function of the weights alone, and measuring it leaves no trace in the training."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import Scale, settings, toy
from test_settings import refused
from warm import cli, cli_many, digest, metrics, tiny

from oneloop import data, loop
from oneloop.configs import Data
from oneloop.inputs import shapes as embedded
from oneloop.inputs import sources
from oneloop.machine.accelerator import make_accelerator
from oneloop.machine.placement import at_rest
from oneloop.settings import command_line
from oneloop.tasks import Loss, Rng
from oneloop.training import validation

HELD = {"data__num_shapes": 60, "data__validation_split": "0.4"}


def validated(out):
    """The validation lines of a run's record."""
    return [line for line in metrics(out) if any(key.startswith("validation/") for key in line)]


def ran(folder, *flags):
    result = cli(folder, *flags)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A data set on disk with two splits of labelled images."""
    place, made = tmp_path_factory.mktemp("splits") / "set", {}
    for name, rows in (("train", range(24)), ("test", range(100, 110))):
        pictures = [embedded.draw_shape(row, 8) for row in rows]
        made[name] = datasets.Dataset.from_dict(
            {"image": [Image.fromarray(p[0]) for p in pictures], "label": [p[2] for p in pictures]},
            datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
        )
    datasets.DatasetDict(made).save_to_disk(place)
    return place


def test_layouts_agree(tmp_path):
    """Batches of 8 and of 3, and two processes: the same numbers."""
    still = HELD | {"ddpm__learning_rate": 0, "steps": 1, "base__mixed_precision": "no"}
    ran(tmp_path, *tiny(tmp_path, "eight", data__train_batch_size=8, **still))
    ran(tmp_path, *tiny(tmp_path, "three", data__train_batch_size=3, **still))
    for result in cli_many(tmp_path, 2, *tiny(tmp_path, "two", data__train_batch_size=3, **still)):
        assert result.code == 0, result.err
    (eight,), (three,), (two,) = (validated(tmp_path / out) for out in ("eight", "three", "two"))
    assert set(eight) == {"step", "validation/loss", "validation/loss_ema", *(f"validation/q{i}" for i in (1, 2, 3, 4))}
    for key in eight:
        assert three[key] == pytest.approx(eight[key], rel=1e-5) and two[key] == pytest.approx(eight[key], rel=1e-5), key
    assert len(set(eight.values())) > 4  # the quarters differ from each other


def test_the_number_moves_only_with_the_weights(tmp_path):
    still = tiny(tmp_path, "still", steps=3, base__validation_steps=1, ddpm__learning_rate=0, **HELD)
    ran(tmp_path, *still)
    lines = [{k: v for k, v in line.items() if k != "step"} for line in validated(tmp_path / "still")]
    assert len(lines) == 3 and lines[0] == lines[1] == lines[2]
    ran(tmp_path, *tiny(tmp_path, "seed", steps=1, base__seed=5, ddpm__learning_rate=0, **HELD))
    assert validated(tmp_path / "seed")[0]["validation/loss"] != lines[0]["validation/loss"]  # other weights
    ran(tmp_path, *tiny(tmp_path, "moves", steps=3, base__validation_steps=1, ddpm__learning_rate=1e-2, **HELD))
    moved = validated(tmp_path / "moves")
    assert len({line["validation/loss"] for line in moved}) == 3
    assert moved[-1]["validation/loss"] != moved[-1]["validation/loss_ema"]
    quarters = np.mean([moved[-1][f"validation/q{i}"] for i in (1, 2, 3, 4)])
    assert quarters == pytest.approx(moved[-1]["validation/loss_ema"], rel=0.2)  # unequal by an image


@pytest.mark.parametrize("task", ["ddpm", "vae"])
def test_training_is_untouched(tmp_path, splits, task):
    """Equal to the run without; and with two optimizers each loss is measured, gradients inside the loss included."""
    common = {"task": task, "data__dataset_name": splits, "base__mixed_precision": "no"}
    ran(tmp_path, *tiny(tmp_path, "without", **common))
    ran(tmp_path, *tiny(tmp_path, "with", **common, base__validation_steps=1, data__validation_split="test"))
    assert digest(tmp_path / "with") == digest(tmp_path / "without")
    lines = validated(tmp_path / "with")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and not validated(tmp_path / "without")
    if task == "vae":  # disc_start is 2
        assert "validation/loss/discriminator" not in lines[0] and "validation/q1/vae" not in lines[-1]
        wanted = {"validation/loss/vae", "validation/loss/discriminator", "validation/loss_ema/vae", "validation/psnr"}
        assert wanted | {"validation/adaptive_weight"} <= set(lines[-1])


def test_the_state_of_the_process_is_untouched(tmp_path):
    """Modes, gradients and generators are what they were; the loss may take gradients, and control comes back to it."""
    model, ends = Scale(1.0), []
    examples = data.Examples(sources.open_source(cfg := Data(num_shapes=9, resolution=8, train_batch_size=4)), cfg, 0)
    model.w.grad = torch.ones(3)

    def losses(batch, rng):
        y = model(rng.uniform("timestep")[:, None] + torch.rand(1) * 0)
        (grad,) = torch.autograd.grad(y.sum(), model.w, retain_graph=True)
        yield Loss("a", y.mean(), {"slope": grad.mean() / len(y)})
        ends.append(len(batch["index"]))
        yield Loss("b", y.mean() + 1)

    accelerator = make_accelerator(settings(tmp_path).base, tmp_path)
    before = torch.get_rng_state()
    found = validation.measure(examples, accelerator, losses, {"loss": at_rest({"a": model}, {}, {})})
    assert torch.equal(torch.get_rng_state(), before) and model.training and model.w.grad.tolist() == [1.0] * 3
    assert sum(ends) == 9 and found["validation/loss/b"] == pytest.approx(found["validation/loss/a"] + 1)
    assert found["validation/slope"] == pytest.approx(found["validation/loss/a"], rel=1e-5)  # of w t is t, and w is 1


def test_levels_are_stratified(tmp_path):
    """A loss that is its own noise level: its mean is that of the schedule, and each quarter's that of the quarter."""
    cfg = settings(tmp_path / "out", {"num_shapes": 200, "validation_split": "0.5"})

    def loss_fn(models, batch, rng, cfg):
        yield Loss("a", models["a"](rng.uniform("timestep")[:, None]).mean())

    loop.run(toy(loss_fn, lambda cfg: {"a": Scale(1.0)}, lr=0.0), cfg)
    (line,) = validated(tmp_path / "out")
    assert line["validation/loss"] == pytest.approx(0.5, abs=0.005)  # independent draws would miss by 0.03
    for i in range(4):
        assert line[f"validation/q{i + 1}"] == pytest.approx((i + 0.5) / 4, abs=0.01)


def test_every_kind_of_draw_is_stratified():
    ranks = torch.arange(64.0)
    rng = validation.Stratified(Rng.of(0, range(64)).keys, ranks=ranks, count=64)
    assert torch.equal((rng.uniform("timestep") * 64).floor(), ranks) and torch.equal(
        rng.integers("timestep", 64).float(), ranks
    )
    normal = rng.normal("timestep")
    assert torch.equal(normal.sort().values, normal) and abs(normal.mean()) < 0.02 and normal.isfinite().all()
    plain = Rng.of(0, range(64))
    assert torch.equal(rng.normal("noise", 3), plain.normal("noise", 3)) and torch.equal(rng.uniform("u"), plain.uniform("u"))
    last = validation.Stratified(rng.keys, ranks=torch.full((64,), 1e7 - 1), count=10**7)
    assert last.uniform("timestep").max() < 1


@pytest.mark.parametrize(("count", "size"), [(4, 1), (10, 3), (64, 8), (7, 100)])
def test_a_batch_has_one_quarter(count, size):
    parts = list(validation.batches([0] * count, size))
    assert [rank for _, ranks in parts for rank in ranks] == list(range(count)) and {q for q, _ in parts} == {1, 2, 3, 4}
    assert all(len(ranks) <= size for _, ranks in parts)


def test_a_fraction_is_chosen_by_row():
    def held(share, shapes=400, **more):
        source = sources.open_source(Data(num_shapes=shapes, resolution=8, validation_split=share, **more))
        assert source.size + source.held_out.size == shapes
        names = [{s.name(row) for row in range(s.size)} for s in (source, source.held_out)]
        assert not names[0] & names[1]
        row = int(source.held_out.name(2).split()[1])
        whole = embedded.draw_shape(row, 8)
        assert source.held_out.captions[2] == [whole[1]] and source.held_out.labels[2] == whole[2]
        assert np.array_equal(np.asarray(source.held_out.read(2)[0]), whole[0])
        return names[1]

    tenth = held("0.1")
    assert tenth == held("0.1", train_batch_size=3) and len(tenth) == 40
    assert tenth < held("0.1", shapes=500)  # of more rows: those stay


@pytest.mark.parametrize("share", ["0.01", "0.1", "0.2", "1/3", "0.5", "0.7", "0.95"])
def test_a_fraction_is_exact_and_stays(share):
    """round(share * rows), spread over the set; rows that are appended change the last one at most, and blocks no two alike."""
    share = "0.3333" if share == "1/3" else share
    before: list[int] = []
    for size in range(600):
        rows = sources.held_out_rows(size, share)
        assert len(rows) == round(float(share) * size) and rows == sorted(set(rows)) and set(rows) <= set(range(size))
        assert rows[: len(before) - 1] == before[:-1] and abs(len(rows) - len(before)) <= 1
        before = rows
    if share in ("0.1", "0.2"):
        assert len({row % int(1 / float(share)) for row in rows}) == int(1 / float(share))  # of no period


def test_mistakes(tmp_path, splits):
    def run(**more):
        return cli(tmp_path, *tiny(tmp_path, **more))

    for given in ("0", "1", "1.5", "-0.1"):
        refused(run(data__validation_split=given), f"--data.validation-split is '{given}'", "between 0 and 1")
    refused(run(data__validation_split="0.95"), "--data.train-batch-size is 4", "beside the", "--data.validation-split 0.95")
    refused(run(data__validation_split="0.01"), "--data.validation-split is '0.01'; expected at least 4 images")
    refused(run(data__validation_split="test"), "--data.validation-split is 'test'", "no splits")
    named = {"data__dataset_name": splits}
    refused(run(**named, data__validation_split="dev"), "--data.validation-split is 'dev'", "has: train, test")
    refused(run(**named, data__validation_split="train"), "--data.validation-split is 'train', which is trained on")
    assert not (tmp_path / "out").exists()


def test_an_older_settings_file(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"base": {"sample_steps": 7}, "ddpm": {}}))
    assert command_line.parse([str(tmp_path / "run.json")])[1].base.validation_steps == 7
