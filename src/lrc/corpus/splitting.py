"""Divide the sources of a mix into units that processes work on independently.

The units of a source do not depend on the number of processes. A unit of a source with random
access (plain JSONL and text, Parquet, data sets on disk) only names the part to read. Other sources
(compressed files, streamed hub data sets) are read once by the main process, which copies them to
disk in parts for the other processes. A copied part is removed as soon as its unit is done.
Decompression runs at about 200 MB per second, fifty times as fast as one core tokenizes.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from lrc.corpus import hub
from lrc.corpus.draw import draw
from lrc.corpus.mix import Mix, Source
from lrc.corpus.pieces import Piece, Unit, line_ends, rest_of_part
from lrc.data import stdlib_docs
from lrc.data.rows import open_dataset, open_parquet
from lrc.data.sources import STDLIB_DOCS, TextSource, expand_sources
from lrc.data.text_files import COMPRESSED_SUFFIXES, open_bytes, reading_errors
from lrc.system.files import new_file, write_text

UNIT_BYTES = 1 << 24
"""Approximate bytes of text per unit: four million tokens, a few seconds on one core."""


Item = TypeVar("Item")

TextKind = Literal["text", "jsonl"]

Sized = tuple[Piece, int]
"""A piece and its bytes of text (an estimate for tables)."""


def local_files(mix: Mix, source: Source) -> list[str]:
    """The paths and patterns of a source, relative to the mix's root; `stdlib-docs` unchanged."""
    return [name if name == STDLIB_DOCS else str(mix.path(name)) for name in source.files]


class Splitter:
    """Yields the units of one source, in order.

    Args:
        mix: the mix.
        index: index of the source in the mix.
        columns: required fields of tables.
        copies: folder of the copied parts.
        is_done: predicate for whether a unit, given by name, has a result; nothing is copied for
            such a unit.
    """

    def __init__(
        self,
        mix: Mix,
        index: int,
        columns: set[str],
        copies: Path,
        is_done: Callable[[str], bool],
    ) -> None:
        self._mix = mix
        self._index = index
        self._source: Source = list(mix.sources.values())[index]
        self._columns = columns
        self._copies = copies
        self._is_done = is_done
        self._number = 0
        self._copied = 0

    def units(self) -> Iterator[Unit]:
        """The units; each has about UNIT_BYTES, and small files share one unit."""
        if self._source.hub is not None:
            yield from self._hub_units(self._source.hub)
            return
        sources = self._in_order(expand_sources(local_files(self._mix, self._source)))
        yield from self._grouped(piece for source in sources for piece in self._file(source))

    def _grouped(self, pieces: Iterable[Sized]) -> Iterator[Unit]:
        """Group pieces into units."""
        group: list[Piece] = []
        size = 0
        for piece, piece_size in pieces:
            group.append(piece)
            size += piece_size
            if size >= UNIT_BYTES:
                yield self._unit(group)
                group, size = [], 0
        if group:
            yield self._unit(group)

    def _unit(self, pieces: list[Piece]) -> Unit:
        """Make the next unit."""
        unit = Unit(self._index, self._number, tuple(pieces))
        self._number += 1
        return unit

    def _file(self, source: TextSource) -> Iterator[Sized]:
        """The pieces of a file or of a data set on disk."""
        kind, path = source
        if kind == "stdlib":
            rows = ({"text": document} for document in stdlib_docs.documents())
            for part in _lines(rows):
                yield self._copy(part, "jsonl", "stdlib-docs"), len(part)
        elif kind == "dataset":
            yield from _row_ranges(path, str(path))
        elif kind == "parquet":
            yield from _row_groups(path)
        elif path.name.lower().endswith(COMPRESSED_SUFFIXES):
            with open_bytes(path) as file:
                for part in iter(lambda: _read_part(file, kind), b""):
                    yield self._copy(part, kind, str(path)), len(part)
        else:
            with reading_errors(path):
                for start, end in line_ends(path, UNIT_BYTES, kind):
                    yield Piece(kind, path, start, end, str(path)), end - start

    def _hub_units(self, name: str) -> Iterator[Unit]:
        """The units of a hub data set."""
        data = hub.load(self._source, self._columns)
        files = hub.arrow_files(data)
        if files is not None:
            tables = self._in_order(files)
            yield from self._grouped(piece for file in tables for piece in _row_ranges(file, name))
            return
        parts = self._in_order(hub.parts(data))
        # A streamed data set continues where the last finished unit ended, without rereading
        # earlier data.
        number, state = 0, None
        while self._is_done(self._name()) and self._state_file(self._number).is_file():
            number, state = json.loads(self._state_file(self._number).read_text())
            yield self._unit([Piece("jsonl", self._copies / self._name(), 0, 0, name)])
        for i, part in enumerate(parts[number:], start=number):
            rows = part()
            if state:
                rows.load_state_dict(state)
                state = None
            for lines in _lines(iter(rows)):
                piece = self._copy(lines, "jsonl", name)
                if hasattr(rows, "state_dict"):
                    mark = json.dumps([i, rows.state_dict()])
                    write_text(self._state_file(self._number), mark)
                yield self._unit([piece])

    def _in_order(self, files: list[Item]) -> list[Item]:
        """Files in the given order, or in an order drawn from the seed."""
        if not self._source.shuffle_files:
            return files
        drawn = draw(np.arange(len(files), dtype=np.uint64), self._mix.seed, again=2 + self._index)
        return [files[i] for i in np.argsort(drawn, kind="stable").tolist()]

    def _name(self) -> str:
        return Unit(self._index, self._number, ()).name

    def _state_file(self, number: int) -> Path:
        """Path of a streamed data set's state after a unit."""
        return self._copies / f"{Unit(self._index, number, ()).name}.state.json"

    def _copy(self, part: bytes, kind: TextKind, shown: str) -> Piece:
        """Write a part to disk, if its unit has no result yet."""
        path = self._copies / f"{self._index:03d}-part-{self._copied:07d}"
        self._copied += 1
        if not self._is_done(self._name()):
            with new_file(path) as temporary:
                temporary.write_bytes(part)
        return Piece(kind, path, 0, len(part), shown)


def _row_groups(path: Path) -> Iterator[Sized]:
    """The row groups of a Parquet file."""
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    row = start = rows = size = 0
    for end, (group_rows, group_size) in enumerate(sizes, start=1):
        rows += group_rows
        size += group_size
        if size >= UNIT_BYTES or end == len(sizes):
            yield Piece("parquet", path, start, end, str(path), row), size
            row, start, rows, size = row + rows, end, 0, 0


def _row_ranges(path: Path, shown: str) -> Iterator[Sized]:
    """Row ranges of a data set on disk."""
    data = open_dataset(path)
    row_size = max(1, data.data.nbytes // max(1, len(data)))
    step = max(1, UNIT_BYTES // row_size)
    for start in range(0, len(data), step):
        end = min(start + step, len(data))
        yield Piece("dataset", path, start, end, shown, start), (end - start) * row_size


def _lines(rows: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    """Rows as JSON lines, in parts of about UNIT_BYTES."""
    lines: list[bytes] = []
    size = 0
    for row in rows:
        # Values that JSON cannot represent (dates, bytes) become text; no filter needs them.
        line = json.dumps(row, default=str).encode() + b"\n"
        lines.append(line)
        size += len(line)
        if size >= UNIT_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _read_part(file: Any, kind: TextKind) -> bytes:
    """The next UNIT_BYTES of a file, extended to a valid end of a part; empty at end of file."""
    part = file.read(UNIT_BYTES)
    return b"".join([part, *rest_of_part(file, kind)]) if part else b""
