"""What `--base.compile` compiles is one graph: no part of a pass of what trains runs between two."""

import pytest
import torch
from test_lora_families import config, encoded
from warm import tiny

from oneloop.settings import command_line
from oneloop.tasks import Rng, lora


def calls(models, task, batch, cfg):
    """(module that trains, what its first call in a loss was given)."""
    found, handles = {}, []
    for name, module in models.items():
        if any(p.requires_grad for p in module.parameters()):

            def keep(module, args, kwargs, name=name):
                found.setdefault(name, (module, args, kwargs))

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    for _ in task.loss_fn(models, batch, Rng.of(0, range(2)), cfg):
        pass
    for handle in handles:
        handle.remove()
    return found.values()


def whole(module, args, kwargs):
    torch._dynamo.reset()
    seen = torch._dynamo.explain(module)(*args, **kwargs)
    assert seen.graph_break_count == 0, [str(reason.reason) for reason in seen.break_reasons]
    assert seen.graph_count == 1


@pytest.mark.parametrize("task", ["ddpm", "vae"])
def test_models_of_their_own(tmp_path, task):
    module, cfg = command_line.parse(tiny(tmp_path, "out", 4, task))
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8), "weight": torch.ones(2), "step": 3, "total": 4, "phase": "train"}
    found = list(calls(module.task.make_models(cfg), module.task, batch, cfg))
    assert len(found) == {"ddpm": 1, "vae": 2}[task]
    for each in found:
        whole(*each)


@pytest.mark.parametrize("name", ["sdxl", "FluxPipeline", "QwenImagePipeline"])
def test_adapters(built, name):
    cfg = config(built(name))
    models = lora.make_models(cfg)
    batch = encoded(models, cfg) | {key: torch.tensor([[32, 32]] * 2) for key in ("original_size", "crop_top_left")}
    (found,) = calls(models, lora.task, batch, cfg)
    whole(*found)
