"""Every private part of another package that the project uses: it is there, it does what is asked of it, and where it is not
there one line says which versions work."""

import ast
import copy
import pickle
import sys
import tomllib
import types
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from warm import ROOT

from oneloop.configs import BadInput, Base
from oneloop.machine import internals, kernels, placement
from oneloop.tasks import Rng, ddpm
from oneloop.training import optimizers


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x))


def adapted():
    torch.manual_seed(0)
    net = Net()
    internals.inject(net, LoraConfig(r=2, target_modules=["a"], init_lora_weights="gaussian"))
    return net


def test_adapters_go_in_and_come_out():
    """They alone train, change nothing at first, and come out under the names that `load_lora_weights` reads."""
    net, x = adapted(), torch.ones(1, 3)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {f"a.lora_{k}.default.weight" for k in "AB"}
    state, config = internals.injected(net)
    assert {k: tuple(v.shape) for k, v in state.items()} == {"a.lora_A.weight": (2, 3), "a.lora_B.weight": (4, 2)}
    assert config.r == 2 and net._hf_peft_config_loaded
    torch.manual_seed(0)
    assert torch.equal(net(x), Net()(x))
    assert internals.injected(Net()) == ({}, None)


class Multiplied(TorchDispatchMode):
    """Counts multiplications."""

    seen = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen += op._schema.name == "aten::mul"
        return op(*args, **kwargs or {})


def by_scale(alpha, inject):
    """A layer of rank 4 with adapters that do something."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32))
    inject(LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False), net)
    return net


def theirs(config, net):
    peft.inject_adapter_in_model(config, net, "default")


def ours(config, net):
    internals.inject(net, config)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 0.25, 1.5, 0])
def test_a_scale_is_part_of_the_addition(dtype, autocast, factor):
    """Output and gradients have the bits of peft, also where the scale is changed later, as diffusers does at inference."""
    dtype, found, counts = getattr(torch, dtype), [], []
    for inject in (theirs, ours):
        net = by_scale(4, inject).to(dtype)
        net[0].scale_layer(factor)
        torch.manual_seed(1)
        x = torch.randn(64, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Multiplied() as mode:
            y = net(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in net.parameters() if p.requires_grad)])
        counts.append(mode.seen)
    assert all(map(torch.equal, *found)) and len(found[0]) == 3
    half = dtype == torch.float16 and not autocast and factor != 1
    assert counts == [1, int(half or factor in (1.5, 0))]


def test_what_peft_merges_is_the_same():
    for safe in (True, False):
        nets = [by_scale(8, inject) for inject in (theirs, ours)]
        before = [net[0].get_base_layer().weight.clone() for net in nets]
        for net in nets:
            net[0].merge(safe_merge=safe)
        merged = [net[0].get_base_layer().weight.clone() for net in nets]
        assert torch.equal(*merged) and not torch.equal(merged[0], before[0])
        for net in nets:
            net[0].unmerge()
        assert torch.equal(*(net[0].get_base_layer().weight for net in nets))


def test_layers_with_adapters_can_be_pickled():
    net = by_scale(4, ours)
    again = pickle.loads(pickle.dumps(net))
    x = torch.randn(2, 16)
    assert torch.equal(again(x), net(x)) and again[0].lora_variant.keys() == net[0].lora_variant.keys() == {"default"}


@pytest.mark.parametrize("factor", [1, 1.0, 2**0.5])
def test_a_factor_of_one_divides_nothing(factor):
    """Attention and residual blocks of diffusers: the same bits forward and backward, in a copy too; another factor divides."""
    found, counts = [], []
    for times in (0, 1, 2):
        torch.manual_seed(0)
        attention = Attention(16, heads=2, dim_head=8, rescale_output_factor=factor)
        residual = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4, output_scale_factor=factor)
        block = torch.nn.Sequential(residual, attention)
        for _ in range(times):
            kernels.undivide({"block": block})
        block, x = pickle.loads(pickle.dumps(copy.deepcopy(block))), torch.randn(2, 16, 4, 4, requires_grad=True)
        with Divided() as mode:
            y = attention_of(block, x)
            y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in block.parameters())])
        counts.append(mode.seen)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert counts == ([4, 0, 0] if factor == 1 else [4, 4, 4])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_s_models_divide_by_nothing(compiled):
    cfg = ddpm.Config(base=Base(output_dir="unused", compile=compiled))
    unet = placement.make_models(ddpm.task, cfg, Accelerator(cpu=True))["unet"]
    undivided = sum(isinstance(x, kernels.One) for part in unet.modules() for x in vars(part).values())
    assert undivided == (0 if compiled else 11 + 7)  # residual blocks, and attention


def attention_of(block, x):
    """The residual block, and attention over its pixels."""
    return block[1](block[0](x, None).flatten(2).transpose(1, 2))


class Divided(TorchDispatchMode):
    """Counts divisions."""

    seen = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen += op is torch.ops.aten.div.Tensor
        return op(*args, **kwargs or {})


def test_layers_with_variants_of_their_own_keep_them():
    net = torch.nn.Sequential(torch.nn.Linear(16, 32))
    internals.inject(net, LoraConfig(r=4, target_modules=["0"], use_dora=True))
    assert type(net[0].lora_variant["default"]).__name__ == "DoraLinearVariant"


def test_adapters_do_not_ask_transformers(monkeypatch):
    """Whatever version of peft transformers wants for its own `add_adapter`."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4
    )
    encoder = transformers.CLIPTextModel(config)
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: pytest.fail("asked"))
    internals.inject(encoder, LoraConfig(r=2, target_modules=["q_proj"]))
    assert all(key.endswith(("q_proj.lora_A.weight", "q_proj.lora_B.weight")) for key in internals.injected(encoder)[0])
    encoder.gradient_checkpointing_enable()  # asks whether there are adapters, without which nothing recomputed has a gradient
    encoder(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_what_accelerate_prepared():
    internals.forget_accelerator()
    accelerator, net = Accelerator(cpu=True), Net()
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=1.0))
    assert internals.prepared(accelerator) == [optimizer]
    internals.forget_accelerator()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    internals.forget_accelerator()


