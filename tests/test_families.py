"""Every flow family beside its own pipeline, on a tiny checkpoint: what training computes is what inference computes.

Prompts are of unequal length, the image is not square, the time is in the middle of the schedule, and guidance is off as the
family defines it. An error planted in any part must be seen.
"""

import ast
import copy
import dataclasses
import functools
import importlib
import re
from dataclasses import dataclass
from typing import Any

import diffusers
import peft
import pytest
import tiny_families
import torch
from safetensors.torch import save_file
from warm import ROOT

from oneloop.configs import BadInput
from oneloop.families import adapters, flow, latents, settings
from oneloop.maths import flow as maths
from oneloop.tasks import lora

NAMES = list(tiny_families.FAMILIES)
PROMPTS = ["a dog", 'a large red circle on the left of the word "go"']
HEIGHT, WIDTH, STEPS = 64, 32, 3
diffusers.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class Seen:
    """What a pipeline did."""

    family: flow.Family
    pipeline: Any
    texts: Any = None
    """A pipeline of the text encoders alone."""
    columns: Any = None
    """Its encoding of the prompts."""
    x: Any = None
    """x_t in the middle of the schedule, [B, C, h, w]."""
    sigma: Any = None
    """Its time, [B]."""
    v: Any = None
    """What the pipeline handed to scheduler.step there, [B, C, h, w]."""
    z: Any = None
    """The last latents, [B, C, h, w]."""
    images: Any = None
    """What the pipeline made of them, [B, 3, H, W]."""

    @property
    def tokens(self) -> int:
        return self.x.shape[-2] * self.x.shape[-1] // self.family.patch**2

    def velocity(self, transformer: Any = None, **changed: torch.Tensor) -> torch.Tensor:
        """Ours, at the pipeline's own x_t and time, or with a column changed."""
        transformer = transformer or self.pipeline.transformer
        return self.family.velocity(transformer, self.x, self.sigma, self.columns | changed, self.family.off)


