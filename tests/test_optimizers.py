"""The optimizers that every task offers: they train, resume in the same bits, show what they average, and are counted."""

import copy
import dataclasses
import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file
from warm import digest, flags, fork, metrics, tiny

from oneloop import configs, loop
from oneloop.configs import BadInput
from oneloop.settings import command_line
from oneloop.tasks import ddpm, lora, vae
from oneloop.training import ema, optimizers

RATES = {"prodigy": 1.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Stable Diffusion."""
    path = tiny_models.build(tmp_path_factory.mktemp("models"))
    made = lora.Settings(pretrained_model_name_or_path=str(path))
    lora.make_models(lora.Config(data=configs.Data(resolution=16), lora=made))  # so that forks find everything imported
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two captioned images."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 16), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    return folder


def installed(kind):
    """Skips where an optimizer's package is not there; CI installs them all with the extra `test`."""
    if (package := optimizers.PACKAGES.get(kind)) and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, of the extra optimizers")
    return kind


def settings(kind, **more):
    values = {"learning_rate": RATES.get(kind, 1e-2), "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 0.01}
    return SimpleNamespace(optimizer=kind, adam_epsilon=1e-8, **values | more)


def ends_equal(folder, commands):
    """Each command's run, whole and resumed from its step 2, ends in the same bits; all of it in one fork."""

    def runs():
        for name, command in commands.items():
            module, cfg = command_line.parse(command)
            loop.run(module.task, cfg)
            shutil.copytree(folder / name / "checkpoint-2", folder / f"{name}-2" / "checkpoint-2")
            again = dataclasses.replace(cfg.base, output_dir=str(folder / f"{name}-2"))
            loop.run(module.task, dataclasses.replace(cfg, base=again))

    result = fork(runs, folder).wait(240)
    assert result.code == 0, result.err
    for name in commands:
        assert digest(folder / name) == digest(folder / f"{name}-2"), name
    return result


@pytest.mark.parametrize("kind", optimizers.KINDS[1:])  # the first is every other test's
def test_trains_and_resumes_in_the_same_bits(tmp_path, kind, checkpoint, photographs):
    """A model of its own and adapters of two models at two rates; with a warm-up from a rate of zero where there is one."""
    own = {"learning_rate": RATES.get(installed(kind), 3e-3), "optimizer": kind}
    run = {"base.output_dir": "", "base.max_train_steps": 4, "base.checkpointing_steps": 2, "base.validation_steps": 0}
    run |= {"base.lr_scheduler": "constant_with_warmup", "base.lr_warmup_steps": 1, "base.logging_steps": 1}
    made = tiny(
        tmp_path, **{k: v for k, v in run.items() if k != "base.output_dir"}, **{f"ddpm.{k}": v for k, v in own.items()}
    )
    made[made.index("--base.output_dir") + 1] = str(tmp_path / "ddpm")
    adapters = run | {
        "base.output_dir": tmp_path / "lora",
        "base.num_samples": 1,
        "base.logger": "none",
        "data.train_data_dir": photographs,
        "data.resolution": 16,
        "data.train_batch_size": 1,
        "lora.pretrained_model_name_or_path": checkpoint,
        "lora.train_text_encoder": True,
        "lora.rank": 2,
        "lora.num_inference_steps": 1,
        **{f"lora.{k}": v for k, v in own.items()},
    }
    ends_equal(tmp_path, {"ddpm": made, "lora": flags("lora", adapters)})
    for name in ("ddpm", "lora"):
        first, last = (load_file(tmp_path / name / f"checkpoint-{n}" / "state" / "model.safetensors") for n in (2, 4))
        assert any(not torch.equal(last[key], x) for key, x in first.items())
        assert [line["step"] for line in metrics(tmp_path / name) if "loss" in line][-1] == 4


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_two_optimizers_in_one_step_resume_in_the_same_bits(tmp_path, kind):
    """The autoencoder's and the discriminator's, each of this kind; the second trains from step 2 on."""
    run = {"base.max_train_steps": 4, "base.checkpointing_steps": 2, "base.lr_scheduler": "constant", "base.logging_steps": 1}
    own = {"vae.optimizer": kind, "vae.learning_rate": 3e-3}
    ends_equal(tmp_path, {"vae": tiny(tmp_path, "vae", 4, "vae", **run | own)})
    first, last = (load_file(tmp_path / "vae" / f"checkpoint-{n}" / "state" / "model.safetensors") for n in (2, 4))
    moved = {"model" + key.partition(".")[0] for key, x in first.items() if not torch.equal(last[key], x)}
    names = {path.name for path in (tmp_path / "vae" / "checkpoint-4" / "state").iterdir()}
    assert moved and "optimizer_1.bin" in names, (moved, names)
    lines = [line for line in metrics(tmp_path / "vae") if "loss" in line or any(key.startswith("loss") for key in line)]
    assert lines, metrics(tmp_path / "vae")


def test_an_offloaded_average_has_the_same_bits(tmp_path):
    """In the machine's memory or on the device, and where a resumed run changes that; samples are of it."""
    more = {"base.lr_scheduler": "constant", "base.checkpointing_steps": 2, "ddpm.learning_rate": 1e-2}

    def runs():
        for name in ("device", "offloaded"):
            command = tiny(tmp_path, name, 4, **more, base__offload_ema=name == "offloaded")
            loop.run(ddpm.task, command_line.parse(command)[1])
        shutil.copytree(tmp_path / "device" / "checkpoint-2", tmp_path / "changed" / "checkpoint-2")
        loop.run(ddpm.task, command_line.parse(tiny(tmp_path, "changed", 4, **more, base__offload_ema=True))[1])

    result = fork(runs, tmp_path).wait(240)
    assert result.code == 0, result.err
    wanted = digest(tmp_path / "device")
    for name in ("offloaded", "changed"):
        assert digest(tmp_path / name) == wanted, name
        grids = [(tmp_path / run / "samples" / "4.png").read_bytes() for run in (name, "device")]
        assert grids[0] == grids[1], name


def test_an_offloaded_average_stays_where_it_is():
    """It is a copy in memory of its own, which stays the same memory as it moves."""
    weight = torch.nn.Parameter(torch.ones(3))
    kept = ema.begin({"a.w": weight}, offload=True)
    assert kept["a.w"].device.type == "cpu" and kept["a.w"].data_ptr() != weight.data_ptr()
    average = ema.Ema(kept, [weight], lambda step, total: 0.5, offloaded=True)
    held = kept["a.w"].data_ptr()
    with torch.no_grad():
        weight.mul_(3)
    assert average.update(1, 2) == 0.5
    assert kept["a.w"].tolist() == [2.0] * 3 and kept["a.w"].data_ptr() == held


def stepped(kind, shapes, steps=3, **more):
    """Parameters, the first of them zero, and their optimizer after some steps on fixed gradients."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * bool(i)) for i, shape in enumerate(shapes)]
    optimizer = optimizers.make(params, settings(installed(kind), **more))
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return params, optimizer


SHAPES = [(4, 80), (80, 64), (64,), (2, 3, 3, 3)]


@pytest.mark.parametrize("kind", optimizers.KINDS)
def test_bytes_are_those_that_are_there(kind):
    """Before the first step and after it; a map that all 8-bit tensors share is 2 KiB more."""
    params, optimizer = stepped(kind, SHAPES)
    count = sum(optimizers.state_bytes(kind, tuple(p.shape), zero=i == 0) for i, p in enumerate(params))
    tensors = {
        id(x): x
        for state in optimizer.state.values()
        for k, x in state.items()
        if torch.is_tensor(x) and k not in ("step", "RMS")
    }
    there = sum(x.nbytes for x in tensors.values())
    assert there - count == (2048 if kind == "adamw8bit" else 0)
    fresh = optimizers.make(params, settings(kind))
    assert optimizers.remembered(optimizer) == pytest.approx(there, abs=40)  # counts of steps
    assert optimizers.remembered(fresh) == sum(optimizers.state_bytes(kind, tuple(p.shape)) for p in params)


def test_schedule_free_shows_what_it_averages_and_moves_no_weight():
    """To the bit what its own eval() makes of the weights, which would not come back to the bit."""
    params, optimizer = stepped("schedulefree", SHAPES)
    before = [p.detach().clone() for p in params]
    values = {str(i): torch.empty_like(p) for i, p in enumerate(params)}
    averaged = lambda: optimizers.averaged({"a": optimizer}, params)  # noqa: E731
    decay = ema.Ema(values, params, lambda step, total: 0.9, averaged=averaged).update(4, 9)
    assert decay == 0 and all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    optimizer.eval()
    assert all(torch.equal(p, x) for p, x in zip(params, values.values(), strict=True))
    assert not any(torch.equal(p, x) for p, x in zip(params, before, strict=True))


def test_a_skipped_first_step_has_no_average_yet():
    params, optimizer = stepped("schedulefree", SHAPES, steps=0)
    averaged = optimizers.averaged({"a": optimizer}, params)
    assert all(torch.equal(p, x) for p, x in zip(params, averaged, strict=True)) and not any(optimizer.state.values())
    assert optimizers.averaged({"a": torch.optim.SGD(params)}, params) is None


def test_muon_takes_matrices_and_adamw_the_rest():
    """As one optimizer they step as both do alone, also from a state that was loaded."""
    params, optimizer = stepped("muon", SHAPES, learning_rate=0.02)
    assert [[p.ndim for p in group["params"]] for group in optimizer.param_groups] == [[2, 2], [1, 4]]
    muon, _ = optimizer.parts
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    values = {key: value for key, value in muon.defaults.items() if key != "lr"}
    apart = torch.optim.Muon(alone[:2], lr=0.02, **values), torch.optim.AdamW(alone[2:], lr=0.02, fused=True)
    for i, one in enumerate(apart):
        state = copy.deepcopy(optimizer.state_dict())
        keys = state["param_groups"][i]["params"]
        group = state["param_groups"][i] | {"params": list(range(len(keys)))}
        one.load_state_dict({"state": {n: state["state"][key] for n, key in enumerate(keys)}, "param_groups": [group]})
    optimizer.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, alone, strict=True):
        p.grad = q.grad = torch.ones_like(p) + p.detach()
    for one in (optimizer, *apart):
        one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))


def test_one_kind_of_parameters_needs_one_optimizer():
    assert type(stepped("muon", [(3, 4)])[1]) is torch.optim.Muon
    assert type(stepped("muon", [(3,)])[1]) is torch.optim.AdamW
    assert type(stepped("adamw", SHAPES)[1]) is torch.optim.AdamW


def test_prodigy_estimates_a_step_for_each_group(capsys):
    """Its own rule allows one learning rate; groups with two have an estimate each."""
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(params, (1.0, 0.5), strict=True)]
    optimizer = optimizers.make(groups, settings(installed("prodigy")))
    for _ in range(20):
        for p, scale in zip(params, (1.0, 100.0), strict=True):
            p.grad = scale * p.detach()
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5] and capsys.readouterr().out == ""
    d = [group["d"] for group in optimizer.param_groups]
    assert d[0] > 1e-6 and d[1] > 1e-6 and d[0] != d[1]


@pytest.mark.parametrize("module, name", [(ddpm, "ddpm"), (vae, "vae"), (lora, "lora")])
@pytest.mark.parametrize(
    "flags, says",
    [
        (["--T.optimizer", "prodigy"], "--T.learning-rate is {rate}; expected about 1 with --T.optimizer prodigy"),
        (["--T.optimizer", "schedulefree"], "--base.lr-scheduler is '{falls}'; expected constant or constant_with_warmup"),
        (
            ["--T.optimizer", "schedulefree", "--base.lr-scheduler", "constant", "--base.no-use-ema"],
            "--base.use-ema is False; expected true",
        ),
        (["--T.optimizer", "lion"], "--T.optimizer"),
    ],
)
def test_what_does_not_fit_is_a_line(monkeypatch, module, name, flags, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    with pytest.raises((BadInput, SystemExit)) as error:
        command_line.build(module.Config, [flag.replace("T.", f"{name}.") for flag in flags])
    if error.type is BadInput:
        rate, falls = module.Settings.learning_rate, "linear" if name == "ddpm" else "cosine"
        assert says.replace("T.", f"{name}.").format(rate=rate, falls=falls) in str(error.value)


@pytest.mark.parametrize("kind, package", optimizers.PACKAGES.items())
def test_a_missing_package_is_a_line_at_the_start(monkeypatch, kind, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(BadInput, match=rf"--vae.optimizer {kind} needs the package {package}: install oneloop\[optimizers\]"):
        optimizers.check(settings(kind, learning_rate=1), "vae", configs.Base())


def test_the_earlier_name_of_8_bit_adamw(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    assert optimizers.kind(lora.Settings(use_8bit_adam=True)) == "adamw8bit"
    with pytest.raises(BadInput, match=r"adamw8bit beside --lora\.use-8bit-adam"):
        optimizers.check(lora.Settings(use_8bit_adam=True, optimizer="muon"), "lora", configs.Base())
