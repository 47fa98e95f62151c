"""Progress display of a running build: tokens, rate, share of the budget, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lrc.corpus.selection import Tally
from lrc.data.shards import Shard

_SECONDS_OF_LINE = 30.0
"""Seconds between two lines if the output is not a terminal."""


class BuildProgress:
    """Shows the progress of a build; without a terminal, it prints a line from time to time.

    Args:
        console: where to show the progress.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._last_line = time.monotonic()

    def unit(self, source: str, tally: Tally, budget: int | None) -> None:
        """Update a source after selecting from one of its units; `tally` has the totals so far."""
        began = self._began.setdefault(source, time.monotonic())
        seconds = time.monotonic() - began
        done = tally.train.tokens
        rate = done / seconds if seconds > 1 else None
        detail = f"{done:,} tokens of {tally.read.documents:,} documents"
        if rate:
            detail += f", {rate:,.0f} tokens/s"
            if budget and done < budget:
                detail += f", {timedelta(seconds=round((budget - done) / rate))} left"
        self._show(source, detail, min(done, budget) if budget else None, budget)

    def shards(self, count: int) -> None:
        """Start the display for `count` shards to be written."""
        self._show("shards", f"0 of {count}", 0, count)
        self._count = count
        self._written = 0

    def shard(self, shard: Shard) -> None:
        """Update the display after a shard is written."""
        self._written += 1
        self._show("shards", f"{self._written} of {self._count}", self._written, self._count)

    def _show(self, name: str, detail: str, done: int | None, total: int | None) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, detail="")
        self._bar.update(self._tasks[name], completed=done, detail=detail)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _SECONDS_OF_LINE:
            self._console.print(f"{name}: {detail}")
            self._last_line = now


@contextmanager
def build_progress(console: Console) -> Iterator[BuildProgress]:
    """Show a build's progress while the context is open."""
    progress = BuildProgress(console)
    with progress._bar:
        yield progress
