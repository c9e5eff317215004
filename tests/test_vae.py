"""The autoencoder: each loss reaches what it should and nothing else, and the run keeps the promises of every run."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from warm import ROOT, SHARED, VAE, checkpoints, cli, cli_many, digest, metrics, tensors, tiny

from oneloop import data
from oneloop.configs import BadInput, Base, Data
from oneloop.inputs import sources
from oneloop.maths import image_quality
from oneloop.settings import command_line
from oneloop.tasks import Rng, vae


class Perceptual(nn.Module):
    """What lpips.LPIPS is to the task: two images in, a distance [B, 1, 1, 1] out."""

    def __init__(self, net="vgg", verbose=True):
        super().__init__()
        self.net = nn.Conv2d(3, 4, 3)

    def forward(self, x, y):
        return (self.net(x).tanh() - self.net(y).tanh()).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch):
    """The package, with a small network in it."""
    package = types.ModuleType("lpips")
    package.LPIPS, package.__spec__ = Perceptual, types.SimpleNamespace(name="lpips")
    monkeypatch.setitem(sys.modules, "lpips", package)


@pytest.fixture
def make(tmp_path):
    """Settings -> (config, models, batch of 3 images of 16x16, rng); images of noise, the discriminator's norms awake."""

    def make(step=0, **settings):
        (tmp_path / "vae.json").write_text(json.dumps(VAE))
        small = {
            "model_config": str(tmp_path / "vae.json"),
            "disc_channels": 4,
            "disc_layers": 2,
            "disc_start": 0,
            "reconstruction": "l1",
        }
        cfg = vae.Config(data=Data(resolution=16, train_batch_size=3), vae=vae.Settings(**(small | settings)))
        torch.manual_seed(1)
        models = vae.make_models(cfg)
        for p in models["discriminator"].parameters() if "discriminator" in models else ():
            p.data += 0.1 * torch.randn(p.shape)
        rng = Rng.of(0, range(3))
        return cfg, models, {"pixel_values": rng.uniform("x", 3, 16, 16) * 2 - 1, "step": step}, rng

    return make


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * max(1, b[name].abs().max()), name


def descend(cfg, models, batch, rng):
    """The gradients on (autoencoder, discriminator) after each loss, as the loop would collect them."""
    after = []
    for loss in vae.loss_fn(models, batch, rng, cfg):
        loss.value.backward()
        after.append((loss, *(gradients(models[k]) if k in models else {} for k in ("vae", "discriminator"))))
    return after


