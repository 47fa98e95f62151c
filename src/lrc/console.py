"""The console: what people read, and what a program that reads it instead gets.

Everything printed is text: no markup or emoji codes are looked for, since paths, names and samples
are the user's. Tables never clip a number: where a terminal is too narrow they become lists, and
where the output is not a terminal, Markdown.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDEST = 10_000
"""Columns of a terminal on which any table has room."""


class TextConsole(Console):
    """A rich console that takes text as text, and goes on where nobody reads it any more."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; lines are not broken, and tables come whole."""
        shown = [self._whole(item) if isinstance(item, Table) else item for item in objects]
        if any(isinstance(item, Table) for item in shown):
            super().print(*shown, **options)
        else:
            super().print(*shown, **{"soft_wrap": True, **options})

    def on_broken_pipe(self) -> None:
        """Go on silently: a training must not end because its reader did."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

    def _whole(self, table: Table) -> Table | Text:
        if not self.is_terminal:
            return Text("\n".join(markdown_lines(table)))
        wide = self.options.update(max_width=WIDEST)
        if Measurement.get(self, wide, table).minimum <= self.width:
            return table
        return Text("\n".join(list_lines(table)))


def markdown_lines(table: Table) -> Iterator[str]:
    """A table in Markdown, columns padded to one width."""
    header, *rows = _cells(table)
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [column.justify == "right" for column in table.columns]

    def line(cells: list[str]) -> str:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    yield from _about(table.title)
    yield line(header)
    yield line(["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)])
    yield from (line(row) for row in rows)
    yield from _about(table.caption)


def list_lines(table: Table) -> Iterator[str]:
    """A table as a list: each row's first cell, and below it the others by their headers."""
    header, *rows = _cells(table)
    width = max(map(len, header[1:]), default=0)
    yield from _about(table.title)
    for first, *rest in rows:
        yield first
        for name, cell in zip(header[1:], rest, strict=True):
            if cell:
                yield f"  {name.ljust(width)}  {cell}"
    yield from _about(table.caption)


def _cells(table: Table) -> list[list[str]]:
    """Header and rows as text."""
    columns = [[column.header, *column.cells] for column in table.columns]
    return [[str(cell) for cell in row] for row in zip(*columns, strict=True)]


def _about(text: Any) -> list[str]:
    return [str(text)] if text else []


console = TextConsole()
"""Where the commands print."""


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours."""
    import logging

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
