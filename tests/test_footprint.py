"""The memory that adapters take, computed from shapes: against bytes that are there, and the peak of a pass that is run."""

import functools
import gc
import importlib.util
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from warm import fork

from oneloop.families import adapters, flow, footprint, precision
from oneloop.machine.memory import stored
from oneloop.training import optimizers

SIZES = {"in_channels": 16, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4}
SIZES |= {"joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}


def flux(device, kind="bf16", dtype=torch.float32):
    """A small FLUX transformer with adapters."""
    with torch.device(device):
        module = diffusers.FluxTransformer2DModel(**SIZES).requires_grad_(False).to(dtype)
        s = SimpleNamespace(
            rank=4,
            alpha=None,
            dropout=0.0,
            use_dora=False,
            use_rslora=False,
            base_precision=kind,
            rank_pattern=(),
            alpha_pattern=(),
            use_lokr=False,
        )
        adapters.adapt(module, s, flow.FLUX.targets)
    for p in module.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return module


def call(module, tokens=1024):
    """One pass of an image of so many tokens."""
    with torch.device(next(module.parameters()).device):
        given = {"encoder_hidden_states": torch.ones(1, 64, 64), "pooled_projections": torch.ones(1, 32)}
        ids = {"txt_ids": torch.zeros(64, 3), "img_ids": torch.zeros(tokens, 3), "timestep": torch.ones(1)}
        return module(torch.ones(1, tokens, 16), **given, **ids, return_dict=False)[0]


def of(module, kind="bf16", optimizer="adamw"):
    kept = footprint.activations(module, flow.recomputable(module), functools.partial(call, module))
    return footprint.of(module, kept, kind, optimizer)


@pytest.mark.parametrize("kind", ["bf16", "float8", "int8", "nf4"])
def test_weights_are_the_bytes_that_are_stored(kind):
    """Of a model that is quantized, counted; from one that has no memory, computed."""
    if (package := precision.PACKAGES.get(kind)) and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, of the extra quantized")
    module = flux("cpu", kind, torch.bfloat16)
    there = sum(stored(p) for p in module.parameters() if not p.requires_grad)
    assert of(flux("meta", dtype=torch.bfloat16), kind).weights == there


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_adapters_gradients_and_optimizer_are_those_of_a_step(tmp_path, kind):
    def compare():
        module = flux("cpu")
        trained = [p for p in module.parameters() if p.requires_grad]
        s = SimpleNamespace(optimizer=kind, learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.99)
        s.adam_weight_decay, s.adam_epsilon = 0.0, 1e-8
        optimizer = optimizers.make(trained, s)
        call(module, 16).square().mean().backward()
        optimizer.step()
        computed = of(flux("meta"), optimizer=kind)
        assert sum(p.nbytes for p in trained) == computed.adapters == computed.gradients == computed.ema
        counts = 8 * len(trained)  # an optimizer may count its steps in a tensor, Adafactor a size too
        assert computed.optimizer <= optimizers.remembered(optimizer) <= computed.optimizer + counts
        rest = computed.weights + computed.adapters + computed.gradients + computed.optimizer + computed.ema
        assert computed.peak(True) == rest + computed.recomputed and computed.peak(False, 5) == rest + computed.activations + 5

    result = fork(compare, tmp_path).wait()
    assert result.code == 0, result.err


def peak(module):
    """Bytes that a pass forward and back took at its peak, beside what was there."""
    call(module).square().mean().backward()
    module.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(module).square().mean().backward()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_activations_are_the_peak_of_a_pass(tmp_path):
    """Within the quarter that lasts a moment, kept and recomputed."""
    computed = of(flux("meta"))

    def run():
        module = flux("cpu")
        kept = peak(module)
        flow.recompute(module)
        print(json.dumps([kept, peak(module)]))

    result = fork(run, tmp_path).wait()
    assert result.code == 0, result.err
    kept, recomputed = json.loads(result.out.splitlines()[-1])
    assert computed.activations < kept < 1.25 * computed.activations
    assert computed.recomputed < recomputed < 1.25 * computed.recomputed
    assert computed.recomputed < 0.4 * computed.activations


def test_narrow_weights_come_back_as_copies():
    """float8 and int8 keep bf16 copies for the backward pass: all of them, or those of one block; nf4 none."""
    module = flux("meta", dtype=torch.bfloat16)
    plain, narrow = of(module), of(module, "int8")
    layers = [module.get_submodule(name) for name in footprint.stored_narrow(module, "int8")]
    every = sum(2 * layer.weight.numel() for layer in layers)
    assert 0.5 * every < narrow.activations - plain.activations <= every
    assert 0 < narrow.recomputed - plain.recomputed < 0.3 * every
    assert of(module, "nf4").activations == plain.activations
