"""The optimizers that every task offers, by one setting. A task's settings `s` have

    optimizer                                                       which of KINDS
    learning_rate, adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon

adamw         Loshchilov and Hutter 2017, Decoupled Weight Decay Regularization (arXiv:1711.05101)
adamw8bit     the same with a byte for each of its numbers: Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization
              (arXiv:2110.02861), in bitsandbytes; tensors of fewer than 4,096 numbers keep float32
adafactor     Shazeer and Stern 2018 (arXiv:1804.04235): a second moment for each row and column, and no first. Its learning
              rate is AdamW's: neither relative to the weights nor to the step, for adapters begin at zero
prodigy       Mishchenko and Defazio 2023 (arXiv:2306.06101): estimates the step size d, for each group of parameters its own;
              the learning rate multiplies d, and is 1
schedulefree  Defazio et al. 2024, The Road Less Scheduled (arXiv:2405.15682), AdamW: an average of the weights takes the place
              of a falling learning rate, so that is constant; it may be several times AdamW's
muon          Jordan et al. 2024 (kellerjordan.github.io/posts/muon), in torch: the momentum of a matrix is orthogonalized. It
              takes parameters of two axes, which in these models are hidden layers and adapters; AdamW takes the rest:
              biases, norms, convolutions. Its steps are scaled to have AdamW's root mean square (Liu et al. 2025,
              arXiv:2502.16982, equation 4), so that both share one learning rate

Settings are read without torch; `make` imports what it needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from oneloop.configs import BadInput, require
from oneloop.machine import internals

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Kind = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree", "muon"]
KINDS = get_args(Kind)
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}
"""Kind -> the package that it is in, of the extra `optimizers`."""


def kind(s: Any) -> str:
    """Which optimizer the settings ask for; `use_8bit_adam` is the earlier name of adamw8bit."""
    return "adamw8bit" if getattr(s, "use_8bit_adam", False) else s.optimizer


def check(s: Any, group: str, base: Any) -> None:
    """Refuse an optimizer that is not installed, or that the other settings do not fit.

    Raises:
        BadInput: with the flag to change.
    """
    chosen, flag = kind(s), f"--{group}.optimizer {s.optimizer}"
    if getattr(s, "use_8bit_adam", False):
        require(s.optimizer in ("adamw", chosen), f"{group}.optimizer", s.optimizer, f"{chosen} beside --{group}.use-8bit-adam")
        flag = f"--{group}.use-8bit-adam"
    package = PACKAGES.get(chosen)
    if package and importlib.util.find_spec(package) is None:
        raise BadInput(f"{flag} needs the package {package}: install oneloop[optimizers], or leave the flag out")
    if chosen == "prodigy":
        expected = f"about 1 with {flag}, which estimates the step size and multiplies it by this"
        require(s.learning_rate >= 0.01, f"{group}.learning_rate", s.learning_rate, expected)
    if chosen in ("prodigy", "schedulefree"):  # they look at all their parameters at once
        require(base.weights == "float32", "base.weights", base.weights, f"float32 with {flag}")
        require(not base.fused_backward_pass, "base.fused_backward_pass", True, f"false with {flag}")
    if chosen == "schedulefree":
        constant = f"constant or constant_with_warmup with {flag}, whose average takes the place of a falling rate"
        require(base.lr_scheduler.startswith("constant"), "base.lr_scheduler", base.lr_scheduler, constant)
        require(base.use_ema, "base.use_ema", base.use_ema, f"true with {flag}: what is shown and exported is an average")
        require(not base.ema_lengths, "base.ema_lengths", base.ema_lengths, f"none with {flag}, which averages by itself")
        require(s.adam_beta1 > 0, f"{group}.adam_beta1", s.adam_beta1, f"more than 0 with {flag}")


def make(params: Iterable[Any], s: Any) -> Optimizer:
    """The optimizer over `params`: parameters, or groups {"params": [...], "lr": peak learning rate}."""
    import torch

    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    rate, decay = {"lr": s.learning_rate}, {"weight_decay": s.adam_weight_decay}
    adam = rate | {"betas": (s.adam_beta1, s.adam_beta2)} | decay | {"eps": s.adam_epsilon}
    match kind(s):
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **adam)
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(groups, **rate, **decay, scale_parameter=False, relative_step=False)
        case "prodigy":
            from prodigyopt import Prodigy

            warmed = {"safeguard_warmup": True, "use_bias_correction": True}
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
                return combined([Prodigy([group], **adam, **warmed) for group in groups])
        case "schedulefree":
            from schedulefree import AdamWScheduleFree

            made = AdamWScheduleFree(groups, **adam)
            made.train()
            return made
        case "muon":
            hidden, rest = (
                [group | {"params": [p for p in group["params"] if (p.ndim == 2) is matrix]} for group in groups]
                for matrix in (True, False)
            )
            hidden, rest = ([group for group in some if group["params"]] for some in (hidden, rest))
            internals.widen_muon()
            parts = [torch.optim.Muon(hidden, **rate, **decay, adjust_lr_fn="match_rms_adamw")] if hidden else []
            return combined(parts + ([torch.optim.AdamW(rest, **adam, fused=True)] if rest else []))
    return torch.optim.AdamW(params, **adam, fused=True)


def combined(parts: list[Optimizer]) -> Optimizer:
    """Optimizers as one."""
    from oneloop.training.several import Several

    return parts[0] if len(parts) == 1 else Several(parts)


def averaged(optims: Mapping[str, Optimizer], weights: Iterable[Tensor]) -> list[Tensor] | None:
    """The weights that schedule-free optimizers would show, in the order of `weights`; None where no optimizer averages.

    With gradients taken at y and steps at z, y = (1 - beta) z + beta x (Defazio et al. 2024, equation 1), so the average is
    x = y + (1 - 1 / beta)(z - y), which is what the optimizer's own `eval()` writes into its parameters. Reading it instead
    leaves them as they are, to the bit.
    """
    average = {
        p: p.detach().lerp(o.state.get(p, {}).get("z", p.detach()), 1 - 1 / group["betas"][0])
        for o in optims.values()
        if hasattr(o, "eval")
        for group in o.param_groups
        for p in group["params"]
    }
    return [average[p] for p in weights] if average else None


def state_bytes(chosen: str, shape: tuple[int, ...], zero: bool = False) -> int:
    """Bytes of what an optimizer remembers of one float32 parameter of this shape; `zero`: it begins as zeros."""
    n = math.prod(shape)
    match chosen:
        case "adamw8bit" if n >= 4096:
            return 2 * (n + 4 * -(-n // 256))  # a scale for each 256 numbers
        case "adafactor":
            return 4 * (n // shape[-1] + n // shape[-2]) if len(shape) > 1 else 4 * n
        case "prodigy":
            return 4 * (3 * n + (1 if zero else n))  # two moments, the sum s, and where it began
        case "muon" if len(shape) == 2:
            return 4 * n
    return 8 * n


NAMES = {"AdamW8bit": "adamw8bit", "Adafactor": "adafactor", "Prodigy": "prodigy", "Muon": "muon"}
"""Class -> kind, where its state is not two float32 numbers for each of the parameters'."""


def remembered(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state: counted once it has stepped, before that computed."""
    from torch import Tensor

    tensors = {id(x): x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)}
    return sum(x.nbytes for x in tensors.values()) or sum(
        state_bytes(NAMES.get(type(part).__name__, "adamw"), tuple(p.shape))
        for part in getattr(optimizer, "parts", [optimizer])
        for group in part.param_groups
        for p in group["params"]
    )
