"""The learning rate of `train.learning_rate: auto`."""

from lrc.recipe.method_sections import LrcSection
from lrc.recipe.recipe import Recipe

SCALE = 1.26
"""Fitted, with both exponents, to the best of a grid at 130 thousand parameters (20, 50, 200 and
800 steps) and at 67 million (10 and 30 steps); see `learning_rate`."""

OTHERS = 3e-4
"""The rate where `learning_rate` is not fitted: a random start, or another method."""


def learning_rate(recipe: Recipe, parameters: int) -> float:
    """The peak learning rate of a run.

    `auto` is 1.26 * parameters^-0.6 * steps^(1/3) for a student of the method `lrc` that starts
    from text, whatever its batch: more steps average out what a large rate does to the start. It is
    a fit to our own runs (benchmarks/learning_rate.md), not a result of the paper.

    Args:
        recipe: the run's recipe.
        parameters: elements of the student's weights; embeddings count, tied ones once.
    """
    asked = recipe.train.learning_rate
    if asked != "auto":
        return asked
    if not isinstance(recipe.method, LrcSection) or recipe.initialize.method == "random":
        return OTHERS
    return SCALE * parameters**-0.6 * recipe.steps() ** (1 / 3)
