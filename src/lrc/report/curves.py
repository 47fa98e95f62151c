"""Loss charts of runs, for their page and for a run's curves.png."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrc.report.charts import Chart, Line, Series, save_charts
from lrc.report.runs import RunView, read_runs
from lrc.run import Run

CHARTS = {
    "held_out_lm": "held-out LM loss (nats)",
    "lm": "LM loss (nats)",
    "kl": "T² · KL (nats)",
    "reverse_kl": "T² · reverse KL (nats)",
    "jsd": "T² · JSD (nats)",
    "clone": "clone loss",
    "hidden": "hidden states (mean squares)",
    "attention": "attention scores (mean squares)",
    "attention_relation": "attention relation (nats)",
    "value_relation": "value relation (nats)",
    "loss": "weighted loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
"""Title of each chart, by key in metrics.jsonl."""

ACCURACY, TEACHER_ACCURACY = "accuracy", "teacher_accuracy"
"""Keys of the accuracies in metrics.jsonl: of the student, and the teacher's in the first line."""

LOGARITHMIC = ("held_out_lm", "clone", "hidden", "attention", "loss", "grad_norm")

HOUR = 3600


def draw_curves(run: Run, path: Path, summary: Mapping[str, Any] | None = None) -> None:
    """Draw the losses of a run against training tokens, as a PNG.

    Args:
        run: the run.
        path: the picture.
        summary: its final table, if that is not written yet.

    Raises:
        UserError: if the disk is full.
    """
    (view,) = read_runs([run])
    if summary is not None:
        view = replace(view, summary=dict(summary))
    save_charts(view.title, loss_charts([view]), path)


def loss_charts(views: Sequence[RunView], over_time: bool = False) -> list[Chart]:
    """Charts of all quantities in the metrics, over training tokens or over time.

    The chart of a single run also shows the loss on each source of the text.
    """
    charts = (metric_chart(views, key, title, over_time) for key, title in CHARTS.items())
    found = [chart for chart in charts if chart is not None]
    return [*found, *accuracy_charts(views, over_time)]


def accuracy_charts(views: Sequence[RunView], over_time: bool = False) -> list[Chart]:
    """A chart of every accuracy that `train.evaluate` measured, beside the teacher's (Figure 4 of
    the paper)."""
    every = [line.get(ACCURACY, {}) for view in views for line in view.metrics]
    names = list(dict.fromkeys(name for found in every for name in found))
    unit, label = time_unit(max(view.seconds for view in views)) if over_time else (1, "")
    place, charts = "seconds" if over_time else "tokens", []
    for name in names:
        lines = []
        for view in views:
            measured = [line for line in view.metrics if name in line.get(ACCURACY, ())]
            if measured:
                x = [line.get(place, 0) / unit for line in measured]
                y = [line[ACCURACY][name] for line in measured]
                teacher = view.metrics[0].get(TEACHER_ACCURACY, {}).get(name)
                lines.append(Line(view.series, x, y, teacher, marked=True))
        charts.append(Chart(name, lines, label or "training tokens"))
    return charts


def metric_chart(
    views: Sequence[RunView], key: str, title: str, over_time: bool = False
) -> Chart | None:
    """The chart of a quantity in the metrics; None if no run has it.

    Args:
        views: the runs.
        key: the quantity.
        title: title of the chart.
        over_time: whether the horizontal axis is the time instead of the training tokens.
    """
    unit, label = time_unit(max(view.seconds for view in views)) if over_time else (1, "")
    measured = key == "held_out_lm"
    lines = []
    for view in views:
        place = "seconds" if over_time else "tokens"
        values = {view.series: [(line, line.get(key)) for line in view.metrics]}
        by_source = [(line, line.get(f"{key}_by_source", {})) for line in view.metrics]
        sources = sorted({name for _, losses in by_source for name in losses})
        for number, name in enumerate(sources if len(views) == 1 else (), start=1):
            values[Series(name, number)] = [(line, losses.get(name)) for line, losses in by_source]
        for series, found in values.items():
            # The line before the first step has no seconds yet.
            points = [
                (line.get(place, 0) / unit, value)
                for line, value in found
                if value is not None and math.isfinite(value)
            ]
            if points:
                x, y = zip(*points, strict=True)
                main = series == view.series
                stages = [(at / unit, stage) for at, stage in stage_marks(view, place) if main]
                teacher = view.teacher_loss if measured and main else None
                lines.append(Line(series, x, y, teacher, marked=measured, stages=stages))
    if not lines:
        return None
    return Chart(title, lines, label or "training tokens", logarithmic=key in LOGARITHMIC)


def stage_marks(view: RunView, place: str = "tokens") -> list[tuple[float, str]]:
    """Positions where a method entered a later stage, with a label such as "released".

    Args:
        view: the run.
        place: the unit of the positions, "tokens" or "seconds".
    """
    found = [(line.get(place, 0), line["stage"]) for line in view.metrics if "stage" in line]
    return [(at, name) for at, name in found if at > 0]


def time_unit(longest: float) -> tuple[float, str]:
    """Length in seconds and name of a suitable unit for times up to `longest` seconds."""
    if longest < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest < 3 * HOUR else (float(HOUR), "hours")
