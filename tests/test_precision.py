"""Frozen bases in float8, int8 and nf4: what they compute, what they take, and that adapters train on them."""

import functools
import importlib.util
import shutil
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from peft import LoraConfig  # noqa: F401
from PIL import Image
from safetensors.torch import load_file
from warm import digest, flags, fork

from oneloop import loop
from oneloop.configs import BadInput, Base
from oneloop.families import adapters, flow, precision
from oneloop.machine.memory import stored
from oneloop.machine.placement import place
from oneloop.settings import command_line
from oneloop.tasks import lora

ADAPTERS = {"rank": 2, "alpha": None, "dropout": 0.0, "use_dora": False, "use_rslora": False, "use_lokr": False}
ADAPTERS |= {"rank_pattern": (), "alpha_pattern": ()}


def installed(kind):
    """Skips where a precision's package is not there; CI installs them all with the extra `test`."""
    if (package := precision.PACKAGES.get(kind)) and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, of the extra quantized")
    return kind


def adapted(path, kind, change=lambda module: None):
    """A FLUX transformer in bf16, changed, with large adapters, placed as a run in bf16 places it."""
    module = diffusers.FluxTransformer2DModel.from_pretrained(path, subfolder="transformer", torch_dtype=torch.bfloat16)
    change(module.requires_grad_(False))
    s = SimpleNamespace(**ADAPTERS, base_precision=kind)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft has one for every layer
        torch.manual_seed(0)
        adapters.adapt(module, s, ("to_q", "to_v", "proj_mlp"))
        for p in module.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.3)
    place({"a": module}, SimpleNamespace(mixed_precision="bf16", device=torch.device("cpu")), False, ())
    return module


def gradients(module):
    """The loss of one pass and the gradients of the adapters and of the input."""
    c, draw = module.config, functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, ids = draw(2, 16, c.in_channels).requires_grad_(), torch.zeros(16, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    given = {"encoder_hidden_states": draw(2, 5, c.joint_attention_dim), "pooled_projections": draw(2, c.pooled_projection_dim)}
    given |= {"txt_ids": torch.zeros(5, 3), "img_ids": ids, "guidance": torch.ones(2), "timestep": torch.tensor([0.3, 0.6])}
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x, **given, return_dict=False)[0].float().square().mean()
    module.zero_grad()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.requires_grad)]


def off(a, b):
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


def rounded(kind, path):
    """A change of a bf16 model: its weights as this precision has them."""
    narrow = adapted(path, kind)

    def change(module):
        for name, p in module.named_parameters():
            layer = narrow.get_submodule(name.rpartition(".")[0])
            own = getattr(getattr(layer, "base_layer", layer), name.rpartition(".")[2])
            if kind == "nf4" and hasattr(own, "quant_state"):
                from bitsandbytes.functional import dequantize_4bit

                own = dequantize_4bit(own.data, own.quant_state)
            p.data = (own.dequantize() if hasattr(own, "dequantize") and kind == "int8" and own.ndim == 2 else own).to(p.dtype)

    return change


@pytest.mark.parametrize("kind, least, most", [("float8", 0.01, 0), ("int8", 1e-3, 0.03), ("nf4", 0.05, 0.03)])
def test_gradients_are_those_of_the_rounded_weights(tmp_path, built, kind, least, most):
    """Exactly, or to the rounding of bf16; they differ from those of the weights themselves; the same bits when recomputed."""
    path = built("FluxPipeline")

    def compare():
        module, plain = adapted(path, installed(kind)), gradients(adapted(path, "bf16"))
        own, expected = gradients(module), gradients(adapted(path, "bf16", rounded(kind, path)))
        assert off(own, expected) <= most < off(plain, expected) and off(plain, expected) > least
        flow.recompute(module)
        assert off(gradients(module), own) == 0

    installed(kind)
    result = fork(compare, tmp_path).wait()
    assert result.code == 0, result.err