def by_hand(models, batch, rng, perceptual=0.0, hinge=True):
    """The losses written out, image by image, with nothing of the task's but its modules: (vae's, discriminator's)."""
    auto, judge, x = models["vae"], models["discriminator"], batch["pixel_values"]
    noise, both = rng.normal("posterior", 2, 8, 8), [0, 0]
    for i in range(len(x)):
        posterior = auto.encode(x[i : i + 1]).latent_dist
        y = auto.decode(posterior.mean + posterior.std * noise[i : i + 1]).sample
        match = F.l1_loss(y, x[i : i + 1])
        if perceptual:
            match = match + perceptual * models["perceptual"](y, x[i : i + 1]).sum()
        doubt = -judge(y).mean()
        last = auto.decoder.conv_out.weight
        norm = lambda loss, y=y: torch.autograd.grad(loss, last, retain_graph=True)[0].norm()  # noqa: E731, B023
        weight = (norm(match) / (norm(doubt) + 1e-6)).clamp(max=1e4)
        both[0] = both[0] + (match + 1e-6 * posterior.kl().sum() / x[0].numel() + 0.5 * weight * doubt) / len(x)
        real, fake = judge(x[i : i + 1]), judge(y.detach())
        if hinge:
            value = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
        else:
            bce = F.binary_cross_entropy_with_logits
            value = (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2
        both[1] = both[1] + value / len(x)
    return both


# ---------------------------------------------------------------------------------------------------------------------
# The losses.


@pytest.mark.parametrize(("kind", "perceptual"), [("hinge", 0.0), ("vanilla", 0.0), ("hinge", 0.7)])
def test_gradients_are_those_of_each_loss_alone(make, lpips, kind, perceptual):
    case = make(disc_loss=kind, perceptual_weight=perceptual)
    (first, auto, none), (second, auto_after, judge) = descend(*case)
    assert (first.name, second.name) == ("vae", "discriminator")
    assert none == {}, "the autoencoder's loss left a gradient on the discriminator"
    close(auto_after, auto, 0)
    _, models, batch, rng = case
    expected = by_hand(models, batch, rng, perceptual, kind == "hinge")
    for loss, value, name, got in ((first, expected[0], "vae", auto), (second, expected[1], "discriminator", judge)):
        models[name].zero_grad()
        value.backward(inputs=list(models[name].parameters()), retain_graph=True)
        close(got, gradients(models[name]))
        assert loss.value.item() == pytest.approx(value.item(), abs=1e-6)
    assert all(p.requires_grad for p in models["discriminator"].parameters())


def test_perceptual_loss_trains_the_decoder(make, lpips):
    """Its part of the gradient, and not only of the value."""
    got = {}
    for weight in (1.0, 2.0):
        ((loss, got[weight], _),) = descend(*make(perceptual_weight=weight, disc_weight=0.0))
    _, models, batch, rng = make(perceptual_weight=1.0, disc_weight=0.0)
    y = models["vae"](batch["pixel_values"], rng.normal("posterior", 2, 8, 8))[0]
    distance = models["perceptual"](y, batch["pixel_values"]).mean()
    distance.backward()
    alone = {n: g for n, g in gradients(models["vae"]).items() if n.startswith("decoder")}
    assert max(g.abs().max() for g in alone.values()) > 1e-4
    close({n: got[2.0][n] - got[1.0][n] for n in alone}, alone)
    assert loss.logs["perceptual"].item() == pytest.approx(distance.item(), rel=1e-5)
    assert gradients(models["perceptual"]) == {}


def test_adaptive_weight_is_the_formula(make):
    """Eq. 7 for each image; whatever stands beside it in the batch."""
    _, models, batch, rng = make()
    auto, x = models["vae"], batch["pixel_values"]
    y, _, _, seen = auto(x, rng.normal("posterior", 2, 8, 8))
    match, doubt = vae.each((y - x).abs()), -vae.each(models["discriminator"](y))
    got = vae.adaptive_weight(match, doubt, y, seen, auto.decoder.conv_out, "taming")
    norm = lambda loss: torch.autograd.grad(loss, auto.decoder.conv_out.weight, retain_graph=True)[0].norm()  # noqa: E731
    assert got.tolist() == pytest.approx([(norm(m) / (norm(d) + 1e-6)).item() for m, d in zip(match, doubt, strict=True)], 1e-4)
    assert not got.requires_grad and got.shape == (3,)
    flat = vae.adaptive_weight(match, doubt * 1e-9, y, seen, auto.decoder.conv_out, "taming")
    assert flat.max() <= 1e4
    assert (vae.adaptive_weight(match * 1e6, doubt * 1e-9, y, seen, auto.decoder.conv_out, "taming") == 1e4).all()


@pytest.mark.parametrize("rises", [1.0, 1e-6])
def test_adaptive_weight_as_latent_diffusion_has_it(make, lpips, rises):
    """Its loss, a sum over the pixels, written out as its code has it (ldm/modules/losses/contperceptual.py: LPIPS is added to
    every pixel before the sum, its log variance is never trained): the same gradient, times the numbers of an image."""
    cfg, models, batch, rng = make(disc_balance="latent_diffusion", kl_weight=1e-6, perceptual_weight=1.0)
    for p in models["discriminator"][-1].parameters():
        p.data *= rises  # a discriminator that says little, whose weight rises to the limit
    auto, x = models["vae"], batch["pixel_values"][:1]
    rng = Rng.of(0, [0])
    y, mean, logvar, _ = auto(x, rng.normal("posterior", 2, 8, 8))
    nll, g = ((x - y).abs() + models["perceptual"](x, y)).sum(), -models["discriminator"](y).mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
    norm = lambda loss: torch.autograd.grad(loss, auto.decoder.conv_out.weight, retain_graph=True)[0].norm()  # noqa: E731
    weight = (norm(nll) / (norm(g) + 1e-4)).clamp(0, 1e4).detach()
    assert (weight == 1e4) == (rises < 1)
    (nll + 1e-6 * kl + 0.5 * weight * g).backward(inputs=list(auto.parameters()))
    theirs = {n: p / x.numel() for n, p in gradients(auto).items()}
    auto.zero_grad()
    (_, got, _), _ = descend(cfg, models, {"pixel_values": x, "step": 0}, rng)
    close(got, theirs, 1e-5)


def test_discriminator_starts_when_told(make):
    case = {"disc_start": 7}
    assert [loss.name for loss, *_ in descend(*make(6, **case))] == ["vae"]
    assert [loss.name for loss, *_ in descend(*make(7, **case))] == ["vae", "discriminator"]
    assert "discriminator" not in make(disc_weight=0.0)[1]


def test_a_picture_does_not_see_its_neighbours(make):
    """The layout of a batch is nobody's business: losses and logits are those of each image alone."""
    _, models, batch, _ = make()
    together = models["discriminator"](batch["pixel_values"])
    alone = torch.cat([models["discriminator"](x[None]) for x in batch["pixel_values"]])
    assert (together - alone).abs().max() < 1e-5


def test_patchgan_has_the_published_layout():
    """C64-C128-C256-C512, and patches of 70 x 70."""
    net = vae.patchgan(64, 3).eval()
    convs = [m for m in net if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in convs] == [
        (3, 64, 4, 2),
        (64, 128, 4, 2),
        (128, 256, 4, 2),
        (256, 512, 4, 1),
        (512, 1, 4, 1),
    ]
    field = 1
    for m in reversed(convs):
        field = (field - 1) * m.stride[0] + m.kernel_size[0]
    assert field == 70
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_quality_is_wangs_and_the_textbooks():
    """Against sums written out with numpy."""
    rng = np.random.default_rng(0)
    x = rng.random((2, 3, 14, 15))
    y = np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1)
    w = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(w, w) / w.sum() ** 2
    for i in range(2):
        values = []
        for c in range(3):
            for top in range(4):
                for left in range(5):
                    a, b = (z[i, c, top : top + 11, left : left + 11] for z in (x, y))
                    ma, mb = (w * a).sum(), (w * b).sum()
                    va, vb, ab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                    numerator = (2 * ma * mb + 1e-4) * (2 * ab + 9e-4)
                    values.append(numerator / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
        got = image_quality.measure(torch.tensor(x) * 2 - 1, torch.tensor(y) * 2 - 1)
        assert got["ssim"][i].item() == pytest.approx(np.mean(values), abs=1e-5)
        assert got["psnr"][i].item() == pytest.approx(10 * np.log10(1 / np.mean((x[i] - y[i]) ** 2)), abs=1e-3)
    assert image_quality.measure(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))["ssim"].item() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 8 steps with every checkpoint; the discriminator begins after 2."""
    folder = tmp_path_factory.mktemp("whole")
    more = {"base__checkpointing_steps": 1, "base__checkpoints_total_limit": None, "base__logging_steps": 1}
    result = cli(folder, *tiny(folder, steps=8, task="vae", **more))
    assert result.code == 0, result.err
    return folder / "out"


def test_run_logs_everything(whole):
    lines = metrics(whole)
    always = {"psnr", "ssim", "l1", "kl", "loss/vae", "lr/vae", "lr/discriminator", "grad_norm/vae"}
    late = {"loss/discriminator", "adversarial", "adaptive_weight", "logits_real", "logits_fake", "grad_norm/discriminator"}
    assert all(always <= m.keys() for m in lines)
    assert [late <= m.keys() for m in lines] == [False] * 2 + [True] * 6
    assert not any(late & m.keys() for m in lines[:2])


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_continued_is_equal(tmp_path, whole, stop):
    """Before, at and after the discriminator's start; both models, averages and optimizers are in the state."""
    (tmp_path / "out").mkdir()
    subprocess.run(["cp", "-r", whole / f"checkpoint-{stop}", tmp_path / "out"], check=True)
    result = cli(tmp_path, *tiny(tmp_path, steps=8, task="vae"))
    assert result.code == 0 and f"resuming after step {stop}" in result.err, result.err
    assert digest(tmp_path / "out") == digest(whole)
    parts = {key.partition("/")[0] for key in tensors(whole)}
    assert {"model", "model_1", "optimizer", "optimizer_1", "ema"} <= parts
    moved = [key for key in tensors(whole) if key.startswith("optimizer_1/") and key.endswith("/step")]
    assert moved and all(tensors(whole)[key] == 6 for key in moved)


