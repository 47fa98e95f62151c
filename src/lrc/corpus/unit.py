"""Process a unit: read, filter, tokenize, and write the result to disk.

A result is two files: NAME.bin (the token ids of the documents that passed, end to end) and
NAME.npz (their lengths, splits, signatures, and the counts), which is written last. A unit with a
NAME.npz is done and is never processed again.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrc.corpus import filters
from lrc.corpus.chat import Malformed, messages_of, render
from lrc.corpus.duplicates import band_keys
from lrc.corpus.overlap import OverlapIndex
from lrc.corpus.pieces import Piece, Unit, missing_field, read_rows
from lrc.corpus.tokenize import Tokenizer
from lrc.corpus.words import Hashes, Words, hash_words
from lrc.corpus.workspace import BuildPlan, Workspace
from lrc.data.identity import HASH_RANGE, text_hash
from lrc.data.sources import as_utf8
from lrc.system.errors import UserError
from lrc.system.files import new_file

BATCH_CHARACTERS = 1 << 18
"""Characters hashed and tokenized at once; more is slower, because it exceeds the CPU caches."""

SHOWN_BAD_ROWS = 5


@dataclass
class Count:
    """Counts of documents, characters and tokens; tokens are known only after tokenizing."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0

    def add(self, documents: int, characters: int, tokens: int = 0) -> None:
        """Add to the counts."""
        self.documents += documents
        self.characters += characters
        self.tokens += tokens


@dataclass
class Report:
    """What happened to a unit's rows."""

    rows: list[int] = field(default_factory=list)
    """Number of rows of each piece (lines, for JSONL)."""

    read: Count = field(default_factory=Count)
    """All rows read."""

    dropped: dict[str, Count] = field(default_factory=dict)
    """What each filter dropped, by the summary's name for the filter."""

    divided: int = 0
    """Documents added by splitting long documents."""

    bad: list[tuple[int, int, str]] = field(default_factory=list)
    """The first malformed rows: index of the piece, row in the piece from 0, what is wrong."""

    overlaps: list[tuple[int, int, str, str, str]] = field(default_factory=list)
    """Documents that overlap evaluation sets: piece, row, the set, the shared words, and the start
    of the document."""

    def drop(self, step: str, characters: int, tokens: int = 0) -> None:
        """Count a document that a filter dropped."""
        self.dropped.setdefault(step, Count()).add(1, characters, tokens)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Load a report from its JSON text."""
        values = json.loads(text)
        values["read"] = Count(**values["read"])
        values["dropped"] = {name: Count(**count) for name, count in values["dropped"].items()}
        return cls(**values)


@dataclass(frozen=True)
class Result:
    """The documents of a unit that passed."""

    lengths: NDArray[np.int64]
    """Tokens of each document, including bos and eos, [documents]."""

    characters: NDArray[np.int64]
    """Characters of each document, [documents]."""

    held_out: NDArray[np.bool_]
    """Whether each document is held out, determined by its content, [documents]."""

    keys: Hashes
    """Keys of each document's signature, [documents, bands]; no bands if duplicates are kept."""

    report: Report


@dataclass(frozen=True)
class _Document:
    piece: int
    row: int
    text: str
    held_out: bool


def process_unit(folder: Path, unit: Unit) -> None:
    """Write the result of a unit, in a pool process.

    Args:
        folder: the build's workspace.
        unit: the unit to process.

    Raises:
        UserError: if the input cannot be read or lacks a field, or the disk is full.
    """
    _worker(folder).process(unit)


def read_result(space: Workspace, unit: Unit) -> Result:
    """Read the result of a finished unit."""
    with np.load(space.result(unit.name)) as arrays:
        return Result(
            arrays["lengths"],
            arrays["characters"],
            arrays["held_out"],
            arrays["keys"],
            Report.from_json(arrays["report"].tobytes().decode()),
        )


@cache
def _worker(folder: Path) -> "UnitWorker":
    """The worker of this process, which exists as long as the build."""
    return UnitWorker(Workspace(folder))


