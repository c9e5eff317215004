"""Captions as functions of texts and uniforms."""

import collections
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from oneloop import data
from oneloop.configs import Data
from oneloop.inputs import sources
from oneloop.inputs.captions import PURPOSES, Captions, caption, choose, drop_tags, fill, shuffle_tags, spread, tags
from oneloop.settings.templates import NAMED

MIDDLE = dict.fromkeys(PURPOSES, 0.5)
UNIFORM = st.floats(0, 1, exclude_max=True)
EVERY = [i / 6000 for i in range(6000)]


def test_the_default_leaves_a_caption_as_it_is():
    assert caption(["a cat,  on {a} mat ,"], Captions(), MIDDLE) == "a cat,  on {a} mat ,"
    assert caption([], Captions(), MIDDLE) == ""


def test_captions_are_chosen_equally_often():
    counts = collections.Counter(choose(["a", "b", "c"], u) for u in EVERY)
    assert set(counts.values()) == {2000}


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=12), UNIFORM, st.integers(0, 5))
def test_shuffling_moves_all_but_the_first(words, u, keep):
    shuffled = shuffle_tags(words, u, keep)
    assert shuffled[:keep] == words[:keep] and sorted(shuffled) == sorted(words)
    assert shuffled == shuffle_tags(words, u, keep)


def test_all_orders_of_tags_are_equally_likely():
    counts = collections.Counter(tuple(shuffle_tags("tabc", u, 1)) for u in EVERY)
    assert set(counts) == {("t", *rest) for rest in itertools.permutations("abc")}
    assert all(abs(n - 1000) < 150 for n in counts.values())


def test_tags_are_dropped_alone_and_in_order():
    drawn = [drop_tags("kabcd", u, 0.25, 1) for u in EVERY]
    assert all(x[0] == "k" and x == sorted(x, key="kabcd".index) for x in drawn)
    counts = collections.Counter(tag for x in drawn for tag in x[1:])
    assert all(abs(counts[tag] - 4500) < 200 for tag in "abcd")
    both = sum("a" in x and "b" in x for x in drawn)  # independent
    assert abs(both - 0.75**2 * 6000) < 200
    assert drop_tags("kabcd", 0.3, 0.0) == list("kabcd") and drop_tags("kabcd", 0.3, 1.0, 2) == list("ka")


def test_tags_lose_their_spaces_and_empty_ones():
    assert tags(" a b ,, c,") == ["a b", "c"] and tags("") == [] and tags("a b;c", ";") == ["a b", "c"]


def test_templates_take_the_text_and_no_other_braces():
    assert fill("a {} of {x}, {}", "c{}d") == "a c{}d of {x}, c{}d"
    cfg = Captions(templates=("a photo of {}", "{}, painted"))
    assert {caption(["sks"], cfg, MIDDLE | {"template": u}) for u in (0.1, 0.9)} == {"a photo of sks", "sks, painted"}


def test_a_set_of_templates_is_named():
    for name, sentences in NAMED.items():
        assert len(set(sentences)) == len(sentences) > 10 and all(sentence.count("{}") == 1 for sentence in sentences)
        assert Data(caption_templates=(name, "my {}, red")).templates() == (*sentences, "my {}, red")
    cfg = Data(trigger="x", caption_templates=("style",), num_shapes=64)
    texts = data.Examples(sources.open_source(cfg), cfg, 0).texts()
    begun = {text.partition("x a ")[0] for text in texts}
    assert begun == {sentence.removesuffix("{}") for sentence in NAMED["style"]}


def test_dropout_gives_the_empty_text_as_often_as_said():
    cfg = Captions(caption_dropout=0.1, templates=("a {}",))
    assert sum(caption(["x"], cfg, MIDDLE | {"caption dropout": u}) == "" for u in EVERY) == 600
    assert caption(["x"], Captions(), MIDDLE | {"caption dropout": 0.0}) == "x"


def test_all_of_it_together():
    cfg = Captions(shuffle_tags=True, keep_tags=1, tag_dropout=0.5, templates=("art: {}",))
    texts = {caption(["sks, a, b, c"], cfg, dict(zip(PURPOSES, spread(v, 5), strict=True))) for v in EVERY}
    assert len(texts) == 1 + 3 + 6 + 6 and all(t.startswith("art: sks") for t in texts)  # ordered choices of a, b, c
    assert caption(["b;a"], Captions(shuffle_tags=True, separator=";"), MIDDLE) in ("a; b", "b; a")


def test_each_draw_has_a_uniform_of_its_own():
    """Changing the uniform of one purpose changes nothing that another decides."""
    cfg = Captions(shuffle_tags=True, tag_dropout=0.2)
    drawn = {caption(["a,b,c,d,e,f,g,h"], cfg, MIDDLE | {"tag order": u}) for u in EVERY[::50]}
    assert len(drawn) > 5 and len({frozenset(text.split(", ")) for text in drawn}) == 1
