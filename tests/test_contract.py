"""What a task may declare and yield: followers, state of its own, losses that step later, and models as fixed functions."""

import copy
import itertools
import shutil
from types import MethodType

import following
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from test_loop import Scale, settings, toy
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from warm import UNET, cli, cli_many, digest, distance, flags, metrics, tensors

from oneloop import data, loop
from oneloop.configs import BadInput
from oneloop.inputs import sources
from oneloop.machine import placement
from oneloop.machine.placement import at_rest, same_buffers
from oneloop.tasks import Follow, Loss, Rng, frozen, hash64, without_adapters
from oneloop.training import ema

# ---------------------------------------------------------------------------------------------------------------------
# Followers and state that does not train.


def command(folder, out, steps=6, **more):
    given = {
        "base.output_dir": folder / out,
        "base.max_train_steps": steps,
        "base.logger": "none",
        "base.validation_steps": 0,
        "base.lr_scheduler": "constant",
        "base.logging_steps": 2,
        "data.num_shapes": 24,
        "data.resolution": 8,
        "data.train_batch_size": 2,
    }
    return flags("following", given | {name.replace("__", "."): value for name, value in more.items()})


def by_hand(steps, batches, size):
    """The run of `command` with the EMA written out: losses of every micro-batch summed, one step, then the target moves."""
    cfg = following.Config(data=data.Data(num_shapes=24, resolution=8, train_batch_size=size))
    torch.manual_seed(hash64(cfg.base.seed, "models"))
    models = {"net": following.Net(False), "seen": following.Seen()}
    target = models["target"] = copy.deepcopy(models["net"]).requires_grad_(False).eval()
    net, optim = models["net"], torch.optim.AdamW(models["net"].parameters(), 0.05)
    examples = data.Examples(sources.open_source(cfg.data), cfg.data, cfg.base.seed)
    stream = examples.stream(0, size)
    for step in range(steps):
        for _ in range(batches):
            batch = examples.ready(next(stream), "cpu")
            rng = Rng.of(cfg.base.seed, batch["n"].tolist())
            for loss in following.loss_fn(models, batch, rng, cfg):
                (loss.value / batches).backward()
        nn.utils.clip_grad_norm_(net.parameters(), cfg.base.max_grad_norm)
        optim.step()
        optim.zero_grad()
        for own, weight in zip(target.parameters(), net.parameters(), strict=True):
            own.lerp_(weight.detach(), 1 - following.decay(step + 1, steps))
    return net.state_dict(), target.state_dict()