def test_layouts(tmp_path):
    """1 x 4, 2 accumulated x 2 and 2 processes x 2 end in the same weights, autoencoder's and discriminator's."""
    command = lambda out, **more: tiny(tmp_path, out, task="vae", **more)  # noqa: E731
    assert cli(tmp_path, *command("one")).code == 0
    split = {"data__train_batch_size": 2}
    assert cli(tmp_path, *command("accumulated", **split, base__gradient_accumulation_steps=2)).code == 0
    for result in cli_many(tmp_path, 2, *command("processes", **split)):
        assert result.code == 0, result.err
    one = tensors(tmp_path / "one")
    for other in ("accumulated", "processes"):
        found = tensors(tmp_path / other)
        differ = {k: (one[k] - found[k]).abs().max().item() for k in one if k.startswith("model")}
        assert any(k.startswith("model_1") for k in differ)
        assert 0 < max(differ.values()) < 1e-4, max(differ.items(), key=lambda item: item[1])
    assert digest(tmp_path / "accumulated") == digest(tmp_path / "processes")


def test_export_opens_and_its_latents_have_unit_deviation(whole):
    """Its own scaling_factor, at the end over all images and before it over some; what is shown is the averaged model."""
    from diffusers import AutoencoderKL

    source = Data(num_shapes=24, resolution=8, train_batch_size=24)
    x = next(iter(data.Fixed(data.Examples(sources.open_source(source), source, 0), 24, "cpu")))["pixel_values"]
    for folder in (whole / "export", whole / "checkpoint-5"):
        model = AutoencoderKL.from_pretrained(folder)
        torch.manual_seed(0)
        with torch.no_grad():
            latents = torch.cat([model.encode(x).latent_dist.sample() for _ in range(20)]) * model.config.scaling_factor
        assert latents.std().item() == pytest.approx(1, abs=0.02)
        assert model.config.sample_size == 8 and model.config.shift_factor is None
    average = load_file(whole / "checkpoint-8" / "state" / "ema.safetensors")
    exported = load_file(whole / "export" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(average[f"vae.{k}"], v) for k, v in exported.items())
    space = {}
    exec(
        (whole / "export" / "README.md")
        .read_text()
        .split("```python\n")[1]
        .split("```")[0]
        .replace("'.'", repr(str(whole / "export"))),
        space,
    )
    assert space["decode"](space["encode"](x)).shape == x.shape


