"""Progress display of an evaluation: tasks, answers, rate and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

Progress = Callable[[int, int], None]
"""Called with the finished count and the total."""

LINE_SECONDS = 30.0
"""Seconds between two progress lines if the output is not a terminal."""


@contextmanager
def task_progress(console: Console, text: str) -> Iterator[Progress]:
    """Show the progress of one task while the context is open.

    A terminal shows a bar; any other output gets a line now and then.

    Args:
        console: the console.
        text: the task.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    terminal = console.is_terminal
    started = last = time.perf_counter()
    with Bar(*columns, console=console, disable=not terminal, transient=True) as bar:
        task = bar.add_task(text, total=None, rate="")

        def show(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            rate = done / (now - started)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f}/s")
            # The answers of a batch arrive all at once, so the first few give no rate.
            if not terminal and now - last > LINE_SECONDS:
                last = now
                line = f"{text}: {done:,} of {total:,}"
                if done > total // 50:
                    left = timedelta(seconds=round((total - done) / rate))
                    line += f", {rate:.1f}/s, {left} left"
                console.print(line)

        yield show
