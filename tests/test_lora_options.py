"""What `lora` offers beside the plain adapter: patterns, a given LoRA, LoKr, preservation, sample prompts, merging, files."""

import hashlib
import importlib.util
import re
import shlex
import types
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import draw_photos
from test_lora_families import CAPTIONS, NAMES, SIDE, command, config, encoded
from warm import ROOT, SHARED, cli, cli_many, distance, flags, shown

from oneloop import configs
from oneloop.configs import BadInput
from oneloop.families import adapters, flow, objective, prompts, text_to_image, transformer
from oneloop.maths import flow as maths
from oneloop.settings import command_line
from oneloop.tasks import Rng, lora

WEIGHTS = "pytorch_lora_weights.safetensors"
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"))


def made(cfg, std=0.3):
    """The models of a run, whose adapters are large numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = lora.make_models(cfg)
        torch.manual_seed(0)
        for module in models.values():
            for p in module.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, std=std)
    return models


def exported(models, cfg, folder):
    folder.mkdir(exist_ok=True)
    lora.export_fn(models, [{"caption": CAPTIONS[:1]}], folder, cfg)
    return folder


def drawn(models, cfg, count=1, examples=CAPTIONS):
    with torch.no_grad():
        return text_to_image.sample_fn(models, [{"caption": examples[:count]}], Rng.of(0, range(count), "samples"), cfg)[
            "samples"
        ]


def metadata(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------------------------------------------------------
# Which layers, with which ranks, alphas and learning rates.


def test_targets_are_ends_patterns_or_all():
    net = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"to_q": torch.nn.Linear(1, 1), "into_q": torch.nn.Linear(1, 1)})})
    net["to_q"], net["conv"] = torch.nn.Linear(1, 1), torch.nn.Conv2d(1, 1, 1)
    for targets, names in (
        (("to_q",), ["a.to_q", "to_q"]),
        ((r"a\..*",), ["a.to_q", "a.into_q"]),
        ((r"to.q", "conv"), ["to_q", "conv"]),
        (("all-linear",), ["a.to_q", "a.into_q", "to_q"]),
    ):
        got = adapters.layers(net, targets)
        assert sorted(got) == sorted(names) or targets == ((r"to.q", "conv")), (targets, got)


def test_ranks_alphas_and_learning_rates_follow_patterns(built, tmp_path):
    """The export loads with them, and moves a fresh pipeline as it moved training's."""
    patterns = {"rank_pattern": ("to_q=3", r".*\.to_.*=2"), "alpha_pattern": ("to_k=5",)}
    rates = ("to_q=1e-3", "to_v=0")
    cfg = config(built("FluxPipeline"), rank=4, learning_rate=1e-4, learning_rate_pattern=rates, **patterns)
    models = made(cfg)
    layers = adapters.tuned(models["transformer"])
    for name, layer in layers.items():
        end = name.rpartition(".")[2] if not name.endswith(".0") else name.split(".")[-2]
        rank = 3 if end == "to_q" else 2 if end.startswith("to_") else 4
        alpha = 5 if end == "to_k" else rank
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha), name
    groups = lora.make_optim(models, cfg)["lora"].param_groups
    counts = {group["lr"]: len(group["params"]) for group in groups}
    of = lambda end: 2 * sum(name.endswith(end) for name in layers)  # noqa: E731
    assert counts == {1e-3: of("to_q"), 0.0: of("to_v"), 1e-4: 2 * len(layers) - of("to_q") - of("to_v")}
    fresh = diffusers.DiffusionPipeline.from_pretrained(built("FluxPipeline"))
    fresh.load_lora_weights(exported(models, cfg, tmp_path))
    again = transformer.sample(
        fresh.components, cfg.lora, CAPTIONS[:1], Rng.of(0, range(1), "samples").generators("sample"), SIDE, SIDE
    )
    torch.testing.assert_close(again, drawn(models, cfg), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("FluxPipeline", {"rank_pattern": ("to_q=0",)}, "--lora.rank-pattern 'to_q=0': expected TARGET=NUMBER"),
        ("FluxPipeline", {"rank_pattern": ("to_q=2.5",)}, "with a number of at least 1"),
        ("FluxPipeline", {"alpha_pattern": ("=4",)}, "--lora.alpha-pattern '=4'"),
        ("FluxPipeline", {"learning_rate_pattern": ("(=1",)}, "--lora.learning-rate-pattern '(=1'"),
        (
            "FluxPipeline",
            {"rank_pattern": ("to_z=4",)},
            "--lora.rank-pattern: 'to_z' is the end of no layer's name; the nearest",
        ),
        ("FluxPipeline", {"target_modules": (r"blocks\..*",)}, r"'blocks\\..*' is the name of no layer"),
        (
            "FluxPipeline",
            {"use_lokr": True},
            "reads no LoKr; expected one of ZImagePipeline, Flux2KleinPipeline, Flux2Pipeline",
        ),
        ("sd", {"use_lokr": True}, "the loader of a StableDiffusionPipeline reads no LoKr"),
        ("ZImagePipeline", {"use_lokr": True, "dropout": 0.1}, "--lora.use-lokr with --lora.dropout: they do not go together"),
        ("ZImagePipeline", {"init_lora": "x", "alpha": 3.0}, "--lora.init-lora with --lora.alpha"),
        ("ZImagePipeline", {"init_lora": "nowhere"}, "--lora.init-lora nowhere: cannot be loaded into a ZImagePipeline"),
        (
            "sd",
            {"use_dora": True, "validation_prompts": ("a --strength 0.5",)},
            "--lora.use-dora with a sample at strength 0.5",
        ),
        ("SanaPipeline", {"kohya": True}, "no names known here for a SanaPipeline"),
        ("sd", {"density": "mode"}, "--lora.density is 'mode': a StableDiffusionPipeline has no use for it"),
    ],
)
def test_options_that_do_not_fit_are_a_line(built, name, settings, says):
    with pytest.raises(BadInput) as refused:
        lora.make_models(config(built(name), **settings))
    assert says in str(refused.value) and "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of adapters, and adapters from a file.


