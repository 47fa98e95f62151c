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
from lrc.report.charts import VARIABLES
from lrc.report.evaluations import read_evaluations
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.system.files import reading, write_text

GENERATOR = '<meta name="generator" content="lrc report">'
"""Marks a page written by lrc, which a newer one may replace."""

SAMPLE_TOKENS = 64


def write_report(
    runs: Sequence[Run],
    path: Path,
    prompts: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
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
    template = (resources.files("lrc.report") / "page.html").read_text(encoding="utf-8")
    write_page(template, values, path)


def _values(
    runs: Sequence[Run], prompts: Sequence[str], progress: Callable[[str], None]
) -> dict[str, Any]:
    """The values for the page's template."""
    stories = contents.read_runs(runs)
    return {
        "title": " · ".join(story.name for story in stories),
        "stories": stories,
        "colors": {story.name: color_variable(story.color) for story in stories},
        "results": contents.results(stories),
        "charts": {
            "tokens": contents.loss_charts(stories, over_time=False),
            "time": contents.loss_charts(stories, over_time=True),
        },
        "throughput": contents.throughput_chart(stories),
        "maps": {story.name: contents.clone_maps(story) for story in stories},
        "shares": {story.name: contents.time_shares(story) for story in stories},
        "shapes": contents.shapes(stories),
        "settings": contents.settings(stories),
        "environments": {story.name: contents.environment(story.run) for story in stories},
        "evaluations": read_evaluations(runs),
        "samples": _samples(stories, prompts, progress),
    }


def write_page(template: str, values: dict[str, Any], path: Path) -> None:
    """Fill a template and write the page.

    Args:
        template: a Jinja template that takes `generator` and `style` in addition to its own values.
        values: its own values.
        path: the page.

    Raises:
        UserError: if the page cannot be written.
    """
    style = (resources.files("lrc.report") / "page.css").read_text(encoding="utf-8")
    common = {
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
    stories: Sequence[contents.RunView], prompts: Sequence[str], progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Prompts with every model's continuation; runs that stored the same prompt share an entry."""
    found: dict[str, dict[str, Any]] = {}
    for story in stories:
        kept = story.summary.get("samples")
        if kept:
            entry = found.setdefault(kept["prompt"], {"prompt": kept["prompt"], "texts": {}})
            entry["texts"]["teacher"] = kept["teacher"]
            entry["texts"][story.name] = kept["student"]
    for story in stories if prompts else ():
        if not story.run.student_folder.is_dir():
            continue
        progress(f"writing samples of {story.name}")
        model, tokenizer = story.run.student(), story.run.tokenizer()
        for prompt in prompts:
            entry = found.setdefault(prompt, {"prompt": prompt, "texts": {}})
            entry["texts"][story.name] = generate_text(model, tokenizer, prompt, SAMPLE_TOKENS)
    return list(found.values())


def color_variable(stand_in: str) -> str:
    """The CSS color of a placeholder."""
    return f"var({VARIABLES[stand_in]})"
