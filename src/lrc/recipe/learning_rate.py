"""The learning rate of `train.learning_rate: auto`."""

from collections.abc import Mapping
from typing import Any

from lrc.recipe.method_sections import LrcSection
from lrc.recipe.recipe import Recipe

ADAMW_SCALE = 1.26
"""Fitted, with both exponents, to the best of a grid at 130 thousand parameters (20, 50, 200 and
800 steps) and at 67 million (10 and 30 steps); see `learning_rate`."""

MUON_SCALE = 7.5
"""Fitted to the best of a grid at 130 thousand parameters (20, 50, 200 and 800 steps) and at 67
million (30 steps), with its exponent."""

MUON_LARGEST = 0.02
"""Muon's largest rate. The fit knows no students below 130 thousand parameters."""

SMALLEST_SHARE = 1 / 32
"""What a student takes of the rate that starts as its teacher (`share_of_rate`)."""

OTHERS = 3e-4
"""The rate where `learning_rate` is not fitted: a random start, or another method."""


def learning_rate(recipe: Recipe, parameters: int) -> float:
    """The peak learning rate of a run whose student starts far from its teacher.

    `auto` is for a student of the method `lrc` that starts from text, whatever its batch. With
    Muon, 7.5 * parameters^-0.55, at most 0.02; with AdamW, 1.26 * parameters^-0.6 * steps^(1/3).
    Both are fits to our own runs (benchmarks/learning_rate.md), not results of the paper. Muon's
    updates have one size; AdamW's are largest in a run's first steps.

    Args:
        recipe: the run's recipe.
        parameters: elements of the student's weights; embeddings count, tied ones once.
    """
    asked = recipe.train.learning_rate
    if asked != "auto":
        return asked
    if not is_fitted(recipe):
        return OTHERS
    if recipe.train.optimizer == "muon":
        return min(MUON_LARGEST, MUON_SCALE * parameters**-0.55)
    return ADAMW_SCALE * parameters**-0.6 * recipe.steps() ** (1 / 3)


def share_of_rate(recipe: Recipe, start: Mapping[str, Any]) -> float:
    """The share that a run takes of the rate of `auto`: gap^(3/4), between `SMALLEST_SHARE` and 1,
    where the gap is that between the held-out LM losses of student and teacher before training, in
    nats. With the whole rate, a student near its teacher would first lose what it has, and end
    worse (benchmarks/learning_rate.md).

    Args:
        recipe: the run's recipe.
        start: the first line of the run's metrics, which has both losses unless it was damaged.
    """
    student, teacher = start.get("held_out_lm"), start.get("teacher_held_out_lm")
    asked = recipe.train.learning_rate
    if asked != "auto" or not is_fitted(recipe) or student is None or teacher is None:
        return 1.0
    gap = max(0.0, float(student - teacher))
    return min(1.0, max(SMALLEST_SHARE, gap**0.75))


def is_fitted(recipe: Recipe) -> bool:
    """Whether the rule of `auto` was fitted to runs of such a recipe."""
    return isinstance(recipe.method, LrcSection) and recipe.initialize.method != "random"
