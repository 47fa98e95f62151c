"""Tables and texts of a page about runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.colors import LogNorm

from lrc.recipe import flatten
from lrc.report.charts import Series, color_scale, heat_map, short
from lrc.report.curves import HOUR
from lrc.report.runs import NO_BREAK, RunView

CLONE_LAYERS = "clone_layers"

COLUMNS = 80
"""Maximum number of columns of a heat map."""

NONE = "\N{EN DASH}"
"""Shown if a run has no value."""

Label = str | Series
"""A name in a table. A series is shown with its color."""


class PageTable(NamedTuple):
    """A table: the names of its columns after the first, and its rows."""

    head: Sequence[Label]
    rows: Sequence[tuple[Label, Sequence[str]]]


class Figure(NamedTuple):
    """A headline figure."""

    name: str
    value: str
    note: str


def headline(
    sizes: tuple[int | None, int | None],
    losses: tuple[float | None, float | None],
    top1: float | None,
    tokens: int,
    seconds: float | None,
) -> list[Figure]:
    """The four headline figures of a student.

    Args:
        sizes: parameters of teacher and student.
        losses: held-out LM losses of teacher and student, in nats.
        top1: share of held-out tokens with the teacher's most likely token.
        tokens: training tokens.
        seconds: training time.
    """
    arrow = " \N{RIGHTWARDS ARROW} "
    ratio = f"{sizes[0] / sizes[1]:.2f}x smaller" if sizes[0] and sizes[1] else ""
    return [
        Figure("parameters", arrow.join(_or_dash(short, x, NO_BREAK, 3) for x in sizes), ratio),
        Figure(
            "held-out perplexity",
            arrow.join(_or_dash(perplexity, loss) for loss in losses),
            f"LM loss {arrow.join(_or_dash(format, loss, '.3f') for loss in losses)}",
        ),
        Figure("same top-1 prediction", _or_dash(format, top1, ".1%"), "of held-out tokens"),
        Figure(
            "training tokens",
            short(tokens, NO_BREAK, 3),
            "" if seconds is None else f"in {duration(seconds)}",
        ),
    ]


def clone_maps(view: RunView) -> tuple[Markup, list[Markup]] | None:
    """The clone terms by layer over the run: the color legend and one chart per term."""
    lines = [line for line in view.metrics if CLONE_LAYERS in line]
    if not lines:
        return None
    tokens = np.array([line["tokens"] for line in lines], float)
    terms = list(lines[0][CLONE_LAYERS])
    values = np.array(
        [[line[CLONE_LAYERS][term] for term in terms] for line in lines], float
    )  # [lines, terms, layers], NaN in layers without the term
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return None
    low, high = np.quantile(positive, [0.01, 1.0])
    norm = LogNorm(low, max(high, 1.01 * low), clip=True)
    # Lines may be unevenly spaced: each column shows the first line at or after its position.
    places = np.linspace(0, tokens[-1], min(COLUMNS, len(lines)) + 1)[1:]
    values = values[np.searchsorted(tokens, places - 1e-9).clip(max=len(lines) - 1)]
    charts = [
        heat_map(term, np.maximum(values[:, i].T, low), tokens[-1], norm, "training tokens")
        for i, term in enumerate(terms)
    ]
    scale = "relative " if view.run.recipe.objective.clone_scale == "relative" else ""
    return color_scale(f"{scale}squared difference", norm), charts


def results(views: Sequence[RunView]) -> PageTable:
    """The final results side by side, with a column for every teacher."""
    students: dict[str, Callable[[RunView], str]] = {
        "status": _status,
        "parameters": lambda v: f"{v.summary['student_parameters']:,}",
        "compression": lambda v: (
            f"{v.summary['teacher_parameters'] / v.summary['student_parameters']:.2f}x smaller"
        ),
        "training tokens": lambda v: f"{v.metrics[-1]['tokens']:,}",
        "training time": lambda v: duration(v.seconds),
        "held-out LM loss at the start": lambda v: f"{v.losses[0]:.4f}",
        "held-out LM loss": lambda v: f"{v.losses[-1]:.4f}",
        "held-out perplexity": lambda v: perplexity(v.losses[-1]),
        "KL(teacher, student)": lambda v: f"{v.summary['kl']:.4f}",
        "same top-1 prediction": lambda v: f"{v.summary['top1_agreement']:.1%}",
        "tokens per second": lambda v: f"{v.summary['tokens_per_second']:,.0f}",
        "share of peak FLOP/s": lambda v: f"{v.summary['flop_utilization']:.0%}",
        "peak memory": lambda v: f"{v.summary['peak_memory_gib']:.1f} GiB",
    }
    teachers: dict[str, Callable[[RunView], str]] = {
        "parameters": lambda v: f"{v.summary['teacher_parameters']:,}",
        "held-out LM loss": lambda v: f"{v.teacher_loss:.4f}",
        "held-out perplexity": lambda v: _or_dash(perplexity, v.teacher_loss),
    }
    columns = _columns(views)
    rows = []
    for name, student in students.items():
        cells = [
            _cell(student if isinstance(label, Series) else teachers.get(name, lambda v: ""), view)
            for label, view in columns
        ]
        rows.append((name, cells))
    return PageTable([label for label, _ in columns], rows)


def shapes(views: Sequence[RunView]) -> PageTable:
    """The shapes of teachers and students."""
    columns = [
        (label, view.summary["shapes"]["student" if isinstance(label, Series) else "teacher"])
        for label, view in _columns([view for view in views if "shapes" in view.summary])
    ]
    names = dict.fromkeys(row for _, shape in columns for row in shape)
    rows = [(name, [str(shape.get(name, NONE)) for _, shape in columns]) for name in names]
    return PageTable([label for label, _ in columns], rows)


def settings(views: Sequence[RunView]) -> PageTable:
    """The recipes, setting by setting."""
    tables = [view.run.recipe.model_dump(mode="json") for view in views]
    return side_by_side([view.series for view in views], tables)


def environments(views: Sequence[RunView]) -> PageTable:
    """Versions, commit and machine of every run."""
    return side_by_side([view.series for view in views], [view.environment() for view in views])


def machines(environments: Iterable[dict[str, Any]]) -> str:
    """Versions and machine in one line; several, if the runs differ."""
    found = []
    for table in environments:
        packages = table.get("packages", {})
        names = ("low-rank-clone", "torch", "transformers")
        parts = [f"{name} {packages[name]}" for name in names if packages.get(name)]
        parts += table.get("gpus") or [table[name] for name in ("cpu",) if table.get(name)]
        if table.get("cores"):
            parts.append(f"{table['cores']} CPU cores")
        found.append(", ".join(parts))
    return "; ".join(dict.fromkeys(filter(None, found)))


def duration(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def written(value: Any) -> str:
    """A setting in YAML style, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def side_by_side(head: Sequence[Label], tables: Sequence[dict[str, Any]]) -> PageTable:
    """Nested tables setting by setting, a column for each."""
    flat = [flatten(table) for table in tables]
    names = dict.fromkeys(name for table in flat for name in table)
    rows = [
        (name.removeprefix("packages."), [written(one.get(name)) for one in flat]) for name in names
    ]
    return PageTable(head, rows)


