"""The task `lora` on every flow-matching family, from a tiny checkpoint: the objective, runs, resuming, samples, the export."""

import copy
import functools
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from warm import cli_many, digest, distance, flags, fork, metrics

from oneloop import data, loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import flow, hub, latents, text_to_image, transformer
from oneloop.inputs import encodings, sources
from oneloop.maths import flow as maths
from oneloop.settings import command_line
from oneloop.tasks import Rng, lora
from oneloop.training import validation

NAMES = list(flow.FAMILIES)
CAPTIONS = ["a dog", 'a large red circle on the left of the word "go"', "a small white dog"]
SIDE = 32
SLOW = ("HunyuanImagePipeline", "HiDreamImagePipeline")  # they take all text of the pipeline, or many experts
LONGER = ("ZImagePipeline", "FluxPipeline", "QwenImagePipeline")  # of which more steps are seen, and a lower loss
SCHEMES = ("logit_normal", "mode", "sigma_sqrt", "cosmap", "none")
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three captioned images."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        small = noise.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((80, 70), Image.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def config(model, photos="unused", recompute=False, **settings):
    """The `Config` of a run, for a test that calls the task's functions itself."""
    base = Base(output_dir="unused", logger=("none",), gradient_checkpointing=recompute)
    sizes = Data(train_data_dir=str(photos), resolution=SIDE, center_crop=True, train_batch_size=2)
    made = {"rank": 2, "num_inference_steps": 2} | settings
    return lora.Config(base, sizes, lora.Settings(pretrained_model_name_or_path=str(model), **made))


