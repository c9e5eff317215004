"""A transformer of a GGUF file as the base of a LoRA: as quantizers write it, trained, resumed, exported and loaded."""

import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from test_lora import draw_photos
from test_lora_families import CAPTIONS, SIDE, command, config, encoded
from warm import cli, digest

from oneloop.configs import BadInput
from oneloop.families import transformer
from oneloop.tasks import Rng, lora

gguf = pytest.importorskip("gguf", reason="needs gguf, of the extra quantized")
diffusers.utils.logging.set_verbosity_error()
KINDS = {"Q8_0": 0.01, "BF16": 4e-3, "F16": 5e-4}
"""Type -> how far a weight may be from what was written, relative to the largest."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"))


def write(model, path, kind):
    """The transformer of a folder as one GGUF file: matrices in `kind`, where its blocks of 32 fit, and else in F16; vectors in
    F32, as llama.cpp's and city96's quantizers have it."""
    wanted, writer = gguf.GGMLQuantizationType[kind], gguf.GGUFWriter(str(path), "test")
    for name, x in load_file(model / "transformer" / "diffusion_pytorch_model.safetensors").items():
        own = x.float().numpy()
        if own.ndim < 2:
            writer.add_tensor(name, own)
            continue
        fits = kind != "Q8_0" or own.shape[-1] % 32 == 0
        held = wanted if fits else gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(own, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def exact(net):
    """The frozen weights as numbers, by name."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    plain = lambda p: dequantize_gguf_tensor(p) if isinstance(p, GGUFParameter) else p  # noqa: E731
    state = {
        name.replace(".base_layer", ""): plain(p.detach()).float() for name, p in net.named_parameters() if not p.requires_grad
    }
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["QwenImagePipeline"])
def test_the_base_answers_as_its_numbers_and_adapters_get_the_gradient(built, tmp_path, name, kind):
    """Beside the same transformer whose plain weights are what the file says."""
    path = write(built(name), tmp_path / "part.gguf", kind)
    cfg = config(built(name), single_file=str(path), target_modules=("all-linear",))
    models, results = lora.make_models(cfg), []
    plain = lora.make_models(config(built(name), target_modules=("all-linear",)))
    numbers = exact(models["transformer"])
    held = {type(p).__name__ for p in models["transformer"].parameters()}
    assert ("GGUFParameter" in held) == (kind != "F16")
    written = load_file(built(name) / "transformer" / "diffusion_pytorch_model.safetensors")
    for key, x in numbers.items():
        assert (x - written[key]).abs().max() <= KINDS[kind] * written[key].abs().max(), key
    for key, p in plain["transformer"].named_parameters():
        if not p.requires_grad:
            p.data = numbers[key.replace(".base_layer", "")].clone()
    for each in (models, plain):
        net = each["transformer"]
        for number, (key, p) in enumerate((k, p) for k, p in net.named_parameters() if p.requires_grad):
            assert p.dtype == torch.float32 and number >= 0, key
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(number))
        (loss,) = [loss.value for loss in lora.loss_fn(each, encoded(each, cfg), Rng.of(7, range(2)), cfg)]
        loss.backward()
        results.append((loss.detach(), {k: p.grad for k, p in net.named_parameters() if p.requires_grad}))
    (a, ours), (b, theirs) = results
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for key, grad in ours.items():
        torch.testing.assert_close(grad, theirs[key], rtol=1e-4, atol=1e-4 * float(theirs[key].abs().max()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_on_it_resumes_equal_and_its_export_loads(built, photos, tmp_path, precision):
    """The lines that the run prints open the file and load the adapters."""
    model = built("FluxPipeline")
    path = write(model, tmp_path / "part.gguf", "Q8_0")
    more = {"lora__single_file": path, "base__mixed_precision": precision, "base__checkpointing_steps": 1}
    more |= {"base__gradient_checkpointing": precision == "bf16", "lora__learning_rate": 0.1}
    first = cli(tmp_path, *command(tmp_path, model, photos, "out", **more))
    assert first.code == 0 and "no samples" not in first.err, first.err
    whole = digest(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    shutil.rmtree(tmp_path / "out" / "export")
    again = cli(tmp_path, *command(tmp_path, model, photos, "out", **more))
    assert again.code == 0 and "after step 1" in again.err and digest(tmp_path / "out") == whole, again.err
    if precision == "no":
        cfg = config(model, single_file=str(path))
        lines = transformer.load_lines(cfg.lora).format(path="path")
        assert f"from_single_file({str(path)!r}" in lines
        scope = {"path": tmp_path / "out" / "export"}
        exec(lines, scope)
        draw = lambda parts: transformer.sample(parts, cfg.lora, CAPTIONS[:1], Rng.of(0, range(1)).generators("s"), SIDE, SIDE)  # noqa: E731
        with torch.no_grad():
            moved = draw(scope["pipeline"].components)
            scope["pipeline"].unload_lora_weights()
            assert (draw(scope["pipeline"].components) - moved).abs().max() > 1e-3


def test_it_is_no_place_to_add_adapters_to(built, photos, tmp_path):
    model = built("FluxPipeline")
    path = write(model, tmp_path / "part.gguf", "Q8_0")
    assert cli(tmp_path, *command(tmp_path, model, photos, "out", lora__single_file=path)).code == 0
    done = cli(tmp_path, "merge", "out", "--to", "whole")
    assert done.code == 2 and "--lora.single-file" in done.err and "cannot be merged" in done.err, done.err


def test_what_does_not_go_is_a_line(built, photos, tmp_path):
    model = built("FluxPipeline")
    path = write(model, tmp_path / "part.gguf", "Q8_0")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(BadInput, match=r"junk\.gguf: transformer cannot be loaded as a FluxTransformer2DModel"):
        lora.make_models(config(model, single_file=str(tmp_path / "junk.gguf")))
    for flag, value in (("use_dora", True), ("base_precision", "int8")):
        with pytest.raises(BadInput) as refused:
            lora.make_models(config(model, single_file=str(path), **{flag: value}))
        assert "\n" not in str(refused.value)
