"""Text sources: files, folders, data sets on disk, or Python's own documentation.

Everything is streamed: no source is held in memory, whatever its size. A source that cannot be read
in full is an error; it never silently yields less text.
"""

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lrc.data import stdlib_docs
from lrc.data.rows import cut_documents, no_field, table_rows
from lrc.data.text_files import COMPRESSED_SUFFIXES, json_lines, open_text
from lrc.system.errors import UserError

STDLIB_DOCS = "stdlib-docs"
"""The source that reads Python's own documentation."""

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIX = ".parquet"

_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json")

_EVALUATION = re.compile(
    r"((testing|eval|evaluation)|(.*[-_.])?(test|validation|valid|val|dev))([-_.]?v?\d.*)?"
)
"""Names, without suffixes, of data set files and folders that must not be trained on."""

_ABOUT = ("readme", "license", "licence", "changelog", "contributing", "citation")
"""Names, without suffixes, of files that describe a data set and are not part of its text."""


NAMED_FILES = 5
"""Largest number of files to list by name."""


class SourceFile(NamedTuple):
    """A file that text is read from, in its current state on disk."""

    path: str
    size: int
    mtime_ns: int


class TextSource(NamedTuple):
    """A file, a data set on disk or a built-in source, and how it is read."""

    kind: Literal["text", "jsonl", "parquet", "dataset", "stdlib"]
    path: Path


def source_files(sources: Sequence[str], held_out: bool = False) -> list[SourceFile]:
    """The files behind the sources, in reading order: absolute path, bytes, modification time [ns].

    Args:
        sources: as for `read_documents`.
        held_out: as for `read_documents`.

    Raises:
        UserError: if a source does not exist, has an unknown type, or is an empty folder.
    """
    files: list[SourceFile] = []
    for kind, path in expand_sources(sources, held_out):
        if kind == "stdlib":
            paths = stdlib_docs.source_files()
        elif kind == "dataset":
            # Other uses of the data set create and delete `cache-*` files, which contain no text.
            found = (f for f in path.rglob("*") if f.is_file() and not f.name.startswith("cache-"))
            paths = sorted(found)
        else:
            paths = [path]
        for file in paths:
            try:
                files.append(state_of(file))
            except OSError as error:
                raise UserError(f"{file} cannot be read ({error.strerror}); fix it.") from error
    return files


def state_of(path: Path) -> SourceFile:
    """A file in its current state."""
    state = path.stat()
    return SourceFile(str(path.resolve()), state.st_size, state.st_mtime_ns)


def read_documents(
    sources: Sequence[str], text_field: str, held_out: bool = False
) -> Iterator[str]:
    """Stream the documents of all sources, one after another; blank documents are skipped.

    - Text files (.txt, .md, .rst), plain or compressed (.gz, .zst), are cut at blank lines into
      documents of roughly 4,000 characters, so that a single large file can be split into training
      and held-out text. Text without blank lines is cut at the end of a line after 16,000
      characters. A single line longer than that is cut inside.
    - JSONL files (.jsonl, .json with one object per line), plain or compressed: field `text_field`.
    - Parquet files (.parquet): column `text_field`.
    - Folders: all such files and data sets in them, sorted by name, folder by folder. Hidden files,
      other file types, and the files that `left_out` lists are skipped.
    - Data sets saved by `datasets` (`save_to_disk`): column `text_field`, split `train`.
    - `stdlib-docs`: see `lrc.data.stdlib_docs`.

    Args:
        sources: files, folders, patterns, or `stdlib-docs`.
        text_field: field or column of the text.
        held_out: whether the text is held out; if so, folders include their test and validation
            files.

    Raises:
        UserError: immediately, if a source does not exist or has an unknown type; while reading,
            if a file is not UTF-8 or is damaged, or a row has no text.
    """
    return _read_all(expand_sources(sources, held_out), text_field)


def _read_all(sources: Iterable[TextSource], text_field: str) -> Iterator[str]:
    for kind, path in sources:
        if kind == "stdlib":
            documents = stdlib_docs.documents()
        elif kind == "jsonl":
            documents = _read_jsonl(path, text_field)
        elif kind == "text":
            documents = _read_text(path)
        else:
            documents = _read_table(kind, path, text_field)
        yield from (document for document in documents if not document.isspace() and document)


def expand_sources(sources: Sequence[str], held_out: bool = False) -> list[TextSource]:
    """Expand sources into files and data sets: search folders and match patterns (`*.jsonl`).

    The arguments are those of `read_documents`.

    Raises:
        UserError: if a source does not exist, has an unknown type, or is an empty folder.
    """
    expanded: list[TextSource] = []
    for source in sources:
        if not source:
            raise UserError("A source of text is empty: give a file or a folder.")
        path = Path(source).expanduser()
        if source == STDLIB_DOCS:
            expanded.append(TextSource("stdlib", path))
        elif not path.exists() and (matches := _matches(source, path)):
            kept = [match for match in matches if not _is_no_text(Path(match), held_out)]
            if not kept:
                raise UserError(
                    f"'{source}' matches only what is left out of training text, such as "
                    f"{Path(matches[0]).name}: to read a file anyway, name it."
                )
            expanded.extend(expand_sources(kept, held_out))
        elif not path.exists():
            raise UserError(
                f"There is no file or folder '{source}'; give text, JSONL or Parquet files, "
                f"folders of these, data sets saved with `save_to_disk`, or {STDLIB_DOCS}."
            )
        else:
            try:
                found = list(_expand(path, held_out))
            except OSError as error:
                raise UserError(f"'{source}' cannot be read ({error}); fix it.") from error
            if not found and path.is_dir() and (skipped := list(_left_out(path))):
                raise UserError(
                    f"The folder '{source}' holds only what is left out of training text, such as "
                    f"{skipped[0].name}: to read a file anyway, name it."
                )
            if not found:
                what = "The folder" if path.is_dir() else "The file"
                raise UserError(f"{what} '{source}' contains no readable text; {_accepted()}.")
            expanded.extend(found)
    return expanded


