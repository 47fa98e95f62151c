"""A run's configuration: one YAML file is one run."""

from lrc.recipe.recipe import (
    Recipe,
    apply_override,
    apply_overrides,
    flatten,
    load_recipe,
    make_recipe,
    parse_override,
    parse_overrides,
    validated,
)

__all__ = [
    "Recipe",
    "apply_override",
    "apply_overrides",
    "flatten",
    "load_recipe",
    "make_recipe",
    "parse_override",
    "parse_overrides",
    "validated",
]