def test_part_of_the_data_is_spread_over_it():
    cfg = Data(num_shapes=24, resolution=8, train_batch_size=4)
    examples = data.Examples(sources.open_source(cfg), cfg, 0)
    assert [b["index"].tolist() for b in examples.fixed(2, 5)] == [[0, 4], [9, 14], [19]]
    assert torch.cat([b["index"] for b in examples.fixed(5)]).tolist() == list(range(24))
    assert sum(len(b["index"]) for b in examples.fixed(5, 24)) == 24


def test_inputs_stand_above_their_reconstructions(whole, make):
    from PIL import Image

    cfg, models, batch, rng = make()
    with torch.no_grad():
        shown = vae.sample_fn(models, [batch], rng, cfg)["reconstructions"]
        y = models["vae"].decode(models["vae"].encode(batch["pixel_values"]).latent_dist.mean).sample
    assert shown.shape == (3, 3, 32, 16)
    assert torch.equal(shown[:, :, :16], batch["pixel_values"] / 2 + 0.5) and torch.equal(shown[:, :, 16:], y / 2 + 0.5)
    assert Image.open(whole / "samples" / "8-reconstructions.png").size == (2 * 100 + 4, 192 + 8)  # enlarged


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_decoder_alone(tmp_path, whole, precision):
    """The encoder and the latents' scale stay those of the pretrained model, to the bit and in any precision."""
    (tmp_path / "pipe").mkdir()
    subprocess.run(["cp", "-r", whole / "export", tmp_path / "pipe" / "vae"], check=True)
    place = {"vae__pretrained_model_name_or_path": tmp_path / "pipe", "vae__subfolder": "vae", "vae__train": "decoder"}
    flags = tiny(tmp_path, task="vae", steps=3, vae__model_config=None, base__mixed_precision=precision, **place)
    result = cli(tmp_path, *flags)
    assert result.code == 0, result.err
    before, after = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (whole / "export", tmp_path / "out/export"))
    kept = {k for k in before if torch.equal(before[k], after[k])}
    frozen = {k for k in before if k.startswith(("encoder.", "quant_conv."))}
    assert frozen <= kept and {v.dtype for v in after.values()} == {torch.float32}
    assert len(kept - frozen) < 4 < len(before.keys() - frozen)
    scales = [
        json.loads((f / "config.json").read_text())["scaling_factor"] for f in (whole / "export", tmp_path / "out/export")
    ]
    assert scales[0] == scales[1] != VAE.get("scaling_factor", 0.18215)
    assert not any("encoder." in k for k in tensors(tmp_path / "out"))