@pytest.mark.parametrize("kind, each", [("bf16", 2), ("float8", 1), ("int8", 1), ("nf4", 0.5)])
def test_bytes_and_precisions(built, kind, each):
    """Adapters are float32; the base is stored as asked, and being placed on a device does not widen it."""
    module = adapted(built("FluxPipeline"), installed(kind))
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    layer = module.transformer_blocks[0].attn.to_q.base_layer
    rows, columns = layer.out_features, layer.in_features
    scales = {"int8": 5 * rows, "nf4": -(-rows * columns // 64) + 4}.get(kind, 0)  # float32 and a zero; a byte, one float32
    assert stored(layer.weight) == each * rows * columns + scales
    norm = module.transformer_blocks[0].attn.norm_q.weight
    assert norm.dtype == torch.bfloat16 and stored(norm) == 2 * norm.numel()
    if kind == "float8":
        modulation = module.transformer_blocks[0].norm1.linear.weight
        assert (layer.weight.dtype, modulation.dtype) == (torch.float8_e4m3fn, torch.bfloat16)


def test_adapters_after_the_cast_would_be_float8(built):
    """What the order in adapters.adapt is for."""
    module = diffusers.FluxTransformer2DModel.from_pretrained(built("FluxPipeline"), subfolder="transformer")
    precision.cast(module.requires_grad_(False), "float8")
    s = SimpleNamespace(**ADAPTERS, base_precision="bf16")
    adapters.adapt(module, s, ("to_q",))
    assert torch.float8_e4m3fn in {p.dtype for p in module.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "name, kind",
    [("FluxPipeline", "float8"), ("ZImagePipeline", "int8"), ("FluxPipeline", "nf4"), ("sd", "float8"), ("sd", "int8")],
)
def test_trains_samples_and_resumes_in_the_same_bits(tmp_path, built, name, kind):
    """Only adapters are in a checkpoint, and the export opens on the base as it was published."""
    path = built(name)
    installed(kind)
    (tmp_path / "images").mkdir()
    for colour in ("red", "white"):
        Image.new("RGB", (40, 36), colour).save(tmp_path / "images" / f"{colour}.png")
        (tmp_path / "images" / f"{colour}.txt").write_text(f"a {colour} circle")
    settings = {
        "base.max_train_steps": 2,
        "base.checkpointing_steps": 1,
        "base.validation_steps": 0,
        "base.num_samples": 1,
        "base.logger": "none",
        "base.mixed_precision": "bf16",
        "base.gradient_checkpointing": True,
        "base.lr_scheduler": "constant",
        "data.train_data_dir": tmp_path / "images",
        "data.resolution": 32,
        "data.train_batch_size": 2,
        "lora.pretrained_model_name_or_path": path,
        "lora.base_precision": kind,
        "lora.learning_rate": 1e-2,
        "lora.num_inference_steps": 1,
    }

    def runs():
        cfg = lambda out: command_line.parse(flags("lora", settings | {"base.output_dir": tmp_path / out}))[1]  # noqa: E731
        state = loop.run(lora.task, cfg("a"))
        assert not any("lora" not in key for key in state.ema)
        shutil.copytree(tmp_path / "a" / "checkpoint-1", tmp_path / "b" / "checkpoint-1")
        loop.run(lora.task, cfg("b"))

    result = fork(runs, tmp_path).wait()
    assert result.code == 0 and "no samples" not in result.err and "keeps a bf16 copy" not in result.err, result.err
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    one, two = (load_file(tmp_path / "a" / f"checkpoint-{n}" / "state" / "model.safetensors") for n in (1, 2))
    assert all("lora_" in key and x.dtype == torch.float32 for key, x in two.items())
    assert any(not torch.equal(x, two[key]) for key, x in one.items())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path)
    pipeline.load_lora_weights(tmp_path / "a" / "export")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_sample_leaves_what_trains_after_it(kind):
    """A quantized layer answers alike, and hands gradients on, before it was called in eval() and after."""
    installed(kind)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32)).requires_grad_(False)
    precision.quantize(module, kind)

    def passed():
        x = torch.linspace(-1, 1, 64).repeat(3, 1).requires_grad_()
        y = module.train()(x)
        y.float().square().sum().backward()
        return y, x.grad

    before = passed()
    with torch.no_grad():
        module.eval()(torch.ones(3, 64))
    after = passed()
    assert before[1].any() and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "settings, base, says",
    [
        (
            {},
            {"mixed_precision": "auto"},
            "--base.mixed-precision is 'auto'; expected bf16, in which --lora.base-precision int8",
        ),
        ({"use_dora": True}, {}, "--lora.base-precision int8 with --lora.use-dora"),
    ],
)
def test_what_does_not_fit_is_a_line(monkeypatch, settings, base, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    with pytest.raises(BadInput) as error:
        precision.check(lora.Settings(base_precision="int8", **settings), "lora", Base(**{"mixed_precision": "bf16"} | base))
    assert says in str(error.value)


@pytest.mark.parametrize("kind, package", precision.PACKAGES.items())
def test_a_missing_package_is_a_line(monkeypatch, kind, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(BadInput, match=rf"needs the package {package}: install oneloop\[quantized\]"):
        precision.check(
            lora.Settings(base_precision=kind, rank_pattern=(), alpha_pattern=(), use_lokr=False),
            "lora",
            Base(mixed_precision="bf16"),
        )


def test_what_comes_back_without_recomputation_is_said():
    s = lora.Settings(base_precision="float8")
    assert "--base.gradient-checkpointing" in precision.remark(s, Base())
    assert precision.remark(s, Base(gradient_checkpointing=True)) is None and precision.remark(lora.Settings(), Base()) is None
