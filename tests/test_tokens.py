"""New tokens: the task `textual_inversion`, and beside adapters or weights; the objective, runs, exports, bad input."""

import functools
import re
import shutil

import diffusers
import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file
from test_lora_families import SIDE, in_fork, photos  # noqa: F401  a fixture
from tiny_models import edit
from warm import brief, cli, cli_many, digest, distance, flags

from oneloop import loop
from oneloop.configs import BadInput, Base, Data
from oneloop.families import flow, objective, stable_diffusion, text_to_image, tokens
from oneloop.settings import command_line
from oneloop.tasks import Rng, finetune, lora, textual_inversion
from oneloop.views import fits

NAMES = ("sd", "sdxl", "FluxPipeline")
TEXTS = ["a photo of <dog>, red", "<dog>"]
NEW = {"placeholder_tokens": ("<dog>", "<cat>"), "initializer_tokens": ("dog", ""), "num_vectors": 3}
TASKS = {"textual_inversion": textual_inversion, "lora": lora, "finetune": finetune}
diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def built(built):
    """The same, with everything imported that forks need; the second text encoder of SDXL is as trained ones are: the end of a
    text is to it the largest of its ids, and those of new tokens are larger."""

    def make(name):
        folder = built(name)
        if name == "sdxl":
            edit(folder / "text_encoder_2" / "config.json", eos_token_id=2)
        textual_inversion.make_models(config(folder)) if name in NAMES else None
        return folder

    return functools.cache(make)


def config(model, task=textual_inversion, recompute=False, **settings):
    base = Base(output_dir="unused", logger=("none",), gradient_checkpointing=recompute)
    sizes = Data(train_data_dir="unused", resolution=SIDE, center_crop=True, train_batch_size=2)
    given = {"placeholder_tokens": ("<dog>",), "num_inference_steps": 2, "pretrained_model_name_or_path": str(model)}
    return task.Config(base, sizes, task.Settings(**given | settings))


def command(folder, model, photos, out="out", task="textual_inversion", **more):  # noqa: F811
    """A command line for two steps, with a `<dog>` of two vectors."""
    settings = (
        brief(folder, out, photos, SIDE)
        | {
            "base.ema_power": 0,
            "data.trigger": "<dog>",
            "task.pretrained_model_name_or_path": model,
            "task.placeholder_tokens": "<dog>",
            "task.initializer_tokens": "dog",
            "task.num_vectors": 3,
            "task.token_learning_rate": 0.05,
            "task.num_inference_steps": 2,
            "task.validation_prompts": TEXTS[0],
        }
        | {name.replace("__", "."): value for name, value in more.items()}
    )
    return flags(task, {name.replace("task.", f"{task}."): value for name, value in settings.items()})


def moved(cfg, task=textual_inversion):
    """The models, whose vectors are no longer what they began as."""
    models, generator = task.make_models(cfg), torch.Generator().manual_seed(0)
    for name in tokens.MODELS.values():
        if name in models:
            with torch.no_grad():
                models[name].weight.normal_(std=0.5, generator=generator)
    return models


def loaded(folder):
    """The pipeline that load.py makes."""
    scope = {"__file__": str(folder / "load.py")}
    exec((folder / "load.py").read_text().rpartition("pipeline(")[0], scope)
    return scope["pipeline"]


def exported(task, models, cfg, folder):
    """The pipeline that an export's lines make."""
    folder.mkdir(exist_ok=True)
    lines = task.export_fn(models, [{"caption": TEXTS}], folder, cfg).rpartition("pipeline(")[0]
    scope = {"path": str(folder)}
    exec(lines.format(path="path"), scope)
    return scope["pipeline"]


def image_columns(models, cfg):
    """Two encoded images."""
    x = Rng.of(0, range(2)).uniform("x", 3, SIDE, SIDE) * 2 - 1
    sizes = {key: torch.tensor([[SIDE, SIDE]] * 2) for key in ("original_size", "target_size")}
    with torch.no_grad():
        return text_to_image.encode_images(models, x, cfg) | sizes | {"crop_top_left": torch.zeros(2, 2, dtype=torch.long)}


