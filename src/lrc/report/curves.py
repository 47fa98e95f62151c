"""Picture of a run's loss curves."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lrc.report.pictures import as_label, save_picture

PANELS = {
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
}


def draw_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw the held-out loss and the method's own losses against training tokens, as a PNG.

    Args:
        metrics: lines of metrics.jsonl; the line of step 0 may hold `teacher_held_out_lm`.
        path: the picture to write.

    Raises:
        UserError: if the disk is full.
    """
    panels = {key: title for key, title in PANELS.items() if any(key in line for line in metrics)}
    rows = max(2, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(10, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (key, title) in zip(grid, panels.items(), strict=False):
        _draw(axes, metrics, key, title)
    teacher = [line["teacher_held_out_lm"] for line in metrics if "teacher_held_out_lm" in line]
    if teacher and "held_out_lm" in panels:
        grid[0].axhline(teacher[0], color="black", linestyle="--", label="teacher")
        grid[0].legend(fontsize="small")
    save_picture(figure, path)


def stage_marks(metrics: list[dict[str, Any]], place: str = "tokens") -> list[tuple[float, str]]:
    """Positions where a method entered a later stage, with a label such as "released".

    Args:
        metrics: lines of metrics.jsonl.
        place: the unit of the positions, "tokens" or "seconds".
    """
    found = [(line.get(place, 0), line["stage"]) for line in metrics if "stage" in line]
    return [(at, name) for at, name in found if at > 0]


def _draw(axes: Axes, metrics: list[dict[str, Any]], key: str, title: str) -> None:
    points = [(line["tokens"], line[key]) for line in metrics if key in line]
    marker = "o" if key == "held_out_lm" else None
    axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label="student")
    by_source = [(line["tokens"], line.get(f"{key}_by_source", {})) for line in metrics]
    for name in sorted({name for _, losses in by_source for name in losses}):
        points = [(tokens, losses[name]) for tokens, losses in by_source if name in losses]
        axes.plot(*zip(*points, strict=True), linewidth=0.8, label=as_label(name))
    for at, name in stage_marks(metrics):
        axes.axvline(at, color="gray", linestyle=":", label=name)
    axes.set_title(title)
    axes.set_xlabel("training tokens")
    axes.set_xlim(0, max(metrics[-1]["tokens"], 1))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if key in ("clone", "hidden", "attention"):
        axes.set_yscale("log")
    if len(axes.lines) > 1:
        axes.legend(fontsize="small")
