"""What the console shows during a run: losses, rate and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

BAR = 20
"""Width of the bar in characters, if there is room."""

TIMES = len("step   0:00:00 left 0:00:00  ")
"""Width in characters of the columns other than the bar, the count and the losses."""


class StepProgress:
    """The progress bar of a training run. Without a terminal, only each `note` is printed."""

    def __init__(self, console: Console, bar: Progress, steps: int, done: int) -> None:
        self._console = console
        self._bar = bar
        self._room = console.width - TIMES - len(f"{steps}/{steps}") - bar_width(console)
        self._task = bar.add_task("", total=steps, completed=done)

    def step(self, losses: dict[str, float], tokens_per_second: float) -> None:
        """Advance by one step."""
        text = describe(losses, tokens_per_second, self._room)
        self._bar.update(self._task, advance=1, description=text)

    def note(self, text: str) -> None:
        """Print a line that stays, with the time left."""
        left = self._bar.tasks[0].time_remaining
        if left is not None:
            text = f"{text}; {timedelta(seconds=round(left))} left"
        self._console.print(text)


def describe(losses: dict[str, float], tokens_per_second: float, room: int) -> str:
    """Format losses and rate in at most `room` characters. The last losses are omitted first, then
    the rate. No number is cut."""
    rate = f"{tokens_per_second:,.0f} tokens/s"
    terms = [f"{name} {value:.3f}" for name, value in losses.items()]
    for kept in range(len(terms), -1, -1):
        text = "  ".join([*terms[:kept], rate])
        if len(text) <= room:
            return text
    return rate if len(rate) <= room else ""


def bar_width(console: Console) -> int:
    """Width of the bar in characters that leaves room for the other columns."""
    return BAR if console.width >= 100 else BAR // 2


@contextmanager
def phase(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done. On a terminal, the line disappears at the end.

    Yields:
        A function that shows a progress detail, on a terminal only.
    """
    if not console.is_terminal:
        console.print(text)
    with console.status(Text(text)) as status:
        yield lambda detail: status.update(Text(f"{text}: {detail}"))


@contextmanager
def step_progress(console: Console, steps: int, done: int) -> Iterator[StepProgress]:
    """Show the progress of a run while the context is open."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=bar_width(console)),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield StepProgress(console, bar, steps, done)
