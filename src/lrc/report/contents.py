"""The content of a page about runs, read only from their folders."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from lrc.model.teacher import short_name
from lrc.recipe import flatten
from lrc.report.charts import Line, color_scale, heat_map, line_chart, run_color
from lrc.report.curves import PANELS, stage_marks
from lrc.run import Run

CHARTS = {
    **PANELS,
    "loss": "weighted loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
"""Title of each chart, by key in metrics.jsonl."""

LOGARITHMIC = ("clone", "loss", "grad_norm")

CLONE_LAYERS = "clone_layers"

COLUMNS = 80
"""Maximum number of columns of a heat map."""

HOUR = 3600

NONE = "\N{EN DASH}"
"""Shown if a run has no value."""


@dataclass(frozen=True)
class RunView:
    """A run as a page shows it."""

    name: str
    color: str
    run: Run
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    """The final results; empty if the run has not ended."""

    @property
    def teacher(self) -> str:
        """The teacher's name, without its path."""
        return short_name(self.run.recipe.teacher.model)


def read_runs(runs: Sequence[Run]) -> list[RunView]:
    """The runs, with distinct names."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return [
        RunView(
            name,
            run_color(i),
            run,
            run.metrics(),
            run.summary() if run.summary_file.is_file() else {},
        )
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


def loss_charts(stories: Sequence[RunView], over_time: bool) -> list[tuple[str, str]]:
    """Title and chart of every quantity in the metrics, over training tokens or over time."""
    longest = max((_seconds(story) for story in stories), default=0.0)
    unit, label = time_unit(longest) if over_time else (1.0, "training tokens")
    charts = []
    for key, title in CHARTS.items():
        lines = []
        for story in stories:
            points = _points(story.metrics, key, over_time)
            if points:
                x, y = zip(*points, strict=True)
                measured = key == "held_out_lm"
                lines.append(
                    Line(
                        story.name,
                        story.color,
                        [value / unit for value in x],
                        y,
                        _teacher_level(story) if measured else None,
                        marked=measured,
                        stages=[
                            (place / unit, stage)
                            for place, stage in stage_marks(
                                story.metrics, "seconds" if over_time else "tokens"
                            )
                        ],
                    )
                )
        if lines:
            charts.append((title, line_chart(title, lines, label, key in LOGARITHMIC)))
    return charts


def throughput_chart(stories: Sequence[RunView]) -> str | None:
    """Tokens per second over training tokens."""
    lines = []
    for story in stories:
        points = _points(story.metrics, "tokens_per_second", over_time=False)
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(story.name, story.color, x, y))
    return line_chart("tokens per second", lines, "training tokens") if lines else None


def clone_maps(story: RunView) -> tuple[str, list[str]] | None:
    """The clone terms by layer over the run: the color legend and one chart per term."""
    lines = [line for line in story.metrics if CLONE_LAYERS in line]
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
    scale = "relative " if story.run.recipe.objective.clone_scale == "relative" else ""
    return color_scale(f"{scale}squared difference", norm), charts


def results(stories: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """The final results side by side: each row's name and its value for every run."""
    rows = [
        ("status", _status),
        ("teacher", lambda s: s.teacher),
        ("student parameters", lambda s: f"{s.summary['student_parameters']:,}"),
        ("compression", _compression),
        ("training tokens", lambda s: f"{s.metrics[-1]['tokens']:,}"),
        ("training time", lambda s: duration(_seconds(s))),
        ("teacher's held-out LM loss", lambda s: f"{_teacher_level(s):.4f}"),
        ("held-out LM loss at the start", lambda s: f"{_held_out(s)[0]:.4f}"),
        ("held-out LM loss", lambda s: f"{_held_out(s)[-1]:.4f}"),
        ("held-out perplexity", lambda s: f"{math.exp(min(_held_out(s)[-1], 700)):,.2f}"),
        ("KL(teacher, student)", lambda s: f"{s.summary['kl']:.4f}"),
        ("same top-1 prediction", lambda s: f"{s.summary['top1_agreement']:.1%}"),
        ("tokens per second", lambda s: f"{s.summary['tokens_per_second']:,.0f}"),
        ("share of peak FLOP/s", lambda s: f"{s.summary['flop_utilization']:.0%}"),
        ("peak memory", lambda s: f"{s.summary['peak_memory_gib']:.1f} GiB"),
    ]
    return [(name, [_or_dash(value, story) for story in stories]) for name, value in rows]


def _or_dash(value: Any, story: RunView) -> str:
    """A value as text; a dash if the run does not have it yet."""
    try:
        return str(value(story))
    except (KeyError, IndexError, TypeError):
        return NONE


def shapes(stories: Sequence[RunView]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns and rows of the shapes of teachers and students; shared teachers appear once."""
    columns: dict[str, dict[str, Any]] = {}
    for story in stories:
        found = story.summary.get("shapes")
        if found:
            columns[story.teacher] = found["teacher"]
            columns[story.name] = found["student"]
    names = dict.fromkeys(row for column in columns.values() for row in column)
    rows = [(row, [str(c.get(row, NONE)) for c in columns.values()]) for row in names]
    return list(columns), rows


def settings(stories: Sequence[RunView]) -> list[tuple[str, list[str], bool]]:
    """Every setting's name, its value for each run, and whether these values differ."""
    flat = [flatten(story.run.recipe.model_dump(mode="json")) for story in stories]
    names = dict.fromkeys(name for recipe in flat for name in recipe)
    rows = [(name, [written(recipe.get(name)) for recipe in flat]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def time_shares(story: RunView) -> list[tuple[str, float]]:
    """Shares of the time of the run's last session, largest first."""
    return list(story.summary.get("time_shares", {}).items())


def duration(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def _points(
    metrics: Sequence[dict[str, Any]], key: str, over_time: bool
) -> list[tuple[float, float]]:
    """Tokens or seconds, and the value, for every line with a finite value."""
    place = "seconds" if over_time else "tokens"
    return [
        (line.get(place, 0), line[key])  # the line before the first step has no seconds yet
        for line in metrics
        if key in line and math.isfinite(line[key])
    ]


def time_unit(longest: float) -> tuple[float, str]:
    """Length in seconds and name of a suitable unit for times up to `longest` seconds."""
    if longest < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest < 3 * HOUR else (float(HOUR), "hours")


def _seconds(story: RunView) -> float:
    return max((line.get("seconds", 0.0) for line in story.metrics), default=0.0)


def _held_out(story: RunView) -> list[float]:
    return [line["held_out_lm"] for line in story.metrics if "held_out_lm" in line]


def _teacher_level(story: RunView) -> float | None:
    levels = (line.get("teacher_held_out_lm") for line in story.metrics)
    return next((level for level in levels if level is not None), None)


def _status(story: RunView) -> str:
    done = story.metrics[-1]["step"] if story.metrics else 0
    steps = story.run.recipe.steps()
    if story.summary:
        return f"ended, {done:,} steps"
    return f"at step {done:,} of {steps:,}"


def _compression(story: RunView) -> str:
    ratio = story.summary["teacher_parameters"] / story.summary["student_parameters"]
    return f"{ratio:.2f}x smaller"


def written(value: Any) -> str:
    """A setting in YAML style, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def environment(run: Run) -> list[tuple[str, str]]:
    """The environment of a run: versions, commit, machine."""
    path = run.folder / "environment.json"
    if not path.is_file():
        return []
    flat = flatten(json.loads(path.read_text(encoding="utf-8")))
    return [(name.removeprefix("packages."), written(value)) for name, value in flat.items()]
