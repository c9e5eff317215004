"""Adapters of Stable Diffusion and SDXL: the objective, what trains and what does not, the cache, the export, bad input."""

import contextlib
import json
import shutil
from dataclasses import replace

import datasets  # noqa: F401
import numpy as np
import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401
from diffusers.training_utils import compute_snr
from peft import LoraConfig  # noqa: F401
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401
from warm import SHARED, cli, cli_many, digest, distance, flags, fork, metrics, shown, tensors

from oneloop import data, loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import adapters, stable_diffusion, text_to_image
from oneloop.inputs import encodings, shapes, sources
from oneloop.maths import diffusion
from oneloop.settings import command_line
from oneloop.tasks import Rng, lora
from oneloop.views import showing
from oneloop.views.loading import load_lines

CAPTIONS = ["a photo of sks dog", "a red circle on a black background", "a small white dog", "the blue square"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """kind -> a tiny checkpoint's folder."""
    folder = tmp_path_factory.mktemp("models")
    made = {kind: tiny_models.build(folder, kind) for kind in ("sd", "sd2", "sdxl")}
    made["v"] = tiny_models.build(folder / "v", "sd2", rescale_betas_zero_snr=True)
    lora.make_models(config(made["sdxl"], folder))  # so that forks find everything imported
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of four captioned images, none of them square."""
    return draw_photos(tmp_path_factory.mktemp("photos"))


def draw_photos(folder):
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        small = noise.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((48, 36), Image.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def command(folder, model, photos, out="out", **more):
    """A command line for four steps of `lora`."""
    settings = {
        "base.output_dir": folder / out,
        "base.max_train_steps": 4,
        "base.num_samples": 2,
        "base.logger": "none",
        "base.validation_steps": 0,
        "base.lr_scheduler": "constant",
        "data.train_data_dir": photos,
        "data.resolution": 32,
        "data.train_batch_size": 2,
        "lora.pretrained_model_name_or_path": model,
        "lora.rank": 4,
        "lora.learning_rate": 1e-2,
        "lora.num_inference_steps": 2,
    }
    return flags("lora", settings | {name.replace("__", "."): value for name, value in more.items()})


def trained(folder, *args, **more):
    result = cli(folder, *command(folder, *args, **more))
    assert result.code == 0, result.err
    return result


def config(model, photos, **settings):
    """The `Config` of such a run, for a test that calls the task's functions itself."""
    base = Base(output_dir="unused", logger=("none",))
    data = Data(train_data_dir=str(photos), resolution=32, center_crop=True, train_batch_size=2)
    return lora.Config(base, data, lora.Settings(pretrained_model_name_or_path=str(model), **settings))


def in_fork(folder, function):
    """Run a test's own code where it may set global state."""
    result = fork(function, folder).wait()
    assert result.code == 0, result.err
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The objective.


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("sd", {}),
        ("sd", {"snr_gamma": 5.0, "noise_offset": 0.1}),
        ("sd", {"prediction_type": "v_prediction", "snr_gamma": 5.0}),
        ("v", {"snr_gamma": 5.0, "input_perturbation": 0.1}),
        ("v", {}),
        ("sd2", {}),
        ("sdxl", {"snr_gamma": 5.0, "noise_offset": 0.05, "input_perturbation": 0.1}),
    ],
)
def test_loss_is_the_official_formula(built, photos, kind, settings):
    """Same weights, latents, noise and timesteps: the loss of diffusers' scripts, written out."""
    cfg = config(built[kind], photos, **settings)
    torch.manual_seed(0)
    models = lora.make_models(cfg)
    for name, p in models["unet"].named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    size, rng = 6, Rng.of(0, range(6))
    pixels = rng.uniform("x", 3, 32, 32) * 2 - 1
    original, corner = torch.tensor([[36, 48]] * size), torch.tensor([[0, 5]] * size)
    texts = CAPTIONS + CAPTIONS[:2]
    batch = {"original_size": original, "crop_top_left": corner, "target_size": torch.full((size, 2), 32)}
    with torch.no_grad():
        batch |= text_to_image.encode_images(models, pixels, cfg) | text_to_image.encode_captions(models, texts, cfg)
        (ours,) = [loss.value for loss in lora.loss_fn(models, batch, rng, cfg)]

        # train_text_to_image_lora(_sdxl).py, with their names.
        noise_scheduler = DDPMScheduler.from_pretrained(built[kind], subfolder="scheduler")
        if cfg.lora.prediction_type:
            noise_scheduler.register_to_config(prediction_type=cfg.lora.prediction_type)
        vae, unet = models["vae"], models["unet"]
        posterior = vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * rng.normal("posterior", 4, 8, 8)) * vae.config.scaling_factor
        noise = rng.normal("noise", 4, 8, 8)
        noise += cfg.lora.noise_offset * rng.normal("noise offset", 4, 1, 1)
        new_noise = noise + cfg.lora.input_perturbation * rng.normal("input perturbation", 4, 8, 8)
        timesteps = rng.integers("timestep", noise_scheduler.config.num_train_timesteps)
        if kind == "v" and not settings:
            timesteps[0] = 999  # nothing but noise: the formula must hold there too
            a = stable_diffusion.alphas_cumprod(cfg.lora, "cpu")[timesteps]
            assert a[0] == 0 and torch.equal(diffusion.target("v_prediction", latents, noise, a)[0], -latents[0])
            return
        noisy_latents = noise_scheduler.add_noise(latents, new_noise, timesteps)
        pipe = DiffusionPipeline.from_pretrained(built[kind])
        if kind == "sdxl":
            embeds, _, pooled, _ = pipe.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
            add_time_ids = torch.tensor([[36, 48, 0, 5, 32, 32]] * size)
            added = {"time_ids": add_time_ids, "text_embeds": pooled}
            model_pred = unet(noisy_latents, timesteps, embeds, added_cond_kwargs=added).sample
        else:
            embeds, _ = pipe.encode_prompt(texts, "cpu", 1, False)
            model_pred = unet(noisy_latents, timesteps, embeds).sample
        kind_of = noise_scheduler.config.prediction_type
        target = noise if kind_of == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps)
        if cfg.lora.snr_gamma is None:
            theirs = torch.nn.functional.mse_loss(model_pred.float(), target.float(), reduction="mean")
        else:
            snr = compute_snr(noise_scheduler, timesteps)
            weights = torch.stack([snr, cfg.lora.snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
            weights = weights / snr if kind_of == "epsilon" else weights / (snr + 1)
            loss = torch.nn.functional.mse_loss(model_pred.float(), target.float(), reduction="none")
            theirs = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_zero_terminal_snr_is_finite_and_refused_for_epsilon(built, photos):
    """At a = 0 every weight is a number; a model of the noise is told that it cannot learn there."""
    a = torch.tensor([0.0, 1e-8, 0.5, 0.999])
    for kind, first in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        weight = diffusion.loss_weight(kind, a, 5.0)
        assert weight.isfinite().all() and weight[0] == first
    with pytest.raises(BadInput, match="zero-terminal-SNR"):
        config(built["v"], photos, prediction_type="epsilon")
    with pytest.raises(BadInput, match="zero-terminal-SNR"):
        config(built["sd"], photos, rescale_betas_zero_snr=True)
    assert stable_diffusion.scheduler(config(built["v"], photos).lora).config.prediction_type == "v_prediction"


def test_an_absent_caption_is_what_the_pipeline_makes_of_it(built, photos):
    """Dropped captions train what guidance compares with: zeros in SDXL, the empty caption in Stable Diffusion."""
    for kind in ("sd", "sdxl"):
        cfg = config(built[kind], photos)
        with torch.no_grad():
            ours = text_to_image.encode_captions(lora.make_models(cfg), ["a dog", ""], cfg)
        pipe = DiffusionPipeline.from_pretrained(built[kind])
        theirs = pipe.encode_prompt("a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        assert torch.allclose(ours["prompt_embeds"], torch.cat(theirs[:2]), atol=1e-6)
        if kind == "sdxl":
            assert torch.allclose(ours["pooled_prompt_embeds"], torch.cat(theirs[2:]), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What trains, and how.


def test_only_adapters_train_in_float32_on_a_bf16_base(tmp_path, built, photos):
    """The base is bfloat16 and bit for bit what it was; adapters, averages and moments are float32, and all that is saved."""

    def run():
        cfg = command_line.parse(
            command(tmp_path, built["sd"], photos, base__mixed_precision="bf16", lora__train_text_encoder=True)
        )[1]
        state = loop.run(lora.task, cfg)
        before = stable_diffusion.load(cfg.lora, "lora", ("unet", "text_encoder"))
        for name, module in before.items():
            old, seen = dict(module.named_parameters()), 0
            for key, p in state.models[name].named_parameters():
                if p.requires_grad:
                    assert "lora_" in key and p.dtype == torch.float32
                else:
                    seen += 1
                    assert p.dtype == torch.bfloat16 and torch.equal(p, old[key.replace(".base_layer", "")].bfloat16())
            assert seen == len(old)
        assert all(x.dtype == torch.float32 for x in state.ema.values()) and state.ema

    in_fork(tmp_path, run)
    saved = tensors(tmp_path / "out")
    assert all("lora_" in key or key.startswith("optimizer") for key in saved), list(saved)
    assert all(x.dtype == torch.float32 for key, x in saved.items() if "lora_" in key or "exp_avg" in key)


def test_clipping_clips(tmp_path, built, photos):
    """With plain gradient descent at rate 1, an update is as long as max_grad_norm allows."""

    def patch():
        def make_optim(models, cfg):
            params = {f"model/{name}": p for name, p in models["unet"].named_parameters() if p.requires_grad}
            torch.save({name: p.detach().clone() for name, p in params.items()}, tmp_path / "before.pt")
            return {"lora": torch.optim.SGD(params.values(), lr=1.0)}

        lora.task = replace(lora.task, make_optim=make_optim)

    line = command(tmp_path, built["sd"], photos, base__max_train_steps=1, base__max_grad_norm=1e-3, base__use_ema=False)
    assert cli(tmp_path, *line, patch=patch).code == 0
    before, after = torch.load(tmp_path / "before.pt"), tensors(tmp_path / "out")
    moved = sum((x - after[key]).square().sum() for key, x in before.items()).sqrt()
    assert metrics(tmp_path / "out")[-1]["grad_norm"] > 1e-2
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_adapters_learn_a_picture(tmp_path, built, photos):
    """One captioned image: the loss falls with the adapters on, and is what it was with them off."""
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(photos / "0.png", one)
    (one / "0.txt").write_text(CAPTIONS[0])
    layers = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv1",
        "conv2",
        "conv_in",
        "conv_out",
        "linear_1",
        "linear_2",
        "time_emb_proj",
    )

    def run():
        line = command(tmp_path, built["sd"], one, base__max_train_steps=70, data__train_batch_size=1, base__use_ema=False)
        line += flags("", {"lora.target_modules": layers, "lora.rank": 16, "lora.adam_weight_decay": 0.0})[1:]
        cfg = command_line.parse(line)[1]
        state, models = loop.run(lora.task, cfg), lora.make_models(cfg)
        examples = data.Examples(sources.open_source(cfg.data), cfg.data, 0)
        batch = data.to_device(next(data.Fixed(examples, 1, "cpu").__iter__()), "cpu")
        batch = encodings.encode(lora.task.encodings, models, batch, cfg)
        batch = {k: v.repeat(64, *[1] * (v.ndim - 1)) for k, v in batch.items() if torch.is_tensor(v)}

        def loss():
            with torch.no_grad():
                return next(lora.loss_fn(models | state.models, batch, Rng.of(9, range(64)), cfg)).value.item()

        on = loss()
        state.models["unet"].disable_adapters()
        off = loss()
        state.models = {}
        assert off == pytest.approx(loss(), rel=1e-5)  # a fresh model: its adapters add nothing yet
        assert on < 0.5 * off, (on, off)

    in_fork(tmp_path, run)


def test_continued_is_equal_and_layouts_agree(tmp_path, built, photos):
    """Weights, averages, text encoders: a run that stopped equals one that did not; processes share the work and the result."""
    more = {
        "lora__train_text_encoder": True,
        "lora__learning_rate": 1e-3,
        "data__caption_dropout": 0.2,
        "data__random_flip": True,
    }
    alone, model = more | {"lora__dropout": 0.2, "base__checkpointing_steps": 1}, built["sdxl"]
    trained(tmp_path, model, photos, "whole", **alone)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    assert "resuming after step 3" in trained(tmp_path, model, photos, "part", **alone).err
    names = tensors(tmp_path / "part")
    assert digest(tmp_path / "part") == digest(tmp_path / "whole")
    assert any(key.startswith("ema/text_encoder_2") for key in names) and any(key.startswith("model_2/") for key in names)
    steady = more | {"lora__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    # Two text encoders beside the UNet: every adapter of each must get a gradient, or DDP waits for it.
    trained(tmp_path, model, photos, "one", data__train_batch_size=4, **steady)
    for result in cli_many(tmp_path, 2, *command(tmp_path, model, photos, "two", **steady)):
        assert result.code == 0, result.err
    for part in ("model/", "model_1/", "model_2/", "ema/"):
        assert 0 < distance(tmp_path / "one", tmp_path / "two", part) < 1e-6


def test_gradient_checkpointing_changes_nothing(tmp_path, built, photos):
    """Recomputed activations give the same gradients, in the text encoder too."""
    for out, recompute in (("a", False), ("b", True)):
        more = {"lora__train_text_encoder": True, "base__gradient_checkpointing": recompute, "lora__dropout": 0.1}
        trained(tmp_path, built["sd"], photos, out, **more)
    assert distance(tmp_path / "a", tmp_path / "b") < 1e-5
    assert distance(tmp_path / "a", tmp_path / "b", "model_1") < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Encode once.


def marks_in(folder):
    """Values in the shards of the folders that are called so."""
    return sum(len(load_file(path)["marks"]) for path in folder.parent.glob(f"{folder.name}/*.safetensors"))


def test_the_cache_changes_nothing(tmp_path, built, photos, kind="sdxl"):
    """With it and without it the same losses; in it each image, each mirrored image and each caption once."""
    more = {"data__random_flip": True, "data__caption_dropout": 0.3, "data__center_crop": True, "base__logging_steps": 1}
    more["lora__learning_rate"] = 1e-3  # AdamW makes a step of this size of a rounding error
    on = trained(tmp_path, built[kind], photos, "on", **more)
    off = trained(tmp_path, built[kind], photos, "off", data__example_cache="no", **more)
    assert "encoding pixel_values once: 8 of 8" in on.err and "encoding caption once: 5 of 5" in on.err
    assert "encoding" not in off.err and "pixel_values [" in off.err and "latent_mean [" in on.err
    assert marks_in(tmp_path / "on" / "examples" / "pixel_values-*") == 8
    assert marks_in(tmp_path / "on" / "examples" / "caption-*") == 5
    read = trained(tmp_path, built[kind], photos, "read", data__memory_budget=0, **more)  # from the disk for every batch
    assert "encoding caption once: 5 of 5" in read.err and digest(tmp_path / "read") == digest(tmp_path / "on")
    for a, b in zip(metrics(tmp_path / "on"), metrics(tmp_path / "off"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert distance(tmp_path / "on", tmp_path / "off") < 1e-5


def test_the_cache_heals_and_notices(tmp_path, built, photos):
    """Shared by runs and processes; damaged and missing entries are made anew, and so is what a changed image needs."""
    mine = draw_photos(tmp_path / "mine")
    more = {"data__example_cache": tmp_path / "cache", "data__center_crop": True}
    for result in cli_many(tmp_path, 2, *command(tmp_path, built["sd"], mine, "a", data__train_batch_size=1, **more)):
        assert result.code == 0, result.err
    shards = sorted((tmp_path / "cache").glob("pixel_values-*/*.safetensors"))
    assert len(shards) == 2 and {path.stat().st_mode & 0o777 for path in shards} == {0o666 & shards[0].parent.stat().st_mode}
    content = [path.read_bytes() for path in shards]
    torn, turned = (len(load_file(path)["marks"]) for path in shards)
    shards[0].write_bytes(content[0][: len(content[0]) // 2])  # a torn write
    start = 8 + int.from_bytes(content[1][:8], "little")  # behind the header, where the values lie
    flipped = bytes([content[1][start] ^ 1])  # found when it is read
    shards[1].write_bytes(content[1][:start] + flipped + content[1][start + 1 :])
    damaged = cli(tmp_path, *command(tmp_path, built["sd"], mine, "b", **more | {"data__train_batch_size": 1}))
    assert damaged.code == 2 and f"{shards[1]} is not what was written" in damaged.err, damaged.err
    assert f"encoding pixel_values once: {torn} of 4" in damaged.err and "encoding caption" not in damaged.err
    again = trained(tmp_path, built["sd"], mine, "b", **more | {"data__train_batch_size": 1})
    assert f"encoding pixel_values once: {turned} of 4" in again.err and "encoding caption" not in again.err
    Image.open(mine / "1.png").rotate(180).save(mine / "1.png")
    (mine / "2.txt").write_text("the yellow circle")
    changed = trained(tmp_path, built["sd"], mine, "c", **more)
    assert "encoding pixel_values once: 1 of 4" in changed.err and "encoding caption once: 1 of 4" in changed.err
    other = shutil.copytree(built["sd"], tmp_path / "other")
    weights = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"] += 0.1
    save_file(weights, other / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    moved = trained(tmp_path, other, mine, "d", **more)
    assert "encoding pixel_values once: 4 of 4" in moved.err and "encoding caption" not in moved.err


def test_what_is_cut_at_random_is_encoded_in_the_step(tmp_path, built, photos):
    """Without a central crop only the captions are cached; models that nothing else calls are dropped or become idle."""

    def run(more, idle):
        def function():
            seen, moves, dropped, real, placed = [], [], [], encodings.encode_once, encodings.place
            encodings.place = lambda models, *given: dropped.extend(models) or placed(models, *given)
            encodings.encode_once = lambda *args: seen.append(real(*args)) or seen[-1]
            loop.move = showing.move = lambda models, names, device: moves.append((names, device))
            cfg = command_line.parse(
                command(tmp_path, built["sd"], photos, f"out{len(str(more))}", base__max_train_steps=1, **more)
            )[1]
            loop.run(lora.task, cfg)
            assert seen == [idle], seen
            assert dropped == ["text_encoder"] * ("train_text_encoder" not in str(more))
            run_on = torch.device("cpu")  # as the accelerator says it: away, back for the samples at the end, away
            assert [names for names, _ in moves] == [idle] * 3 and [type(d) for _, d in moves] == [str, type(run_on), str]

        in_fork(tmp_path, function)

    run({"data__center_crop": False}, set())
    run({"data__center_crop": True}, {"vae"})
    run({"data__center_crop": False, "lora__train_text_encoder": True}, set())


def test_validation_encodes_as_the_step_does(tmp_path, built, photos):
    """With the encoders idle after caching, or at work in every step: the same number."""
    (folder := tmp_path / "many").mkdir()
    for i in range(4, 24):
        shutil.copy(photos / f"{i % 4}.png", folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 4])
    common = {"base__max_train_steps": 1, "data__validation_split": "0.4", "lora__learning_rate": 0}
    found = []
    for cache in ("auto", "no"):
        trained(tmp_path, built["sd"], folder, f"out-{cache}", data__example_cache=cache, **common)
        found.append(next(m for m in metrics(tmp_path / f"out-{cache}") if "validation/loss" in m))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and 0.5 < found[0]["validation/loss_ema"] < 2


def test_captions_and_sizes(tmp_path, photos):
    """The trigger stands in front, dropout empties a keyed share, and size and corner are those of the upright image."""
    cfg = Data(train_data_dir=str(photos), resolution=32, train_batch_size=2, trigger="sks", caption_dropout=0.5)
    examples = data.Examples(sources.open_source(cfg), cfg, 0)
    texts = [
        text for batch in map(examples.__getitem__, (range(n, n + 50) for n in range(0, 200, 50))) for text in batch["caption"]
    ]
    assert set(texts) == {"", *(f"sks {caption}" for caption in CAPTIONS)} and 60 < texts.count("") < 140
    assert texts[150:] == examples[range(150, 200)]["caption"]
    plain = tmp_path / "plain"
    plain.mkdir()
    tall = Image.new("RGB", (64, 48))
    tall.putpixel((0, 0), (255, 0, 0))
    exif = tall.getexif()
    exif[0x0112] = 6  # lies on its side
    tall.save(plain / "a.jpg", exif=exif)
    cfg = Data(train_data_dir=str(plain), resolution=24, train_batch_size=1, trigger="a dog", center_crop=True)
    batch = data.Examples(sources.open_source(cfg), cfg, 0)[range(1)]
    assert batch["caption"] == ["a dog"] and batch["original_size"].tolist() == [[64, 48]]
    assert batch["crop_top_left"].tolist() == [[4, 0]]  # 32 x 24, cut in the middle
    cfg = Data(num_shapes=8, resolution=8, train_batch_size=2, trigger="{label}:")
    source = sources.open_source(cfg)
    assert all(
        text.startswith(f"{list(shapes.SHAPES)[k]}: a ") for (text,), k in zip(source.captions, source.labels, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Samples and exports.


def picture(pipe, count=2):
    """What the run's grid shows, drawn by a loaded pipeline."""
    pipe.set_progress_bar_config(disable=True)
    generators = Rng.of(0, range(count), "samples").generators("sample")
    prompts = ["a photo of sks dog", "the blue square"]
    images = pipe(
        prompts, generator=generators, num_inference_steps=4, guidance_scale=3.0, height=32, width=32, output_type="np"
    ).images
    return np.concatenate([np.asarray(image) for image in images], 1) * 255


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_the_export_gives_the_pictures_of_the_run(tmp_path, built, photos, kind):
    """load_lora_weights, from the export, from a checkpoint and from the kohya form: the training-time sample."""
    more = {"lora__train_text_encoder": True, "lora__alpha": 7.0, "lora__use_rslora": True, "lora__kohya": True}
    asked = {"lora__validation_prompts": ("a photo of sks dog", "the blue square"), "lora__guidance_scale": 3.0}
    steps = {"lora__num_inference_steps": 4, "base__max_train_steps": 12, "lora__text_encoder_learning_rate": 2e-2}
    result = trained(tmp_path, built[kind], photos, **more, **asked, **steps)
    wanted = shown(tmp_path / "out" / "samples" / "12.png", 32)
    export = tmp_path / "out" / "export"
    assert f"path = {str(export)!r}" in result.out + result.err
    bare = DiffusionPipeline.from_pretrained(built[kind])
    assert np.abs(picture(bare) - wanted).max() > 12
    places = [(export, adapters.WEIGHTS), (tmp_path / "out" / "checkpoint-12", None), (export, adapters.KOHYA)]
    for folder, name in places:
        pipe = DiffusionPipeline.from_pretrained(built[kind])
        pipe.load_lora_weights(folder, **({"weight_name": name} if name else {}))
        assert np.abs(picture(pipe) - wanted).max() <= 1.01, (folder, name)
    for layer in filter(lambda m: isinstance(m, BaseTunerLayer), pipe.text_encoder.modules()):
        layer.enable_adapters(False)
    assert np.abs(picture(pipe) - wanted).max() > 2  # the text encoder's part is no formality
    with safe_open(export / adapters.WEIGHTS, "pt") as file:
        about = file.metadata()
    assert json.loads(about["lora_adapter_metadata"])["unet.lora_alpha"] == 7.0
    assert json.loads(about["oneloop"])["lora"]["rank"] == 4


def test_dora_loads(tmp_path, built, photos):
    """The lengths of a DoRA are in the export too."""
    asked = {"lora__validation_prompts": ("a photo of sks dog", "the blue square"), "lora__guidance_scale": 3.0}
    trained(tmp_path, built["sd"], photos, lora__use_dora=True, lora__num_inference_steps=4, **asked)
    wanted = shown(tmp_path / "out" / "samples" / "4.png", 32)
    pipe = DiffusionPipeline.from_pretrained(built["sd"])
    pipe.load_lora_weights(tmp_path / "out" / "export")
    assert np.abs(picture(pipe) - wanted).max() <= 1.01


def test_loading_lines_run(tmp_path, built, photos):
    """The lines that the run prints are the ones that load it, for a schedule told otherwise too."""
    more = {"lora__prediction_type": "v_prediction", "lora__rescale_betas_zero_snr": "True", "base__max_train_steps": 1}
    trained(tmp_path, built["sd"], photos, **more)
    code = load_lines(tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-1")

    def run():
        with contextlib.chdir(tmp_path):
            scope = {}
            exec(code, scope)
            scheduler = scope["pipeline"].scheduler.config
            assert scheduler.prediction_type == "v_prediction" and scheduler.timestep_spacing == "trailing"

    in_fork(tmp_path, run)
    assert (tmp_path / "sample.png").exists()


def test_an_autoencoder_of_ones_own(tmp_path, built, photos):
    """The export of the task `vae` in the place of the checkpoint's: its latents, its images, its line to load."""
    small = {
        "vae.pretrained_model_name_or_path": built["sd"] / "vae",
        "vae.disc_weight": 0.0,
        "vae.learning_rate": 0.05,
        "base.logger": "none",
    }
    size = {"data.resolution": 32, "data.train_batch_size": 4, "base.num_samples": 1, "base.max_train_steps": 6}
    place = {"data.train_data_dir": photos, "base.output_dir": tmp_path / "vae"}
    assert cli(tmp_path, *flags("vae", small | size | place)).code == 0
    own = tmp_path / "vae" / "export"
    more = {"lora__pretrained_vae_model_name_or_path": own, "lora__guidance_scale": 3.0, "lora__num_inference_steps": 4}
    asked = {"lora__validation_prompts": ("a photo of sks dog", "the blue square")}
    trained(tmp_path, built["sd"], photos, **more, **asked)
    cfg = config(built["sd"], photos, pretrained_vae_model_name_or_path=str(own))
    models = lora.make_models(cfg)
    assert models["vae"].config.scaling_factor == AutoencoderKL.load_config(own)["scaling_factor"] != 0.5
    wanted = shown(tmp_path / "out" / "samples" / "4.png", 32)
    for theirs in (True, False):
        other = {"vae": AutoencoderKL.from_pretrained(own)} if theirs else {}
        pipe = DiffusionPipeline.from_pretrained(built["sd"], **other)
        pipe.load_lora_weights(tmp_path / "out" / "export")
        assert (np.abs(picture(pipe) - wanted).max() <= 1.01) == theirs
    lines = (tmp_path / "out" / "checkpoint-4" / "load.py").read_text()
    assert f"vae = AutoencoderKL.from_pretrained('{own}')" in lines and "vae=vae)" in lines


@pytest.mark.skipif(not (SHARED / "dog").is_dir(), reason="the photographs of ../shared/data/dog are not here")
def test_five_photographs(tmp_path, built):
    """Real captioned photographs, captions too long for the tiny encoder: said once."""
    result = trained(tmp_path, built["sd"], SHARED / "dog", base__num_epochs=1, base__max_train_steps=None)
    assert result.err.count("captions are longer than the 16 tokens") == 1 and "5 of 5 captions" in result.err
    assert "peak memory" in result.err and "lasts from step to step" in result.err


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2.


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lora__rank": 0}, "--lora.rank is 0; expected at least 1"),
        ({"data__resolution": 30}, "--data.resolution is 30; expected a multiple of 4, by which its VAE divides"),
        ({"lora__target_modules": ("to_q", "to_ou")}, "'to_ou' is the end of no layer's name; the nearest is 'to_out.0'"),
        ({"lora__optimizer": "muon", "lora__use_8bit_adam": True}, "'muon'; expected adamw8bit beside --lora.use-8bit-adam"),
        ({"lora__kohya": True, "lora__use_dora": True}, "leave one out"),
        ({"lora__validation_prompts": ("a", "b", "c")}, "--base.num-samples is 2; expected at least 3"),
        ({"model": "photos"}, "not a diffusers model"),
        ({"model": "nowhere"}, "not a diffusers model"),
        (
            {"model": "nobody/nothing"},
            "--lora.pretrained-model-name-or-path nobody/nothing: the hub is not asked, since HF_HUB_OFFLINE",
        ),
        ({"data__example_cache": "/dev/null/cache"}, "--data.example-cache: /dev/null/cache"),
        (
            {"model": "pixart"},
            "is a PixArtSigmaPipeline; expected one of StableDiffusionPipeline, StableDiffusionXLPipeline, ZImage",
        ),
        ({"lora__flow_shift": 3.0}, "--lora.flow-shift is 3.0: a StableDiffusionPipeline has no use for it; leave it out"),
        ({"model": "inpainting"}, "its UNet takes 9 channels, its VAE gives 4"),
        ({"lora__variant": "fp16"}, "--lora.variant fp16"),
        ({"lora__pretrained_vae_model_name_or_path": "/dev/null"}, "/dev/null: not an autoencoder"),
        ({"lora__pretrained_vae_model_name_or_path": "nobody/nothing"}, "nobody/nothing: the hub is not asked"),
        ({"data": "bare"}, "needs a caption for each image and found none"),
        ({"data__caption_dropout": 1.5}, "--data.caption-dropout is 1.5"),
        ({"data__trigger": "{label}"}, "the images have no labels"),
    ],
)
def test_bad_input(tmp_path, built, photos, change, says):
    change, model, pictures = dict(change), built["sd"], photos
    wrong = change.pop("model", None)
    if wrong == "photos":
        model = photos
    elif wrong == "nobody/nothing":
        model = wrong
    elif wrong == "nowhere":
        model = tmp_path / "nowhere"
    elif wrong:
        model = shutil.copytree(built["sd"], tmp_path / wrong)
        if wrong == "pixart":
            tiny_models.edit(model / "model_index.json", _class_name="PixArtSigmaPipeline")
        else:
            tiny_models.edit(model / "unet" / "config.json", in_channels=9)
    if change.pop("data", None):
        pictures = tmp_path / "bare"
        pictures.mkdir()
        for i in range(2):
            shutil.copy(photos / f"{i}.png", pictures)
    loaded = lambda: setattr(stable_diffusion, "load", lambda *args: pytest.fail("weights were loaded"))  # noqa: E731
    late = "variant" in says or "example-cache" in says
    early = loaded if not late else lambda: None
    result = cli(tmp_path, *command(tmp_path, model, pictures, **change), patch=early)
    assert result.code == 2 and says in result.err, (result.code, result.err)
    assert result.err.strip().splitlines()[-1].startswith("error: ")
    assert "example-cache" in says or not (tmp_path / "out").exists()


def broken(folder, how):
    """Break a copy of a checkpoint in one way."""
    index, weights = folder / "model_index.json", "diffusion_pytorch_model.safetensors"
    if how == "list":
        (folder / "unet" / "config.json").write_text("[]")
    elif how == "junk":
        (folder / "unet" / weights).write_bytes(b"junk" * 100)
    elif how == "half":
        state = load_file(folder / "unet" / weights)
        save_file({k: v for k, v in state.items() if "conv_in" not in k}, folder / "unet" / weights, {"format": "pt"})
    elif how == "other shapes":
        state = load_file(folder / "vae" / weights)
        save_file({k: v.repeat(*[2] * v.ndim) for k, v in state.items()}, folder / "vae" / weights, {"format": "pt"})
    elif how == "scheduler":
        tiny_models.edit(folder / "scheduler" / "scheduler_config.json", _class_name="NoScheduler")
    elif how == "no class":
        tiny_models.edit(folder / "scheduler" / "scheduler_config.json", _class_name=None)
    elif how == "betas":
        tiny_models.edit(folder / "scheduler" / "scheduler_config.json", beta_start="high")
    elif how == "library":
        tiny_models.edit(index, unet=["evil", "Model"])
    elif how == "pair":
        tiny_models.edit(index, unet=7)
    elif how == "blocks":
        tiny_models.edit(folder / "unet" / "config.json", block_out_channels=[0, 0])
    elif how == "channels":
        tiny_models.edit(folder / "vae" / "config.json", block_out_channels=7)
    elif how == "tokenizer":
        for path in (folder / "tokenizer").iterdir():
            path.write_text("{")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("list", "unet/config.json holds a list, not an object"),
        ("junk", "unet cannot be loaded"),
        ("half", "of its weights are missing, such as conv_in"),
        ("other shapes", "vae cannot be loaded"),
        ("scheduler", "NoScheduler"),
        ("no class", "not a diffusers model"),
        ("betas", "not a diffusers model"),
        ("library", "unet is a Model of 'evil'; expected a class of models of diffusers or transformers"),
        ("pair", "not a diffusers model"),
        ("blocks", "unet cannot be loaded"),
        ("channels", "not a diffusers model"),
        ("tokenizer", "not a diffusers model"),
    ],
)
def test_a_broken_checkpoint_is_a_line(tmp_path, built, photos, how, says):
    model = shutil.copytree(built["sd"], tmp_path / "model")
    broken(model, how)
    (tmp_path / "evil.py").write_text("open('imported', 'w')")
    result = cli(tmp_path, *command(tmp_path, model, photos))
    line = result.err.strip().splitlines()[-1]
    assert result.code == 2 and says in line and line.startswith(f"error: --lora.pretrained-model-name-or-path {model}"), (
        result.err
    )
    assert len(line) < 1000 and not (tmp_path / "out").exists() and not (tmp_path / "imported").exists()
