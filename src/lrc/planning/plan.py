"""Plan a student: candidate shapes of one size, their figures, and the recipe of one of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lrc.exporting.gguf_architectures import check_runs
from lrc.exporting.gguf_sizes import QUANTIZATIONS, file_bytes
from lrc.model.teacher import Teacher
from lrc.planning.expected import Expectation
from lrc.planning.figures import (
    Conditions,
    Figures,
    Training,
    cache_bytes,
    figures_of,
    file_sizes,
    training_of,
)
from lrc.planning.probe import probe
from lrc.planning.recommend import recommended, size_limit
from lrc.planning.shapes import Candidate, CostLimit, section_of, student_without_weights
from lrc.recipe import Recipe, make_recipe
from lrc.recipe.recipe import names_text
from lrc.recipe.sections import StudentSection
from lrc.system.errors import UserError
from lrc.system.files import write_text
from lrc.system.progress import task
from lrc.train.sizes import planned_teacher


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan is made for. One of `parameters`, `ratio` and `memory` is given."""

    teacher: str
    parameters: float | None = None
    """Parameters of the student."""
    ratio: float | None = None
    """Share of the teacher's parameters that the student has."""
    memory: float | None = None
    """Bytes that the student's weights, in `dtype`, and the cache of `conditions.context` tokens
    may take."""
    dtype: str = "q4_k_m"
    """Element type for `memory`, one of `QUANTIZATIONS`."""
    conditions: Conditions
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe by dotted key."""
    probe: bool = False
    """Whether to solve the start of each candidate and rank by the held-out loss."""
    probe_tokens: int = 0
    """Tokens to train each candidate for before it is measured."""
    calibration_tokens: int = 4096
    """Tokens that a probe solves each start from."""


TOKENS = 10_000_000_000
"""Training tokens, unless the settings say how many: as in the paper."""


@dataclass(frozen=True)
class Row:
    """A candidate and everything known about it."""

    candidate: Candidate
    figures: Figures
    training: Training
    expected: Expectation
    recipe: Recipe
    measured: float | str | None = None
    """The held-out LM loss of a probe, or why there is none; None: not probed."""


@dataclass(frozen=True)
class Plan:
    """Candidates, the recommended one first."""

    teacher: Figures
    rows: list[Row]
    ranked_by: str
    left_out: dict[str, str]
    """Kinds of shapes without a candidate, and why."""
    notes: list[str]
    settings: PlanSettings
    teacher_loss: float | None = None
    """The teacher's held-out LM loss on the text of the probe."""

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "teacher": {"model": self.settings.teacher, **asdict(self.teacher)},
            "teacher_held_out_lm": self.teacher_loss,
            "conditions": asdict(self.settings.conditions),
            "ranked_by": self.ranked_by,
            "candidates": [
                {
                    "kind": row.candidate.kind,
                    "shape": asdict(row.candidate.shape),
                    **asdict(row.figures),
                    "training": asdict(row.training),
                    "expected": asdict(row.expected),
                    "measured": row.measured,
                    "student": row.recipe.student.model_dump(exclude_none=True),
                }
                for row in self.rows
            ],
            "left_out": self.left_out,
            "notes": self.notes,
        }


def make_plan(settings: PlanSettings, out: Path | None = None, choose: int = 1) -> Plan:
    """Find candidates for a budget, compute their figures, and rank them.

    Args:
        settings: what the plan is made for.
        out: a new YAML file for the recipe of one candidate.
        choose: this candidate's number, from 1.

    Raises:
        UserError: if the teacher is not found or not supported, no candidate fits or has the
            number, a setting is not usable, or the recipe has no text or cannot be written.
    """
    if out is not None:
        _check_output(settings, out)
    elif choose != 1:
        raise UserError("--choose names the candidate whose recipe --out writes: give both.")
    _check(settings)
    recipe, under = _recipe(StudentSection(), settings), settings.conditions
    teacher, tokens = planned_teacher(recipe.teacher), recipe.train.tokens
    found, ranked_by, left_out = recommended(teacher, _budget(teacher, settings), tokens)
    if out is not None and not 1 <= choose <= len(found):
        raise UserError(f"There is no candidate {choose}: choose from 1 to {len(found)}.")
    rows = []
    with task("Computing figures", len(found)) as shown:
        for candidate, expected in found:
            recipe = _recipe(section_of(teacher, candidate.shape), settings)
            student = student_without_weights(teacher, candidate.shape)
            figures = figures_of(student, under)
            training = training_of(teacher.model, student, recipe, under)
            rows.append(Row(candidate, figures, training, expected, recipe))
            shown.update(len(rows))
    teacher_loss = None
    if settings.probe:
        rows, ranked_by, teacher_loss = _probed(rows, settings)
    whole = figures_of(teacher.model, under)
    made = Plan(whole, rows, ranked_by, left_out, _notes(teacher), settings, teacher_loss)
    if out is not None:
        _write_recipe(made, choose, out)
    return made


