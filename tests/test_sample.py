"""`python loop.py sample`: the images of a run, drawn again from what it saved."""

import json
import shutil

import pytest
import tiny_models
from cases import sign
from test_lora import command, draw_photos
from test_settings import refused
from warm import cli, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps, with grids and checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    every = {"base__validation_steps": 3, "base__checkpointing_steps": 3, "base__num_samples": 4}
    result = cli(folder, *tiny(folder, **every))
    assert result.code == 0, result.err
    return folder / "out"


def test_the_same_bits(tmp_path, run):
    """From the output folder, from a checkpoint, and from one that was carried away from its run."""
    last, before = (run / "samples/6.png").read_bytes(), (run / "samples/3.png").read_bytes()
    assert last != before
    drawn = cli(tmp_path, "sample", run, "--num", "4")
    path = run / "samples" / "drawn" / "6-seed-0-num-4.png"
    assert drawn.code == 0 and f"4 images of step 6, seed 0: {path}" in drawn.out, drawn.err
    assert path.read_bytes() == last
    drawn = cli(tmp_path, "sample", run / "checkpoint-3", "--to", "there/three.png")
    assert drawn.code == 0 and (tmp_path / "there/three.png").read_bytes() == before, drawn.err
    shutil.copytree(run / "checkpoint-3", tmp_path / "alone")
    drawn = cli(tmp_path, "sample", "alone", "--to", "alone.png", "--seed", "1")
    assert drawn.code == 0 and (tmp_path / "alone.png").read_bytes() not in (before, last), drawn.err


def test_what_the_run_did_beside_drawing_is_not_asked_for(tmp_path, run):
    """A run that compiled, uploaded and had a tracker is drawn from without compiler, login and tracker."""
    shutil.copytree(run, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoint-6"
    settings = json.loads((saved / "manifest.json").read_text())["settings"]
    settings["base"] |= {"compile": True, "push_to_hub": True, "logger": ["wandb"]}
    sign(saved, settings=settings)
    drawn = cli(tmp_path, "sample", "run", "--to", "drawn.png", env={"CXX": "no-such-compiler", "HF_TOKEN": ""})
    assert drawn.code == 0 and (tmp_path / "drawn.png").read_bytes() == (run / "samples/6.png").read_bytes(), drawn.err


def test_a_damaged_checkpoint_is_passed_over(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / "state" / "ema.safetensors").write_bytes(b"")
    drawn = cli(tmp_path, "sample", "run", "--to", "drawn.png")
    assert drawn.code == 0 and "damaged" in drawn.err and "4 images of step 3" in drawn.out, drawn.err
    assert (tmp_path / "drawn.png").read_bytes() == (run / "samples/3.png").read_bytes()
    refused(cli(tmp_path, "sample", "run/checkpoint-6"), "run/checkpoint-6: not a valid checkpoint", "ema.safetensors")


@pytest.mark.parametrize("step", [3, "../../../3"])
def test_no_code_runs_on_the_word_of_a_received_folder(tmp_path, run, step):
    """Its manifest names a module that lies in it: it is imported where --task says so, and nothing is written elsewhere."""
    shutil.copytree(run / "checkpoint-3", tmp_path / "received")
    (tmp_path / "received" / "their_task.py").write_text("open('hacked', 'w')\nfrom oneloop.tasks.ddpm import task\n")
    sign(tmp_path / "received", module="their_task", step=step)
    drawn = cli(tmp_path, "sample", ".", cwd=tmp_path / "received")
    words = ["python loop.py sample . --task their_task"] if step == 3 else ["manifest.json: not a manifest: step"]
    refused(drawn, *words)
    assert not (tmp_path / "received" / "hacked").exists()
    if step == 3:
        drawn = cli(tmp_path, "sample", ".", "--task", "their_task", "--to", "x.png", cwd=tmp_path / "received")
        assert drawn.code == 0 and (tmp_path / "received" / "x.png").read_bytes() == (run / "samples/3.png").read_bytes(), (
            drawn.err
        )


@pytest.mark.parametrize("task", ["vae", "lora"])
def test_tasks_that_look_at_examples(tmp_path, task):
    if task == "vae":
        flags, grid = tiny(tmp_path, task="vae", base__num_samples=4), "6-reconstructions.png"
    else:
        photos = draw_photos(tmp_path / "photos")
        flags, grid = command(tmp_path, tiny_models.build(tmp_path), photos, base__num_samples=4), "4.png"
    result = cli(tmp_path, *flags)
    assert result.code == 0, result.err
    drawn = cli(tmp_path, "sample", "out", "--num", "4", "--to", "drawn.png")
    assert drawn.code == 0, drawn.err
    path = tmp_path / drawn.out.strip().rpartition(": ")[2]
    assert path.read_bytes() == (tmp_path / "out" / "samples" / grid).read_bytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], ["nowhere: there is no such folder; expected a run's output folder"]),
        (["."], [".: holds neither run.json nor a checkpoint; expected"]),
        ([".", "--num", "0"], ["--num is 0; expected at least 1"]),
        ([".", "--to", "images"], ["--to is 'images'; expected the name of a .png file"]),
        ([".", "--nmu", "3"], ["--nmu is not a setting", "did you mean --num?"]),
        ([], ["required"]),
    ],
)
def test_mistakes(tmp_path, argv, words):
    refused(cli(tmp_path, "sample", *argv), *words)


def test_it_is_listed(tmp_path):
    listed = cli(tmp_path)
    assert listed.code == 0 and "    sample     Draw images from a run's output folder" in listed.out
    assert "--seed" in cli(tmp_path, "sample", "--help").out