class UnitWorker:
    """What processing any unit needs: tokenizer, evaluation sets, the mix.

    Args:
        space: the build's workspace, which contains the plan.
    """

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.plan: BuildPlan = space.read_plan()
        self.overlap = OverlapIndex(space.overlap) if self.plan.mix.decontaminate else None
        self.tokenizer = Tokenizer(space.tokenizer / "tokenizer.json", self.plan.tokenizer)
        self.chat: Any = None
        if any(source.chat for source in self.plan.mix.sources.values()):
            from transformers import AutoTokenizer  # Also imports torch: 200 MB.

            self.chat = AutoTokenizer.from_pretrained(
                space.tokenizer, local_files_only=True, trust_remote_code=False
            )

    def process(self, unit: Unit) -> None:
        """Write the result of a unit.

        Raises:
            UserError: if the input cannot be read or lacks a field, or the disk is full.
        """
        work = _UnitWork(self, unit)
        work.run()
        work.write()
        for piece in unit.pieces:
            if piece.path.parent == self.space.copies:
                piece.path.unlink(missing_ok=True)


class _UnitWork:
    """The processing of one unit."""

    def __init__(self, worker: UnitWorker, unit: Unit) -> None:
        self._worker = worker
        self._mix = worker.plan.mix
        self._unit = unit
        self._source = list(self._mix.sources.values())[unit.source]
        source = self._source
        self._field_tests = filters.field_tests(source.filters)
        self._text_tests = filters.text_tests(source.filters)
        self._columns = filters.columns_of(source)
        self._limit = int(self._mix.held_out_fraction * HASH_RANGE)
        self._bad = 0
        self.report = Report(rows=[0] * len(unit.pieces))
        bands = self._mix.deduplicate.bands if self._mix.deduplicate else 0
        self._tokens: list[NDArray[Any]] = []
        self._lengths: list[int] = []
        self._characters: list[int] = []
        self._held_out: list[bool] = []
        self._keys: list[Hashes] = [np.empty((0, bands), np.uint64)]

    def run(self) -> None:
        """Read the unit and collect the documents that pass."""
        batch: list[_Document] = []
        size = 0
        for document in self._documents():
            batch.append(document)
            size += len(document.text)
            if size >= BATCH_CHARACTERS:
                self._finish(batch)
                batch, size = [], 0
        if batch:
            self._finish(batch)

    def write(self) -> None:
        """Write the result."""
        space = self._worker.space
        dtype = np.dtype(self._worker.plan.dtype).newbyteorder("<")
        with new_file(space.tokens(self._unit.name)) as temporary, temporary.open("wb") as file:
            for tokens in self._tokens:
                file.write(tokens.astype(dtype, copy=False).tobytes())
        report = json.dumps(asdict(self.report)).encode()
        with new_file(space.result(self._unit.name)) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                lengths=np.array(self._lengths, np.int64),
                characters=np.array(self._characters, np.int64),
                held_out=np.array(self._held_out, bool),
                keys=np.concatenate(self._keys),
                report=np.frombuffer(report, np.uint8),
            )

    def _documents(self) -> Iterator[_Document]:
        """The documents that pass all field and text filters; long documents are split."""
        for index, piece in enumerate(self._unit.pieces):
            for row in read_rows(piece, self._columns):
                self.report.rows[index] = row.number + 1
                if row.fields is None:
                    self._malformed(index, row.number, row.problem)
                else:
                    try:
                        text = self._text(row.fields, piece)
                    except Malformed as problem:
                        self._malformed(index, row.number, str(problem))
                        continue
                    if text is not None:
                        yield from self._divided(index, row.number, text)
                if self._bad > self._mix.bad_rows:
                    return  # The main process stops the build when it reaches this unit.

    def _malformed(self, piece: int, row: int, problem: str) -> None:
        self._bad += 1
        self.report.read.add(1, 0)
        self.report.drop(filters.MALFORMED, 0)
        if len(self.report.bad) < SHOWN_BAD_ROWS:
            self.report.bad.append((piece, row, problem))

    def _text(self, fields: dict[str, Any], piece: Piece) -> str | None:
        """The text of a row, or None if a filter drops it."""
        try:
            if self._source.chat is None:
                text, turns = self._plain_text(fields, piece), []
                size = len(text)
                blank = not text or text.isspace()
            else:
                turns = messages_of(filters.field_of(fields, self._source.chat))
                text, blank = "", not turns
                size = sum(len(str(turn.get("content") or "")) for turn in turns)
            step = filters.BLANK if blank else self._first_failure(fields, piece)
        except KeyError as error:
            where = f"A row of {piece.shown}"
            raise missing_field(where, str(error.args[0]), fields) from None
        if step is None and self._source.chat is not None:
            text = as_utf8(render(turns, self._worker.chat))
            size = len(text)
        self.report.read.add(1, size)
        if step is None:
            step = next((name for name, passes in self._text_tests if not passes(text)), None)
        if step is not None:
            self.report.drop(step, size)
            return None
        return text

    def _plain_text(self, fields: dict[str, Any], piece: Piece) -> str:
        value = filters.field_of(fields, self._source.text)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"A row of {piece.shown} has type {type(value).__name__} in '{self._source.text}' "
                "instead of text; set `text` of the source to a text field, or `chat` to a field "
                "of conversations."
            )
        return as_utf8(value)

    def _first_failure(self, fields: dict[str, Any], piece: Piece) -> str | None:
        try:
            return next((name for name, passes in self._field_tests if not passes(fields)), None)
        except UserError as error:
            raise UserError(f"In a row of {piece.shown}, {error}.") from None

    def _divided(self, piece: int, row: int, text: str) -> Iterator[_Document]:
        """The document, or its parts if it is too long; all parts are in the same split."""
        held_out = text_hash(text) < self._limit
        parts = list(divide(text, self._mix.longest_document))
        self.report.divided += len(parts) - 1
        for part in parts:
            yield _Document(piece, row, part, held_out)

    def _finish(self, batch: list[_Document]) -> None:
        """Filter a batch by overlap and tokens, and keep what passes."""
        mix = self._mix
        texts = [document.text for document in batch]
        hashed = hash_words(texts) if mix.decontaminate or mix.deduplicate else None
        overlapping = self._overlapping(batch, texts, hashed)
        rest = [i for i in range(len(batch)) if i not in overlapping]
        whole = self._source.chat is not None
        all_ids = self._worker.tokenizer.encode(
            [texts[i] for i in rest], whole, self._source.parse_special_tokens
        )
        bounds = self._source.filters.tokens
        kept: list[int] = []
        kept_ids: list[list[int]] = []
        for i, ids in zip(rest, all_ids, strict=True):
            if ids and bounds.contain(len(ids)):
                kept.append(i)
                kept_ids.append(ids)
            else:
                step = f"tokens {bounds}" if ids else filters.NO_TOKENS
                self.report.drop(step, len(texts[i]), len(ids))
        tokens, lengths = self._worker.tokenizer.framed(kept_ids, self._worker.plan.dtype)
        self._tokens.append(tokens)
        self._lengths += lengths
        self._characters += [len(texts[i]) for i in kept]
        self._held_out += [batch[i].held_out for i in kept]
        if mix.deduplicate and hashed is not None:
            self._keys.append(band_keys(texts, hashed, mix.deduplicate)[kept])

    def _overlapping(
        self, batch: list[_Document], texts: list[str], words: Words | None
    ) -> set[int]:
        """Indices of the documents of a batch that overlap evaluation sets; also reports them."""
        if self._worker.overlap is None or words is None:
            return set()
        found = self._worker.overlap.find(texts, words)
        for overlap in found:
            document = batch[overlap.text]
            self.report.drop(filters.OVERLAP, len(document.text))
            begins = " ".join(document.text[:200].split())
            where = (document.piece, document.row)
            self.report.overlaps.append((*where, overlap.evaluation_set, overlap.run, begins))
        return {overlap.text for overlap in found}


def divide(text: str, longest: int) -> Iterator[str]:
    """Cut a text into parts of at most `longest` characters, at the end of a paragraph, line or
    word in the second half of each part, or anywhere if there is none."""
    start = 0
    while len(text) - start > longest:
        end = -1
        for mark in ("\n\n", "\n", " "):
            end = text.rfind(mark, start + longest // 2, start + longest)
            if end >= 0:
                break
        end = start + longest if end < 0 else end
        yield text[start:end].strip()
        start = end
    yield text[start:].strip() if start else text