def test_a_target_network(tmp_path):
    """Equal to the EMA by hand: accumulated, on two processes, resumed from any step; in the same bits."""
    split = {"base__gradient_accumulation_steps": 2, "base__checkpointing_steps": 1, "base__checkpoints_total_limit": None}
    result = cli(tmp_path, *command(tmp_path, "accumulated", following__alone=True, **split))
    assert result.code == 0, result.err
    for result in cli_many(tmp_path, 2, *command(tmp_path, "two", following__alone=True)):
        assert result.code == 0, result.err
    for stop in (1, 4):
        shutil.copytree(tmp_path / f"accumulated/checkpoint-{stop}", tmp_path / f"resumed-{stop}/checkpoint-{stop}")
        result = cli(tmp_path, *command(tmp_path, f"resumed-{stop}", following__alone=True, **split))
        assert result.code == 0 and f"resuming after step {stop}" in result.err, result.err
    outs = [tmp_path / out for out in ("accumulated", "two", "resumed-1", "resumed-4")]
    assert len({digest(out) for out in outs}) == 1
    net, target = by_hand(6, 2, 2)
    found = tensors(outs[0])
    assert net and all(torch.equal(found[f"model/{name}"], value) for name, value in net.items())
    assert all(torch.equal(found[f"ema/target.{name}"], value) for name, value in target.items())
    assert not torch.equal(target["conv.weight"], net["conv.weight"])
    assert {name for name in found if name.startswith("model_1/")} == {"model_1/count", "model_1/mean"}
    # `late` is logged by the second process alone: its mean is over what was logged, and its neighbours are themselves.
    for line, other in zip(*(metrics(out) for out in outs[:2]), strict=True):
        assert line["late"] == other["late"] and line["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_losses_that_share_a_step_on_two_processes(tmp_path):
    """The same weights, to the rounding of sums in another order."""
    more = {"following__twice": True, "base__logging_steps": 6}
    assert cli(tmp_path, *command(tmp_path, "accumulated", base__gradient_accumulation_steps=2, **more)).code == 0
    for result in cli_many(tmp_path, 2, *command(tmp_path, "two", **more)):
        assert result.code == 0, result.err
    assert distance(tmp_path / "accumulated", tmp_path / "two") < 1e-5
    assert distance(tmp_path / "accumulated", tmp_path / "two", "ema/target") < 1e-5


def test_gradients_that_were_not_reduced_are_refused(tmp_path):
    """DDP reduces one backward pass after each call: of two calls in a row the second stays each process's own."""
    for result in cli_many(tmp_path, 2, *command(tmp_path, "out", following__twice=True, following__ahead=True)):
        assert result.code and "the gradient of 'net' was not reduced across processes (norms " in result.err, result.err


@pytest.mark.parametrize("processes", [1, 3])
def test_state_that_does_not_train_survives(tmp_path, processes):
    """Batch norm and a state of the task's own, though warm-up passes (of three processes) and validation move them."""
    more = {
        "following__moving": True,
        "following__twice": True,
        "data__validation_split": 0.3,
        "base__use_ema": False,
        "data__num_shapes": 40,
    }
    saves = {"base__checkpointing_steps": 2, "base__checkpoints_total_limit": None, "base__validation_steps": 3}
    for result in cli_many(tmp_path, processes, *command(tmp_path, "whole", **more, **saves)):
        assert result.code == 0, result.err
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    for result in cli_many(tmp_path, processes, *command(tmp_path, "resumed", **more)):
        assert result.code == 0, result.err
    found = tensors(tmp_path / "whole")
    assert found["model_1/count"] == 6 and found["model/norm.num_batches_tracked"] == 12
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")


def adapted():
    """A base of two layers with adapters, and the same base without."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)
    plain = copy.deepcopy(base)
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    return inject_adapter_in_model(config, base), plain


def test_what_follows_an_adapter_is_an_adapter():
    """Parameters of its own where the model trains, those of the model elsewhere; a step moves the first alone."""
    model, _ = adapted()
    task = {"target": Follow(of="a", decay=0.75)}
    models = {"a": model} | placement.followers({"a": model}, task)
    (average,), target = ema.following(models, task), models["target"]
    pairs = dict(zip(dict(model.named_parameters()), zip(model.parameters(), target.parameters(), strict=True), strict=True))
    assert {name for name, (p, q) in pairs.items() if p is not q} == {n for n in pairs if "lora_" in n}
    assert {name.removeprefix("target.") for name in average.values} == {name for name in pairs if "lora_" in name}
    before = {name: q.clone() for name, (_, q) in pairs.items()}
    with torch.no_grad():
        [p.add_(1) for p, _ in pairs.values() if p.requires_grad]
    assert average.update(1, 10) == 0.75
    for name, (_, q) in pairs.items():
        assert not q.requires_grad and torch.allclose(q, before[name] + 0.25 * ("lora_" in name)), name


def test_followers_that_cannot_be():
    for name, of in (("a", "a"), ("target", "b"), ("target", "fixed")):
        with pytest.raises(ValueError, match=f"{name!r} follows {of!r}; expected a new name"):
            placement.followers({"a": Scale(), "fixed": Scale().requires_grad_(False)}, {name: Follow(of, 0.5)})
    closed = Scale()
    closed.forward = lambda x: closed.w * x
    with pytest.raises(ValueError, match="its forward is a closure"):
        placement.followers({"a": closed}, {"target": Follow("a", 0.5)})
    bound = Scale(2.0)
    bound.forward = MethodType(lambda self, x: 10 * self.w * x, bound)
    target = placement.followers({"a": bound}, {"target": Follow("a", 0.5)})["target"]
    bound.w.data.fill_(0.0)
    assert target(torch.ones(3)).tolist() == [20.0] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Samples show the EMA without copying anything.


def test_weights_stay_where_they_are():
    """Parameters point to the EMA meanwhile and to their own memory afterwards, tied ones too, whatever happens inside."""
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    weights = {f"m.{n}": p for n, p in tied.named_parameters()}
    averaged = {name: torch.full_like(p, 5.0) for name, p in weights.items()}
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in weights.items()}
    with pytest.raises(KeyError), at_rest({"m": tied}, weights, averaged):
        assert not tied.training and not torch.is_grad_enabled()
        assert {p.data_ptr() for p in tied.parameters()} == {x.data_ptr() for x in averaged.values()}
        assert tied["b"].weight.min() == 5.0
        tied["a"].half()  # an export may convert what it saves
        raise KeyError
    assert tied.training and tied["b"].weight is tied["a"].weight
    for name, p in weights.items():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1]) and (averaged[name] == 5.0).all()


def test_parts_in_eval_stay_so():
    """What a task puts in eval() inside of a model that trains is as it was, on the device and after it was shown."""
    accelerator, frozen_part = Accelerator(cpu=True), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    loaded = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).eval()  # as from_pretrained has them
    frozen_part[1].eval()
    models = {"a": frozen_part, "loaded": loaded}
    placement.place(models, accelerator, False, ())
    flags = lambda: [part.training for model in models.values() for part in model.modules()]  # noqa: E731
    before = [True, True, False, True] + [True] * 3
    assert flags() == before
    with at_rest(models, {}, {}):
        assert not any(flags())
    assert flags() == before


def test_a_sample_moves_no_weight(tmp_path):
    addresses = []

    def loss_fn(models, batch, rng, cfg):
        addresses.append(models["a"].w.data_ptr())
        yield Loss("a", models["a"](torch.ones(3)).sum())

    def sample_fn(models, examples, rng, cfg):
        addresses.append(-models["a"].w.data_ptr())
        return {}

    cfg = settings(tmp_path / "out", max_train_steps=2, use_ema=True, validation_steps=1, checkpointing_steps=1)
    state = loop.run(toy(loss_fn, sample_fn=sample_fn), cfg)
    own, averaged = state.models["a"].w.data_ptr(), state.ema["a.w"].data_ptr()
    assert [address for address, _ in itertools.groupby(addresses)] == [own, -averaged] * 2 and own != averaged


# ---------------------------------------------------------------------------------------------------------------------
# Losses.


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_of_several_losses_share_a_step(tmp_path, accumulated):
    """Backward at once, in any number; the step, with the clipping, is that of their sum, and so is the metric."""
    seen = []

    def split(models, batch, rng, cfg):
        n = batch["n"].float().mean()
        for power in (1, 2):
            yield Loss("a", power * n * models["a"](torch.ones(3)).sum(), step=False)
            seen.append(models["a"].w.tolist())
        yield Loss("a", models["a"](torch.ones(3)).square().sum())

    def whole(models, batch, rng, cfg):
        y = models["a"](torch.ones(3))
        yield Loss("a", 3 * batch["n"].float().mean() * y.sum() + y.square().sum())

    more = {"gradient_accumulation_steps": accumulated, "max_train_steps": 3, "logging_steps": 1}
    found = {}
    for loss_fn in (split, whole):
        cfg = settings(tmp_path / loss_fn.__name__, **more)
        found[loss_fn] = loop.run(toy(loss_fn, lambda cfg: {"a": Scale(1.0)}, lr=0.1), cfg).models["a"].w
    torch.testing.assert_close(found[split], found[whole])
    assert seen[:2] == [[1.0] * 3] * 2  # nothing stepped in between
    for one, other in zip(*(metrics(tmp_path / name) for name in ("split", "whole")), strict=True):
        assert one["loss"] == pytest.approx(other["loss"]) and one["grad_norm"] == pytest.approx(other["grad_norm"])


def test_steps_of_one_name(tmp_path):
    """Two in a batch are two steps; of accumulated batches they would be a wrong one, and a gradient without a step is none."""

    def loss_fn(models, batch, rng, cfg):
        for _ in range(2):
            yield Loss("a", models["a"](torch.ones(3)).sum())

    state = loop.run(toy(loss_fn), settings(tmp_path / "two", max_grad_norm=0))
    assert state.models["a"].w.tolist() == [-2.0] * 3
    with pytest.raises(
        BadInput, match=r"gradient-accumulation-steps is 2; expected 1, since the task steps 'a' more than once"
    ):
        loop.run(toy(loss_fn), settings(tmp_path / "accumulated", gradient_accumulation_steps=2))

    def never(models, batch, rng, cfg):
        yield Loss("a", models["a"](torch.ones(3)).sum(), step=False)

    with pytest.raises(ValueError, match="yields 'a' with step=False and no loss after it that steps"):
        loop.run(toy(never), settings(tmp_path / "never"))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("step", [True, False])
def test_a_second_loss_that_forgets_to_detach_is_refused(tmp_path, accumulated, late, step):
    """Though the first optimizer has yielded, whatever batches are accumulated, from the step on which it does."""

    def loss_fn(models, batch, rng, cfg):
        one = torch.ones(3)
        with frozen(models["b"]) as b:
            yield Loss("a", b(models["a"](one)).sum(), step=False)
        yield Loss("a", models["a"](one).sum())
        y = models["a"](one)
        if not step:
            yield Loss("b", models["b"](one).sum(), step=False)
        yield Loss("b", models["b"](y if batch["step"] >= late else y.detach()).sum())
        reached.append(batch["step"])

    reached = []
    cfg = settings(tmp_path / "out", gradient_accumulation_steps=accumulated, max_train_steps=4)
    with pytest.raises(ValueError, match=r"the loss 'b' put gradients on the parameters of 'a'.*detach"):
        loop.run(toy(loss_fn, lambda cfg: {"a": Scale(1.0), "b": Scale(2.0)}), cfg)
    assert len(reached) == late * accumulated


def test_what_a_loss_is_told(tmp_path):
    seen = []

    def loss_fn(models, batch, rng, cfg):
        seen.append((batch["phase"], batch["step"], batch["total"]))
        yield Loss("a", models["a"](torch.ones(3)).sum())

    loop.run(toy(loss_fn), settings(tmp_path / "out", {"num_shapes": 40, "validation_split": "0.2"}, max_train_steps=2))
    assert seen[:2] == [("train", 0, 2), ("train", 1, 2)] and set(seen[2:]) == {("validate", 2, 2)}


def test_passes_that_leave_buffers_alone():
    model = nn.BatchNorm1d(3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), same_buffers({"m": model}):
        model(torch.randn(4, 3))
        assert model.num_batches_tracked == 1
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Models as fixed functions.


class Judge(nn.Module):
    """[B, 3] -> [B], its layers recomputed in the backward pass or not; reentrant or not."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) for _ in range(2))
        self.how = how

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.how is None else recompute(layer, x, use_reentrant=self.how)
        return x.sum(1)


class DistributedDataParallel(nn.Module):
    """Wraps as the real one does, by name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda module: module, DistributedDataParallel])
@pytest.mark.parametrize("how", [None, False, True])
def test_frozen_holds_where_activations_are_recomputed(how, wrap):
    """After the context: the right gradient on its input, none on its parameters; and it trains as before."""
    judge, x = Judge(how), torch.randn(5, 3)
    y = x.clone().requires_grad_()
    with frozen(wrap(judge)) as fixed:
        doubt = fixed(2 * y).square().sum()
        (inner,) = torch.autograd.grad(doubt, y, retain_graph=True) if not how else (None,)
    assert all(p.requires_grad for p in judge.parameters())
    doubt.backward()
    assert all(p.grad is None for p in judge.parameters())
    plain, z = Judge(None), x.clone().requires_grad_()
    plain(2 * z).square().sum().backward()
    assert torch.equal(y.grad, z.grad) and (inner is None or torch.equal(inner, z.grad))
    judge(2 * x.clone().requires_grad_()).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(judge.parameters(), plain.parameters(), strict=True))


def test_frozen_is_a_view():
    """The same memory, the same buffers, the same mode and forward; it costs no weights."""
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "rnn": nn.LSTM(3, 3), "layer": nn.Linear(3, 3)})
    model.tied, model.pair = model["layer"], [model["layer"].weight]
    model.forward = MethodType(lambda self, x: self.tied(self["rnn"](self["norm"](x))[0]) @ self.pair[0], model)
    with frozen(model) as fixed:
        y = fixed(torch.randn(4, 3, requires_grad=True))
    y.sum().backward()
    assert model["norm"].num_batches_tracked == 1 and all(p.grad is None for p in model.parameters())
    assert [p.data_ptr() for p in fixed.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert fixed.pair[0] is fixed["layer"].weight is fixed.tied.weight and not any(p.requires_grad for p in fixed.parameters())
    fixed["norm"].running_mean = torch.full((3,), 7.0)  # as layers do that make their buffers anew
    assert model["norm"].running_mean.tolist() == [7.0] * 3
    model.eval()
    with frozen(model) as fixed:
        assert not fixed["norm"].training


def test_frozen_diffusers_models():
    """A UNet that recomputes, as enable_gradient_checkpointing makes it do."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel.from_config(UNET | {"sample_size": 8, "dropout": 0.0})
    grads = []
    for recomputes in (False, True):
        if recomputes:
            unet.enable_gradient_checkpointing()
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with frozen(unet) as fixed:
            y = fixed(x, torch.tensor([1, 2])).sample
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and all(p.grad is None for p in unet.parameters())


@pytest.mark.parametrize("wrap", [lambda module: module, DistributedDataParallel])
def test_without_adapters(wrap):
    """The base, whatever happens inside and is recomputed after; the model keeps its adapters and what trains of them."""
    model, plain = adapted()
    frozen_one = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen_one.requires_grad_(False)
    trained, x = [p.requires_grad for p in model.parameters()], torch.randn(5, 4, requires_grad=True)
    before = model(x)
    with pytest.raises(KeyError), without_adapters(wrap(model)) as base:
        y = recompute(base, x, use_reentrant=False)
        assert torch.equal(y, plain(x)) and torch.equal(model(x), before) and not torch.equal(y, before)
        raise KeyError
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    plain(other).sum().backward()
    assert torch.equal(x.grad, other.grad) and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == trained and torch.equal(model(x), before)
    with pytest.raises(ValueError, match="this Sequential has no peft adapter"), without_adapters(plain):
        pass
