"""Models that are conditioned on the labels of the data: which label the loss shows, and guidance in samples.

A model of N classes has N + 1 embeddings; the last one stands for no label. It is learned where labels are left out, and
classifier-free guidance compares with it (Ho and Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from oneloop.configs import Amount, BadInput, Live, Range, ShareBelowOne, require
from oneloop.families.settings import flag

if TYPE_CHECKING:
    from torch import Tensor

    from oneloop.tasks import Batch, Facts, Rng


@dataclass(frozen=True)
class Classes:
    """How a model is conditioned on labels."""

    class_conditional: bool = False
    """Condition the model on the labels of the data; samples then show the classes in turn."""
    num_classes: Annotated[int, Range(1, 1_000_000)] | None = None
    """Classes of the model. None: as many as the data have."""
    label_dropout: ShareBelowOne = 0.1
    """Share of the examples whose label is left out, so that the model learns what guidance compares with."""
    guidance_scale: Live[Amount] = 1.5
    """Strength of classifier-free guidance in samples: 1 is none."""


def check(s: Classes, group: str) -> None:
    """Refuse settings of classes without classes, and guidance by what is not learned.

    Raises:
        BadInput: with the flag to change.
    """
    usual = type(s)()
    for name in () if s.class_conditional else ("num_classes", "label_dropout", "guidance_scale"):
        value, expected = getattr(s, name), f"{flag(group, 'class_conditional')} beside it"
        require(value == getattr(usual, name), f"{group}.{name}", value, expected)
    learned = s.label_dropout > 0 or s.guidance_scale == 1 or not s.class_conditional
    expected = f"1, or {flag(group, 'label_dropout')} above 0: guidance compares with what is learned without labels"
    require(learned, f"{group}.guidance_scale", s.guidance_scale, expected)


def resolve(cfg: Any, facts: Facts, group: str) -> Any:
    """The settings with the number of classes that the data have.

    Raises:
        BadInput: they have no labels, or more classes than the settings say.
    """
    s, there = getattr(cfg, group), len(facts.classes)
    if not s.class_conditional:
        return cfg
    if "label" not in facts.columns or not (there or s.num_classes):
        what = "how many classes there are" if "label" in facts.columns else "labels"
        cure = flag(group, "num_classes") if "label" in facts.columns else "--data.label-column names them"
        raise BadInput(f"{flag(group, 'class_conditional')}: the images do not say {what}; {cure}, or leave the flag out")
    given = s.num_classes or there
    require(given >= there, f"{group}.num_classes", given, f"at least {there}, the classes of the data")
    return replace(cfg, **{group: replace(s, num_classes=given)})


def shown(batch: Batch, rng: Rng, s: Classes) -> Tensor | None:
    """The labels that the loss shows the model, [B] int64: of a share of the examples none; None without classes."""
    if not s.class_conditional:
        return None
    return batch["label"].masked_fill(rng.uniform("label dropout") < s.label_dropout, s.num_classes)


def in_turn(rng: Rng, s: Classes) -> Tensor | None:
    """The labels of samples by their numbers, [N] int64: all classes in turn; None without classes."""
    import torch

    return torch.tensor(rng.numbers, device=rng.device) % s.num_classes if s.class_conditional else None