def _matches(source: str, path: Path) -> list[str]:
    """The paths that a pattern matches; none if the source is not a pattern."""
    return sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(source) else []


def left_out(sources: Sequence[str]) -> list[Path]:
    """Readable files and folders that source folders and patterns skip: those named after a test or
    validation split, and those that describe the data (README.md). A source that names such a file
    directly reads it."""
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if source != STDLIB_DOCS and path.is_dir():
            found.extend(_left_out(path))
        elif not path.exists():
            matches = map(Path, _matches(source, path))
            found.extend(one for one in matches if _is_no_text(one, False))
    return found


def left_out_note(sources: Sequence[str], setting: str) -> str | None:
    """A sentence about what `left_out` lists; None if nothing is.

    Args:
        sources: as for `left_out`.
        setting: the setting that names the sources.
    """
    if not (skipped := left_out(sources)):
        return None
    return (
        "Left out, because they are test or validation splits or not training text: "
        f"{listed(skipped)}. To read one anyway, name it in {setting}."
    )


def listed(paths: Iterable[Path]) -> str:
    """The first few paths, and the number of the others."""
    every = [str(path) for path in paths]
    more = len(every) - NAMED_FILES
    return ", ".join(every[:NAMED_FILES]) + (f" and {more} more" if more > 0 else "")


def _left_out(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    if any((folder / mark).is_file() for mark in _DATASET_MARKS) or folder.resolve() in above:
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if _is_no_text(entry, False):
            if entry.is_dir() or any(_expand(entry, True)):
                yield entry
        elif entry.is_dir():
            yield from _left_out(entry, (*above, folder.resolve()))


def _is_no_text(path: Path, held_out: bool) -> bool:
    """Whether a file or folder describes the data or, for training text, is named after a split
    that must not be trained on."""
    stem = path.name.lower()
    for suffix in (*COMPRESSED_SUFFIXES, *TEXT_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX):
        stem = stem.removesuffix(suffix)
    return stem in _ABOUT or (not held_out and bool(_EVALUATION.fullmatch(stem)))


def _accepted() -> str:
    plain = ", ".join((*TEXT_SUFFIXES, *JSONL_SUFFIXES))
    compressed = " or ".join(COMPRESSED_SUFFIXES)
    return f"give files that end in {plain}, with or without {compressed}, or in {PARQUET_SUFFIX}"


def _expand(path: Path, held_out: bool, above: tuple[Path, ...] = ()) -> Iterator[TextSource]:
    """The sources in a file or folder; `above` lists the parent folders, to detect loops."""
    if path.is_dir():
        if any((path / mark).is_file() for mark in _DATASET_MARKS):
            yield TextSource("dataset", path)
        elif path.resolve() not in above:
            for entry in sorted(path.iterdir()):
                if not entry.name.startswith(".") and not _is_no_text(entry, held_out):
                    yield from _expand(entry, held_out, (*above, path.resolve()))
        return
    if not path.is_file():
        return  # Reading a pipe would block; a broken link cannot be read.
    name = path.name.lower()
    if name.endswith(PARQUET_SUFFIX):
        yield TextSource("parquet", path)
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    if name.endswith(TEXT_SUFFIXES):
        yield TextSource("text", path)
    elif name.endswith(JSONL_SUFFIXES):
        yield TextSource("jsonl", path)


def _read_text(path: Path) -> Iterator[str]:
    """Documents of a text file, cut as described in `read_documents`."""
    with open_text(path) as file:
        yield from cut_documents(file)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    """The field `text_field` of every line."""
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a JSON object; give one object per line.")
        if text_field not in row:
            raise no_field(f"{path}:{number}", text_field, row)
        yield as_utf8(text_of(row[text_field], f"{path}:{number}", text_field))


def _read_table(kind: Literal["parquet", "dataset"], path: Path, text_field: str) -> Iterator[str]:
    """The column `text_field` of a table."""
    where = f"The data set '{path}'" if kind == "dataset" else str(path)

    def column(names: list[str]) -> list[str]:
        if text_field not in names:
            raise no_field(where, text_field, names)
        return [text_field]

    for row in table_rows(kind, path, column):
        yield text_of(row[text_field], where, text_field)


def as_utf8(text: str) -> str:
    """A text without unpaired surrogates, which JSON can contain and no tokenizer accepts: they
    become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_of(value: Any, where: str, text_field: str) -> str:
    """The text of a field; an empty field (null) is an empty text.

    Args:
        value: the value of the field.
        where: the file or data set, as the start of a sentence.
        text_field: the name of the field.

    Raises:
        UserError: if the value is not text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where} has type {type(value).__name__} in '{text_field}' instead of text; set "
            "data.text_field to a text field."
        )
    return value
