"""Train or fine-tune the autoencoder of latent diffusion: reconstruction, perceptual loss and a discriminator.

    python loop.py vae --data.train-data-dir images --data.resolution 256 --vae.perceptual-weight 1

Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models (arXiv:2112.10752, section 3.1, appendix G),
after Esser, Rombach, Ommer 2021, Taming Transformers (arXiv:2012.09841). The export is an `AutoencoderKL`.

Every term below is computed for each image by itself, [B], and averaged last: no image's loss depends on which others
share its batch, so a batch may be split over accumulation and processes in any way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oneloop.configs import (
    Amount,
    BadInput,
    Base,
    CountOrZero,
    Data,
    Live,
    Name,
    Range,
    ShareBelowOne,
    check,
    portable,
    read_model_config,
    require,
)
from oneloop.families import building, hub
from oneloop.maths import image_quality
from oneloop.tasks import Batch, Images, Loss, Models, Optims, Rng, Task, frozen, masked, mean, unwrap
from oneloop.training import optimizers

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_VAE = {  # fit for 64x64 on a CPU: four latent channels at a quarter of the side
    "block_out_channels": [8, 16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,  # with a group for each channel, no channel could hold a flat colour
}


@dataclass(frozen=True)
class Settings:
    """The autoencoder, its discriminator and their objectives."""

    pretrained_model_name_or_path: Name | None = None
    """An AutoencoderKL to fine-tune: a folder, or a name on the hub. None: train a new one."""
    subfolder: Name | None = None
    """Its folder inside that place: `vae` where it is a whole pipeline."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""
    model_config: Live[Name | None] = None
    """Of a new one: a diffusers AutoencoderKL config, a JSON file or a folder with a config.json. None: a small one fit for
    64x64 on a CPU."""
    latent_channels: Annotated[int, Range(1, 4096)] | None = None
    """Of a new one: channels of the latent. None: as the config says."""
    train: Literal["all", "decoder"] = "all"
    """decoder: improve the decoder of a pretrained autoencoder, whose latents stay as they are."""
    reconstruction: Literal["l1", "l2"] = "l2"
    """Error of a pixel: absolute, as published, or squared, which gets a small model going sooner."""
    kl_weight: Amount = 1e-6
    """Weight of the latent's KL divergence from a standard normal, as a sum, against the pixels' errors, as a sum."""
    perceptual_weight: Amount = 0.0
    """Weight of LPIPS; 1 is usual for photographs. It needs the package lpips and torchvision's VGG16 weights, which are
    downloaded once; 0 goes without."""
    disc_weight: Amount = 0.5
    """Weight of the discriminator against the autoencoder; 0: none is trained."""
    disc_balance: Literal["taming", "latent_diffusion"] = "taming"
    """How far the weight that balances both gradients may rise: to 1e4 on means over pixels (Esser et al. 2021), or to 1e4 on
    sums over them, as latent diffusion has it; at 256 x 256 that is to 0.05 on means, so its discriminator counts less."""
    disc_start: Live[CountOrZero] = 1000
    """Optimizer steps before the discriminator begins: enough for a fair reconstruction, such as 50000 on photographs."""
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    """The discriminator's loss."""
    disc_channels: Annotated[int, Range(1, 4096)] = 16
    """Channels of the discriminator's first layer, 64 as published; each layer doubles them, up to eightfold."""
    disc_layers: Annotated[int, Range(1, 12)] = 3
    """Layers of the discriminator that halve the image: 3 judges patches of 70 x 70."""
    optimizer: optimizers.Kind = "adamw"
    """What turns gradients into steps: adamw, adamw8bit, adafactor, prodigy, schedulefree or muon (docs/optimizers.md)."""
    learning_rate: Live[Amount] = 3e-3
    """Peak learning rate: of AdamW, 1e-4 and less for large models; about 1 with prodigy."""
    disc_learning_rate: Live[Amount | None] = None
    """That of the discriminator. None: the same."""
    adam_beta1: Live[ShareBelowOne] = 0.5
    """AdamW's beta1."""
    adam_beta2: Live[ShareBelowOne] = 0.9
    """AdamW's beta2."""
    adam_weight_decay: Live[Amount] = 0.0
    """AdamW's weight decay."""
    adam_epsilon: Live[Amount] = 1e-6
    """AdamW's epsilon. An attention's key bias has no gradient but rounding errors; much less would make steps of them."""

    def __post_init__(self):
        check(self, "vae")
        pretrained, flag = self.pretrained_model_name_or_path, "--vae.pretrained-model-name-or-path"
        for name in ("model_config", "latent_channels") if pretrained else ("subfolder", "revision"):
            expected = f"nothing {'beside' if pretrained else 'without'} {flag}"
            require(getattr(self, name) is None, f"vae.{name}", getattr(self, name), expected)
        require(self.train == "all" or bool(pretrained), "vae.train", self.train, f"all, or {flag} beside it")
        if self.perceptual_weight and importlib.util.find_spec("lpips") is None:
            given = f"--vae.perceptual-weight is {self.perceptual_weight}"
            raise BadInput(
                f"{given} and needs the package lpips: install oneloop[vae], or --vae.perceptual-weight 0 goes without"
            )


