"""The picture and the page of a tuning, read only from its folder."""

from pathlib import Path
from typing import Any

from lrc.model.locate import short_name
from lrc.report import contents
from lrc.report.charts import LARGE, Chart, Line, Series, save_charts, svg_chart
from lrc.report.curves import LOGARITHMIC
from lrc.report.page import Progress, check_path, write_page
from lrc.run import ENVIRONMENT
from lrc.system.errors import UserError
from lrc.system.files import read_json, reading
from lrc.system.metrics import read_metrics
from lrc.tuning.settings import BEFORE, METRICS, SUMMARY, Tuning, open_tuning

CHARTS = {
    "lm": "LM loss on answers (nats)",
    "kl": "T² · KL on answers (nats)",
    "loss": "training loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
"""Title of each chart below the first, by key in metrics.jsonl."""


def draw_tuning(folder: Path) -> None:
    """Draw the losses of a tuning against its steps: curves.png.

    Raises:
        UserError: if the disk is full.
    """
    charts = _charts(folder, read_metrics(folder / METRICS))
    save_charts(_title(open_tuning(folder)), charts, folder / "curves.png")


def write_tuning_page(folder: Path, path: Path, progress: Progress = lambda text: None) -> None:
    """Write an HTML page about one tuning: held-out losses, curves, settings and environment.

    Args:
        folder: the tuning's folder, ended or not.
        path: the page; only an older report there is replaced.
        progress: called with the name of the current step.

    Raises:
        UserError: if the tuning has not begun, the path is taken, or the page cannot be written.
    """
    check_path(path)
    tuning = open_tuning(folder)
    if not (folder / BEFORE).is_file():
        raise UserError(f"{folder} has no losses yet; start or continue it with `lrc sft`.")
    progress("drawing")
    with reading(folder, "one of its files is damaged: restore it, or tune again"):
        values = _values(tuning, folder)
    write_page("report", values, path)


def _title(tuning: Tuning) -> str:
    return f"{short_name(tuning.model)}, tuned on conversations"


def _charts(folder: Path, lines: list[dict[str, Any]]) -> list[Chart]:
    """The held-out loss, and what the metrics hold of `CHARTS`, over the steps."""
    before = read_json(folder / BEFORE, "tune again")
    series = Series(folder.resolve().name, 0)
    measured = [(0, before["held_out_lm"])]
    measured += [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    teacher = before.get("teacher_held_out_lm")
    steps, losses = zip(*measured, strict=True)
    first = Line(series, steps, losses, teacher, marked=True)
    charts = [Chart("held-out loss on answers (nats)", [first], "steps", logarithmic=True)]
    for key, title in CHARTS.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            x, y = zip(*points, strict=True)
            line = Line(series, x, y)
            charts.append(Chart(title, [line], "steps", logarithmic=key in LOGARITHMIC))
    return charts


def _values(tuning: Tuning, folder: Path) -> dict[str, Any]:
    """The values for the page's template."""
    summary = _table(folder / SUMMARY)
    environment = _table(folder / ENVIRONMENT)
    lines = read_metrics(folder / METRICS)
    charts = _charts(folder, lines)
    measured = charts[0].lines[0]
    losses = {"before": measured.y[0]}
    losses |= {"after": summary["held_out_lm"]} if summary else {"so far": measured.y[-1]}
    if measured.teacher is not None:
        losses["teacher"] = measured.teacher
    learned = f" and the predictions of {short_name(tuning.teacher)}" if tuning.teacher else ""
    return {
        "title": _title(tuning),
        "about": f"{short_name(tuning.model)} learned the answers of "
        f"{', '.join(map(short_name, tuning.data))}{learned}.",
        "machines": contents.machines([environment]),
        "headline": _headline(losses, lines, summary),
        "held_out": {"tokens": [(charts[0].title, svg_chart(charts[0], LARGE))]},
        "results": contents.PageTable(
            list(losses),
            [
                ("held-out loss on answers", [f"{loss:.4f}" for loss in losses.values()]),
                ("held-out perplexity", list(map(contents.perplexity, losses.values()))),
            ],
        ),
        "losses": {"tokens": [(chart.title, svg_chart(chart)) for chart in charts[1:]]},
        "settings": contents.side_by_side([], [tuning.model_dump(mode="json")]),
        "environments": contents.side_by_side([], [environment]),
    }


def _headline(
    losses: dict[str, float], lines: list[dict[str, Any]], summary: dict[str, Any]
) -> list[contents.Figure]:
    before, after, *teacher = losses.values()
    figures = [
        contents.Figure(
            "held-out loss on answers",
            f"{before:.3f} \N{RIGHTWARDS ARROW} {after:.3f}",
            f"teacher {teacher[0]:.3f}" if teacher else "",
        )
    ]
    if not summary:
        done, total = (lines[-1]["step"], f"of {lines[-1]['steps']:,}") if lines else (0, "")
        return [*figures, contents.Figure("steps", f"{done:,}", total)]
    return [
        *figures,
        contents.Figure(
            "conversations",
            f"{summary['training_conversations']:,}",
            f"{summary['held_out_conversations']:,} held out",
        ),
        contents.Figure("answer tokens", f"{summary['training_answer_tokens']:,}", "in an epoch"),
        contents.Figure(
            "steps", f"{summary['steps']:,}", f"in {contents.duration(summary['seconds'])}"
        ),
    ]


def _table(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is not written yet."""
    return read_json(path, "tune again") if path.is_file() else {}
