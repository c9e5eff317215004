"""What makes a step quick changes no result, and nothing in a step waits for the device."""

import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from warm import ROOT, cli, fork, metrics, start, tiny

from oneloop import data, loop
from oneloop.configs import Data
from oneloop.inputs import sources
from oneloop.machine import accelerator as accelerator_module
from oneloop.machine import compilation, internals
from oneloop.machine.placement import at_rest, same_buffers
from oneloop.settings import command_line
from oneloop.tasks import Rng, hash64
from oneloop.training.guard import Guard, NonFinite


def in_fork(folder, function):
    result = fork(function, folder).wait()
    assert result.code == 0, result.err


def plain_loop(task, cfg, fused):
    """The weights and averages after as many steps written out: nothing kept, no accelerate, no operation over many tensors."""
    examples = data.Examples(sources.open_source(cfg.data), cfg.data, cfg.base.seed)
    torch.manual_seed(hash64(cfg.base.seed, "models"))
    unet = task.make_models(cfg)["unet"].train()
    given = {"lr": cfg.ddpm.learning_rate, "betas": (cfg.ddpm.adam_beta1, cfg.ddpm.adam_beta2), "eps": cfg.ddpm.adam_epsilon}
    optimizer = torch.optim.AdamW(
        unet.parameters(), weight_decay=cfg.ddpm.adam_weight_decay, fused=fused, foreach=False, **given
    )
    averages = [p.detach().clone() for p in unet.parameters()]
    size, total = cfg.data.train_batch_size, cfg.base.max_train_steps
    warmup = total // 20
    for step in range(total):
        numbers = range(step * size, (step + 1) * size)
        x = examples[numbers]["pixel_values"].float() / 127.5 - 1
        rng = Rng.of(cfg.base.seed, numbers)
        torch.manual_seed(hash64(cfg.base.seed, "layers", numbers[0]))
        for loss in task.loss_fn({"unet": unet}, {"pixel_values": x}, rng, cfg):
            loss.value.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        optimizer.param_groups[0]["lr"] = cfg.ddpm.learning_rate * (step / warmup if step < warmup else cosine)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9999, 1 - (step + 1) ** -0.75)
        for average, p in zip(averages, unet.parameters(), strict=True):
            average.lerp_(p.detach(), 1 - decay)
    return [p.detach() for p in unet.parameters()], averages


@pytest.mark.parametrize("fused, rate, bound", [(True, 2e-3, 0.0), (False, 5e-5, 1e-5)])
def test_fifty_steps_of_a_plain_loop(tmp_path, fused, rate, bound):
    """The same bits where the operations are the same. With AdamW in other operations it is near: as its steps are as large for
    a small gradient as for a large one, 50 of them make of a rounding about a tenth of the learning rate, whatever that is."""
    usual = {"base__lr_scheduler": "cosine", "base__ema_power": 0.75}
    module, cfg = command_line.parse(tiny(tmp_path, steps=50, data__random_flip=True, ddpm__learning_rate=rate, **usual))

    def check():
        state = loop.run(module.task, cfg)
        found = [p.detach() for p in state.models["unet"].parameters()], list(state.ema.values())
        for own, plain in zip(found, plain_loop(module.task, cfg, fused), strict=True):
            apart = max((a - b).abs().max().item() for a, b in zip(own, plain, strict=True))
            assert apart <= bound, apart

    in_fork(tmp_path, check)


@pytest.mark.parametrize("computes, chosen", [(True, "bf16"), (False, "no")])
def test_auto_is_bf16_where_the_hardware_computes_it(tmp_path, computes, chosen):
    """And what it became is said."""

    def patch():
        accelerator_module.computes_bf16 = lambda: computes

    result = start(tmp_path, *tiny(tmp_path, steps=1), patch=patch).wait()
    assert result.code == 0 and f"mixed precision {chosen}\n" in result.err, result.err


