"""Settings of a recipe that its method makes no use of."""

from lrc.methods.base import Method
from lrc.recipe import Recipe
from lrc.sections import Section

SHARED = ("student", "initialise", "objective")
"""Sections that a method may use in part; `data` and `train` are the loop's own."""


def unused_settings(method: type[Method], recipe: Recipe) -> list[str]:
    """Settings, by dotted key, that differ from their default and have no effect."""
    if method.honours is None:
        return []
    found = []
    for name in SHARED:
        section: Section = getattr(recipe, name)
        for key, field in type(section).model_fields.items():
            used = f"{name}.{key}" in method.honours
            if not used and not field.is_required() and getattr(section, key) != field.default:
                found.append(f"{name}.{key}")
    return found
