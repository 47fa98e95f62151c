"""Rows of tables on disk and documents of text files, in bounded memory.

Training text (`sources`) reads whole files; `lrc data build` (`corpus.pieces`) reads parts of them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from lrc.system.errors import UserError

DOCUMENT_CHARACTERS = 4_000
"""A text file is cut into documents at the first blank line after this many characters."""

LONGEST_PIECE = 16_000
"""Characters after which a text file without blank lines is cut at the end of a line."""

ROWS_AT_ONCE = 64
"""Table rows held in memory at once."""


def cut_documents(file: TextIO) -> Iterator[str]:
    """Cut text into documents as described in `read_documents`; some may be empty."""
    piece: list[str] = []
    size = 0
    # Reads are bounded: a file may be a single line of many gigabytes.
    for line in iter(lambda: file.readline(LONGEST_PIECE), ""):
        if size >= LONGEST_PIECE or (size >= DOCUMENT_CHARACTERS and line.isspace()):
            yield "".join(piece).strip()
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    yield "".join(piece).strip()


def table_rows(
    kind: Literal["parquet", "dataset"],
    path: Path,
    columns: Callable[[list[str]], list[str]],
    start: int = 0,
    end: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file or of a data set on disk, by column.

    Args:
        kind: what the path is.
        path: the table; of a data set, also one of its Arrow files.
        columns: chooses the columns to read from the names of all.
        start: first row group of a Parquet file, first row of a data set.
        end: end (exclusive), in the same unit; None: the table's.

    Raises:
        UserError: if the table cannot be read, or has several splits and none named `train`.
    """
    if kind == "parquet":
        with open_parquet(path) as file:
            groups = range(start, file.num_row_groups if end is None else end)
            chosen = columns(file.schema_arrow.names)
            for batch in file.iter_batches(ROWS_AT_ONCE, groups, chosen, use_threads=False):
                yield from batch.to_pylist()
        return
    data = open_dataset(path)
    data = data.select_columns(columns(data.column_names)).with_format(None)
    end = len(data) if end is None else end
    for first in range(start, end, ROWS_AT_ONCE):
        rows = data[first : min(first + ROWS_AT_ONCE, end)]
        yield from (dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True))


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file (a `pyarrow.parquet.ParquetFile`).

    Raises:
        UserError: if the file cannot be opened, or is found to be damaged while it is read.
    """
    import pyarrow  # Slow to import, and most recipes do not need it.
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); check it or download it again."
        ) from error


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


def no_field(
    where: str,
    field: str,
    fields: Iterable[str],
    fix: str = "set data.text_field to one of its fields",
) -> UserError:
    """The error for a missing field; it lists the fields that exist."""
    return UserError(
        f"{where} has no field '{field}'; {fix} ({', '.join(map(str, fields)) or 'none'})."
    )
