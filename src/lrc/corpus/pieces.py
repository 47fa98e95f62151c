"""Pieces of the input: parts of files that can be read independently, and their rows."""

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lrc.data.sources import cut_documents, open_parquet
from lrc.data.text_files import open_bytes, reading_errors
from lrc.system.errors import UserError
from lrc.system.limits import LONGEST_LINE

ROWS_AT_ONCE = 64
"""Table rows held in memory at once."""

UTF8_MARK = b"\xef\xbb\xbf"


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
    readers = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "dataset": _dataset}
    return readers[piece.kind](piece, columns)


def missing_field(where: str, field: str, fields: Any) -> UserError:
    """The error for a missing field."""
    names = ", ".join(map(str, fields)) or "none"
    return UserError(f"{where} has no field '{field}'; use one of its fields in the mix ({names}).")


def _text(piece: Piece, columns: set[str]) -> Iterator[TextRow]:
    with reading_errors(Path(piece.shown)), open(piece.path, "rb") as file:
        file.seek(piece.start)
        data = file.read(piece.end - piece.start)
        if not piece.start:
            data = data.removeprefix(UTF8_MARK)
        lines = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        for number, document in enumerate(cut_documents(lines)):
            yield TextRow(number, {"text": document})


def _jsonl(piece: Piece, columns: set[str]) -> Iterator[TextRow]:
    # Copies are uncompressed, whatever their names; compressed files are copied first.
    with reading_errors(Path(piece.shown)), open(piece.path, "rb") as file:
        file.seek(piece.start)
        left = piece.end - piece.start
        for number in itertools.count():
            line = file.readline(min(left, LONGEST_LINE))
            if not line:
                return
            left -= len(line)
            if not number and not piece.start:
                line = line.removeprefix(UTF8_MARK)
            if not line.isspace():
                yield _parse(number, line)


def _parse(number: int, line: bytes) -> TextRow:
    """Parse one line of JSON into a row."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        long = len(line) == LONGEST_LINE
        reason = f"longer than {LONGEST_LINE >> 20} MiB" if long else f"not valid JSON ({error})"
        return TextRow(number, None, reason)
    if not isinstance(fields, dict):
        return TextRow(number, None, f"not a JSON object but a {type(fields).__name__}")
    return TextRow(number, fields)


def _parquet(piece: Piece, columns: set[str]) -> Iterator[TextRow]:
    with open_parquet(piece.path) as file:
        wanted = _present(piece, columns, file.schema_arrow.names)
        groups = list(range(piece.start, piece.end))
        batches = file.iter_batches(ROWS_AT_ONCE, groups, wanted, use_threads=False)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from (TextRow(number, row) for number, row in enumerate(rows))


def _dataset(piece: Piece, columns: set[str]) -> Iterator[TextRow]:
    data = open_dataset(piece.path)
    data = data.select_columns(_present(piece, columns, data.column_names)).with_format(None)
    for start in range(piece.start, piece.end, ROWS_AT_ONCE):
        rows = data[start : min(start + ROWS_AT_ONCE, piece.end)]
        for number, values in enumerate(zip(*rows.values(), strict=True), start - piece.start):
            yield TextRow(number, dict(zip(rows, values, strict=True)))


def open_dataset(path: Path) -> Any:
    """Open a data set saved by `datasets`, or one of its Arrow files.

    Raises:
        UserError: if the data set cannot be read, or has several splits and none named `train`.
    """
    import datasets  # Slow to import, and most mixes do not need it.

    try:
        if path.is_file():
            return datasets.Dataset.from_file(str(path))
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The data set '{path}' cannot be read ({error}); save it again with `save_to_disk`."
        ) from error
    if not isinstance(data, datasets.DatasetDict):
        return data
    if "train" not in data:
        raise UserError(
            f"The data set '{path}' has no split 'train'; name one of its splits as a folder, "
            f"such as {path / next(iter(data), 'train')}."
        )
    return data["train"]


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