@dataclass(frozen=True)
class Config:
    """Settings of a run of this task."""

    base: Base = field(default_factory=lambda: Base(num_epochs=4.0))
    data: Data = field(default_factory=lambda: Data(resolution=64, train_batch_size=8))
    vae: Settings = field(default_factory=Settings)

    def __post_init__(self):
        s, side = self.vae, self.data.resolution
        optimizers.check(s, "vae", self.base)
        if not s.pretrained_model_name_or_path:
            building.check_config(model_config(self), f"--vae.model-config {s.model_config or '(the default)'}", side, 1)
        if s.perceptual_weight:
            require(side >= 16, "data.resolution", side, "at least 16 for LPIPS, or --vae.perceptual-weight 0")
        if s.disc_weight:
            least = 3 * 2**s.disc_layers
            require(side >= least, "data.resolution", side, f"at least {least} for --vae.disc-layers {s.disc_layers}, or fewer")
            one = "auto, bf16 or no: one loss scale cannot follow two optimizers; or --vae.disc-weight 0"
            require(self.base.mixed_precision != "fp16", "base.mixed_precision", "fp16", one)


def model_config(cfg: Config) -> dict[str, Any]:
    """The AutoencoderKL config of a new model."""
    path, channels = cfg.vae.model_config, cfg.vae.latent_channels
    config = DEFAULT_VAE if path is None else read_model_config(path, "vae.model-config", "AutoencoderKL")
    return config | ({"latent_channels": channels} if channels else {}) | {"sample_size": cfg.data.resolution}