def as_map(x: torch.Tensor, family: flow.Family, height: int, width: int) -> torch.Tensor:
    """What a scheduler holds as [B, C, h, w]: as it is, or unpacked."""
    if x.ndim == 4:
        return x
    token = round((height * width / x.shape[1]) ** 0.5)  # pixels a token spans
    like = x.new_empty(1, 1, height // token * family.patch, width // token * family.patch)
    return latents.unpack(x, like, family.patch)


def draw(seen: Any, prompts: list[str], steps: int, listen: Any = None, **more: Any) -> torch.Tensor:
    """The pipeline's images, [B, 3, H, W] in [0, 1]; `listen` is called for scheduler.step, with it and its arguments."""
    pipeline, family = seen.pipeline, seen.family
    own = pipeline.scheduler.step
    pipeline.scheduler.step = functools.partial(listen, own) if listen else own
    call = {**family.call, family.guided_by: family.off, "generator": torch.Generator().manual_seed(0), **more}
    try:
        size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": steps}
        return pipeline(prompt=[*prompts], **size, output_type="pt", **call).images
    finally:
        pipeline.scheduler.step = own


@pytest.fixture(scope="session")
def see(tmp_path_factory):
    """name -> `Seen`, each made once."""

    @functools.cache
    def look(name: str) -> Seen:
        kind, folder = name.split()[0], tiny_families.build(name, tmp_path_factory.mktemp("tiny"))
        family = flow.of(kind)
        pipeline = getattr(diffusers, kind).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.default_sample_size = 16  # HiDream scales every size to this many latents' area
        steps = []

        def listen(step, v, t, x, **more):
            result = step(v, t, x, **more)
            steps.append((x.clone(), t, v.clone(), result[0].clone()))
            return result

        # CogView4 fills to the longest of a batch: there inference of one prompt is what training must see.
        batches = [[prompt] for prompt in PROMPTS] if kind == "CogView4Pipeline" else [PROMPTS]
        images = torch.cat([draw(Seen(family, pipeline), batch, STEPS, listen) for batch in batches])  # [B, 3, H, W]
        size = images.shape[-2:]
        x, v = (as_map(torch.cat([step[i] for step in steps[1::STEPS]]), family, *size) for i in (0, 2))  # [B, C, h, w]
        z = as_map(torch.cat([step[3] for step in steps[STEPS - 1 :: STEPS]]), family, *size)  # [B, C, h, w]
        # DPM-Solver tells whole-numbered times, floor(1000 sigma); Euler's sigma is exact, and CogView4's time is another.
        euler = type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        sigma = pipeline.scheduler.sigmas[1] if euler else steps[1][1] / 1000
        # What encodes captions needs neither transformer nor autoencoder.
        parts = {key: part for key, part in pipeline.components.items() if key.startswith(("text", "token"))}
        if "text_encoder_select_layers" in pipeline.config:
            parts["text_encoder_select_layers"] = pipeline.config.text_encoder_select_layers
        texts = flow.assemble(kind, parts)
        with torch.no_grad():
            columns = family.text(texts, PROMPTS, family.length) | {"target_size": torch.tensor([[*size]] * len(PROMPTS))}
        family.prepare(pipeline.transformer)
        return Seen(family, pipeline, texts, columns, x, sigma.expand(len(PROMPTS)).float(), v, z, images)

    return look


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether no number differs by more."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


def agree(seen: Seen) -> dict[str, bool]:
    """The comparison: whether velocity, images and shift are the pipeline's."""
    with torch.no_grad():
        images = latents.decode(seen.family, seen.pipeline.vae, seen.z)
        return {
            "velocity": same(seen.velocity(), seen.v, 1e-6),
            "images": same(images, seen.images, 1e-4),
            "shift": evenly(seen, levels(seen)),
        }


def levels(seen: Seen) -> torch.Tensor:
    """The pipeline's sigmas at its own default number of steps, [steps]; it is stopped at the first."""

    class Stop(Exception): ...

    def stop(*args, **more):
        raise Stop

    steps = flow.samples(type(seen.pipeline).__name__, seen.family)["num_inference_steps"]
    with pytest.raises(Stop):
        draw(seen, PROMPTS[:1], steps, stop)
    return torch.as_tensor(seen.pipeline.scheduler.sigmas[:-1]).float()


def evenly(seen: Seen, sigmas: torch.Tensor) -> bool:
    """Whether these sigmas are evenly spaced numbers shifted by our alpha (to 2e-3: CogView4's times are whole thousandths)."""
    scheduler, n = seen.pipeline.scheduler, len(sigmas)
    alpha = seen.family.shift(scheduler, seen.tokens, seen.pipeline.config)
    if terminal := scheduler.config.get("shift_terminal"):  # Qwen-Image's are stretched afterwards to end there
        last = maths.shift(torch.tensor(1 / n), alpha)
        sigmas = 1 - (1 - sigmas) * (1 - last) / (1 - terminal)
    u = maths.unshift(sigmas, alpha)
    return same(u, torch.linspace(u[0].item(), u[-1].item(), n), 2e-3) and abs(u[0].item() - 1) < 2e-3 and u[-1] < 1.5 / n


@pytest.mark.parametrize("name", NAMES)
def test_velocity_images_and_shift_are_the_pipeline_s(name, see):
    seen = see(name)
    assert seen.v.abs().mean() > 0.01 and seen.x.shape[-2] > seen.x.shape[-1] and 0.1 < seen.sigma[0] < 0.95
    assert agree(seen) == {"velocity": True, "images": True, "shift": True}


def wrong(family: flow.Family, error: str) -> flow.Family:
    """The family with an error planted."""
    right = family.velocity

    def velocity(transformer, x, sigma, columns, guidance):
        if error == "time":
            sigma = 0.99 * sigma
        if error == "mask":
            masks = {key: torch.ones_like(mask) for key, mask in columns.items() if "mask" in key}
            # Where the transformer has no mask its text is all that padding can be mistaken in: exchange the captions.
            columns = {**columns, **(masks or {key: x.flip(0) for key, x in columns.items() if key != "target_size"})}
        if error == "layout":  # rows taken for columns
            return right(transformer, x.mT.contiguous(), sigma, columns, guidance).mT
        return (-1 if error == "sign" else 1) * right(transformer, x, sigma, columns, guidance)

    if error == "shift":
        return dataclasses.replace(family, shift=lambda *a: 1.2 * family.shift(*a))
    return dataclasses.replace(family, velocity=velocity)


@pytest.mark.parametrize("error", ["sign", "time", "mask", "layout", "shift"])
@pytest.mark.parametrize("name", NAMES)
def test_a_planted_error_is_seen(name, error, see):
    seen = see(name)
    planted = dataclasses.replace(seen, family=wrong(seen.family, error))
    if error == "shift":
        assert not evenly(planted, levels(seen))
    else:
        with torch.no_grad():
            assert not same(planted.velocity(), seen.v, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_scale_of_latents_is_seen(name, see):
    seen = see(name)
    with torch.no_grad():
        assert not same(latents.decode(seen.family, seen.pipeline.vae, 1.02 * seen.z), seen.images, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_encoded_latents_are_the_autoencoder_s_in_the_pipeline_s_scale(name, see):
    """What is drawn of the normalised posterior, and decoded as the pipeline decodes, is what is drawn of the posterior."""
    seen = see(name)
    family, vae = seen.family, seen.pipeline.vae
    images = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        columns = latents.encode(family, vae, images)
        noise = torch.randn(columns["latent_mean"].shape, generator=torch.Generator().manual_seed(2))
        ours = latents.decode(family, vae, latents.draw(columns, noise))
        encoded = vae.encode(images[:, :, None] if family.video else images)
        if not hasattr(encoded, "latent_dist"):
            z = encoded.latent
        elif family.sample:
            like = encoded.latent_dist.mean
            z = like + encoded.latent_dist.std * noise.view_as(like)
        else:
            z = encoded.latent_dist.mode()
        theirs = vae.decode(z).sample
    theirs = ((theirs[:, :, 0] if family.video else theirs) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert columns["latent_mean"].shape[1:] == seen.x.shape[1:] or name.startswith("HiDream")
    assert ("latent_std" in columns) == (family.sample and hasattr(encoded, "latent_dist"))


@pytest.mark.parametrize("name", NAMES)
def test_a_caption_s_columns_do_not_depend_on_its_neighbours(name, see):
    seen, captions = see(name), [*PROMPTS]
    with torch.no_grad():
        for i, caption in enumerate(captions):
            alone = seen.family.text(seen.texts, [caption], seen.family.length)
            for key, column in alone.items():
                assert column.shape[0] == 1
                torch.testing.assert_close(column[0], seen.columns[key][i], rtol=0, atol=1e-5)
    assert captions == PROMPTS == ["a dog", 'a large red circle on the left of the word "go"']  # Z-Image writes into its list


@pytest.mark.parametrize("name", NAMES)
def test_an_example_s_velocity_does_not_depend_on_its_neighbours(name, see):
    """Each with its own time, beside another of another length, as in training."""
    seen = dataclasses.replace(see(name), sigma=torch.tensor([0.3, 0.8]))
    with torch.no_grad():
        both = seen.velocity()
        for i in range(len(PROMPTS)):
            columns = {key: x[i : i + 1] for key, x in seen.columns.items()}
            alone = dataclasses.replace(seen, x=seen.x[i : i + 1], sigma=seen.sigma[i : i + 1], columns=columns)
            torch.testing.assert_close(alone.velocity()[0], both[i], rtol=0, atol=1e-5)


SILENT = {"StableDiffusion3Pipeline": {"transformer_blocks.1.attn.add_q_proj"}}
"""Layers whose adapters get no gradient: SD3's last block asks nothing of the text."""


@pytest.mark.parametrize("name", NAMES)
def test_saved_adapters_move_the_pipeline_as_they_moved_training(name, see, tmp_path):
    seen = see(name)
    family, kind = seen.family, type(seen.pipeline).__name__
    trained, fresh = copy.deepcopy(seen.pipeline.transformer), copy.deepcopy(seen.pipeline.transformer)
    targets = "|".join(map(adapters.expression, family.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets)
        peft.inject_adapter_in_model(config, trained)
        for key, p in trained.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.3)
    ours = seen.velocity(trained)
    ours.square().mean().backward()
    weak = {
        n.partition(".lora_")[0] for n, p in trained.named_parameters() if "lora_" in n and (p.grad is None or not p.grad.any())
    }
    assert weak == SILENT.get(kind, set())
    adapted = {n.partition(".lora_")[0] for n, _ in trained.named_parameters() if "lora_" in n}
    for target in family.targets:
        assert any(re.fullmatch(adapters.expression(target), layer) for layer in adapted), target
    state = {f"transformer.{key}": x.detach().contiguous() for key, x in peft.get_peft_model_state_dict(trained).items()}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = flow.assemble(kind, seen.pipeline.components | {"transformer": fresh})
    exec(family.load_lora.format(path="path"), {"pipeline": pipeline, "path": tmp_path})
    with torch.no_grad():
        loaded = seen.velocity(fresh)
    torch.testing.assert_close(loaded, ours.detach(), rtol=0, atol=1e-6)
    assert (loaded - seen.v).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_blocks_changes_no_gradient(name, see):
    seen, results = see(name), []
    for again in (False, True):
        transformer = copy.deepcopy(seen.pipeline.transformer).train()
        calls = []
        blocks = [block for child in transformer.children() if isinstance(child, torch.nn.ModuleList) for block in child]
        for block in blocks:
            if any("Atten" in type(m).__name__ for m in block.modules()):
                first = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
                first.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        if again:
            flow.recompute(transformer)
        v = seen.velocity(transformer)
        v.square().mean().backward()
        results.append((v.detach(), {n: p.grad for n, p in transformer.named_parameters()}, len(calls)))
    (a, grads, once), (b, recomputed, twice) = results
    torch.testing.assert_close(a, seen.v, rtol=0, atol=1e-6)  # in training as at inference
    assert torch.equal(a, b) and twice == 2 * once > 0  # every block
    for key, grad in grads.items():
        assert (grad is None) == (recomputed[key] is None), key
        assert grad is None or torch.equal(grad, recomputed[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_velocity_in_bf16_is_the_same_to_bf16(name, see):
    """Weights and text in bf16, latents in float32, as a run holds a frozen base; at 1/2, which bf16 says exactly."""
    seen = dataclasses.replace(see(name), sigma=torch.full((len(PROMPTS),), 0.5))
    low = copy.deepcopy(seen.pipeline.transformer).bfloat16()
    columns = {key: x.bfloat16() if x.is_floating_point() else x for key, x in seen.columns.items()}
    with torch.no_grad():
        exact = seen.velocity()
        with torch.autocast("cpu", torch.bfloat16):
            v = dataclasses.replace(seen, columns=columns).velocity(low)
    assert (v - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["CogView4Pipeline", "HiDreamImagePipeline"])
def test_a_prepared_transformer_draws_what_it_drew(name, see):
    seen = see(name)
    batches = [[prompt] for prompt in PROMPTS] if name == "CogView4Pipeline" else [PROMPTS]
    images = torch.cat([draw(seen, batch, STEPS) for batch in batches])
    torch.testing.assert_close(images, seen.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_guided_as_the_pipeline_s_own_default_is(name, see):
    seen = see(name)
    family = seen.family
    guided = {family.guided_by: flow.samples(type(seen.pipeline).__name__, family)[family.guided_by]}
    if family.negative is not None:
        guided["negative_prompt"] = [family.negative] * len(PROMPTS)
    images = draw(seen, PROMPTS, STEPS, **guided)
    # schnell has no guidance, and HunyuanImage's base has its own component for it, which a tiny checkpoint lacks.
    deaf = name in ("FluxPipeline schnell", "HunyuanImagePipeline")
    assert bool(images.isfinite().all()) and same(images, seen.images, 1e-4) == deaf


def test_hidream_s_experts_learn_as_their_training_form_does(see):
    """diffusers' form for training, whose result has another shape further on, is exact for one layer of experts."""
    ours = copy.deepcopy(see("HiDreamImagePipeline").pipeline.transformer.double_stream_blocks[0].block.ff_i).train()
    theirs = copy.deepcopy(ours)
    del theirs.moe_infer
    theirs._force_inference_output = False
    results = []
    for experts in (ours, theirs):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        experts(x).square().sum().backward()
        results.append({"x": x.grad} | {key: p.grad for key, p in experts.named_parameters()})
    assert all(grad.any() for key, grad in results[0].items() if "experts" in key)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "index", "transformer", "scheduler", "wanted"),
    [
        ("ZImagePipeline", {}, {}, {"shift": 3.0}, True),
        ("ZImagePipeline", {}, {}, {"shift": 6.0}, False),
        ("Flux2KleinPipeline", {"is_distilled": True}, {}, {}, True),
        ("Flux2KleinPipeline", {"is_distilled": False}, {}, {}, False),
        ("FluxPipeline", {}, {"guidance_embeds": False}, {}, True),
        ("FluxPipeline", {}, {"guidance_embeds": True}, {}, False),
        ("Krea2Pipeline", {"is_distilled": True}, {}, {}, True),
        ("QwenImagePipeline", {}, {}, {}, False),
    ],
)
def test_a_checkpoint_distilled_to_few_steps_says_so(kind, index, transformer, scheduler, wanted):
    assert flow.of(kind).distilled(index, transformer, scheduler) is wanted


def test_sd3_without_t5_has_zeros_in_its_place():
    """How wide they are its transformer's config says, which the encoding has on the meta device."""
    pipeline = tiny_families.sd3(third=False)
    with torch.device("meta"):
        config = type(pipeline.transformer).from_config(pipeline.transformer.config)
    parts = {key: part for key, part in pipeline.components.items() if key.startswith(("text", "token"))}
    with torch.no_grad():
        columns = flow.SD3.text(flow.assemble("StableDiffusion3Pipeline", parts | {"transformer": config}), PROMPTS, 256)
        wanted, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    assert not columns["prompt_embeds"][:, 77:].any() and torch.equal(columns["prompt_embeds"], wanted)
    assert torch.equal(columns["pooled_prompt_embeds"], pooled)


def test_an_unknown_pipeline_is_refused_with_the_list():
    with pytest.raises(BadInput, match=r"PixArtSigmaPipeline .*ZImagePipeline, Flux2KleinPipeline, .*HiDreamImagePipeline"):
        flow.of("PixArtSigmaPipeline")


def test_every_family_has_a_tiny_checkpoint():
    assert {name.split()[0] for name in NAMES} == set(flow.FAMILIES)


def test_the_settings_that_are_read_are_named():
    """By tasks, with their types; the properties that stand for some among them."""
    read, named = set(), set()
    for path in (ROOT / "families").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "s":
                read.add(node.attr)
    for path in (ROOT / "tasks").glob("[a-z]*.py"):
        kind = importlib.import_module(f"oneloop.tasks.{path.stem}").Settings
        named |= {field.name for field in dataclasses.fields(kind)}
        named |= {key for key in dir(kind) if isinstance(getattr(kind, key), property)}
    assert read - named == set()
    shared = {field.name for kind in (settings.Pretrained, settings.Adapters) for field in dataclasses.fields(kind)}
    assert shared <= {field.name for field in dataclasses.fields(lora.Settings)}