@pytest.fixture(scope="module")
def moved(built):
    """name -> its `Config` and its models, whose adapters are large numbers; each made once."""

    @functools.cache
    def make(name):
        cfg = config(built(name), weighting_scheme=SCHEMES[NAMES.index(name) % len(SCHEMES)], alpha=3.0, guidance_scale=2.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models = lora.make_models(cfg)
            for key, p in models["transformer"].named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(p, std=0.3)
        return cfg, models

    return make


def command(folder, model, photos, out="out", **more):
    """A command line for two steps of `lora`."""
    settings = {
        "base.output_dir": folder / out,
        "base.max_train_steps": 2,
        "base.num_samples": 1,
        "base.logger": "none",
        "base.validation_steps": 0,
        "base.logging_steps": 1,
        "base.lr_scheduler": "constant",
        "data.train_data_dir": photos,
        "data.resolution": SIDE,
        "data.train_batch_size": 2,
        "lora.pretrained_model_name_or_path": model,
        "lora.rank": 2,
        "lora.learning_rate": 1e-3,
        "lora.num_inference_steps": 1,
    }
    return flags("lora", settings | {name.replace("__", "."): value for name, value in more.items()})


def in_fork(folder, function):
    """Run a test's own code where it may set global state."""
    result = fork(function, folder).wait()
    assert result.code == 0, result.err
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The objective.


def encoded(models, cfg, captions=CAPTIONS[:2]):
    """A batch of two encoded examples."""
    x = Rng.of(0, range(len(captions))).uniform("x", 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        columns = text_to_image.encode_images(models, x, cfg) | text_to_image.encode_captions(models, captions, cfg)
        return columns | {"target_size": torch.full((len(captions), 2), SIDE)}


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_official_formula_and_reaches_every_adapter(built, moved, name):
    """Same weights, latents, text, noise and sigma: the loss of diffusers' scripts, written out."""
    cfg, models = moved(name)
    family, net, rng = flow.of(name), models["transformer"], Rng.of(7, range(2))
    batch = encoded(models, cfg)
    net.zero_grad()
    (ours,) = [loss.value for loss in lora.loss_fn(models, batch, rng, cfg)]
    ours.backward()
    for key, p in net.named_parameters():
        assert p.requires_grad == ("lora_" in key) and (not p.requires_grad or p.grad.any()), key

    # train_dreambooth_lora_*.py, with their names; the density of sigma is written in test_flow_maths.py.
    pipe = diffusers.DiffusionPipeline.from_pretrained(built(name))
    scheme, u = cfg.lora.weighting_scheme, rng.uniform("timestep")
    name_of_density = scheme if scheme in ("logit_normal", "mode") else "uniform"
    mean = batch["latent_mean"]
    model_input = mean + batch["latent_std"] * rng.normal("posterior", *mean.shape[1:]) if "latent_std" in batch else mean
    shift = family.shift(pipe.scheduler, mean.shape[-2] * mean.shape[-1] // family.patch**2, pipe.config)
    sigmas = maths.density(name_of_density, u)
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).view(-1, 1, 1, 1)
    noise = rng.normal("noise", *mean.shape[1:])
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
    with torch.no_grad():
        columns = family.text(pipe, CAPTIONS[:2], family.length) | {"target_size": torch.tensor([[SIDE, SIDE]] * 2)}
        model_pred = family.velocity(net, noisy_model_input, sigmas.flatten(), columns, 1.0)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    target = noise - model_input
    loss = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_shift_and_a_length_of_ones_own(built):
    cfg = config(built("StableDiffusion3Pipeline"), flow_shift=2.0, max_sequence_length=40)
    s, u = cfg.lora, torch.tensor([0.25, 0.5])
    assert transformer.scheme(s) == "logit_normal"  # the official script's default for this family alone
    assert transformer.scheme(config(built("ZImagePipeline")).lora) == "none"
    torch.testing.assert_close(transformer.noise_level(s, u, (2, 4, 8, 8)), maths.shift(maths.logit_normal(u), 2.0))
    models = lora.make_models(cfg)
    assert text_to_image.encode_captions(models, ["a dog"], cfg)["prompt_embeds"].shape[1] == 77 + 40
    assert transformer.arguments(s, SIDE, SIDE)["max_sequence_length"] == 40


def test_validation_spreads_the_noise_levels(moved):
    """The only draw of the noise level is the one that validation stratifies: every quarter of the ranks has its own."""
    cfg, models = moved("ZImagePipeline")
    seen, own = [], transformer.noise_level
    rng = Rng.of(0, range(8))
    stratified = validation.Stratified(rng.keys, ranks=torch.arange(8.0), count=8)
    batch = {k: x[:1].expand(8, *x.shape[1:]) for k, x in encoded(models, cfg).items()}
    try:
        transformer.noise_level = lambda *args: seen.append(own(*args)) or seen[-1]
        with torch.no_grad():
            next(lora.loss_fn(models, batch, stratified, cfg))
    finally:
        transformer.noise_level = own
    assert "timestep" in stratified.drawn and torch.equal(seen[0], seen[0].sort().values)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_learn_an_image(built, photos, name):
    """Over 64 fixed pairs of noise and sigma of one image the loss falls with adapters on all linear layers, and is what it
    was without them."""
    cfg = config(built(name), photos, target_modules=("all-linear",), rank=16, max_sequence_length=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = lora.make_models(cfg)
    net = models["transformer"]
    examples = data.Examples(sources.open_source(cfg.data), cfg.data, 0)
    batch = data.to_device(next(iter(data.Fixed(examples, 1, "cpu"))), "cpu")
    batch = encodings.encode(lora.task.encodings, models, batch, cfg)

    def loss(rng):
        wide = {k: x.expand(len(rng), *x.shape[1:]) for k, x in batch.items() if isinstance(x, torch.Tensor)}
        return next(lora.loss_fn(models, wide, rng, cfg)).value

    fixed = Rng.of(9, range(16 if name in SLOW else 64))
    with torch.no_grad():
        before = loss(fixed).item()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-2, weight_decay=0.0)
    steps, size, share = (30, 8, 0.8) if name in LONGER else (8 if name in SLOW else 16, 4, 0.9)
    for step in range(steps):
        loss(Rng.of(1, range(size * step, size * step + size))).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        on = loss(fixed).item()
        for layer in filter(lambda m: isinstance(m, BaseTunerLayer), net.modules()):
            layer.enable_adapters(False)
        off = loss(fixed).item()
    assert off == pytest.approx(before, rel=1e-5) and on < share * off, (before, on, off)


# ---------------------------------------------------------------------------------------------------------------------
# What trains.


def test_layers_without_gradient_are_named_and_left_out(built):
    for name, targets, silent in (
        ("StableDiffusion3Pipeline", None, {"transformer_blocks.1.attn.add_q_proj"}),
        ("QwenImagePipeline", None, set()),
        ("QwenImagePipeline", ("all-linear",), {"transformer_blocks.1.txt_mlp.net.2", "transformer_blocks.1.attn.to_add_out"}),
    ):
        cfg = config(built(name), target_modules=targets)
        models = lora.make_models(cfg)
        adapted = {key.partition(".lora_")[0] for key, p in models["transformer"].named_parameters() if p.requires_grad}
        said = " ".join(lora.task.remarks(models, cfg))
        assert all(layer in said for layer in silent) and bool(said) == bool(silent) and not silent & adapted and adapted
        next(lora.loss_fn(models, encoded(models, cfg), Rng.of(0, range(2)), cfg)).value.backward()
        unmoved = [k for k, p in models["transformer"].named_parameters() if "lora_B" in k and not p.grad.any()]
        assert not unmoved


@pytest.mark.parametrize("name", ["ChromaPipeline", "HunyuanImagePipeline"])
def test_gradient_checkpointing_is_exact(moved, name):
    """Where diffusers' own is not (families.flow.recompute)."""
    cfg, models = moved(name)
    models, grads = models | {"transformer": copy.deepcopy(models["transformer"]).train()}, []
    for again in (False, True):
        if again:
            flow.recompute(models["transformer"])
        models["transformer"].zero_grad()
        next(lora.loss_fn(models, encoded(models, cfg), Rng.of(0, range(2)), cfg)).value.backward()
        grads.append([p.grad.clone() for p in models["transformer"].parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))
    assert moved(name)[1]["transformer"].enable_gradient_checkpointing.func is flow.recompute


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_equal_and_the_cache_changes_nothing(tmp_path, built, photos, name):
    """Two steps at once or one and one: the same bits. Encoded once or in every step: the same loss."""
    model = built(name)
    cached = {"base__checkpointing_steps": 1, "data__example_cache": tmp_path / "cache"}
    alone = {"data__example_cache": "no", "base__gradient_checkpointing": True, "base__max_train_steps": 1}

    def runs():
        loop.run(lora.task, command_line.parse(command(tmp_path, model, photos, "whole", **cached))[1])
        shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
        loop.run(lora.task, command_line.parse(command(tmp_path, model, photos, "part", **cached))[1])
        loop.run(lora.task, command_line.parse(command(tmp_path, model, photos, "no", **alone))[1])

    said = in_fork(tmp_path, runs).err
    assert digest(tmp_path / "part") == digest(tmp_path / "whole") and "after step 1" in said and "no samples" not in said
    assert "latent_mean [" in said and "pixel_values [" in said  # cached, and not
    for key in ("loss", "grad_norm"):
        a, b = (metrics(tmp_path / out)[0][key] for out in ("whole", "no"))
        assert a == pytest.approx(b, rel=1e-5), key
    assert (tmp_path / "whole" / "samples" / "2.png").exists()


@pytest.mark.parametrize("name", ["ZImagePipeline", "StableDiffusion3Pipeline", "QwenImagePipeline"])
def test_two_processes_agree_with_one(tmp_path, built, photos, name):
    """Every adapter of each gets a gradient, or DDP waits for it."""
    steady = {"base__use_ema": False, "lora__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    line = functools.partial(command, tmp_path, built(name), photos, **steady)
    in_fork(tmp_path, lambda: loop.run(lora.task, command_line.parse(line("one"))[1]))
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert 0 < distance(tmp_path / "one", tmp_path / "two", "model") < 1e-6


def test_only_adapters_train_in_float32_on_a_bf16_base(tmp_path, built, photos):
    """The base and the text encoders are bfloat16, the autoencoder and the adapters float32; samples are drawn so."""

    def run():
        line = command(tmp_path, built("FluxPipeline"), photos, base__mixed_precision="bf16")
        cfg = command_line.parse(line)[1]
        made, own = [], lora.make_models
        task = copy.copy(lora.task)
        object.__setattr__(task, "make_models", lambda *given: made.append(own(*given)) or made[0])
        loop.run(task, cfg)
        for part, module in made[0].items():
            for key, p in module.named_parameters():
                wide = part == "vae" or "lora_" in key
                assert p.dtype == (torch.float32 if wide else torch.bfloat16), (part, key)

    assert "no samples" not in in_fork(tmp_path, run).err


# ---------------------------------------------------------------------------------------------------------------------
# Samples and exports.


@pytest.mark.parametrize("name", NAMES)
def test_the_export_draws_the_samples_of_the_run(tmp_path, built, moved, name):
    """The lines that the run prints load the adapters, with their alpha, into a fresh pipeline, which draws what the
    run drew."""
    cfg, models = moved(name)
    s, examples = cfg.lora, [{"caption": CAPTIONS[1:2]}]
    lines = lora.export_fn(models, examples, tmp_path, cfg).format(path="path").splitlines()
    scope = {"path": tmp_path}
    exec("\n".join(lines[:-1]), scope)
    fresh, rng = scope["pipeline"], Rng.of(0, range(1), "samples")
    with torch.no_grad():
        ours = text_to_image.sample_fn(models, examples, rng, cfg)["samples"]
        loaded = transformer.sample(fresh.components, s, CAPTIONS[1:2], rng.generators("sample"), SIDE, SIDE)
        bare = diffusers.DiffusionPipeline.from_pretrained(built(name)).components
        without = transformer.sample(bare, s, CAPTIONS[1:2], rng.generators("sample"), SIDE, SIDE)
    assert ours.shape == (1, 3, SIDE, SIDE) and ours.min() >= 0 and ours.max() <= 1
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-4)
    assert (without - ours).abs().max() > 1e-4 and (without - ours).norm() > 20 * (loaded - ours).norm()
    saved = json.loads(_metadata(tmp_path)["lora_adapter_metadata"])
    assert saved["transformer.lora_alpha"] == 3.0 and saved["transformer.r"] == 2
    assert lines[-1].startswith(f"pipeline(prompt={CAPTIONS[1]!r}, height={SIDE}") and flow.of(name).guided_by in lines[-1]


def _metadata(folder):
    from safetensors import safe_open

    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        return file.metadata()


def test_the_last_line_draws(tmp_path, built, moved, monkeypatch):
    cfg, models = moved("Flux2KleinPipeline")
    monkeypatch.chdir(tmp_path)
    exec(lora.export_fn(models, [{"caption": ["a {dog}"]}], tmp_path, cfg).format(path="path"), {"path": tmp_path})
    assert Image.open("sample.png").size == (SIDE, SIDE)


def test_prompts_go_by_the_number_of_the_sample(built, monkeypatch):
    cfg = config(built("ZImagePipeline"), validation_prompts=("a", "b", "c"))
    seen = []
    blank = lambda models, s, prompts, *rest: seen.append(prompts) or torch.zeros(2, 3, SIDE, SIDE)  # noqa: E731
    monkeypatch.setattr(transformer, "sample", blank)
    for part in (slice(0, 2), slice(2, 4)):
        text_to_image.sample_fn({}, [], Rng.of(0, range(4), "samples")[part], cfg)
    assert seen == [["a", "b"], ["c", "a"]]


def test_a_distilled_checkpoint_is_warned_of_and_drawn_in_few_steps(built):
    for name, steps in (("FluxPipeline schnell", 4), ("Krea2Pipeline distilled", 8)):
        cfg = config(built(name), num_inference_steps=None)
        models = lora.make_models(cfg)
        assert "is distilled to few steps" in " ".join(lora.task.remarks(models, cfg))
        told = transformer.arguments(cfg.lora, SIDE, SIDE)
        assert told["num_inference_steps"] == steps and told["guidance_scale"] == flow.of(name.split()[0]).off
    own = transformer.arguments(config(built("QwenImagePipeline"), num_inference_steps=None).lora, SIDE, SIDE)
    assert own["num_inference_steps"] == 50 and own["true_cfg_scale"] == 4.0 and own["negative_prompt"] == " "


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, from the configs alone.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"snr_gamma": 5.0}, "--lora.snr-gamma is 5.0: a ZImagePipeline has no use for it; leave it out"),
        ({"train_text_encoder": True}, "--lora.train-text-encoder is True: a ZImagePipeline has no use for it"),
        ({"target_modules": ("to_q", "to_ou")}, "'to_ou' is the end of no layer's name; the nearest is 'to_out.0'"),
        ({"target_modules": ("all-linear", "to_q")}, "all-linear without other names"),
        ({"flow_shift": 0.0}, "--lora.flow-shift is 0.0; expected more than 0 and"),
    ],
)
def test_settings_that_do_not_fit_are_refused(built, monkeypatch, settings, says):
    monkeypatch.setattr(transformer, "load", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(BadInput) as refused:
        lora.make_models(config(built("ZImagePipeline"), **settings))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_checkpoints_that_cannot_train_are_refused(tmp_path, built):
    folder = shutil.copytree(built("HiDreamImagePipeline"), tmp_path / "hidream")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_4": [None, None]}))
    with pytest.raises(BadInput, match="has no text_encoder_4; expected a folder that save_pretrained of its whole pipeline"):
        config(folder)
    hub.read.cache_clear()
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))
    with pytest.raises(BadInput, match=r"is a WanPipeline; expected one of StableDiffusionPipeline, .*HiDreamImagePipeline$"):
        config(folder)
    with pytest.raises(BadInput, match="resolution is 48; expected a multiple of 32"):
        lora.Config(data=Data(resolution=48), lora=lora.Settings(pretrained_model_name_or_path=str(built("SanaPipeline"))))