def _check_output(settings: PlanSettings, path: Path) -> None:
    """Refuse to write a recipe before any work is done.

    Raises:
        UserError: if the file exists, or the settings name no text.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another name with --out.")
    _need_text(settings)


def _write_recipe(plan: Plan, choice: int, path: Path) -> None:
    """Write the recipe of a candidate.

    Args:
        plan: the plan.
        choice: the candidate's number, from 1.
        path: a new YAML file.

    Raises:
        UserError: if the file exists, or the recipe has no text.
    """
    _check_output(plan.settings, path)
    row = plan.rows[choice - 1]
    chosen = row.recipe.model_dump(mode="json", exclude_unset=True)
    about = f"# {row.candidate.kind}: {row.figures.parameters:,} parameters, by `lrc plan`.\n"
    write_text(path, about + yaml.safe_dump(chosen, sort_keys=False))


def _need_text(settings: PlanSettings) -> None:
    """Refuse to continue without text.

    Raises:
        UserError: if the settings name none.
    """
    if not names_text(settings.recipe):
        raise UserError(
            "Say which text the student learns from: give --text (or --set data.shards=FOLDER)."
        )


def _check(settings: PlanSettings) -> None:
    """Refuse settings that do not fit each other.

    Raises:
        UserError: as it says.
    """
    under = settings.conditions
    if not 0 < under.mfu <= 1:
        raise UserError(f"--mfu is {under.mfu}: give a share between 0 and 1.")
    if under.gpus < 1 or under.context < 0:
        raise UserError(
            f"--gpus is {under.gpus} and --context {under.context}: give at least 1 and 0."
        )
    if settings.probe_tokens and not settings.probe:
        raise UserError("--probe-tokens goes with --probe: give both.")
    if settings.probe:
        _need_text(settings)


def _budget(teacher: Teacher, settings: PlanSettings) -> CostLimit:
    given = [settings.parameters, settings.ratio, settings.memory]
    if sum(value is not None for value in given) != 1:
        raise UserError("Give one of --params, --ratio and --memory.")
    if settings.memory is None:
        return size_limit(teacher, settings.parameters, settings.ratio)
    if settings.dtype not in QUANTIZATIONS:
        raise UserError(f"--dtype is {settings.dtype}: choose one of {', '.join(QUANTIZATIONS)}.")
    context = settings.conditions.context

    def measure(model: Any) -> float:
        try:
            file = file_bytes(model, settings.dtype)
        except UserError as error:
            if settings.dtype != "bf16":
                raise UserError(
                    f"llama.cpp does not run these models, so there is no {settings.dtype} file: "
                    "give --dtype bf16."
                ) from error
            file = file_sizes(model)["bf16"]
        return file + cache_bytes(model) * context

    return CostLimit(measure, settings.memory, hard=True)


def _recipe(student: StudentSection, settings: PlanSettings) -> Recipe:
    for section in ("student", "method", "teacher.model"):
        if any(f"{key}.".startswith(f"{section}.") for key in settings.recipe):
            raise UserError(f"The plan decides this: leave {section} out of --set.")
    base = {
        "teacher": {"model": settings.teacher},
        "student": student.model_dump(exclude_none=True, exclude_unset=True),
        "data": {"text": ["-"]},
        "train": {"tokens": TOKENS},
    }
    recipe = make_recipe(base, settings.recipe)
    gpus = settings.conditions.gpus
    if recipe.train.accumulate % gpus and "train.accumulate" not in settings.recipe:
        return make_recipe(base, {**settings.recipe, "train.accumulate": gpus})  # one for each GPU
    return recipe


def _probed(rows: list[Row], settings: PlanSettings) -> tuple[list[Row], str, float]:
    calibration = {"calibration_tokens": settings.calibration_tokens}
    recipes: list[Recipe] = []
    for row in rows:
        changed: dict[str, Any] = {
            "initialize": row.recipe.initialize.model_copy(update=calibration)
        }
        if settings.probe_tokens:
            length = {"tokens": settings.probe_tokens}
            changed["train"] = row.recipe.train.model_copy(update=length)
        recipes.append(row.recipe.model_copy(update=changed))
    teacher_loss, losses = probe(recipes, settings.probe_tokens)
    measured = [replace(row, measured=loss) for row, loss in zip(rows, losses, strict=True)]
    measured.sort(key=lambda row: row.measured if isinstance(row.measured, float) else 1e9)
    after = f"{settings.probe_tokens:,} training tokens" if settings.probe_tokens else "the start"
    return measured, f"the held-out loss measured after {after}", teacher_loss


def _notes(teacher: Teacher) -> list[str]:
    """Whether llama.cpp and vLLM run students of this family."""
    family, notes = teacher.family, []
    try:
        check_runs(teacher.config)
    except UserError as error:
        notes.append(str(error))
    takes = {
        True: f"vLLM takes {family.model_type} students.",
        False: f"vLLM's own class does not take {family.model_type} students: serve them with "
        "--model-impl transformers.",
        None: f"Whether vLLM takes {family.model_type} students was not checked.",
    }
    return [*notes, takes[family.vllm]]
