"""What a person sees of a run while it goes: losses, rate and time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class StepProgress:
    """The bar of a training run; on anything but a terminal, a line at every `note`."""

    def __init__(self, console: Console, bar: Progress, steps: int, done: int) -> None:
        self._console = console
        self._bar = bar
        self._task = bar.add_task("", total=steps, completed=done)

    def step(self, losses: dict[str, float], tokens_per_second: float) -> None:
        """One step is done."""
        text = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self._bar.update(
            self._task, advance=1, description=f"{text}  {tokens_per_second:,.0f} tokens/s"
        )

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, highlight=False)


@contextmanager
def step_progress(console: Console, steps: int, done: int) -> Iterator[StepProgress]:
    """Show the progress of a run while the context is open."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield StepProgress(console, bar, steps, done)