@pytest.mark.parametrize("name", NAMES)
def test_families_say_whether_their_loader_reads_lokr(built, name):
    pipe = flow.assemble(name, {})
    state = {"transformer.x.lokr_w1": torch.zeros(1), "transformer.x.lokr_w2": torch.zeros(1)}
    seen = types.SimpleNamespace(load_lora_adapter=lambda *args, **more: None)
    reads = hasattr(pipe, "load_lora_weights")
    if reads:
        pipe.load_lora_into_transformer = lambda *args, **more: seen.__dict__.update(got=True)
        pipe.transformer = torch.nn.Linear(1, 1)
        try:
            pipe.load_lora_weights(state)
        except ValueError as error:
            assert "lora" in str(error).lower()
    assert hasattr(seen, "got") == flow.of(name).lokr


@pytest.mark.parametrize("name", ["ZImagePipeline", "Flux2KleinPipeline"])
def test_lokr_trains_and_loads(built, tmp_path, name):
    cfg = config(built(name), use_lokr=True, lokr_factor=4, alpha=3.0)
    models = made(cfg)
    next(lora.loss_fn(models, encoded(models, cfg), Rng.of(0, range(2)), cfg)).value.backward()
    trained = {key: p for key, p in models["transformer"].named_parameters() if p.requires_grad}
    assert trained and all(".lokr_" in key and p.grad.any() for key, p in trained.items())
    fresh = diffusers.DiffusionPipeline.from_pretrained(built(name))
    rng = Rng.of(0, range(1), "samples")
    bare = transformer.sample(fresh.components, cfg.lora, CAPTIONS[:1], rng.generators("sample"), SIDE, SIDE)
    fresh.load_lora_weights(exported(models, cfg, tmp_path))
    loaded = transformer.sample(fresh.components, cfg.lora, CAPTIONS[:1], rng.generators("sample"), SIDE, SIDE)
    ours = drawn(models, cfg)
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-4)
    assert (bare - ours).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "FluxPipeline", "HunyuanImagePipeline", "Flux2KleinPipeline"])
