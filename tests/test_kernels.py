"""Which kernels compute, and the trace of steps: what is asked for is what runs, and what cannot be had is a line."""

import gzip
import json

import pytest
import torch
from diffusers.models import attention_dispatch
from test_loop import Scale, settings, toy
from test_lora import draw_photos
from test_lora_families import command
from warm import cli, digest, fork, metrics, tiny

from oneloop import loop
from oneloop.configs import BadInput
from oneloop.machine.kernels import kernels
from oneloop.settings import command_line
from oneloop.tasks import Loss
from oneloop.training.profiling import profiled


def test_deterministic_kernels_last_as_long_as_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def loss_fn(models, batch, rng, cfg):
        seen.append(torch.are_deterministic_algorithms_enabled())
        yield Loss("a", models["a"](torch.ones(3)).sum())

    for on in (True, False):
        loop.run(toy(loss_fn), settings(tmp_path / str(on), deterministic=on))
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True, False]


def test_an_operation_without_a_deterministic_kernel_is_a_line(tmp_path):
    def loss_fn(models, batch, rng, cfg):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        yield Loss("a", models["a"](torch.ones(3)).sum())

    with pytest.raises(BadInput, match=r"--base.deterministic: put_ has no such kernel on this device"):
        loop.run(toy(loss_fn), settings(tmp_path / "on", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    loop.run(toy(loss_fn), settings(tmp_path / "off"))
    with pytest.raises(RuntimeError, match="something else"), kernels(settings(tmp_path / "out", deterministic=True).base):
        raise RuntimeError("something else")


def test_a_trace_of_steps_changes_nothing(tmp_path):
    """Two of six steps, of two batches each, are in it; a resumed run, and one that is too short, go on as well."""
    more = {"base.gradient_accumulation_steps": 2, "base.checkpointing_steps": 4}
    for name, traced in (("plain", 0), ("traced", 2)):
        done = cli(tmp_path, *tiny(tmp_path, name, **more, **{"base.profile_steps": traced, "base.deterministic": traced > 0}))
        assert done.code == 0, done.err
    assert digest(tmp_path / "plain") == digest(tmp_path / "traced")
    folder = tmp_path / "traced" / "profile"
    assert f"2 steps are traced in {folder}" in done.err and not (tmp_path / "plain" / "profile").exists()
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    convolutions = [event for event in events if event["name"] == "aten::convolution"]
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"} and convolutions
    assert "aten::convolution" in (folder / "operations.txt").read_text()
    for steps, says in ((2, "warning: no step is traced: --base.profile-steps begins after 2"), (5, "3 steps are traced in")):
        short = cli(
            tmp_path, *tiny(tmp_path, f"short-{steps}", steps, **{"base.profile_steps": 9, "base.lr_scheduler": "constant"})
        )
        assert short.code == 0 and says in short.err, short.err


@pytest.mark.parametrize("steps", [0, 1])
def test_batches_end_with_their_trace(tmp_path, steps):
    """Whoever else holds them: their loader's workers would outlive the run."""
    ended = []

    def stream():
        try:
            while True:
                yield {}
        finally:
            ended.append(True)

    batches = stream()
    traced = profiled(batches, settings(tmp_path, profile_steps=steps).base, tmp_path / "profile", print)
    next(traced)
    traced.close()
    assert ended == [True] and batches.gi_frame is None


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "profile").write_text("a file")
    done = cli(tmp_path, *tiny(tmp_path, "out", 4, **{"base.profile_steps": 1}))
    assert done.code == 0 and "warning: the trace of 1 steps is lost" in done.err, done.err
    assert (tmp_path / "out" / "profile").read_text() == "a file"


def test_attention_is_computed_by_what_is_asked_for(tmp_path, built, monkeypatch):
    """The other kernel of PyTorch's own that a CPU has; afterwards the process is as it was."""
    photos = draw_photos(tmp_path / "photos")

    def runs():
        usual, counted = attention_dispatch._native_math_attention, []
        registry = attention_dispatch._AttentionBackendRegistry
        name = attention_dispatch.AttentionBackendName._NATIVE_MATH
        registry._backends[name] = lambda *given, **more: (counted.append(1), usual(*given, **more))[1]
        for out, kind in (("math", "_native_math"), ("auto", "auto")):
            module, cfg = command_line.parse(command(tmp_path, built("FluxPipeline"), photos, out, base__attention=kind))
            loop.run(module.task, cfg)
            print(out, len(counted))
            counted.clear()

    result = fork(runs, tmp_path).wait(240)
    assert result.code == 0, result.err
    counts = dict(line.split() for line in result.out.splitlines() if line.split()[0] in ("math", "auto"))
    assert int(counts["math"]) > 0 and int(counts["auto"]) == 0
    losses = [[line["loss"] for line in metrics(tmp_path / out) if "loss" in line] for out in ("math", "auto")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_attention_that_cannot_be_had_is_a_line(tmp_path, built):
    photos = draw_photos(tmp_path / "photos")
    for kind, says in {"flash": "flash-attn", "flex": "does not suit this model or device"}.items():
        done = cli(tmp_path, *command(tmp_path, built("FluxPipeline"), photos, kind, base__attention=kind))
        assert done.code == 2 and f"--base.attention {kind}" in done.err and says in done.err, done.err
        assert "Traceback" not in done.err
    done = cli(tmp_path, *tiny(tmp_path, **{"base.attention": "native"}))
    assert done.code == 2 and "--base.attention is 'native'; expected auto: none of the models (UNet2DModel)" in done.err


def test_a_toy_keeps_its_own_errors(tmp_path):
    def loss_fn(models, batch, rng, cfg):
        raise ValueError("mine")
        yield

    with pytest.raises(ValueError, match="mine"):
        loop.run(toy(loss_fn, lambda cfg: {"a": Scale()}), settings(tmp_path / "out"))
