"""The console: what people read, and what a program that captures the output gets.

Everything printed is plain text. Paths, names and samples come from the user, so markup and emoji
codes in them mean nothing. Tables never clip a number: they become lists if the terminal is too
narrow, and Markdown if the output is not a terminal.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lrc.system.tables import Table

INTERRUPTED = 130
"""Exit code after Ctrl-C outside training."""

NOWHERE = io.StringIO()
"""Stand-in for standard output in a process that was started without one."""


class Output:
    """Standard output for the console.

    If it can no longer be written (a pipe whose reader has ended, a full disk), what is printed is
    lost, but nothing fails.
    """

    def __init__(self) -> None:
        self.problem: OSError | None = None
        """Why output was lost; None if none was, or only because nobody reads it."""
        self.results: Any = None
        """Where results go, while everything else goes to standard error; None: all goes to
        standard output."""

    def write(self, text: str) -> int:
        """Write to the current standard output."""
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush standard output."""
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, do: Callable[[Any], object]) -> None:
        try:
            do(self._stream())
        except BrokenPipeError:
            self._to_nowhere()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if isinstance(error, OSError):
                self.problem = error
            self._to_nowhere()

    def _stream(self) -> Any:
        # While a bar is shown, rich replaces standard output with its own stream. In a process
        # started without standard output, Python has none either.
        stream = sys.stdout if self.results is None else sys.stderr
        return getattr(stream, "rich_proxied_file", stream) or NOWHERE

    def _to_nowhere(self) -> None:
        """Discard the rest of the output, including what Python flushes at exit."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream().fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)


class TextConsole(Console):
    """A rich console that prints plain text, and continues after its reader has ended."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **{"markup": False, "emoji": False, "highlight": False, "file": Output(), **options}
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, but also our tables, and without breaking lines."""
        shown = [self._whole(item) if isinstance(item, Table) else item for item in objects]
        if any(isinstance(item, RichTable) for item in shown):
            super().print(*shown, **options)
        else:
            super().print(*shown, **{"soft_wrap": True, **options})

    @property
    def as_json(self) -> bool:
        """Whether results are JSON on standard output, and all else goes to standard error."""
        return isinstance(self.file, Output) and self.file.results is not None

    @as_json.setter
    def as_json(self, wanted: bool) -> None:
        if isinstance(self.file, Output):
            self.file.results = (sys.stdout or NOWHERE) if wanted else None

    def result(self, data: Any, *shown: Any) -> None:
        """Print the result of a command.

        Args:
            data: JSON values, for programs (`--json`).
            shown: the same for people.
        """
        if self.as_json:
            assert isinstance(self.file, Output)
            with redirect_stdout(self.file.results):
                self.as_json = False
                self.print(json.dumps(data, indent=2))
        else:
            for item in shown:
                self.print(item)

    def _whole(self, table: Table) -> RichTable | Text:
        """A table in a form that clips nothing."""
        if not self.is_terminal:
            return Text("\n".join(markdown_lines(table)))
        widths = column_widths([table.header, *table.rows], self.width)
        if widths is None:
            return Text("\n".join(list_lines(table)))
        shown = RichTable(
            title=table.title or None, caption=table.caption or None, caption_justify="left"
        )
        for column, (name, width) in enumerate(zip(table.header, widths, strict=True)):
            justify: Literal["left", "right"] = "right" if column in table.right else "left"
            shown.add_column(name, width=width, justify=justify)
        for row in table.rows:
            shown.add_row(*row)
        return shown


def column_widths(rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Compute widths of a table's columns so that no word is cut.

    Columns are as wide as their longest line if there is room. Otherwise they wrap between words.

    Args:
        rows: header and rows.
        width: width of the terminal in characters.

    Returns:
        The widths without padding and lines; None if the longest words do not fit.
    """
    columns = list(zip(*rows, strict=True))
    least = [_longest(text.split() for text in cells) for cells in columns]
    whole = [_longest(text.split("\n") for text in cells) for cells in columns]
    room = width - 3 * len(columns) - 1 - sum(least)
    if room < 0:
        return None
    widths = []
    for narrow, wide in zip(least, whole, strict=True):
        more = min(room, max(wide - narrow, 0))
        widths.append(narrow + more)
        room -= more
    return widths


def _longest(texts: Iterable[Sequence[str]]) -> int:
    return max((cell_len(part) for parts in texts for part in parts), default=0)


def markdown_lines(table: Table) -> Iterator[str]:
    """Format a table as Markdown, each column padded to one width."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table.rows]
    widths = [max(3, *map(len, column)) for column in zip(table.header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.rjust(width) if column in table.right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rules = ["-" * (w - 1) + (":" if n in table.right else "-") for n, w in enumerate(widths)]
    yield from filter(None, [table.title])
    yield line(table.header)
    yield line(rules)
    yield from (line(row) for row in rows)
    yield from filter(None, [table.caption])


def list_lines(table: Table) -> Iterator[str]:
    """Format a table as a list: each row's first cell, and below it the others with headers."""
    width = max(map(len, table.header[1:]), default=0)
    yield from filter(None, [table.title])
    for first, *rest in table.rows:
        yield first
        for name, cell in zip(table.header[1:], rest, strict=True):
            if cell:
                yield f"  {name.ljust(width)}  {cell}"
    yield from filter(None, [table.caption])


console = TextConsole()
"""Where the commands print."""


def lost_output() -> OSError | None:
    """Why some printed output could not be written; None if nothing was lost."""
    return console.file.problem if isinstance(console.file, Output) else None


def quiet_libraries() -> None:
    """Silence the progress bars and notices of other libraries."""
    import logging
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