def test_a_run_starts_from_a_given_lora(built, tmp_path, name):
    """Its layers, ranks and alphas are the file's, and so is what it draws; a further export has the same numbers."""
    kinds = {"sdxl": {"use_rslora": True}, "FluxPipeline": {"use_dora": True}, "Flux2KleinPipeline": {"use_lokr": True}}
    text = {"train_text_encoder": True} if name == "sdxl" else {}
    first = config(built(name), rank=3, alpha=5.0, **kinds.get(name, {}), **text)
    models = made(first)
    folder = exported(models, first, tmp_path / "one")
    second = config(built(name), init_lora=str(folder), **text)
    started = lora.make_models(second)
    for part in models:
        wanted = {key: p for key, p in models[part].named_parameters() if p.requires_grad}
        got = {key: p for key, p in started[part].named_parameters() if p.requires_grad}
        assert wanted.keys() == got.keys(), part
        assert all(torch.equal(p, got[key]) for key, p in wanted.items())
    torch.testing.assert_close(drawn(started, second), drawn(models, first), rtol=0, atol=1e-5)
    again = exported(started, second, tmp_path / "two")
    one, two = (load_file(path / WEIGHTS) for path in (folder, again))
    assert one.keys() == two.keys() and all(torch.equal(x, two[key]) for key, x in one.items())
    if text:
        with pytest.raises(BadInput, match=r"has adapters of the text_encoder; add --lora.train-text-encoder"):
            lora.make_models(config(built(name), init_lora=str(folder)))


def test_layers_of_a_given_lora_that_no_gradient_reaches_are_dropped(built, tmp_path):
    """They change nothing: the transformer answers as with all of them."""
    name = "StableDiffusion3Pipeline"
    pipe = diffusers.DiffusionPipeline.from_pretrained(built(name))
    import peft

    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules="|".join(map(adapters.expression, flow.SD3.targets))), pipe.transformer
    )
    state = {f"transformer.{key}": torch.randn_like(x) for key, x in peft.get_peft_model_state_dict(pipe.transformer).items()}
    save_file(state, tmp_path / "some.safetensors")
    cfg = config(built(name), init_lora=str(tmp_path / "some.safetensors"))
    models = lora.make_models(cfg)
    assert "transformer_blocks.1.attn.add_q_proj" in " ".join(lora.task.remarks(models, cfg))
    fresh = diffusers.DiffusionPipeline.from_pretrained(built(name))
    fresh.load_lora_weights(tmp_path, weight_name="some.safetensors")
    loaded = transformer.sample(
        fresh.components, cfg.lora, CAPTIONS[:1], Rng.of(0, range(1), "samples").generators("sample"), SIDE, SIDE
    )
    torch.testing.assert_close(drawn(models, cfg), loaded, rtol=0, atol=1e-4)


