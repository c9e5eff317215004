"""Sentences for captions of a subject or of a style, in the place of captions that nobody wrote.

They differ in what the word they are about should not learn: the view, the light, the place. `{}` is where it goes.
"""

VIEWS = ("photo of", "picture of", "close-up of", "cropped photo of", "blurry photo of", "bright photo of", "dark photo of")
VIEWS += ("good photo of", "clean photo of", "rendering of")
WORKS = ("painting", "drawing", "picture", "photo", "print", "close-up painting", "small painting", "large painting")
WORKS += ("bright painting", "dark painting", "work of art", "rendering")

NAMED = {
    "object": (*(f"a {view} a {{}}" for view in VIEWS), *(f"a {view} the {{}}" for view in VIEWS[:6]), "the {}", "my {}"),
    "style": (*(f"a {work} in the style of {{}}" for work in WORKS), "in the style of {}"),
}
"""Name -> sentences, as one of `--data.caption-templates`."""


def expanded(templates: tuple[str, ...]) -> tuple[str, ...]:
    """The templates, those of a set in the place of its name."""
    return tuple(one for given in templates for one in NAMED.get(given, (given,)))
