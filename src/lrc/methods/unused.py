"""Settings of a recipe that its method makes no use of."""

from lrc.methods.base import Method
from lrc.recipe import Recipe
from lrc.sections import FORMER_DEFAULTS, Section

SHARED = ("student", "initialise", "objective")
"""Sections that a method may use in part; `data` is the loop's own."""

RELEASE = ("release_at", "release_learning_rate")
"""Settings of `train` that a method may make no use of; the others are the loop's own."""


def unused_settings(method: type[Method], recipe: Recipe) -> list[str]:
    """Settings, by dotted key, that have no effect and differ from their default, now and formerly:
    older runs and recipes that share a base with the paper's state the former one."""
    if method.honours is None:
        return []
    found = []
    for name in (*SHARED, "train"):
        section: Section = getattr(recipe, name)
        for key, field in type(section).model_fields.items():
            if name == "train" and key not in RELEASE:
                continue
            dotted = f"{name}.{key}"
            if dotted in method.honours or field.is_required():
                continue
            former = FORMER_DEFAULTS.get(dotted, field.default)
            if getattr(section, key) not in (field.default, former):
                found.append(dotted)
    return found
