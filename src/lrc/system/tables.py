"""Tables of text, independent of where they are shown."""

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass
class Table:
    """A header, rows of as many cells, and text around them."""

    header: list[str]
    title: str = ""
    caption: str = ""
    right: Collection[int] = ()
    """Columns of numbers, which are aligned on the right."""
    rows: list[list[str]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Add a row.

        Raises:
            ValueError: if the number of cells is not that of the header.
        """
        if len(cells) != len(self.header):
            raise ValueError(f"{len(cells)} cells for {len(self.header)} columns")
        self.rows.append(list(cells))


def size(number: float) -> str:
    """Bytes for people, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
