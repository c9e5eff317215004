"""What `--base.compile` compiles is one graph, which CUDA could record once and replay: no part of a pass of what trains runs
between two, a bucket is one shape, weights stay where they are."""

import json
import sysconfig

import pytest
import torch
from test_lora_families import config, encoded
from test_pretended import draw_photos
from warm import checkpoints, flags, fork, tiny

from oneloop import loop
from oneloop.configs import BadInput
from oneloop.machine import compilation
from oneloop.settings import command_line
from oneloop.tasks import Facts, Rng, lora


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


@pytest.mark.parametrize("task", ["ddpm", "vae", "consistency", "edm", "dit"])
def test_models_of_their_own(tmp_path, task):
    module, cfg = command_line.parse(tiny(tmp_path, "out", 4, task))
    cfg = module.task.resolve(cfg, Facts(24, ("a", "b"), ("pixel_values", "label")))
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 1]), "weight": torch.ones(2)}
    batch |= {"step": 3, "total": 4, "phase": "train"}
    found = list(calls(module.task.make_models(cfg), module.task, batch, cfg))
    assert len(found) == (2 if task == "vae" else 1)
    for each in found:
        whole(*each)


@pytest.mark.parametrize("name", ["sdxl", "FluxPipeline", "QwenImagePipeline"])
def test_adapters(built, name):
    cfg = config(built(name))
    models = lora.make_models(cfg)
    batch = encoded(models, cfg) | {key: torch.tensor([[32, 32]] * 2) for key in ("original_size", "crop_top_left")}
    (found,) = calls(models, lora.task, batch, cfg)
    whole(*found)


# ---------------------------------------------------------------------------------------------------------------------
# What CUDA graphs rely on, as a compiled graph sees it. (No CPU records one.)


def seen_by_graphs(argv, folder):
    """In a fork: a run, whose graphs note each call: what lasts by its address, what does not by its shape."""
    calls = []

    def backend(graph, inputs):
        number = len(calls)
        calls.append([])
        own = {id(x) for x in inputs if isinstance(x, torch.nn.Parameter)}
        lasts = [i for i, x in enumerate(inputs) if id(x) in own]

        def call(*given):
            assert all(isinstance(given[i], torch.nn.Parameter) for i in lasts)
            shapes = [list(x.shape) for i, x in enumerate(given) if isinstance(x, torch.Tensor) and i not in lasts]
            calls[number].append([[given[i].data_ptr() for i in lasts], shapes])
            return graph.forward(*given)

        return call

    compilation.options = lambda *_: {"backend": backend}
    module, cfg = command_line.parse(list(map(str, argv)))
    loop.run(module.task, cfg)
    (folder / "calls.json").write_text(json.dumps(calls))


RUNS = {"base.compile": True, "base.lr_scheduler": "constant", "base.logger": "none", "base.num_samples": 2}
RUNS |= {"base.validation_steps": 2, "base.checkpointing_steps": 2, "data.buckets": True, "data.validation_split": 0.4}
RUNS |= {"data.resolution": 32, "data.train_batch_size": 2}


@pytest.mark.parametrize(("task", "shapes"), [("ddpm", 2), ("lora", 1)])
def test_one_shape_a_bucket_and_addresses_that_stay(tmp_path, built, task, shapes):
    """Over steps, validations and samples of the EMA, and saves; of a resumed run too. Of two buckets, one the other turned,
    a UNet sees two shapes, and its blocks of tokens one."""
    more = RUNS | {"data.train_data_dir": draw_photos(tmp_path) / "images", "base.output_dir": tmp_path / "out"}
    if task == "lora":
        own = {"pretrained_model_name_or_path": built("sd"), "rank": 2, "num_inference_steps": 1}
        argv = flags(task, more | {f"lora.{name}": value for name, value in own.items()})
    else:
        argv = [*tiny(tmp_path, steps=None), *flags(task, more)[1:]]
    for steps, passes in ((4, 4), (6, 2)):
        done = fork(lambda n=steps: seen_by_graphs([*argv, "--base.max-train-steps", n], tmp_path), tmp_path).wait(300)
        assert done.code == 0 and "no samples" not in done.err, done.err
        graphs = json.loads((tmp_path / "calls.json").read_text())
        blocks = {tuple(where) for calls in graphs for where, _ in calls}
        for block in blocks:  # of which one that moved would be two
            seen = [str(sizes) for calls in graphs for where, sizes in calls if tuple(where) == block]
            assert len(seen) == 6 + passes and len(set(seen)) == shapes, seen  # 6 compile and are timed
    assert checkpoints(tmp_path / "out")[-1] == 6


def test_when_graphs_are_recorded():
    """A frozen base is no size; several models, accumulation, recomputation, and what has much to train leave them out."""
    cuda, small = torch.device("cuda"), torch.nn.Linear(2, 2)
    large = torch.nn.Linear(20_000, 10_000, device="meta")
    adapted = torch.nn.Sequential(large, small)
    graphs = lambda *given: compilation.options(*given) == {"mode": "reduce-overhead"}  # noqa: E731
    assert graphs({"a": small}, cuda, 1) and not graphs({"a": adapted}, cuda, 1)
    large.requires_grad_(False)
    assert graphs({"a": adapted}, cuda, 1) and not graphs({"a": adapted}, torch.device("cpu"), 1)
    assert not graphs({"a": adapted}, cuda, 2) and not graphs({"a": adapted, "b": small}, cuda, 1)
    small.gradient_checkpointing = True
    assert not graphs({"a": adapted}, cuda, 1)


def test_what_a_compiler_needs(tmp_path, monkeypatch):
    """Each that is missing is a line, before anything starts."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    (tmp_path / "compiler").touch(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "compiler"))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    for device, said in (
        (cpu, r"a C\+\+ compiler; found none of .*none .CXX"),
        (cuda, "Triton on a GPU; found no package "),
    ):
        with pytest.raises(BadInput, match=f"--base.compile needs {said}"):
            compilation.check(device)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name)
    compilation.check(cuda)
    compilation.check(torch.device("mps"))
    (tmp_path / "Python.h").unlink()
    with pytest.raises(BadInput, match=r"--base.compile needs Python's headers; found no .*Python.h"):
        compilation.check(cuda)
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match=r"a C compiler; found none of gcc, clang \(CC names another\)"):
        compilation.check(cuda)


@pytest.mark.parametrize(("has", "regions"), [(True, 1), (False, 0)])
def test_a_model_without_the_blocks_that_its_class_names_is_compiled_whole(has, regions):
    class Block(torch.nn.Linear):
        pass

    class Net(torch.nn.Sequential):
        _repeated_blocks = ("Block",)

        def compile_repeated_blocks(self, **how):
            return [part.compile(**how) for part in self.modules() if isinstance(part, Block)]

    net = Net(Block(2, 2) if has else torch.nn.Linear(2, 2))
    compilation.compile_models({"a": net}, torch.device("cpu"), 1)
    assert (net[0]._compiled_call_impl is not None) is has and (net._compiled_call_impl is not None) is not has
