"""What becomes of an example's captions before the encoder: pure functions of texts and uniforms in [0, 1).

Every random choice takes its uniform as an argument; the caller draws it for example n, so the text is a function of n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oneloop.inputs.shuffle import mix, uniform

PURPOSES = ("caption", "tag dropout", "tag order", "template", "caption dropout")
"""The draws of `caption`, a uniform each."""


@dataclass(frozen=True)
class Captions:
    """How texts are made; as it is, one of the captions, unchanged."""

    shuffle_tags: bool = False
    keep_tags: int = 0
    """The first tags, which are neither moved nor dropped: a trigger word, a subject."""
    tag_dropout: float = 0.0
    """Probability of each other tag to be left out."""
    separator: str = ","
    """Between tags."""
    templates: tuple[str, ...] = ()
    """One of them is chosen; the caption goes where it has {}. As in 'a photo of {}'."""
    caption_dropout: float = 0.0
    """Probability of the empty text, which classifier-free guidance needs (Ho, Salimans, 2022, arXiv 2207.12598)."""


def spread(u: float, count: int) -> np.ndarray:
    """`count` uniforms in [0, 1) made of one, [count]."""
    key = np.full(count, int(u * 2**53), np.uint64)
    return uniform(mix(key, key), np.arange(count, dtype=np.uint64))


def choose(texts: Sequence[str], u: float) -> str:
    """One of the texts, each with the same probability; none: the empty text."""
    return texts[int(u * len(texts))] if texts else ""


def tags(text: str, separator: str = ",") -> list[str]:
    """The tags of a text, without the spaces around them and without empty ones."""
    return [tag for part in text.split(separator) if (tag := part.strip())]


def drop_tags(tags: Sequence[str], u: float, share: float, keep: int = 0) -> list[str]:
    """The tags in order, each after the first `keep` left out with probability `share`."""
    return [tag for i, (tag, v) in enumerate(zip(tags, spread(u, len(tags)), strict=True)) if i < keep or v >= share]


def shuffle_tags(tags: Sequence[str], u: float, keep: int = 0) -> list[str]:
    """The first `keep` tags, then the others in random order."""
    rest = list(tags[keep:])
    return [*tags[:keep], *(rest[i] for i in np.argsort(spread(u, len(rest)), kind="stable"))]


def fill(template: str, text: str) -> str:
    """The template with the text in place of each {}; other braces are text."""
    return template.replace("{}", text)


def possible(texts: Sequence[str], cfg: Captions) -> list[str]:
    """What `caption` may make of these texts, each once, where no tags are drawn."""
    made = [fill(form, text) for text in texts or [""] for form in cfg.templates or ("{}",)]
    return list(dict.fromkeys([*made, *[""] * bool(cfg.caption_dropout)]))


def caption(texts: Sequence[str], cfg: Captions, u: Mapping[str, float]) -> str:
    """The text of one example: one of its captions, tags dropped, then shuffled, put into a template, or empty.

    u: a uniform in [0, 1) for each of PURPOSES.
    """
    if u["caption dropout"] < cfg.caption_dropout:
        return ""
    text = choose(texts, u["caption"])
    if cfg.shuffle_tags or cfg.tag_dropout:
        parts = drop_tags(tags(text, cfg.separator), u["tag dropout"], cfg.tag_dropout, cfg.keep_tags)
        parts = shuffle_tags(parts, u["tag order"], cfg.keep_tags) if cfg.shuffle_tags else parts
        text = f"{cfg.separator} ".join(parts) if cfg.separator.strip() else cfg.separator.join(parts)
    return fill(choose(cfg.templates, u["template"]), text) if cfg.templates else text