def test_a_training_adapter_is_on_in_training_and_off_in_samples_and_exports(built, tmp_path):
    name = "FluxPipeline schnell"
    other = config(built(name), rank=3)
    folder = exported(made(other, std=1.0), other, tmp_path / "assistant")
    plain, cfg = config(built(name)), config(built(name), training_adapter=str(folder))
    alone, both = made(plain), made(cfg)
    trained = {key for key, p in both["transformer"].named_parameters() if p.requires_grad}
    assert trained == {key for key, p in alone["transformer"].named_parameters() if p.requires_grad}
    loss = lambda models, cfg: next(lora.loss_fn(models, encoded(models, cfg), Rng.of(0, range(2)), cfg)).value  # noqa: E731
    assert loss(both, cfg).item() != pytest.approx(loss(alone, plain).item(), rel=1e-3)
    assert torch.equal(drawn(both, cfg), drawn(alone, plain))
    one, two = (load_file(exported(m, c, tmp_path / n) / WEIGHTS) for m, c, n in ((both, cfg, "a"), (alone, plain, "b")))
    assert one.keys() == two.keys() and all(torch.equal(x, two[key]) for key, x in one.items())


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_clip_text_encoders_train_with_the_transformer(built, photos, tmp_path, name):
    """All their adapters get gradients, two processes agree with one, and the export draws what training drew."""
    cfg = config(built(name), train_text_encoder=True)
    models = made(cfg)
    batch = encoded(models, cfg)
    columns = ("prompt_embeds", "pooled_prompt_embeds")
    batch = {key: x for key, x in batch.items() if key not in columns} | {"caption": CAPTIONS[:2]}
    next(lora.loss_fn(models, batch, Rng.of(0, range(2)), cfg)).value.backward()
    trained = {f"{part}.{key}": p for part, m in models.items() for key, p in m.named_parameters() if p.requires_grad}
    assert all(p.grad.any() for p in trained.values())
    encoders = {key.partition(".")[0] for key in trained} - {"transformer"}
    assert encoders == {"text_encoder", "text_encoder_2"} if "3" in name else {"text_encoder"}
    fresh = diffusers.DiffusionPipeline.from_pretrained(built(name))
    fresh.load_lora_weights(exported(models, cfg, tmp_path))
    generators = lambda: Rng.of(0, range(1), "samples").generators("sample")  # noqa: E731
    with torch.no_grad():
        loaded = transformer.sample(fresh.components, cfg.lora, CAPTIONS[:1], generators(), SIDE, SIDE)
        torch.testing.assert_close(loaded, drawn(models, cfg), rtol=0, atol=1e-4)
        part = transformer.sample(
            fresh.components | {"text_encoder": text_to_image.load(cfg, "no")["text_encoder"]},
            cfg.lora,
            CAPTIONS[:1],
            generators(),
            SIDE,
            SIDE,
        )
    assert (part - loaded).abs().max() > 1e-4  # the text encoder's part is no formality
    more = {"lora__train_text_encoder": True, "base__use_ema": False, "base__validate_first": False}
    more |= {"lora__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    assert cli(tmp_path, *command(tmp_path, built(name), photos, "one", **more)).code == 0
    for result in cli_many(tmp_path, 2, *command(tmp_path, built(name), photos, "two", data__train_batch_size=1, **more)):
        assert result.code == 0, result.err
    for part in ("model/", "model_1/"):
        assert 0 < distance(tmp_path / "one", tmp_path / "two", part) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Output preservation.


@pytest.mark.parametrize(("name", "recompute"), [("sdxl", False), ("ZImagePipeline", False), ("HiDreamImagePipeline", True)])
def test_preservation_holds_to_the_base(built, name, recompute):
    """The second loss is the squared distance from what the model without adapters answers to the prompt, 0 before the first
    step; gradients reach the adapters alone."""
    cfg = config(built(name), preservation_weight=0.5, preservation_prompt="a dog")
    fresh = lora.make_models(cfg)
    batch = encoded(fresh, cfg) | {
        "original_size": torch.full((2, 2), 32),
        "crop_top_left": torch.zeros(2, 2),
        "target_size": torch.full((2, 2), 32),
    }
    rng = Rng.of(0, range(2))
    net = text_to_image.family(cfg.lora).TRAINED
    if recompute:
        fresh[net].train().enable_gradient_checkpointing()
    kept, main = lora.loss_fn(fresh, batch, rng, cfg)
    assert kept.value.item() == pytest.approx(0, abs=1e-9) and not kept.step and main.step and kept.name == main.name == "lora"
    models = fresh
    for p in models[net].parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    kept, _ = lora.loss_fn(models, batch, rng, cfg)
    kept.value.backward()
    grads = [p.grad.abs().sum() for p in models[net].parameters() if p.requires_grad and p.grad is not None]
    assert kept.logs["preservation"] * 0.5 == kept.value.detach() and kept.value > 1e-6 and sum(grads) > 0
    with torch.no_grad():  # by hand: the main loss with the base's answer to the prompt as its target
        said = batch | text_to_image.encode_captions(models, ["a dog", "a dog"], cfg)
        bare = lora.make_models(replace(cfg, lora=replace(cfg.lora, preservation_weight=0.0)))[net].eval()
        loss = objective.diffusion_loss if name == "sdxl" else objective.flow_loss
        by_hand = loss(models, said, rng, cfg, bare).mean()
    assert kept.logs["preservation"].item() == pytest.approx(by_hand.item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What an export says of itself.


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("sd", "stable-diffusion-v1"),
        ("sdxl", "stable-diffusion-xl-v1-base"),
        ("FluxPipeline", "flux-1-dev"),
        ("FluxPipeline schnell", "flux-1-schnell"),
        ("ZImagePipeline", "zimage"),
    ],
)
def test_an_export_says_what_it_is(built, tmp_path, name, architecture):
    cfg = config(built(name), save_dtype="bfloat16")
    cfg = replace(cfg, data=replace(cfg.data, trigger="sks dog"), base=replace(cfg.base, output_dir="runs/my-dog"))
    folder = exported(made(cfg), cfg, tmp_path)
    said = {key.removeprefix("modelspec."): x for key, x in metadata(folder).items() if key.startswith("modelspec.")}
    raw = (folder / WEIGHTS).read_bytes()
    content = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert said.pop("hash_sha256") == f"0x{hashlib.sha256(content).hexdigest()}"
    assert said.pop("description").startswith("Adapters of") and said.pop("prediction_type", "epsilon") == "epsilon"
    assert said == {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": "diffusers",
        "title": "my-dog",
        "resolution": f"{SIDE}x{SIDE}",
        "trigger_phrase": "sks dog",
        "usage_hint": "Trigger: sks dog",
    }
    assert {x.dtype for x in load_file(folder / WEIGHTS).values()} == {torch.bfloat16}