def test_late_verdicts_name_their_step(tmp_path):
    """A loss that is not finite is reported with its own step, though it is read at a later one."""
    module, cfg = command_line.parse(tiny(tmp_path, steps=6))

    def check():
        guard = Guard.__init__

        def late(self, *arguments):
            guard(self, *arguments)
            self.now = False

        def loss_fn(models, batch, rng, cfg):
            for loss in module.task.loss_fn(models, batch, rng, cfg):
                yield dataclasses.replace(loss, value=loss.value * (torch.inf if batch["step"] == 2 else 1))

        Guard.__init__ = late
        with pytest.raises(NonFinite, match="at step 3"):
            loop.run(dataclasses.replace(module.task, loss_fn=loss_fn), cfg)

    in_fork(tmp_path, check)


@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="there is no GPU in this machine")
def test_nothing_waits_on_a_gpu(tmp_path):
    """What test_pretended.py holds of a pretended one, as CUDA sees it."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "gpu.py", tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_optimizer_is_stepped_itself_where_there_is_no_loss_scale():
    """Its checkpoint is accelerate's in any case."""
    accelerator, weight = Accelerator(cpu=True), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert accelerator_module.prepare_optimizer(accelerator, optimizer) is optimizer
    assert [wrapper.optimizer for wrapper in internals.prepared(accelerator)] == [optimizer]
    scaled = SimpleNamespace(prepare=accelerator.prepare, scaler=object())
    assert accelerator_module.prepare_optimizer(scaled, optimizer) is internals.prepared(accelerator)[-1]


def test_draws_that_decide_nothing_are_not_made(monkeypatch):
    """Of images that fill their crop, with a caption each: none; of others the corners, of several captions the choice."""
    drawn, own = [], Rng.uniform
    monkeypatch.setattr(Rng, "uniform", lambda rng, purpose, *shape: drawn.append(purpose) or own(rng, purpose, *shape))
    cfg = Data(num_shapes=8, resolution=8, train_batch_size=4)
    source = sources.open_source(cfg)
    examples = data.Examples(source, cfg, 0)
    before = examples[range(4)]
    assert drawn == [] and (before["crop_top_left"] == 0).all()
    source.captions[int(before["index"][0])] = ["a", "b"]
    texts = examples[range(4)]["caption"]
    assert drawn == ["caption"] and texts[0] in "ab" and texts[1:] == before["caption"][1:]


def test_what_is_compiled(tmp_path):
    """What trains is compiled under its own names, not while it is shown; the passes leave its buffers as they were."""

    def check():  # in a fork: what compiles may start threads, after which this process could not fork
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compilation.options = lambda *_: {"backend": backend}
        module, x = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)), torch.randn(4, 2)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        compilation.compile_models({"m": module}, torch.device("cpu"), 1)
        with at_rest({"m": module}, {}, {}):
            module(x)
        assert not graphs
        with same_buffers({"m": module}):
            said = compilation.price(Accelerator(cpu=True), lambda: module(x), 1)
        assert len(graphs) == 1 and said.startswith("compiled in")
        assert module.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    in_fork(tmp_path, check)


def test_compiling_is_no_part_of_the_speed(tmp_path):
    """The first line of metrics counts from the first step."""

    def patch():
        compilation.compile_models = lambda *_: None
        compilation.price = lambda *_: time.sleep(4) or "compiled"

    result = start(tmp_path, *tiny(tmp_path, steps=4, base__compile=True, base__logging_steps=2), patch=patch).wait()
    assert result.code == 0, result.err
    assert metrics(tmp_path / "out")[0]["images_per_second"] > 2 * 4 / 4


def test_compiling_needs_a_compiler(tmp_path):
    """Without one: a line that names the flag and what is missing, and nothing written."""
    result = cli(tmp_path, *tiny(tmp_path), "--base.compile", env={"CXX": "no-such-compiler"})
    assert result.code == 2 and "--base.compile" in result.err and "no-such-compiler" in result.err
    assert len(result.err.splitlines()) == 1 and not (tmp_path / "out").exists()
