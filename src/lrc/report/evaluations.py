"""Benchmark results of runs in one table, beside the published results.

`lrc eval` writes `evaluation/results.json` to a run's folder. The published results ship with the
package as `evaluation/published.yaml`. If either is missing or has another format, it is left out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lrc.run import Run

RESULTS = Path("evaluation") / "results.json"

NONE = "\N{EN DASH}"
"""Shown if a model has no value."""

METRICS = ("acc", "acc_norm")
"""The most likely answer, and the most likely answer for its length."""


@dataclass(frozen=True)
class EvaluationRow:
    """A model's accuracies by one metric."""

    model: str
    note: str
    """The model that it was derived from, and the number of training tokens."""
    metric: str
    """One of `METRICS`; empty for published rows, where the metric is not known."""
    cells: tuple[str, ...]
    """One per task, in percent, then the average."""
    published: bool = False


@dataclass(frozen=True)
class Evaluations:
    """Models by tasks."""

    tasks: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[EvaluationRow, ...]
    notes: tuple[str, ...]
    """Notes that a reader needs before comparing the numbers."""


def read_evaluations(runs: Sequence[Run]) -> Evaluations | None:
    """The table of all evaluated runs; None if no run was evaluated."""
    found = [content for run in runs if (content := _results(run)) is not None]
    names = list(dict.fromkeys(name for content in found for name in _task_names(content)))
    if not names:
        return None
    published = _published()
    columns = published.get("tasks", {})
    known = [name for name in columns if name in names]
    order = [*known, *(name for name in names if name not in columns)]
    measured = [
        row
        for content in found
        for model in content["models"]
        for metric in METRICS
        if (row := _row(model, metric, order)) is not None
    ]
    rows = dict.fromkeys(measured)  # list a teacher shared by two runs only once
    beside = [
        EvaluationRow(
            entry["model"],
            _note(entry["teacher"], entry["tokens"]),
            "",
            _with_average(
                [dict(zip(columns, entry["accuracy"], strict=True)).get(name) for name in order]
            ),
            published=True,
        )
        for entry in (published.get("models", ()) if known else ())
    ]
    labels = tuple(columns[name]["label"] if name in columns else name for name in order)
    return Evaluations(labels, (*rows, *beside), tuple(_notes(found)))


def _results(run: Run) -> dict[str, Any] | None:
    try:
        content = json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
        for model in content["models"]:
            model["label"], model["tasks"].items()
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _published() -> dict[str, Any]:
    path = resources.files("lrc.evaluation") / "published.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _task_names(content: dict[str, Any]) -> list[str]:
    """Tasks that have an accuracy."""
    return [
        name
        for model in content["models"]
        for name, task in model["tasks"].items()
        if "acc" in task.get("metrics", {})
    ]


def _row(model: dict[str, Any], metric: str, order: Sequence[str]) -> EvaluationRow | None:
    """A model's row by one metric; None if no task has this metric."""
    scores = [
        model["tasks"].get(name, {}).get("metrics", {}).get(metric, {}).get("value")
        for name in order
    ]
    if not any(score is not None for score in scores):
        return None
    tokens = model.get("tokens")
    return EvaluationRow(
        model["label"],
        _note(model.get("teacher"), f"{tokens:,}" if tokens else None),
        metric,
        _with_average([None if score is None else 100 * score for score in scores]),
    )


def _note(teacher: str | None, tokens: str | None) -> str:
    parts = [f"from {teacher}" if teacher else "", f"{tokens} tokens" if tokens else ""]
    return ", ".join(part for part in parts if part)


def _with_average(scores: Sequence[float | None]) -> tuple[str, ...]:
    """Percentages, and their average if none is missing."""
    cells = [NONE if score is None else f"{score:.2f}" for score in scores]
    values = [score for score in scores if score is not None]
    complete = len(values) == len(scores)
    return (*cells, f"{sum(values) / len(values):.2f}" if complete else NONE)


def _notes(found: Sequence[dict[str, Any]]) -> list[str]:
    """Notes that a reader needs before comparing the numbers."""
    limits = sorted({c["settings"]["limit"] for c in found if c.get("settings", {}).get("limit")})
    return [
        f"Some results cover only the first {limit:,} rows of each task: not comparable with "
        "results on all rows."
        for limit in limits
    ]