def test_comfyui_s_form_has_each_layer_s_alpha(built, tmp_path):
    """Its loader multiplies B A by alpha over the rank, and knows no metadata."""
    cfg = config(built("QwenImagePipeline"), kohya=True, alpha=6.0, use_rslora=True, rank_pattern=("to_q=4",))
    models = made(cfg)
    state = load_file(exported(models, cfg, tmp_path) / adapters.KOHYA)
    for name, layer in adapters.tuned(models["transformer"]).items():
        key = f"transformer.{name}"
        down, up = state.pop(f"{key}.lora_A.weight"), state.pop(f"{key}.lora_B.weight")
        theirs = state.pop(f"{key}.alpha") / len(down) * up @ down
        torch.testing.assert_close(theirs, layer.get_delta_weight("default"))
    assert not state


# ---------------------------------------------------------------------------------------------------------------------
# Sample prompts.


def test_entries_of_sample_prompts(tmp_path):
    told = prompts.read(
        ["a dog -- not --seed 3 --strength 0.5 --negative a cat", '{"prompt": "x", "width": 64}', "plain"], "--f"
    )
    assert told[0] == prompts.Prompt("a dog -- not", "a cat", seed=3, strength=0.5)
    assert told[1] == prompts.Prompt("x", width=64) and told[2] == prompts.Prompt("plain")
    (tmp_path / "p.txt").write_text("# mine\n\n a dog --steps 2 \n  # no\nb\u2028c\x0bd\n{red|blue} car\n", "utf-8")
    entries = prompts.read_file(str(tmp_path / "p.txt"), "--f")
    assert entries == ["a dog --steps 2", "b\u2028c\x0bd", "{red|blue} car"]
    assert prompts.read(entries[2:], "--f") == [prompts.Prompt("{red|blue} car")]
    for text in ("", "# only\n"):
        (tmp_path / "p.txt").write_text(text)
        with pytest.raises(BadInput, match="has no prompt; expected one in each line"):
            prompts.read_file(str(tmp_path / "p.txt"), "--f")
    with pytest.raises(BadInput, match=r"nothing.txt cannot be read"):
        prompts.read_file("nothing.txt", "--f")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("a --steps x", "--f, entry 2: --steps is 'x'; expected a number without a fraction"),
        ("a --steps 0", "--f, entry 2: --steps is 0; expected at least 1"),
        ("a --stepps 2", "--f, entry 2: --stepps is none of negative, width"),
        ("a --seed 1 --seed 2", "--f, entry 2: --seed is given more than once"),
        ("a --width 20", "--f, entry 2: --width is 20; expected a multiple of 16"),
        ("a --guidance nan", "--f, entry 2: --guidance is nan"),
        ("a --reference x.png", "--f, entry 2: --reference: no family draws after a reference image"),
        ('{"prompt": 3}', "--f, entry 2: --prompt is 3; expected text"),
        ('{"prompt": null}', "--f, entry 2: --prompt is None; expected text"),
        ('{"prompt": "a", "seed": true}', "--f, entry 2: --seed is True; expected a number"),
        ('{"seed": 1}', "--f, entry 2: has no prompt"),
        ("{a dog}", "--f, entry 2: no JSON, which a text in braces is read as"),
        ('{"prompt": "a", "prompt": "b"}', "--f, entry 2: a key is given more than once"),
        ('{"prompt": ' + "[" * 99_999 + "}", "--f, entry 2: no JSON"),
    ],
)
def test_a_bad_entry_is_a_line_with_its_number_and_key(entry, says):
    with pytest.raises(BadInput) as refused:
        prompts.read(["fine", entry], "--f", 16)
    assert str(refused.value).startswith(says), str(refused.value)