# ---------------------------------------------------------------------------------------------------------------------
# The objective, and what trains.


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_the_pipeline_with_the_vectors_in_it(tmp_path, built, name):
    """The export in diffusers' own pipeline: its `encode_prompt`, and the gradient on the rows of its own embeddings."""
    cfg = config(built(name), **NEW)
    models, rng = moved(cfg), Rng.of(7, range(2))
    batch = image_columns(models, cfg)
    (ours,) = textual_inversion.loss_fn(models, batch | {"caption": TEXTS}, rng, cfg)
    ours.value.backward()
    pipeline = exported(textual_inversion, models, cfg, tmp_path / "export")
    parts = [part for part, vectors in tokens.MODELS.items() if vectors in models]
    rows = {part: getattr(pipeline, part).requires_grad_(True).get_input_embeddings().weight for part in parts}
    if name == "FluxPipeline":
        columns = flow.flux_text(pipeline, TEXTS, 512)
    else:
        made = pipeline.encode_prompt(TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        columns = {"prompt_embeds": made[0]} | ({"pooled_prompt_embeds": made[2]} if name == "sdxl" else {})
    wanted = objective.objective(models, batch | columns, rng, cfg).mean()
    torch.testing.assert_close(ours.value, wanted, rtol=1e-5, atol=1e-6)
    wanted.backward()
    assert len(parts) == 1 + (name == "sdxl")
    for part, weight in rows.items():
        own = models[tokens.MODELS[part]].weight
        torch.testing.assert_close(own.grad, weight.grad[-6:], rtol=1e-4, atol=1e-7)
        assert own.grad[:3].any(1).all() and not own.grad[3:].any()  # <cat> is in neither text


def test_the_loss_is_the_official_scripts(built):
    """textual_inversion.py of diffusers: the embedding made longer, the first vector's tokens in the text, epsilon."""
    from transformers import CLIPTextModel, CLIPTokenizer

    cfg = config(built("sd"), num_vectors=2)
    models, rng = moved(cfg), Rng.of(7, range(2))
    batch = image_columns(models, cfg)
    (ours,) = textual_inversion.loss_fn(models, batch | {"caption": TEXTS}, rng, cfg)
    words = CLIPTokenizer.from_pretrained(built("sd"), subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(built("sd"), subfolder="text_encoder").eval()
    words.add_tokens(["<dog>", "<dog>_1"])
    encoder.resize_token_embeddings(len(words))
    encoder.get_input_embeddings().weight.data[-2:] = models["tokens"].weight.data
    texts = [text.replace("<dog>", "<dog> <dog>_1") for text in TEXTS]
    ids = words(texts, padding="max_length", truncation=True, max_length=words.model_max_length, return_tensors="pt").input_ids
    scheduler = diffusers.DDPMScheduler.from_pretrained(built("sd"), subfolder="scheduler")
    posterior = rng.normal("posterior", *batch["latent_mean"].shape[1:])
    latents = (batch["latent_mean"] + batch["latent_std"] * posterior) * models["vae"].config.scaling_factor
    noise, t = rng.normal("noise", *latents.shape[1:]), rng.integers("timestep", 1000)
    answer = models["unet"](scheduler.add_noise(latents, noise, t), t, encoder(ids)[0]).sample
    torch.testing.assert_close(ours.value, torch.nn.functional.mse_loss(answer, noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_they_begin_as(built, name):
    """Words by their tokens in turn, or random numbers of the embedding's size, by the seed; nothing else trains."""
    word = "red" if name == "FluxPipeline" else "red dog"  # whose tokenizer has letters
    cfg = config(built(name), **NEW | {"initializer_tokens": (word, "")})
    models, again = textual_inversion.make_models(cfg), textual_inversion.make_models(cfg)
    clips = text_to_image.family(cfg.textual_inversion).clip_tokenizers(cfg.textual_inversion, True)
    for part, words in clips.items():
        own, weight = models[tokens.MODELS[part]].weight, models[part].get_input_embeddings().weight
        ids = words(cfg.textual_inversion.initializer_tokens[0], add_special_tokens=False).input_ids
        assert len(own) == 6 and len(ids) > 1 and torch.equal(own[:3], weight[[*ids, *ids][:3]])
        assert 0.5 < own[3:].std() / weight.std() < 2 and torch.equal(own, again[tokens.MODELS[part]].weight)
    assert {key for key, m in models.items() if any(p.requires_grad for p in m.parameters())} == {
        tokens.MODELS[part] for part in clips
    }


@pytest.mark.parametrize("name", ["sd", "FluxPipeline"])
def test_activations_of_the_frozen_model_are_computed_again(built, name):
    """With the same gradient: its blocks are called twice."""
    grads, calls = [], []
    for recompute in (False, True):
        cfg = config(built(name), recompute=recompute)
        models, net = moved(cfg), text_to_image.family(cfg.textual_inversion).TRAINED
        models["tokens"].enable_gradient_checkpointing() if recompute else None
        block = next(m for key, m in models[net].named_modules() if re.search(r"transformer_blocks\.0\.attn2?$", key))
        seen = []
        block.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        batch = image_columns(models, cfg) | {"caption": TEXTS}
        (loss,) = textual_inversion.loss_fn(models, batch, Rng.of(7, range(2)), cfg)
        loss.value.backward()
        grads.append(models["tokens"].weight.grad)
        calls.append(len(seen))
    assert torch.equal(*grads) and calls == [1, 2], calls


def test_what_a_step_holds_is_counted(built):
    """The frozen model's blocks can be computed again, and the text encoders stay, though captions may be cached elsewhere."""
    cfg = config(built("sd"))
    models = textual_inversion.make_models(cfg)
    batch = image_columns(models, cfg) | {"caption": TEXTS}
    held, _ = fits.watch(models, lambda: next(textual_inversion.loss_fn(models, batch, Rng.of(7, range(2)), cfg)))
    made = fits.counted(held, textual_inversion.task, cfg)
    size = lambda name: sum(p.numel() for p in models[name].parameters())  # noqa: E731
    assert made.weights == 2 * (size("unet") + size("text_encoder")) and made.adapters == 4 * size("tokens")
    assert 0 < made.recomputed < 0.7 * made.activations


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_equal_and_its_export_draws_the_same(tmp_path, built, photos, name):  # noqa: F811
    """Nothing but the vectors is in a checkpoint, and every row that the text encoders had is there, bit for bit."""

    def run(out, **more):
        cfg = command_line.parse(command(tmp_path, built(name), photos, out, base__checkpointing_steps=1, **more))[1]
        return loop.run(textual_inversion.task, cfg), cfg

    def runs():
        state, cfg = run("out", base__gradient_checkpointing=True)
        shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
        run("again")
        assert digest(tmp_path / "out") == digest(tmp_path / "again")
        assert set(state.models) == {"tokens"} | ({"tokens_2"} if name == "sdxl" else set())
        pipeline, base = loaded(tmp_path / "out" / "checkpoint-2"), textual_inversion.make_models(cfg)
        for part in stable_diffusion.ENCODERS:
            if tokens.MODELS[part] in state.models:
                own, weight = state.ema[f"{tokens.MODELS[part]}.weight"], base[part].get_input_embeddings().weight
                now = getattr(pipeline, part).get_input_embeddings().weight
                assert (
                    torch.equal(now[:-3], weight)
                    and torch.equal(now[-3:], own)
                    and (own - base[tokens.MODELS[part]].weight).any()
                )
        keys = {"clip_l": "tokens", "clip_g": "tokens_2"} if name == "sdxl" else {"<dog>": "tokens"}
        file = load_file(tmp_path / "out" / "export" / "learned_embeds.safetensors")
        assert file.keys() == keys.keys() and all(torch.equal(x, state.ema[f"{keys[key]}.weight"]) for key, x in file.items())
        draw = functools.partial(drawn, cfg)
        with torch.no_grad():
            for vectors in tokens.MODELS.values():
                if vectors in base:
                    base[vectors].weight.copy_(state.ema[f"{vectors}.weight"])
            learned = draw(base)
            torch.testing.assert_close(drawn_by(pipeline, cfg), learned, rtol=0, atol=1e-5)
            base = textual_inversion.make_models(cfg)
            assert (draw(base) - learned).abs().max() > 1e-4

    assert "no samples" not in in_fork(tmp_path, runs).err


def drawn(cfg, models):
    """A sample as training draws it."""
    return text_to_image.sample_fn(models, [{"caption": TEXTS}], Rng.of(0, range(1), "samples"), cfg)["samples"]


def drawn_by(pipeline, cfg):
    """The same by a pipeline."""
    s = text_to_image.settings(cfg)
    call = text_to_image.family(s).arguments(s, SIDE, SIDE) | {"output_type": "pt"}
    (generator,) = Rng.of(0, range(1), "samples").generators("sample")
    return pipeline(prompt=TEXTS[0], generator=generator, **call).images


def test_what_is_learned_is_the_vectors(tmp_path, built, photos):  # noqa: F811
    """On fixed pairs of noise and t the loss of an image falls under the new word, and is what it was under others."""

    def run():
        more = {"base__max_train_steps": 60, "data__max_train_samples": 2, "base__use_ema": False}
        cfg = command_line.parse(command(tmp_path, built("sd"), photos, **more))[1]
        state, models = loop.run(textual_inversion.task, cfg), textual_inversion.make_models(cfg)
        batch = {k: v[:1].repeat(64, *[1] * (v.ndim - 1)) for k, v in image_columns(models, cfg).items()}

        def loss(models, text):
            with torch.no_grad():
                columns = batch | {"caption": [text] * 64}
                return next(textual_inversion.loss_fn(models, columns, Rng.of(9, range(64)), cfg)).value.item()

        begun, learned = (loss(m, "<dog> a dog") for m in (models, models | state.models))
        assert learned < 0.98 * begun, (begun, learned)
        assert loss(models, "a dog") == loss(models | state.models, "a dog")

    in_fork(tmp_path, run)


@pytest.mark.parametrize("name", NAMES[:2])
def test_two_processes_agree_with_one(tmp_path, built, photos, name):  # noqa: F811
    """The second's captions may have no new token: caption dropout leaves some out."""
    steady = {"base__use_ema": False, "task__adam_epsilon": 1e-3}  # AdamW's division magnifies what is nearly 0
    line = functools.partial(command, tmp_path, built(name), photos, **steady, data__caption_dropout=0.5)
    one = cli(tmp_path, *line("one"))
    assert one.code == 0, one.err
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1)):
        assert result.code == 0, result.err
    assert distance(tmp_path / "one", tmp_path / "two", "model") < 1e-6


@pytest.mark.parametrize(("task", "name"), [("lora", "sdxl"), ("finetune", "sd")])
def test_beside_adapters_or_weights(tmp_path, built, photos, task, name):  # noqa: F811
    """Pivotal tuning, and Custom Diffusion: keys and values of cross-attention. Each at its own rate, both in the export, which
    draws what training drew, and so does what is merged."""
    own = {
        "lora": {"lora__rank": 2, "lora__train_text_encoder": True},
        "finetune": {"finetune__trains": r".*attn2\.to_[kv]"},
    }
    line = functools.partial(command, tmp_path, built(name), photos, task=task, **own[task], **{f"{task}__learning_rate": 1e-2})

    def run():
        cfg = command_line.parse(line("out", base__gradient_checkpointing=True))[1]
        state = loop.run(TASKS[task].task, cfg)
        pipeline, begun = loaded(tmp_path / "out" / "checkpoint-2"), TASKS[task].make_models(cfg)
        changed = {
            key
            for key, x in state.ema.items()
            if not torch.equal(x, dict(begun[key.split(".")[0]].named_parameters())[key.partition(".")[2]])
        }
        assert {"tokens.weight"} < changed and ("tokens_2.weight" in changed) == (name == "sdxl")
        assert all("lora_" in key or ".attn2.to_" in key for key in changed - {"tokens.weight", "tokens_2.weight"})
        first = (state.ema["tokens.weight"] - begun["tokens"].weight).abs().max()
        assert 0.04 < first < 0.2, first  # the rate of its own
        with torch.no_grad():
            for key, x in state.ema.items():
                dict(begun[key.split(".")[0]].named_parameters())[key.partition(".")[2]].copy_(x)
            learned = drawn(cfg, begun)
            torch.testing.assert_close(drawn_by(pipeline, cfg), learned, rtol=0, atol=1e-4)
            torch.save(learned, tmp_path / "learned.pt")

    assert "no samples" not in in_fork(tmp_path, run).err
    result = cli(tmp_path, "merge", "out", "--to", "merged", "--dtype", "float32")
    assert result.code == 0, result.err
    cfg = command_line.parse(line("out"))[1]
    merged, learned = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged"), torch.load(tmp_path / "learned.pt")
    torch.testing.assert_close(drawn_by(merged, cfg), learned, rtol=0, atol=1e-4)
    for result in cli_many(tmp_path, 2, *line("two", data__train_batch_size=1, base__use_ema=False)):
        assert result.code == 0, result.err


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is said.


def test_families_whose_pipelines_load_new_tokens():
    for kind, family in flow.FAMILIES.items():
        assert family.inversion == bool(issubclass(getattr(diffusers, kind), TextualInversionLoaderMixin) and family.clips)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("QwenImagePipeline", {}, "a QwenImagePipeline loads no new tokens, which are those of CLIP; expected one of"),
        ("StableDiffusion3Pipeline", {}, "a StableDiffusion3Pipeline loads no new tokens"),
        ("sd", {"placeholder_tokens": ()}, "expected at least one new word, such as '<dog>'"),
        ("sd", {"placeholder_tokens": ("dog",)}, "--textual-inversion.placeholder-tokens 'dog': the tokenizer has this token"),
        ("sd", {"placeholder_tokens": ("<|endoftext|>",)}, "the tokenizer has this token"),
        ("sd", {"placeholder_tokens": ("a dog",)}, "is 'a dog'; expected a word without spaces"),
        ("sd", {"placeholder_tokens": ("",)}, "is ''; expected a word without spaces"),
        ("sd", {"placeholder_tokens": ("<dog>", "<dog>")}, "'<dog>' is in '<dog>'; expected words of which none is in another"),
        ("sd", {"placeholder_tokens": ("sks2", "Sks")}, "'Sks' is in 'sks2'"),
        ("sd", {"placeholder_tokens": ("x<|endoftext|>",)}, "the tokenizer reads it as"),
        (
            "sd",
            {"initializer_tokens": ("red dog",)},
            "'red dog' is 2 tokens of the tokenizer; expected at most 1, a vector each",
        ),
        (
            "sd",
            {"initializer_tokens": ("dog", "red")},
            "expected none, or one for each of --textual-inversion.placeholder-tokens",
        ),
        ("sd", {"num_vectors": 15}, "--textual-inversion.num-vectors is 15; expected at most 14, the room of a prompt"),
        ("sd", {"num_vectors": 0}, "--textual-inversion.num-vectors is 0; expected at least 1"),
        ("sd", {"train_text_encoder": True}, "--textual-inversion.train-text-encoder: the vectors alone train here"),
        ("sd", {"validation_prompts": ("a --strength 0.5",)}, "a sample at strength 0.5: only adapters have a strength"),
    ],
)
def test_tokens_that_do_not_fit_are_a_line(built, name, settings, says):
    with pytest.raises(BadInput) as refused:
        config(built(name), **settings)
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"placeholder_tokens": (), "num_vectors": 2}, "--lora.num-vectors is 2; expected --lora.placeholder-tokens beside it"),
        ({"preservation_weight": 0.1}, "--lora.preservation-weight with --lora.placeholder-tokens: they do not go together"),
    ],
)
def test_beside_adapters_too(built, settings, says):
    with pytest.raises(BadInput) as refused:
        config(built("sd"), lora, **settings)
    assert says in str(refused.value)


def test_a_word_that_no_caption_has(built):
    cfg = config(built("sd"))
    assert "warning: no caption has <dog>, whose vectors then learn nothing" in text_to_image.remark(["a dog"], cfg)
    assert text_to_image.remark(["a dog", "a <dog>"], cfg) is None
    assert "are longer than the 16 tokens" in text_to_image.remark(["a <dog>"], config(built("sd"), num_vectors=14))
