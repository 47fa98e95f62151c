"""Pieces of the input: parts of files that can be read independently, and their rows."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lrc.data.rows import cut_documents, no_field, table_rows
from lrc.data.text_files import json_rows, open_bytes, reading_errors
from lrc.system.limits import LONGEST_LINE

missing_field = partial(no_field, fix="use one of its fields in the mix")
"""The error for a missing field."""


@dataclass(frozen=True)
class Piece:
    """A part of a file."""

    kind: Literal["text", "jsonl", "parquet", "dataset"]

    path: Path
    """The file to read."""

    start: int
    """First byte of text and JSONL, first row group of Parquet, first row of a data set."""

    end: int
    """End (exclusive), in the same unit as `start`."""

    shown: str
    """The file that the user knows, if `path` is a copy of a part of it."""

    first_row: int = 0
    """Number of the piece's first row in `path`; 0 for text and JSONL, where it is unknown."""


@dataclass(frozen=True)
class Unit:
    """What one process works on at a time; builds resume from the results of finished units."""

    source: int
    """Index of the source in the mix."""

    number: int
    """Number of the unit in its source."""

    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """File name stem of its result."""
        return f"{self.source:03d}-{self.number:07d}"


class TextRow(NamedTuple):
    """A row of a piece."""

    number: int
    """Number of the row in the piece, from 0."""

    fields: dict[str, Any] | None
    """Fields of the row; None if the row is malformed."""

    problem: str = ""
    """What is wrong with a malformed row."""


def read_rows(piece: Piece, columns: set[str]) -> Iterator[TextRow]:
    """Stream the rows of a piece.

    Args:
        piece: the piece to read.
        columns: the required fields; tables yield only these, JSONL yields all its fields, and
            text yields each document as field `text`.

    Raises:
        UserError: if the file cannot be read, is damaged or not UTF-8, or a table lacks a column.
    """
    if piece.kind == "text":
        yield from _text(piece)
    elif piece.kind == "jsonl":
        yield from _jsonl(piece)
    else:
        choose = partial(_present, piece, columns)
        rows = table_rows(piece.kind, piece.path, choose, piece.start, piece.end)
        yield from (TextRow(number, row) for number, row in enumerate(rows))


def _text(piece: Piece) -> Iterator[TextRow]:
    with reading_errors(Path(piece.shown)), open(piece.path, "rb") as file:
        file.seek(piece.start)
        data = io.BytesIO(file.read(piece.end - piece.start))
        lines = io.TextIOWrapper(data, "utf-8" if piece.start else "utf-8-sig")
        for number, document in enumerate(cut_documents(lines)):
            yield TextRow(number, {"text": document})


def _jsonl(piece: Piece) -> Iterator[TextRow]:
    # Copies are uncompressed, whatever their names; compressed files are copied first.
    with reading_errors(Path(piece.shown)), open(piece.path, "rb") as file:
        file.seek(piece.start)
        for number, fields, problem in json_rows(file, piece.end - piece.start):
            if not problem and not isinstance(fields, dict):
                problem = f"not a JSON object but a {type(fields).__name__}"
            yield TextRow(number, None if problem else fields, problem)


def _present(piece: Piece, columns: set[str], names: list[str]) -> list[str]:
    """The table columns that contain the fields (for nested fields, `meta` for `meta.language`)."""
    found = []
    for column in sorted(columns):
        head = column if column in names else column.partition(".")[0]
        if head not in names:
            raise missing_field(piece.shown, column, names)
        found.append(head)
    return sorted(set(found))


def line_ends(path: Path, size: int, kind: Literal["text", "jsonl"]) -> Iterator[tuple[int, int]]:
    """Cut a plain file into parts of about `size` bytes, at line ends (for text, at blank lines).

    Yields:
        Start and end of each part, in bytes.
    """
    length = path.stat().st_size
    start = 0
    with open_bytes(path) as file:
        while start < length:
            end = start + size
            if end < length:
                file.seek(end)
                for _ in rest_of_part(file, kind):
                    pass
                end = file.tell()
            yield start, min(end, length)
            start = end


def rest_of_part(file: Any, kind: Literal["text", "jsonl"]) -> Iterator[bytes]:
    """Read up to the next valid end of a part: a line end or, for text, the next blank line within
    64 KiB; if there is none, any boundary between two characters."""
    limit = LONGEST_LINE if kind == "jsonl" else 1 << 16
    line = file.readline(limit)
    yield line
    if kind == "jsonl":
        return
    read = len(line)
    while line and read < limit and not line.isspace():
        line = file.readline(limit - read)
        read += len(line)
        yield line
    if line and not line.endswith(b"\n"):
        # The cut is inside a line: read to the end of the character.
        while (following := file.peek(1)[:1]) and following[0] & 0xC0 == 0x80:
            yield file.read(1)
