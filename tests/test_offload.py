"""Frozen blocks in the machine's memory: the same bits, one block's weights at a time, and what does not go with it."""

import weakref

import diffusers
import pytest
import torch
from test_lora import draw_photos
from test_lora_families import command, config, encoded
from warm import cli, digest

from oneloop.configs import BadInput
from oneloop.families import flow, offload
from oneloop.settings import command_line
from oneloop.tasks import Rng, lora

diffusers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "ZImagePipeline"])
def test_gradients_are_the_same_and_few_weights_are_there_at_once(built, name, monkeypatch):
    """What is brought is counted as it lives: one block's at a time, in either pass, and none between."""
    cfg = config(built(name))
    models, grads, alive, most = lora.make_models(cfg), [], [], [0]
    net = models["transformer"]
    batch, own = encoded(models, cfg), offload.brought
    blocks = list(flow.recomputable(net))
    largest = max(len([p for p in block.parameters() if not p.requires_grad]) for block in blocks)

    def counting(held, forward, *args, **more):
        def inner(*args, **more):
            there = [(getattr(layer, key), home) for layer, key, home in held]
            alive.extend(weakref.ref(p.data.untyped_storage()) for p, _ in there)
            assert all(p is not home and p.data_ptr() != home.data_ptr() for p, home in there)
            most[0] = max(most[0], sum(x() is not None for x in alive))
            return forward(*args, **more)

        made = own(held, inner, *args, **more)
        assert all(getattr(layer, key) is home for layer, key, home in held)
        return made

    homes = {key: p.data_ptr() for key, p in net.named_parameters()}
    for offloaded in (False, True):
        if offloaded:
            monkeypatch.setattr(offload, "brought", counting)
            offload.hold(net, blocks)
            net.enable_gradient_checkpointing()
        net.zero_grad()
        next(lora.loss_fn(models, batch, Rng.of(0, range(2)), cfg)).value.backward()
        grads.append({key: p.grad.clone() for key, p in net.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, grads[1][key]) for key, grad in grads[0].items()) and grads[0]
    assert homes == {key: p.data_ptr() for key, p in net.named_parameters()}
    assert len(alive) >= 2 * len(blocks) and 0 < most[0] <= 2 * largest
    assert net.offloaded and not any(p.requires_grad for p in net.offloaded)


def test_a_run_with_it_ends_in_the_same_bits(built, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    draw_photos(photos)
    model = built("FluxPipeline")
    for name in ("usual", "offloaded"):
        more = {"lora__group_offload": name == "offloaded", "base__gradient_checkpointing": True}
        done = cli(tmp_path, *command(tmp_path, model, photos, name, **more, lora__preservation_weight=0.5))
        assert done.code == 0 and "no samples" not in done.err, done.err
    assert digest(tmp_path / "usual") == digest(tmp_path / "offloaded")
    grids = [(tmp_path / name / "samples" / "2.png").read_bytes() for name in ("usual", "offloaded")]
    assert grids[0] == grids[1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--base.gradient-checkpointing is False; expected true with --lora.group-offload"),
        (("--base.gradient-checkpointing", "--base.compile"), "--base.compile is True; expected false"),
        (
            ("--base.gradient-checkpointing", "--lora.base-precision", "int8", "--base.mixed-precision", "bf16"),
            "--lora.base-precision is 'int8'; expected auto, bf16 or float8",
        ),
    ],
)
def test_what_does_not_go_with_it_is_a_line(flags, says, capsys):
    with pytest.raises((BadInput, SystemExit)) as refused:
        command_line.parse(["lora", "--lora.group-offload", *flags])
    assert says in str(refused.value) + capsys.readouterr().err
