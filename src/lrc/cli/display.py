"""What the command line shows of the library's log and progress."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lrc.cli.console import TextConsole
from lrc.system.progress import Task, log_progress, show_progress_with, silent_progress

BAR = 20
"""Width of a bar in characters, if there is room."""

TIMES = len("    0:00:00 left 0:00:00")
"""Width in characters of the columns of times, and of the spaces between all columns."""


class LogHandler(logging.Handler):
    """Prints the library's log on a console; warnings in yellow."""

    def __init__(self, console: TextConsole) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(record.getMessage(), style=style)


def show_library(console: TextConsole, quiet: bool = False) -> None:
    """Show the library's log and progress on a console: bars on a terminal, else lines. If quiet,
    show only warnings."""
    logger = logging.getLogger("lrc")
    logger.handlers = [LogHandler(console)]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    bars = Bars(console).task if console.is_terminal else log_progress
    show_progress_with(silent_progress if quiet else bars)


class Bars:
    """The bars of all tasks, one below the other. A bar disappears when its task ends."""

    def __init__(self, console: TextConsole) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[count]}", markup=False),
            BarColumn(bar_width=bar_width(console)),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def task(self, text: str, total: int | None, done: int, unit: str) -> Iterator[Task]:
        """Show a bar while the context is open."""
        if not self._open:
            self._progress.start()
        self._open += 1
        bar = BarTask(self._progress, text, total, done, unit)
        try:
            yield bar
        finally:
            self._progress.remove_task(bar.id)
            self._open -= 1
            if not self._open:
                self._progress.stop()


class BarTask(Task):
    """A task with a bar."""

    def __init__(
        self, progress: Progress, text: str, total: int | None, done: int, unit: str
    ) -> None:
        super().__init__(text, total, done, unit)
        self._progress = progress
        self.id: TaskID = progress.add_task(text, total=total, completed=done, count="", detail="")
        self.show()

    def show(self) -> None:
        """Update the bar."""
        console, count = self._progress.console, self.count()
        room = console.width - len(self.text) - len(count) - bar_width(console) - TIMES
        detail = fit(", ".join(part for part in (self.rate_text(), self.detail) if part), room)
        self._progress.update(
            self.id, completed=self.done, total=self.total, count=count, detail=detail
        )


def fit(detail: str, room: int) -> str:
    """As many of the comma-separated parts of a text as fit, from the first. No number is cut."""
    parts = detail.split(", ")
    for kept in range(len(parts), 0, -1):
        text = ", ".join(parts[:kept])
        if len(text) <= room:
            return text
    return ""


def bar_width(console: Console) -> int:
    """Width of the bar in characters that leaves room for the other columns."""
    return BAR if console.width >= 100 else BAR // 2