def test_a_settings_file_may_hold_objects(tmp_path, built):
    model = built("ZImagePipeline")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"lora:\n  pretrained_model_name_or_path: {model}\n  validation_prompts:\n  - a\n  - prompt: b\n    seed: 7\n"
    )
    cfg = command_line.parse([str(file), "--data.resolution", "32"])[1]
    assert text_to_image.asked(cfg) == [prompts.Prompt("a"), prompts.Prompt("b", seed=7)]
    assert (
        command_line.parse(["lora", *command_line.as_flags(configs.to_dict(cfg), lora.Config)])[1] == cfg
    )  # as run.json has it
    with pytest.raises(BadInput, match=r"entry 1: --width is 40; expected a multiple of 16"):
        config(model, validation_prompts=("a --width 40",))
    file.write_text("base:\n  logger:\n  - a: b\n")
    with pytest.raises(BadInput, match="expected text, a number, true or false"):
        command_line.parse(["lora", str(file)])


@pytest.mark.parametrize("name", ["sd", "ZImagePipeline"])
def test_prompts_have_settings_of_their_own(built, name):
    """Each image is what the pipeline draws with those settings; images of several sizes lie on white."""
    entries = (
        "a dog --seed 5 --strength 0",
        "a dog --seed 5",
        "a dog --seed 5 --strength 2",
        "a dog --width 48 --steps 1",
        "a dog",
    )
    cfg = config(built(name), validation_prompts=entries, guidance_scale=2.0)
    models = made(cfg, std=0.1)
    images = drawn(models, cfg, 5)
    assert images.shape == (5, 3, 32, 48) and (images[[0, 1, 2, 4], :, :, 32:] == 1).all() and (images[3, :, :, 32:] < 1).any()
    own = text_to_image.family(cfg.lora)
    seeded = [torch.Generator().manual_seed(5)]
    bare = lora.make_models(replace(cfg, lora=replace(cfg.lora, validation_prompts=())))
    with torch.no_grad():
        base = own.sample(bare, cfg.lora, ["a dog"], seeded, 32, 32)[0]
        wide = own.sample(
            models,
            replace(cfg.lora, num_inference_steps=1),
            ["a dog"],
            Rng.of(0, range(5), "samples").generators("sample")[3:4],
            32,
            48,
        )[0]
    torch.testing.assert_close(images[0, :, :, :32], base, rtol=0, atol=1e-5)
    torch.testing.assert_close(images[3], wide, rtol=0, atol=1e-5)
    distances = [(images[i, :, :, :32] - base).norm() for i in (1, 2)]
    assert 0 < distances[0] < distances[1]
    assert not torch.equal(images[1], images[4])  # a seed of its own
    assert torch.equal(drawn(models, cfg, 5), images)  # scales are as they were


