"""Read plain or compressed text files, and report every read failure to the user."""

import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import zstandard

from lrc.system.errors import UserError, reason
from lrc.system.limits import LONGEST_LINE

COMPRESSED_SUFFIXES = (".gz", ".zst")
"""Suffixes of the compressed files that `open_text` decompresses."""

UTF8_MARK = b"\xef\xbb\xbf"
"""The byte order mark, which may begin a file and is not text."""


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file as UTF-8 text, decompressed if its name ends in .gz or .zst.

    Raises:
        UserError: if the file cannot be opened, or is found to be damaged, cut off or not UTF-8
            while it is read.
    """
    # "-sig": a byte order mark is not text.
    with (
        reading_errors(path),
        open_bytes(path) as data,
        io.TextIOWrapper(data, encoding="utf-8-sig") as text,
    ):
        yield text


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file as bytes, decompressed if its name ends in .gz or .zst; seek only in other files.

    Raises:
        UserError: if the file cannot be opened, or is found to be damaged or cut off while it is
            read.
    """
    with reading_errors(path), open(path, "rb") as raw:
        yield cast(BinaryIO, _decompressed(raw, path))


def json_lines(path: Path, fix: str = "give one JSON object per line") -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with their line numbers, from 1; blank lines are skipped. The file
    is decompressed if its name ends in .gz or .zst.

    Args:
        path: the file.
        fix: what to do about an invalid line, as the end of a sentence.

    Raises:
        UserError: if the file cannot be read, or a line is not JSON or is too long.
    """
    with open_bytes(path) as file:
        for number, value, problem in json_rows(file):
            if problem:
                raise UserError(f"{path}:{number + 1} is {problem}; {fix}.")
            yield number + 1, value


def json_rows(file: BinaryIO, size: int = sys.maxsize) -> Iterator[tuple[int, Any, str]]:
    """The values of the lines of a JSONL file; blank lines are skipped.

    Args:
        file: the file, at the start of a line.
        size: number of bytes to read.

    Yields:
        The line's number from 0, its value, and what is wrong with it: empty if nothing is.
    """
    for number in itertools.count():
        line = file.readline(min(size, LONGEST_LINE))
        if not line:
            return
        size -= len(line)
        line = line if number else line.removeprefix(UTF8_MARK)
        if line.isspace():
            continue
        value, problem = None, ""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            long = len(line) == LONGEST_LINE
            problem = f"longer than {LONGEST_LINE >> 20} MiB" if long else reason(error)
        yield number, value, problem


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn every failure to read a text file into a readable message.

    Raises:
        UserError: if the file cannot be read, is damaged, cut off or not UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; convert it to UTF-8 first.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); compress it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); check the file.") from error


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedReader | gzip.GzipFile:
    if path.name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(raw), buffer_size=1 << 18)
    return raw


class _ZstdFrames(io.RawIOBase):
    """Decompresses all frames of a .zst file.

    `zstandard.open` stops after the first frame and accepts a truncated file as complete. Either
    would silently train on only part of the text.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._compressed or self._raw.read(1 << 16)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame is None:
                # The largest window, which `zstd --long=31` needs.
                decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                self._frame = decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