def test_fine_tuning_all_begins_at_the_pretrained_weights(tmp_path, whole):
    flags = tiny(tmp_path, task="vae", steps=1, vae__model_config=None, vae__pretrained_model_name_or_path=whole / "export")
    result = cli(tmp_path, *flags, "--vae.learning-rate", "0", "--base.gradient-checkpointing")
    assert result.code == 0, result.err
    before, after = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (whole / "export", tmp_path / "out/export"))
    assert all(torch.equal(before[k], after[k]) for k in before)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what the settings say.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--vae.kl-weight -1", "--vae.kl-weight is -1.0; expected at least 0"),
        ("--vae.disc-layers 0", "--vae.disc-layers is 0; expected at least 1"),
        ("--vae.disc-layers 3", "--data.resolution is 8; expected at least 24 for --vae.disc-layers 3"),
        ("--vae.latent-channels 0", "--vae.latent-channels is 0"),
        ("--vae.disc-loss wasserstein", "hinge"),
        ("--vae.train decoder", "--vae.train is 'decoder'; expected all, or --vae.pretrained-model-name-or-path"),
        ("--vae.subfolder vae", "--vae.subfolder is 'vae'; expected nothing without"),
        ("--vae.pretrained-model-name-or-path x", "--vae.model-config is "),
        (
            "--vae.model-config None --vae.pretrained-model-name-or-path /nowhere/x",
            "not an AutoencoderKL",
        ),
        ("--vae.model-config unet.json", "whose _class_name is AutoencoderKL"),
        ("--vae.model-config nothing.json", "cannot read nothing.json as JSON"),
        ("--vae.model-config gray.json", "in_channels is 1; expected 3"),
        ("--vae.model-config odd.json", "no AutoencoderKL can be made of it"),
        ("--data.resolution 9", "--data.resolution is 9; expected a multiple of 2"),
        ("--base.mixed-precision fp16", "one loss scale cannot follow two optimizers"),
        ("--vae.perceptual-weight 1", "--data.resolution is 8; expected at least 16 for LPIPS"),
        ("--vae.perceptual-wieght 1", "did you mean --vae.perceptual-weight?"),
    ],
)
def test_bad_input_is_a_line_and_code_2(tmp_path, flags, says, lpips):
    command = tiny(tmp_path, task="vae")
    (tmp_path / "gray.json").write_text(json.dumps(VAE | {"in_channels": 1}))
    (tmp_path / "odd.json").write_text(json.dumps(VAE | {"norm_num_groups": 3}))
    result = cli(tmp_path, *command, *flags.split())
    assert result.code == 2 and says in result.err, result.err
    assert result.err.count("\n") == 1 and result.err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_without_lpips_or_its_weights(tmp_path, lpips):
    """A line that names the way on, before anything is decoded."""
    flags = [*tiny(tmp_path, task="vae"), "--vae.perceptual-weight", "1", "--data.resolution", "16"]
    slow = lambda *_: pytest.fail("decoded")  # noqa: E731

    def missing():
        sys.modules["lpips"] = None  # as find_spec sees a package that is not there
        vae.importlib.util.find_spec = lambda name: None
        data.Examples.__init__ = slow

    def offline():
        def refuse(**_):
            raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

        sys.modules["lpips"].LPIPS = refuse
        data.Examples.__init__ = slow

    for patch, says in ((missing, "needs the package lpips"), (offline, "VGG16 weights, which cannot be had")):
        result = cli(tmp_path, *flags, patch=patch)
        assert result.code == 2 and says in result.err and "--vae.perceptual-weight 0" in result.err, result.err
        assert result.err.count("\n") == 1
    result = cli(tmp_path, *flags, "--base.max-train-steps", "3", "--base.logging-steps", "1")
    assert result.code == 0 and metrics(tmp_path / "out")[-1]["perceptual"] > 0, result.err