# ---------------------------------------------------------------------------------------------------------------------
# Densities.


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "cosmap"])
def test_densities(built, density):
    cfg = config(
        built("ZImagePipeline"),
        density=density,
        logit_mean=0.3,
        logit_std=0.8,
        mode_scale=0.5,
        flow_shift=2.0,
        weighting_scheme="sigma_sqrt",
    )
    u = (torch.arange(1000.0) + 0.5) / 1000
    sigma = transformer.noise_level(cfg.lora, u, (2, 4, 8, 8))
    torch.testing.assert_close(sigma, maths.shift(maths.density(density, u, 0.3, 0.8, 0.5), 2.0))
    assert sigma.diff().gt(0).all() and torch.equal(transformer.weight(cfg.lora, sigma), sigma.clamp(min=1e-3) ** -2.0)


# ---------------------------------------------------------------------------------------------------------------------
# Merging, and single files.


@pytest.mark.parametrize(("name", "kind"), [("sd", {"lora__use_dora": True}), ("Flux2KleinPipeline", {"lora__use_lokr": True})])
def test_a_finished_lora_is_merged_into_its_base_and_into_a_file_that_is_a_base(built, photos, tmp_path, name, kind):
    """The merged pipeline draws what base and adapters draw; the file, in the place of the UNet's weights, does so too."""
    line = command(tmp_path, built(name), photos, lora__learning_rate=0.3, base__lr_scheduler="constant", **kind)
    assert cli(tmp_path, *line).code == 0
    for to in ("whole", "part.safetensors"):
        done = cli(tmp_path, "merge", "out", "--to", to, "--dtype", "float32")
        assert done.code == 0 and "checkpoint-2 at strength 1 merged into" in done.out, done.err
    cfg = config(built(name))
    own = text_to_image.family(cfg.lora)
    fresh = lambda folder: diffusers.DiffusionPipeline.from_pretrained(folder)  # noqa: E731
    rng = Rng.of(0, range(1), "samples")
    draw = lambda parts, s=cfg.lora: own.sample(parts, s, CAPTIONS[:1], rng.generators("sample"), SIDE, SIDE)  # noqa: E731
    adapted = fresh(built(name))
    with torch.no_grad():
        bare = draw(adapted.components)
        adapted.load_lora_weights(tmp_path / "out" / "export")
        wanted = draw(adapted.components)
        torch.testing.assert_close(draw(fresh(tmp_path / "whole").components), wanted, rtol=0, atol=1e-4)
        single = config(built(name), single_file=str(tmp_path / "part.safetensors"))
        models = lora.make_models(single)
        torch.testing.assert_close(draw(models, single.lora), wanted, rtol=0, atol=1e-4)
        scope = {"path": exported(models, single, tmp_path / "again")}
        exec(own.load_lines(single.lora).format(path="path"), scope)
        torch.testing.assert_close(draw(scope["pipeline"].components), wanted, rtol=0, atol=1e-4)
    assert (bare - wanted).abs().max() > 1e-3
    for to in ("whole", "part.safetensors"):
        taken = cli(tmp_path, "merge", "out", "--to", to)
        assert taken.code == 2 and f"--to is '{to}'; expected a name that is not taken" in taken.err
    assert cli(tmp_path, "merge", "out", "--to", "none", "--dtype", "float32", "--strength", "0").code == 0
    with torch.no_grad():
        torch.testing.assert_close(draw(fresh(tmp_path / "none").components), bare, rtol=0, atol=1e-4)


