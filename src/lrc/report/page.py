"""One or more runs as a self-contained HTML page: no network, no scripts."""

from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from lrc.evaluation.sample import generate_text
from lrc.report import contents
from lrc.report.charts import LARGE, Chart, legend, svg_chart
from lrc.report.curves import loss_charts, metric_chart
from lrc.report.evaluations import read_evaluations
from lrc.report.runs import RunView, read_runs
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.system.files import reading, write_text

GENERATOR = '<meta name="generator" content="lrc report">'
"""Marks a page written by lrc, which a newer one may replace."""

SAMPLE_TOKENS = 64

Progress = Callable[[str], None]


def write_report(
    runs: Sequence[Run],
    path: Path,
    prompts: Sequence[str] = (),
    progress: Progress = lambda text: None,
) -> None:
    """Write a page about some runs, with their curves overlaid.

    Args:
        runs: runs, ended or not.
        path: the page; only an older report there is replaced.
        prompts: texts for the students of ended runs to continue, in addition to the sample stored
            in every ended run.
        progress: called with the name of the current step.

    Raises:
        UserError: if a run has no metrics yet, the path is taken, or the page cannot be written.
    """
    check_path(path)
    for run in runs:
        if not run.metrics():
            raise UserError(f"{run.folder} has no metrics yet; start or continue it first.")
    progress("drawing")
    folders = ", ".join(str(run.folder) for run in runs)
    with reading(folders, "a file of a run may be damaged: restore it, or leave the run out"):
        values = _values(runs, prompts, progress)
    write_page("report", values, path)


def _values(runs: Sequence[Run], prompts: Sequence[str], progress: Progress) -> dict[str, Any]:
    """The values for the page's template."""
    views = read_runs(runs)
    titles = list(dict.fromkeys(view.title for view in views))
    teachers = ", ".join(dict.fromkeys(view.teacher for view in views))
    best = min(views, key=lambda view: min(view.losses[-1:], default=float("inf")))
    over_tokens, over_time = loss_charts(views), loss_charts(views, over_time=True)
    throughput = metric_chart(views, "tokens_per_second", "tokens per second")
    settings = contents.settings(views)
    different = [row for row in settings.rows if len(set(row[1])) > 1]
    return {
        "title": " · ".join(titles) if len(titles) < 4 else f"{len(titles)} students of {teachers}",
        "about": f"{'Students' if len(views) > 1 else 'A student'} of {teachers}.",
        "machines": contents.machines(view.environment() for view in views),
        "best": best.series if len(views) > 1 else None,
        "headline": contents.headline(
            (best.summary.get("teacher_parameters"), best.summary.get("student_parameters")),
            (best.teacher_loss, best.losses[-1] if best.losses else None),
            best.summary.get("top1_agreement"),
            best.metrics[-1]["tokens"],
            best.seconds,
        ),
        "held_out": pictures(over_tokens[:1], over_time[:1], LARGE),
        "legend": legend(over_tokens),
        "results": contents.results(views),
        "losses": pictures(over_tokens[1:], over_time[1:]),
        "throughput": throughput and svg_chart(throughput),
        "maps": [(view.series, maps) for view in views if (maps := contents.clone_maps(view))],
        "shares": [
            (view.series, shares.items())
            for view in views
            if (shares := view.summary.get("time_shares"))
        ],
        "shapes": contents.shapes(views),
        "different": contents.PageTable(settings.head, different),
        "settings": settings,
        "environments": contents.environments(views),
        "evaluations": read_evaluations(runs),
        "samples": _samples(views, prompts, progress),
    }


def pictures(
    over_tokens: Sequence[Chart], over_time: Sequence[Chart], *size: tuple[float, float]
) -> dict[str, list[tuple[str, Markup]]]:
    """Titles and pictures of charts, by the axis that the page's switch chooses."""
    axes = {"tokens": over_tokens, "time": over_time}
    return {
        axis: [(chart.title, svg_chart(chart, *size)) for chart in charts]
        for axis, charts in axes.items()
    }


def write_page(kind: str, values: dict[str, Any], path: Path) -> None:
    """Fill the template page.html and write the page.

    Args:
        kind: "report" or "comparison".
        values: values of the template; sections without values are left out.
        path: the page.

    Raises:
        UserError: if the page cannot be written.
    """
    template, style = (
        (resources.files("lrc.report") / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css")
    )
    common = {
        "kind": kind,
        "generator": Markup(GENERATOR),
        "style": Markup(style),
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.from_string(template).render({**common, **values}))


def check_path(path: Path) -> None:
    """Refuse to replace anything except a report.

    Raises:
        UserError: if something else is at the path.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file name for the page.")
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{path} exists and is not a report: choose another name with --out.")


def _samples(
    views: Sequence[RunView], prompts: Sequence[str], progress: Progress
) -> dict[str, dict[contents.Label, str]]:
    """Every model's continuation by prompt; runs that stored the same prompt share an entry."""
    found: dict[str, dict[contents.Label, str]] = {}
    for view in views:
        if kept := view.summary.get("samples"):
            texts = found.setdefault(kept["prompt"], {})
            texts["teacher"] = kept["teacher"]
            texts[view.series] = kept["student"]
    for view in views if prompts else ():
        if not view.run.student_folder.is_dir():
            continue
        progress(f"writing samples of {view.name}")
        model, tokenizer = view.run.student(), view.run.tokenizer()
        for prompt in prompts:
            text = generate_text(model, tokenizer, prompt, SAMPLE_TOKENS)
            found.setdefault(prompt, {})[view.series] = text
    return found