def test_the_key_of_a_caption_follows_tokenizer_length_and_template(tmp_path, built):
    cfg = config(shutil.copytree(built("ZImagePipeline"), tmp_path / "own"))  # whose tokenizer nothing has used yet
    key = transformer.caption_key(cfg.lora)
    models = lora.make_models(cfg)
    text_to_image.encode_captions(models, CAPTIONS, cfg)  # which leaves padding and truncation set in the tokenizer
    assert transformer.caption_key(cfg.lora) == key
    assert transformer.caption_key(config(tmp_path / "own", max_sequence_length=64).lora) != key
    other = shutil.copytree(built("ZImagePipeline"), tmp_path / "other")
    template = other / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert transformer.caption_key(config(other).lora) != key
    for name in ("HunyuanImagePipeline", "Flux2Pipeline"):  # a tokenizer of bytes, and a processor
        assert transformer.caption_key(config(built(name)).lora)


def test_the_autoencoder_computes_in_its_own_precision(moved):
    _, models = moved("FluxPipeline")
    z = latents.encode(flow.FLUX, models["vae"], torch.zeros(1, 3, 16, 16))["latent_mean"]
    with torch.no_grad():
        exact = models["vae"].decode(z).sample
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(models["vae"].decode(z.bfloat16().float()).sample, models["vae"].decode(z.bfloat16()).sample)
            torch.testing.assert_close(models["vae"].decode(z).sample, exact, rtol=0, atol=0)
