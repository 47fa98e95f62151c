"""All methods by their names in recipes: Low-Rank Clone and the baselines."""

from lrc.baselines.activation_clone import ActivationClone
from lrc.baselines.llm_pruner import LlmPruner
from lrc.baselines.minilm import MiniLm
from lrc.baselines.minitron import Minitron
from lrc.baselines.scratch import Scratch
from lrc.baselines.sheared_llama import ShearedLlama
from lrc.baselines.slicegpt import SliceGpt
from lrc.baselines.tinybert import TinyBert
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import Method
from lrc.recipe import Recipe
from lrc.recipe.sections import Section

METHODS: dict[str, type[Method]] = {
    "lrc": LowRankClone,
    "scratch": Scratch,
    "tinybert": TinyBert,
    "minilm": MiniLm,
    "activation-clone": ActivationClone,
    "minitron": Minitron,
    "slicegpt": SliceGpt,
    "sheared-llama": ShearedLlama,
    "llm-pruner": LlmPruner,
}

SHARED_SECTIONS = ("student", "initialize", "objective")
"""Sections of which a method may use only some settings."""

RELEASE_SETTINGS = ("release_at", "release_learning_rate")
"""Settings of `train` that a method may ignore; the training loop uses the others."""


def unused_settings(recipe: Recipe) -> list[str]:
    """Settings of a recipe, by dotted key, that are not at their defaults but that the recipe's
    method does not use."""
    used = METHODS[recipe.method.name].used_settings
    if used is None:
        return []
    found = []
    for name in (*SHARED_SECTIONS, "train"):
        section: Section = getattr(recipe, name)
        for key, field in type(section).model_fields.items():
            if name == "train" and key not in RELEASE_SETTINGS:
                continue
            dotted = f"{name}.{key}"
            changed = not field.is_required() and getattr(section, key) != field.default
            if changed and dotted not in used:
                found.append(dotted)
    return found
