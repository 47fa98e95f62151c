"""Progress of a running build: tokens, rate, share of the budget, time left."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lrc.corpus.selection import Tally
from lrc.data.shards import Shard
from lrc.system.progress import Task, task

WRITING = "Writing shards"


class BuildProgress:
    """Shows the progress of a build: a task for each source, and one for the shards."""

    def __init__(self, open_tasks: ExitStack) -> None:
        self._open = open_tasks
        self._tasks: dict[str, Task] = {}

    def unit(self, source: str, tally: Tally, budget: int | None) -> None:
        """Update a source after selecting from one of its units; `tally` has the totals so far."""
        detail = f"{tally.read.documents:,} documents read"
        self._task(f"Reading {source}", budget, "tokens").update(tally.train.tokens, detail=detail)

    def shards(self, count: int) -> None:
        """Start the display for `count` shards to be written."""
        self._task(WRITING, count)

    def shard(self, shard: Shard) -> None:
        """Update the display after a shard is written."""
        self._tasks[WRITING].update(self._tasks[WRITING].done + 1)

    def _task(self, name: str, total: int | None, unit: str = "") -> Task:
        if name not in self._tasks:
            self._tasks[name] = self._open.enter_context(task(name, total, unit=unit))
        return self._tasks[name]


@contextmanager
def build_progress() -> Iterator[BuildProgress]:
    """Show a build's progress while the context is open."""
    with ExitStack() as open_tasks:
        yield BuildProgress(open_tasks)
