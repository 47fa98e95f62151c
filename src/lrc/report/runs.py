"""Runs as pages and pictures show them, read only from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrc.model.locate import short_name
from lrc.report.charts import Series, short
from lrc.run import Run

NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class RunView:
    """A run with its logged steps and results."""

    series: Series
    run: Run
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    """The final results; empty if the run has not ended, or goes on after them."""

    @property
    def name(self) -> str:
        """The folder's name, or its path if several runs have the same name."""
        return self.series.name

    @property
    def teacher(self) -> str:
        """The teacher's name, without its path."""
        return short_name(self.run.recipe.teacher.model)

    @property
    def title(self) -> str:
        """Teacher and student, such as "SmolLM2-135M → 67 M (hidden 288)"."""
        shape = self.summary.get("shapes", {}).get("student", {})
        hidden = shape.get("hidden size", self.run.recipe.student.hidden_size)
        return title(self.teacher, self.summary.get("student_parameters"), hidden)

    @property
    def teacher_loss(self) -> float | None:
        """Held-out LM loss of the teacher, in nats."""
        levels = (line.get("teacher_held_out_lm") for line in self.metrics)
        return next((level for level in levels if level is not None), None)

    @property
    def losses(self) -> list[float]:
        """Held-out LM losses of the student, in nats, oldest first."""
        return [line["held_out_lm"] for line in self.metrics if "held_out_lm" in line]

    @property
    def seconds(self) -> float:
        """Training time."""
        return max((line.get("seconds", 0.0) for line in self.metrics), default=0.0)

    def environment(self) -> dict[str, Any]:
        """Versions, commit and machine; empty if they were not recorded."""
        return self.run.environment()


def read_runs(runs: Sequence[Run]) -> list[RunView]:
    """The runs, with distinct names."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    found = []
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        metrics = run.metrics()
        summary = run.summary() if run.summary_file.is_file() else {}
        if metrics and summary.get("tokens", 0) < metrics[-1]["tokens"]:
            summary = {}  # it is that of the start
        found.append(RunView(Series(name, number), run, metrics, summary))
    return found


def title(teacher: str, parameters: int | None, hidden: int | None) -> str:
    """Teacher and student; a student's parameters are known once it is exported, and a hidden size
    of None is the teacher's."""
    arrow, width = "\N{RIGHTWARDS ARROW}", hidden and f"hidden{NO_BREAK}{hidden}"
    if parameters is None:
        return f"{teacher} {arrow} {width or 'student'}"
    size = short(parameters, NO_BREAK, digits=3)
    return f"{teacher} {arrow} {size} ({width})" if width else f"{teacher} {arrow} {size}"