def test_the_loop_refuses_fp16_for_any_two_optimizers(tmp_path):
    def pretend():
        import accelerate

        accelerate.Accelerator.mixed_precision = property(lambda self: "fp16")

    result = cli(tmp_path, *tiny(tmp_path, task="vae"), patch=pretend)
    assert result.code == 2 and "fp16's one loss scale cannot follow 2 optimizers (vae, discriminator)" in result.err, (
        result.err
    )
    with pytest.raises(BadInput, match="two optimizers"):
        vae.Config(base=Base(mixed_precision="fp16"))
    vae.Config(base=Base(mixed_precision="fp16"), vae=vae.Settings(disc_weight=0.0))


def test_settings_need_nothing_heavy():
    code = "import sys, tasks.vae as v; v.Config(); print({'torch', 'diffusers', 'lpips', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("vae*.json")))
def test_examples_are_settings(name, monkeypatch, lpips):

    monkeypatch.chdir(ROOT)
    module, cfg = command_line.parse([str(ROOT / "examples" / name)])
    assert module is vae and isinstance(cfg, vae.Config)


def test_digits(tmp_path):
    """The MNIST digits, from the settings file of the examples."""
    if not (SHARED / "mnist").is_dir():
        pytest.skip(f"no MNIST in {SHARED}")
    small = [
        "base.max_train_steps=2",
        "data.resolution=8",
        "data.split=test",
        "data.validation_split=None",
        "vae.disc_start=1",
        "base.logger=none",
        "vae.disc_layers=1",
    ]
    flags = [part for setting in small for part in f"--{setting}".split("=")]
    settings = json.loads((ROOT / "examples" / "vae_mnist.json").read_text())
    settings["data"]["dataset_name"] = str(SHARED / "mnist")
    (tmp_path / "mnist.json").write_text(json.dumps(settings))
    result = cli(tmp_path, tmp_path / "mnist.json", *flags, "--data.cache-dir", tmp_path, "--base.output-dir", tmp_path / "out")
    assert result.code == 0, result.err
    assert checkpoints(tmp_path / "out") == [2] and "1000 images" in result.err