def test_single_files(built, tmp_path):
    """An autoencoder of one file, in diffusers' names; and what is no such file."""
    folder = built("sd")
    state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({key: 2 * x for key, x in state.items()}, tmp_path / "vae.safetensors", {"format": "pt"})
    models = lora.make_models(config(folder, pretrained_vae_model_name_or_path=str(tmp_path / "vae.safetensors")))
    assert all(torch.equal(x, 2 * state[key]) for key, x in models["vae"].state_dict().items())
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    for name, value, says in (
        ("sd", "nowhere.safetensors", "--lora.single-file is 'nowhere.safetensors'; expected a .safetensors or .gguf file"),
        ("sd", str(folder), "expected a .safetensors or .gguf file that is there"),
        ("sd", str(tmp_path / "junk.safetensors"), "unet cannot be loaded as a UNet2DConditionModel"),
        ("ZImagePipeline", str(tmp_path / "some.gguf"), "transformer needs the package gguf"),
        ("CogView4Pipeline", str(tmp_path / "junk.safetensors"), "reads no CogView4Transformer2DModel from a single file"),
    ):
        if "gguf" in says and importlib.util.find_spec("gguf"):
            continue
        with pytest.raises(BadInput) as refused:
            lora.make_models(config(built(name), single_file=value))
        assert says in str(refused.value) and "\n" not in str(refused.value), str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# The worked example.


@pytest.mark.skipif(not (SHARED / "dog").is_dir(), reason="the photographs of ../shared/data/dog are not here")
def test_the_worked_example(built, tmp_path):
    """The commands of docs/lora.md, as they stand there, on five photographs: a grid before the first step, whose image at
    strength 0 stays as it is, while the others change; the merged file is a base that draws as the run does."""
    name, steps = "ZImagePipeline", 12
    section = (ROOT / "docs" / "lora.md").read_text().partition("## A worked example")[2].partition("\n## ")[0]
    lines = [shlex.split(line)[2:] for line in re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()]
    assert [line[0] for line in lines] == ["lora", "sample", "merge"]
    (tmp_path / "dog").symlink_to(SHARED / "dog")
    tiny = {
        "base.max_train_steps": steps,
        "base.logger": "none",
        "base.lr_scheduler": "constant",
        "base.use_ema": False,
        "data.resolution": SIDE,
        "lora.pretrained_model_name_or_path": built(name),
        "lora.num_inference_steps": 2,
        "lora.learning_rate": 2e-2,
    }
    lines[0] += flags("lora", tiny)[1:]
    lines[2] += ["--dtype", "float32"]
    for line in lines:
        done = cli(tmp_path, *line)
        assert done.code == 0, done.err
    grids = [shown(tmp_path / "runs" / "dog" / "samples" / f"{step}.png", SIDE) for step in (0, steps)]
    base, now = (np.split(grid[:, : 2 * SIDE], 2, axis=1) for grid in grids)  # the first row: sks dog, and at strength 0
    assert np.array_equal(base[0], base[1]) and np.array_equal(base[1], now[1]) and np.abs(now[0] - now[1]).max() > 2
    assert (tmp_path / "dog.png").read_bytes() == (tmp_path / "runs" / "dog" / "samples" / f"{steps}.png").read_bytes()
    cfg = config(built(name), single_file=str(tmp_path / "dog-unet.safetensors"), guidance_scale=None)
    with torch.no_grad():
        models = lora.make_models(cfg)
        (image,) = transformer.sample(
            models, cfg.lora, ["sks dog, on the moon"], [torch.Generator().manual_seed(7)], SIDE, SIDE
        )
    assert np.abs(image.permute(1, 2, 0).numpy() * 255 - now[0]).max() <= 1.01
