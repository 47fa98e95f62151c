"""The shape that is recommended for a size."""

import logging
from collections.abc import Mapping
from typing import Any

from lrc.model.shapes import parameters_of
from lrc.model.student import ties_weights
from lrc.model.teacher import Teacher
from lrc.planning.expected import Expectation, Expected, measured_runs
from lrc.planning.shapes import (
    Candidate,
    CostLimit,
    candidates,
    section_of,
    student_without_weights,
)
from lrc.recipe import make_recipe
from lrc.recipe.sections import AXES
from lrc.system.errors import UserError
from lrc.train.sizes import planned_teacher

logger = logging.getLogger(__name__)

RULE = (
    "a rule: hidden size and neurons together first, the hidden size alone last, as in our "
    "measurements (docs/shapes.md)"
)
EXPECTED = "the expected held-out loss"


def size_limit(teacher: Teacher, parameters: float | None, ratio: float | None) -> CostLimit:
    """The budget of a student with a number of parameters, or with a share of its teacher's.

    Raises:
        UserError: if it is not above 0, or no share.
    """
    if parameters is not None and parameters <= 0:
        raise UserError(f"The student would have {parameters:g} parameters: give a larger number.")
    if ratio is not None and not 0 < ratio < 1:
        raise UserError(f"--ratio is {ratio}: give the share to keep, between 0 and 1.")
    return CostLimit(parameters_of, parameters or parameters_of(teacher.model) * (ratio or 0))


def recommended(
    teacher: Teacher, limit: CostLimit, tokens: int
) -> tuple[list[tuple[Candidate, Expectation]], str, dict[str, str]]:
    """The candidates, the recommended one first, with the loss to expect of each; by what they are
    ranked; and why the other kinds of shapes are left out.

    Args:
        teacher: a teacher, which needs no weights.
        limit: what a student may cost.
        tokens: training tokens.

    Raises:
        UserError: if no shape fits.
    """
    found, left_out = candidates(teacher, limit)
    if not found:
        reasons = "; ".join(dict.fromkeys(reason.rstrip(".") for reason in left_out.values()))
        less = "larger --memory or less --context" if limit.hard else "larger budget"
        raise UserError(f"No shape of this teacher fits ({reasons}): choose a {less}.")
    expected, known = Expected(measured_runs(teacher.config)), []
    for candidate in found:
        parameters = parameters_of(student_without_weights(teacher, candidate.shape))
        known.append((candidate, expected.of(candidate.shape, parameters, tokens)))
    if any(expectation.loss is None for _, expectation in known):
        return known, RULE, left_out
    return sorted(known, key=lambda one: one[1].loss or 0.0), EXPECTED, left_out


def with_shape(
    settings: dict[str, Any],
    overrides: Mapping[str, Any],
    parameters: float | None,
    ratio: float | None,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Overrides of a recipe with the shape that is recommended for a size.

    Args:
        settings: nested settings of the recipe. Their shape is replaced.
        overrides: by dotted key, without a shape.
        parameters: parameters of the student. One of this and `ratio` is given.
        ratio: share of the teacher's parameters that the student has.
        teacher: the teacher; None: the recipe's.

    Raises:
        UserError: if the overrides have a shape, the method takes none but a hidden size, or no
            shape fits.
    """
    if parameters is not None and ratio is not None:
        raise UserError("Give one of --params and --ratio.")
    shape = [f"student.{axis}" for axis in AXES]
    if given := [key for key in overrides if key in ("student", *shape)]:
        raise UserError(f"--params and --ratio decide the shape: leave out {', '.join(given)}.")
    no_shape = dict.fromkeys(shape)
    recipe = make_recipe(settings, {**overrides, **no_shape, "student.hidden_size": 2})
    if recipe.method.name != "lrc":
        raise UserError(
            f"--params and --ratio are for method lrc: give {recipe.method.name} a --hidden-size."
        )
    teacher = (teacher or planned_teacher(recipe.teacher)).whole
    if ties_weights(teacher, recipe.student) != teacher.config.tie_word_embeddings:
        raise UserError(
            "--params and --ratio count a head that is tied as the teacher's: leave "
            "student.tie_projections empty, or give a shape."
        )
    limit = size_limit(teacher, parameters, ratio)
    ranked, by, _ = recommended(teacher, limit, recipe.train.tokens)
    candidate, _ = ranked[0]
    section = section_of(teacher, candidate.shape).model_dump(include=set(AXES))
    student = student_without_weights(teacher, candidate.shape)
    sizes = ", ".join(f"{axis} {size:,}" for axis, size in section.items() if size is not None)
    logger.info(
        "Shape: %s; %s parameters. By %s; `lrc plan` shows others.",
        sizes,
        f"{parameters_of(student):,}",
        by,
    )
    return {**overrides, **{f"student.{axis}": size for axis, size in section.items()}}
