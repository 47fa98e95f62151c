"""Progress of long work.

Code below the command line reports it here. By default it is logged: what begins, and a line now
and then. The command line shows bars on a terminal instead (`lrc.cli.display`).
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

LOG_SECONDS = 30.0
"""Seconds between two logged lines about one task."""

LEAST_SHARE = 1 / 50
"""Share of a task after which its rate tells the time left: the first few parts may be slow."""

Progress = Callable[[int, int], None]
"""Gets the number of finished parts, and of all parts."""

logger = logging.getLogger(__name__)


class Task:
    """A piece of long work.

    Args:
        text: what is done.
        total: number of parts; None if it is not known.
        done: number of parts that are already finished.
        unit: what the parts are, in the plural, if their rate is of interest.
    """

    def __init__(self, text: str, total: int | None = None, done: int = 0, unit: str = "") -> None:
        self.text, self.total, self.done, self.unit = text, total, done, unit
        self.detail = ""
        self._first, self._started = done, time.perf_counter()

    def update(
        self, done: int | None = None, total: int | None = None, detail: str | None = None
    ) -> None:
        """Report progress. What is not given stays.

        Args:
            done: number of finished parts.
            total: number of parts.
            detail: more about the current part; the most important comes first.
        """
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.detail = self.detail if detail is None else detail
        self.show()

    def describe(self, detail: str) -> None:
        """Report what is being done now."""
        self.update(detail=detail)

    def show(self) -> None:
        """Show the current state."""

    def count(self) -> str:
        """The finished parts and all parts, such as `3 of 40` or `1,024 tokens`."""
        if not (self.done or self.total):
            return ""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.done:,}{unit}" + (f" of {self.total:,}" if self.total else "")

    def rate(self) -> float:
        """Parts per second since the task began here."""
        return (self.done - self._first) / max(time.perf_counter() - self._started, 1e-9)

    def rate_text(self) -> str:
        """The rate for people, such as `1,024.5 tokens/s`; empty if nobody asks."""
        return f"{self.rate():,.1f} {self.unit}/s" if self.unit and self.done > self._first else ""

    def left(self) -> timedelta | None:
        """The time left at the rate so far; None if it is not known."""
        here = self.done - self._first
        if not self.total or here <= 0 or here < LEAST_SHARE * (self.total - self._first):
            return None
        return timedelta(seconds=round((self.total - self.done) / self.rate()))


class LoggedTask(Task):
    """A task whose progress is logged now and then."""

    def __init__(self, text: str, total: int | None = None, done: int = 0, unit: str = "") -> None:
        super().__init__(text, total, done, unit)
        self._last = time.perf_counter()
        logger.info("%s", text)

    def show(self) -> None:
        """Log a line, unless the last one is recent."""
        now = time.perf_counter()
        if now - self._last < LOG_SECONDS:
            return
        self._last = now
        left = self.left()
        parts = [self.count(), self.rate_text(), self.detail, f"{left} left" if left else ""]
        logger.info("%s: %s", self.text, ", ".join(part for part in parts if part))


@contextmanager
def log_progress(text: str, total: int | None, done: int, unit: str) -> Iterator[Task]:
    """Log the progress of a task while the context is open."""
    yield LoggedTask(text, total, done, unit)


@contextmanager
def silent_progress(text: str, total: int | None, done: int, unit: str) -> Iterator[Task]:
    """Show nothing."""
    yield Task(text, total, done, unit)


Show = Callable[[str, int | None, int, str], AbstractContextManager[Task]]
"""A way to show progress: gets the arguments of `Task`."""

_show: Show = log_progress


def show_progress_with(show: Show) -> None:
    """Show all progress of this process in another way than `log_progress`."""
    global _show
    _show = show


def task(
    text: str, total: int | None = None, done: int = 0, unit: str = ""
) -> AbstractContextManager[Task]:
    """Show the progress of a piece of work while the context is open.

    Args:
        text: what is done.
        total: number of parts; None if it is not known yet.
        done: number of parts that are already finished.
        unit: what the parts are, in the plural.
    """
    return _show(text, total, done, unit)