def multiple(cfg: Config) -> int:
    """What the images' sides are multiples of."""
    if cfg.vae.pretrained_model_name_or_path:
        return 8
    return 2 ** (len(model_config(cfg).get("block_out_channels", [64])) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The models.


def make_models(cfg: Config) -> Models:
    s, models = cfg.vae, {}
    if s.perceptual_weight:
        models["perceptual"] = perceptual()
    vae = models["vae"] = pretrained(cfg) if s.pretrained_model_name_or_path else new(cfg)
    if s.train == "decoder":
        vae.requires_grad_(False)
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(True) if part is not None else None
    vae.forward = MethodType(autoencode, vae)  # what trains is called through its forward
    vae.decoder.conv_out.register_forward_pre_hook(_keep)
    if s.disc_weight:
        models["discriminator"] = patchgan(s.disc_channels, s.disc_layers)
    return models


def new(cfg: Config) -> nn.Module:
    """An autoencoder from its config."""
    side, what = cfg.data.resolution, f"--vae.model-config {cfg.vae.model_config or '(the default)'}"
    call = lambda vae, x: vae.decode(vae.encode(x).latent_dist.mean).sample  # noqa: E731
    return building.build("AutoencoderKL", model_config(cfg), what, (2, 3, side, side), call)


def pretrained(cfg: Config) -> nn.Module:
    """The autoencoder to fine-tune, float32."""
    import torch

    s = cfg.vae
    name, inside = s.pretrained_model_name_or_path, {"subfolder": s.subfolder, "revision": s.revision}
    flag = f"--vae.pretrained-model-name-or-path {name}"
    with hub.readable(flag, "an AutoencoderKL", "its folder or name (--vae.subfolder?)"):
        config = hub.read(name, s.revision, f"{s.subfolder}/config.json" if s.subfolder else "config.json")
        if config.get("_class_name") != "AutoencoderKL":
            raise BadInput(f"{flag}: holds a {config.get('_class_name')}; expected an AutoencoderKL (--vae.subfolder?)")
        building.check_config(config, flag, cfg.data.resolution, 1)
    return hub.load("diffusers", "AutoencoderKL", name, flag, **inside, torch_dtype=torch.float32)


def autoencode(vae: nn.Module, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The autoencoder's forward: x [B, 3, H, W] in [-1, 1] and standard normal noise of the latent's shape to the
    reconstruction [B, 3, H, W], the posterior's mean and log variance [B, C, h, w], and what the decoder's last layer saw."""
    posterior, last = vae.encode(x).latent_dist, vae.decoder.conv_out
    last.seen = None
    y = vae.decode(posterior.mean + posterior.std * noise).sample
    seen, last.seen = last.seen, False
    return y, posterior.mean, posterior.logvar, seen


def _keep(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
    """What the last layer is given, while the autoencoder's own forward waits for it."""
    if getattr(layer, "seen", False) is None:
        layer.seen = given[0]


def patchgan(channels: int, layers: int) -> nn.Module:
    """A discriminator of patches: [B, 3, H, W] to logits [B, 1, h, w] (Isola et al. 2017, arXiv:1611.07004, section 6.1.2).

    C64-C128-C256-C512 of 4x4 convolutions and leaky ReLUs; the first `layers` halve the image, the first has no norm. The
    norm is over each image by itself, which is what batch norm was in the paper's runs with one image a batch: statistics
    over more would make an image's loss depend on its neighbours, and on how the batch is split.
    """
    from torch import nn

    widths = [channels * min(2**i, 8) for i in range(layers + 1)]
    net = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for i in range(1, layers + 1):
        conv = nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < layers else 1, padding=1, bias=False)
        net += [conv, nn.InstanceNorm2d(widths[i], affine=True), nn.LeakyReLU(0.2)]
    net.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
    return nn.Sequential(*net)


def perceptual() -> nn.Module:
    """LPIPS on VGG16, frozen: two images in [-1, 1] to their distance [B, 1, 1, 1] (Zhang et al. 2018, arXiv:1801.03924)."""
    import lpips

    try:
        return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
    except (OSError, RuntimeError) as error:  # a download that failed, or a file that is not whole
        hint = "--vae.perceptual-weight 0 goes without"
        raise BadInput(
            f"--vae.perceptual-weight needs torchvision's VGG16 weights, which cannot be had ({error}); {hint}"
        ) from None


def make_optim(models: Models, cfg: Config) -> Optims:
    rate = cfg.vae.learning_rate if cfg.vae.disc_learning_rate is None else cfg.vae.disc_learning_rate
    settings = {"vae": cfg.vae, "discriminator": replace(cfg.vae, learning_rate=rate)}
    trained = {k: [p for p in m.parameters() if p.requires_grad] for k, m in models.items() if k in settings}
    return {k: optimizers.make(params, settings[k]) for k, params in trained.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The losses: first the autoencoder, then its judge.


def loss_fn(models: Models, batch: Batch, rng: Rng, cfg: Config) -> Iterator[Loss]:
    import torch

    s, x, vae = cfg.vae, batch["pixel_values"], unwrap(models["vae"])  # [B, 3, H, W] in [-1, 1]
    noise = rng.normal("posterior", *latent_shape(vae, x))  # [B, C, h, w]
    y, posterior_mean, logvar, seen = models["vae"](x, noise)
    error = y.float() - x
    l1, kl = each(error.abs()), kl_divergence(posterior_mean.float(), logvar.float())  # [B]
    match = masked(error.abs() if s.reconstruction == "l1" else error.square(), batch)  # [B]
    logs = {"l1": l1, "kl": kl} | image_quality.measure(x, y)
    if s.perceptual_weight:
        logs["perceptual"] = models["perceptual"](y, x).float().flatten()  # [B]
        match = match + s.perceptual_weight * logs["perceptual"]
    total = match + s.kl_weight * kl / x[0].numel()
    adversarial = s.disc_weight > 0 and batch["step"] >= s.disc_start
    if adversarial:
        with frozen(models["discriminator"]) as judge:
            doubt = -each(judge(y).float())  # [B]
        logs["adversarial"] = doubt
        logs["adaptive_weight"] = adaptive_weight(match, doubt, y, seen, vae.decoder.conv_out, s.disc_balance)  # [B]
        total = total + s.disc_weight * logs["adaptive_weight"] * doubt
    yield Loss("vae", mean(total, batch), {k: v.mean() for k, v in logs.items()})

    if adversarial:
        # The reconstruction that the autoencoder was judged by: made anew, it would depend on whether this batch was the
        # last of its step. One call for both, since parallel training wants one forward for one backward.
        real, fake = models["discriminator"](torch.cat([x, y.detach().to(x)])).float().chunk(2)
        yield Loss(
            "discriminator", disc_loss(real, fake, s.disc_loss), {"logits_real": real.mean(), "logits_fake": fake.mean()}
        )


def latent_shape(vae: nn.Module, x: Tensor) -> tuple[int, int, int]:
    halved = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, x.shape[-2] // halved, x.shape[-1] // halved


def each(values: Tensor) -> Tensor:
    """The mean over everything but the examples, [B]."""
    return values.flatten(1).mean(1)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) in nats, summed over the latent, [B] (Kingma and Welling 2013, arXiv:1312.6114, B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def adaptive_weight(match: Tensor, doubt: Tensor, y: Tensor, seen: Tensor, last: nn.Conv2d, balance: str) -> Tensor:
    """lambda = |grad match| / (|grad doubt| + delta), gradients of the weight of the decoder's last layer (Esser et al. 2021,
    eq. 7); for each example by itself, [B], a constant.

    taming: on means over pixels, delta is 1e-6, as in the paper (their code, taming/modules/losses/vqperceptual.py, has 1e-4),
    and lambda at most 1e4. latent_diffusion (Rombach et al. 2022; in CompVis/latent-diffusion at a506df5,
    ldm/modules/losses/contperceptual.py, calculate_adaptive_weight and forward): the match, with LPIPS added to every pixel, is
    a sum over the N numbers of an image, N times ours, while the doubt is a mean; so lambda is N |grad match| / (|grad doubt| +
    1e-4), at most 1e4 before disc_weight. The whole loss is N times ours too, so that here lambda is at most 1e4 / N.

    match, doubt: losses [B]; y: the reconstruction [B, 3, H, W]; seen: the last layer's input [B, C, H, W].
    """
    import torch
    from torch.nn.grad import conv2d_weight

    def norms(loss: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss.sum(), y, retain_graph=True)  # [B, 3, H, W]; row i is of example i alone
        by_weight = lambda h, g: conv2d_weight(h[None], last.weight.shape, g[None], last.stride, last.padding)  # noqa: E731
        return torch.func.vmap(by_weight)(seen.detach().float(), grad.float()).flatten(1).norm(dim=1)

    delta, most = (1e-6, 1e4) if balance == "taming" else (1e-4, 1e4 / y[0].numel())
    return (norms(match) / (norms(doubt) + delta)).clamp(max=most)


def disc_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What the discriminator descends, from its logits [B, 1, h, w] on images and reconstructions: the hinge loss (Lim and Ye
    2017, arXiv:1705.02894), or the cross-entropy of the first GAN (Goodfellow et al. 2014, arXiv:1406.2661)."""
    from torch.nn import functional as F

    measure = F.relu if kind == "hinge" else F.softplus
    margin = 1 if kind == "hinge" else 0
    return 0.5 * (measure(margin - real).mean() + measure(margin + fake).mean())


# ---------------------------------------------------------------------------------------------------------------------
# What comes of it.


def sample_fn(models: Models, examples: Iterable[Batch], rng: Rng, cfg: Config) -> Images:
    """Each image above its reconstruction, from the posterior's mean."""
    import torch

    x = next(iter(examples))["pixel_values"]  # [N, 3, H, W]
    y = models["vae"].decode(models["vae"].encode(x).latent_dist.mean).sample
    return {"reconstructions": torch.cat([x, y.to(x)], dim=2) / 2 + 0.5}  # [N, 3, 2H, W]


def export_fn(models: Models, examples: Iterable[Batch], path: Path, cfg: Config) -> str:
    vae = models["vae"]
    if cfg.vae.train == "decoder":  # its latents, and so their scale, are those of the model it came from
        trained = {name: p for name, p in vae.named_parameters() if p.requires_grad}
        vae = pretrained(cfg)  # what is frozen may have been narrowed
        vae.load_state_dict(trained, strict=False)
    else:
        mean, std = latent_scale(vae, examples)
        shift = {} if vae.config.shift_factor is None else {"shift_factor": mean}
        vae.register_to_config(scaling_factor=1 / std, **shift)
    if "_name_or_path" in vae.config:
        vae.register_to_config(_name_or_path=portable(str(vae.config["_name_or_path"]), cfg))
    vae.save_pretrained(path)
    scale, shift = "vae.config.scaling_factor", "vae.config.shift_factor"
    moved, back = ("", "") if vae.config.shift_factor is None else (f" - {shift}", f" + {shift}")
    return (
        "from diffusers import AutoencoderKL\n"
        "vae = AutoencoderKL.from_pretrained({path})\n"
        f"encode = lambda x: (vae.encode(x).latent_dist.sample(){moved}) * {scale}  # x [B, 3, H, W] in [-1, 1]\n"
        f"decode = lambda z: vae.decode(z / {scale}{back}).sample"
    )


def latent_scale(vae: nn.Module, examples: Iterable[Batch]) -> tuple[float, float]:
    """Mean and standard deviation of all latents of the examples: of posterior samples, without drawing them."""
    count = first = second = 0.0
    for batch in examples:
        posterior = vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist
        mean = posterior.mean.double()
        count, first = count + mean.numel(), first + mean.sum()
        second = second + (mean.square() + posterior.logvar.double().exp()).sum()
    mean = float(first / count)
    return mean, float(second / count - mean**2) ** 0.5


task = Task(
    config=Config,
    make_models=make_models,
    make_optim=make_optim,
    loss_fn=loss_fn,
    sample_fn=sample_fn,
    export_fn=export_fn,
    judged=False,
    multiple=multiple,
)
