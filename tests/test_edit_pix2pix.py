"""InstructPix2Pix: the widened convolution, the loss written out, and what is dropped."""

import diffusers
import pytest
import torch
from test_edit import CAPTIONS, SIDE, batch_of, config, generator

from oneloop.families import edit_sources, stable_diffusion, text_to_image
from oneloop.tasks import Rng
from oneloop.tasks import edit as task


def test_the_new_weights_are_zero_and_what_was_there_stays(built):
    """The bias too, which the official script draws anew."""
    before, after = (make(config(built("sd"))) for make in (lambda cfg: text_to_image.load(cfg, "no"), task.make_models))
    assert after["unet"].config.in_channels == 8 and all(p.requires_grad for p in after["unet"].parameters())
    assert not any(p.requires_grad for name in ("vae", "text_encoder") for p in after[name].parameters())
    for key, x in after["unet"].state_dict().items():
        old = before["unet"].state_dict()[key]
        assert torch.equal(x[:, :4], old) and not x[:, 4:].any() if key == "conv_in.weight" else torch.equal(x, old)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_loss_is_the_formula_s(built, name):
    """Written out for every example, with what its number drops: the first forty have all four cases."""
    cfg = config(built(name))
    models = task.make_models(cfg)
    torch.nn.init.normal_(models["unet"].conv_in.weight, std=0.2, generator=generator())
    vae, seen, wanted, got = models["vae"], set(), [], []
    table = diffusers.DDPMScheduler.from_config(stable_diffusion.config(cfg.edit, "scheduler"))
    with torch.no_grad():
        raw = batch_of(cfg, 1)
        x, source = (vae.encode(raw[key]).latent_dist for key in ("pixel_values", "conditioning"))
        texts = {caption: text_to_image.encode_captions(models, [caption], cfg) for caption in ("", CAPTIONS[0])}
        columns = text_to_image.encode_images(models, raw["pixel_values"], cfg) | texts[CAPTIONS[0]]
        batch = raw | columns | edit_sources.encode_source(models, raw["conditioning"], cfg)
        for n in range(40):
            rng = Rng.of(0, [n])
            (loss,) = task.loss_fn(models, batch, rng, cfg)
            u = rng.uniform("dropout").item()
            text, image = u >= 0.1, not 0.05 <= u < 0.15  # the share without text, both, without image: 5 % each
            seen.add((text, image))
            z = (x.mean + x.std * rng.normal("posterior", 4, 8, 8)) * vae.config.scaling_factor
            noise, t = rng.normal("noise", 4, 8, 8), rng.integers("timestep", 1000)
            given = texts[CAPTIONS[0] if text else ""]
            more = {}
            if name == "sdxl":
                ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32)
                more["added_cond_kwargs"] = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": ids}
            told = torch.cat([table.add_noise(z, noise, t), source.mode() * image], 1)
            answer = models["unet"](told, t, given["prompt_embeds"], **more).sample
            wanted.append((answer - noise).square().mean()), got.append(loss.value)
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert len(seen) == 4


def test_shares_that_are_dropped(built):
    """Of 20,000 examples about 5 % each way, or as many as is asked; the same whatever batch they are in."""
    for p in (None, 0.2, 0.0):
        cfg = config(built("sd"), conditioning_dropout=p)
        models = {"null": text_to_image.held({"prompt_embeds": torch.zeros(1, 1, 1)})}
        ones = {"source_latents": torch.ones(20_000, 1, 1, 1), "prompt_embeds": torch.ones(20_000, 1, 1)}
        made = edit_sources.given(models, ones, Rng.of(3, range(20_000)), cfg)
        text, image = (made[key].flatten().bool() for key in ("prompt_embeds", "beside"))
        share = 0.05 if p is None else p
        for dropped in (~text & image, ~text & ~image, text & ~image):
            assert abs(dropped.float().mean().item() - share) < 0.006
        alone = edit_sources.given(models, {key: x[:7] for key, x in ones.items()}, Rng.of(3, range(7)), cfg)
        assert torch.equal(alone["beside"], made["beside"][:7]) and torch.equal(
            alone["prompt_embeds"], made["prompt_embeds"][:7]
        )


def test_an_absent_instruction_is_what_the_pipeline_shows_in_its_place(built):
    """Zeros where SDXL says so, in both text columns; else the encoding of nothing."""
    for name, zero in (("sdxl", True), ("sd", False)):
        null = dict(task.make_models(config(built(name)))["null"].named_buffers())
        assert len(null) == 1 + zero and all(bool(x.any()) != zero for x in null.values())