def _columns(views: Sequence[RunView]) -> list[tuple[Label, RunView]]:
    """The columns of a table about models: every run, after its teacher's first occurrence.

    A teacher that was measured on other held-out tokens has another column.
    """
    columns: list[tuple[Label, RunView]] = []
    seen = set()
    for view in views:
        teacher = view.teacher, view.teacher_loss and round(view.teacher_loss, 3)
        if teacher not in seen:
            columns.append((view.teacher, view))
        seen.add(teacher)
        columns.append((view.series, view))
    return columns


def _cell(value: Callable[[RunView], str], view: RunView) -> str:
    """A value as text; a dash if the run does not have it yet."""
    try:
        return value(view)
    except (KeyError, IndexError, TypeError):
        return NONE


def _or_dash(form: Callable[..., str], value: Any, *arguments: Any) -> str:
    return NONE if value is None else form(value, *arguments)


def perplexity(loss: float) -> str:
    """The perplexity of a loss in nats."""
    value = math.exp(min(loss, 700))
    return f"{value:,.2f}" if value < 1000 else short(value, NO_BREAK, 3)


def _status(view: RunView) -> str:
    done = view.metrics[-1]["step"] if view.metrics else 0
    if view.summary:
        return f"ended, {done:,} steps"
    return f"at step {done:,} of {view.run.recipe.steps():,}"