def test_what_datasets_calls_its_content():
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3]})
    (whole, chosen), (part, some) = internals.fingerprint(rows), internals.fingerprint(rows.select([2, 0]))
    assert (chosen, some) == (False, True) and whole != part


def test_a_cpu_that_does_not_say_computes_no_bf16(monkeypatch):
    assert internals.cpu_computes_bf16() in (True, False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert internals.cpu_computes_bf16() is False


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_multiplies_in_float32_where_the_cpu_has_no_bf16(monkeypatch, shape):
    """Steps near those of bf16, and of another type; on a CPU that has it they are torch's own."""

    def step(bf16, scale=1):
        monkeypatch.setattr(internals, "cpu_computes_bf16", lambda: bf16)
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        optimizers.make([p], SimpleNamespace(**values)).step()
        return p.detach()

    values = {"optimizer": "muon", "learning_rate": 1.0, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8}
    values |= {"adam_beta1": 0.9, "adam_beta2": 0.99}
    wide, narrow, zero = step(False), step(True), step(False, 0)
    assert not zero.any()
    assert 0 < (wide - narrow).norm() < 0.03 * wide.norm()
    singular = torch.linalg.svdvals(wide / (0.2 * max(shape) ** 0.5))
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_the_metadata_key_is_what_diffusers_reads():
    assert internals.adapter_metadata_key() == "lora_adapter_metadata"


def missing_random(monkeypatch):
    monkeypatch.delattr(torch.func, "_random", raising=False)
    monkeypatch.setitem(sys.modules, "torch.func._random", None)


def broken_random(monkeypatch, **parts):
    module = types.ModuleType("torch.func._random")
    vars(module).update(parts)
    monkeypatch.setattr(torch.func, "_random", module, raising=False)


def altered_random(monkeypatch, name):
    """One of its functions gives other numbers, of the same shape and type."""
    from torch.func import _random

    own = getattr(_random, name)
    monkeypatch.setattr(_random, name, lambda *given: own(*given).flip(-1))


@pytest.mark.parametrize(
    ("package", "breaks", "call"),
    [
        ("torch", missing_random, lambda: Rng.of(0, [0]).normal("x", 1)),
        ("torch", lambda m: broken_random(m), lambda: Rng.of(0, [0]).uniform("x", 1)),
        (
            "torch",
            lambda m: broken_random(
                m, fold_in=lambda key, data: key, normal=lambda key, *shape: torch.zeros(*shape), uniform=None
            ),
            lambda: Rng.of(0, [0]).normal("x", 1),
        ),
        ("torch", lambda m: altered_random(m, "fold_in"), internals.stream),
        ("torch", lambda m: altered_random(m, "uniform"), internals.stream),
        ("torch", lambda m: altered_random(m, "normal"), internals.stream),
        (
            "accelerate",
            lambda m: m.setitem(sys.modules, "accelerate.state", types.ModuleType("x")),
            internals.forget_accelerator,
        ),
        ("accelerate", lambda m: None, lambda: internals.prepared(object())),
        ("datasets", lambda m: None, lambda: internals.fingerprint(object())),
        ("peft", lambda m: m.setattr("peft.inject_adapter_in_model", lambda model: None), adapted),
        ("peft", lambda m: m.delattr("peft.get_peft_model_state_dict"), lambda: internals.injected(adapted())),
        (
            "diffusers",
            lambda m: m.delattr("diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY"),
            internals.adapter_metadata_key,
        ),
    ],
)
def test_a_part_that_is_missing_or_another_is_a_line(monkeypatch, package, breaks, call):
    internals.philox.cache_clear()
    try:
        breaks(monkeypatch)
        with pytest.raises(BadInput, match=f"{package} [0-9.]+.* has another .*; install {package} [0-9]"):
            call()
    finally:
        internals.philox.cache_clear()


def test_it_names_the_versions_that_the_project_asks_for():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, works in internals.WORKS.items():
        assert f"{package}>={works.split()[0]}" in asked


PRIVATE = {"_foreach_copy_", "_foreach_lerp_", "_exit", "_version", "_parameters"}
"""Kernels that torch's own optimizers are made of; os._exit, which is public; a tensor's version counter and a module's own
parameters, which have been what they are since torch 0.4."""


def test_private_parts_are_called_nowhere_else():
    """An attribute with an underscore in front, of anything but this project's own objects."""
    own, others = set(), {}
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        if room in ("tests", "benchmarks", "docs", "examples", "build") or path.name == "internals.py":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, (ast.AnnAssign, ast.Assign)):
                own |= {t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)}
        named = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        named += [a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
        named += [part for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for part in (n.module or "").split(".")]
        private = {name for name in named if name.startswith("_") and not name.startswith("__")}
        others |= dict.fromkeys(private - PRIVATE, path)
    assert not {name: path for name, path in others.items() if name not in own}
