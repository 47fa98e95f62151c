"""A data set that is tokenized and packed during the download; nothing is stored on disk.

Documents are read in blocks and shuffled within each block; `datasets` shuffles the order of the
data set's files. A stream position is a block, which `datasets` can seek to, plus a document and a
token in it. Resuming rereads one block and yields exactly the same sequences. (The shuffle buffer
of `datasets` loses its contents on resume.)

A data set with enough files is read in parts, one for each micro-batch of a step, each with files
of its own, so that every process reads and tokenizes only what it trains on. With fewer files,
every process reads all of it and drops what others train on.

As in packed text, a document's content determines whether it is held out, so a held-out document is
never trained on, even if it occurs again.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.data.batch import Batch
from lrc.data.identity import HASH_RANGE, refuse_not_embedded, text_hash, tokenizer_identity
from lrc.data.packing import Progress, also_held_out_hashes, encode
from lrc.data.reader import make_batch
from lrc.data.rows import no_field
from lrc.data.sources import text_of
from lrc.data.tokens import Span
from lrc.recipe.sections import DataSection, StreamSection
from lrc.system.errors import UserError, reason
from lrc.system.hub import cache_alone_if_unreachable, no_way

logger = logging.getLogger(__name__)

BUILDERS = ("json", "csv", "parquet", "text", "arrow", "xml", "pandas", "webdataset")
"""Names of the file readers built into `datasets`, which do not need the hub."""

DOCUMENTS_PER_BATCH = 64
"""Documents tokenized at once."""


class Mark(NamedTuple):
    """The position of a document in the stream."""

    epoch: int
    block: int
    before: dict[str, Any] | None
    """State of the data set before the block; None at the start of the data set."""
    document: int
    """Index in the shuffled block."""


START = Mark(0, 0, None, 0)

Tokenized = tuple[Mark, NDArray[np.int64]]
"""A document: its position and its token ids."""


class Packer:
    """Concatenates documents and yields them as sequences of one length.

    Args:
        documents: the documents, none of them empty.
        length: tokens per sequence.
        used: tokens of the first document to skip.
    """

    def __init__(self, documents: Iterator[Tokenized], length: int, used: int = 0) -> None:
        self._documents = documents
        self._length = length
        self._document: Tokenized | None = None
        self._used = used

    def place(self) -> tuple[Mark, int]:
        """The document in which the next sequence begins, and the token offset in it."""
        return self._current()[0], self._used

    def __iter__(self) -> Iterator[Span]:
        return self

    def __next__(self) -> Span:
        pieces: list[NDArray[np.int64]] = []
        begins: list[int] = []
        filled = 0
        while filled < self._length:
            _, ids = self._current()
            if not self._used:
                begins.append(filled)
            piece = ids[self._used : self._used + self._length - filled]
            pieces.append(piece)
            filled += len(piece)
            self._used += len(piece)
            if self._used == len(ids):
                self._document, self._used = None, 0
        return Span(np.concatenate(pieces), np.array(begins, np.int64), None)

    def _current(self) -> Tokenized:
        """The document currently being packed."""
        if self._document is None:
            self._document = next(self._documents)
        return self._document


class _Part:
    """The part of a stream that has been packed up to a position of its own."""

    def __init__(self, packer: Packer, position: int = 0) -> None:
        self._packer, self.position = packer, position

    def take(self, position: int) -> Span:
        """The sequence at a position, not before the present one. Those between are read and
        discarded: they belong to other processes."""
        for _ in range(self.position, position):
            next(self._packer)
        self.position = position + 1
        return next(self._packer)

    def state(self) -> dict[str, Any]:
        """Where the next sequence begins, as JSON values."""
        mark, used = self._packer.place() if self.position else (START, 0)
        return {**mark._asdict(), "used": used, "position": self.position}


class StreamedText:
    """A streamed data set as the training loop reads it; see `lrc.data.reader.Reader`.

    Args:
        data: the recipe's data section, with `stream` set.
        tokenizer: the teacher's tokenizer.
        seed: seed of the order of files and documents.
        held_out: number of held-out sequences wanted.
        progress: callback that receives the number of held-out tokens read so far.
        first_token: as in `lrc.data.reader.Sequences`.
        parts: parts to read it in, if it has as many files: the micro-batches of a step.
        block: consecutive sequences of a part: those of a micro-batch.
        vocabulary: as in `lrc.data.opening.open_text`.

    Raises:
        UserError: if the data set cannot be read or lacks the text field, the held-out text does
            not fill one sequence, or the tokenizer does not fit.
    """

    sources = ()
    training_sequences = None
    identity = None

    def __init__(
        self,
        data: DataSection,
        tokenizer: Tokenizer,
        seed: int,
        held_out: int,
        progress: Progress | None = None,
        first_token: int | None = None,
        parts: int = 1,
        block: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        self._first_token, self._vocabulary = first_token, vocabulary
        assert data.stream is not None
        tokenizer_identity(tokenizer)  # Rejects a tokenizer that does not fit.
        self._data, self._stream = data, data.stream
        self._tokenizer = tokenizer
        self._seed = seed % (1 << 64)
        self._builder = _open(data.stream)
        self._also_held_out = also_held_out_hashes(data)
        rows = self._builder.as_streaming_dataset(split=data.stream.split)
        self._held_out = self._read_held_out(rows, held_out, progress)
        self._block = block
        several = range(parts if rows.num_shards >= parts else 1)
        if rows.num_shards % len(several):
            logger.warning(
                "The stream has %d files and is read in %d parts, which takes as much of each part "
                "as of others: files of small parts are read more often. A train.accumulate that "
                "divides the number of files avoids it.",
                rows.num_shards,
                len(several),
            )
        self._parts = [self._from_the_start(part) for part in several]

    def training_batch(self, position: int, count: int) -> Batch:
        """The `count` training sequences after the first `position` sequences of the run. Blocks of
        sequences are those of one part after the other. Parts that are beyond them are read again
        from the start."""
        spans = []
        for number in range(position, position + count):
            block, place = divmod(number, self._block)
            before, part = divmod(block, len(self._parts))
            within = before * self._block + place
            if within < self._parts[part].position:
                self._parts[part] = self._from_the_start(part)
            spans.append(self._parts[part].take(within))
        return make_batch(spans, self._data.document_mask, self._first_token)

    def held_out_batches(self, count: int, batch_size: int) -> Iterator[Batch]:
        """The first `count` held-out sequences in batches, the same on every call."""
        spans = self._held_out[:count]
        for start in range(0, len(spans), batch_size):
            some = spans[start : start + batch_size]
            yield make_batch(some, self._data.document_mask, self._first_token)

    def shares(self) -> dict[str, float]:
        """Return no shares: a stream has no named sources."""
        return {}

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Never called: a stream has no named sources."""
        raise AssertionError("a stream has no named sources")

    def state(self) -> dict[str, Any]:
        """The positions at which the next sequences begin, as JSON values."""
        return {"parts": [part.state() for part in self._parts]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            UserError: if the state has no such position.
        """
        try:
            saved = state["parts"]
            if len(saved) != len(self._parts):
                raise UserError(
                    f"The checkpoint has read its stream in {len(saved)} parts, and now there are "
                    f"{len(self._parts)}: the data set has other files; start a new run."
                )
            self._parts = [
                _Part(
                    self._packed_from(
                        number, Mark(*(part[name] for name in Mark._fields)), part["used"]
                    ),
                    part["position"],
                )
                for number, part in enumerate(saved)
            ]
        except KeyError as error:
            raise UserError(
                "The checkpoint does not say where the run was in its stream; start a new run."
            ) from error

    def _from_the_start(self, part: int) -> _Part:
        return _Part(self._packed_from(part, START, 0))

    def _packed_from(self, part: int, mark: Mark, used: int) -> Packer:
        """Pack the sequences of a part, starting at a token of a document."""
        documents = self._tokenized(self._documents(part, mark), DOCUMENTS_PER_BATCH)
        return Packer(documents, self._length, used)

    @property
    def _length(self) -> int:
        return self._data.sequence_length

    def _documents(self, part: int, mark: Mark) -> Iterator[tuple[Mark, str]]:
        """The training documents of a part from a position on, epoch after epoch."""
        together = max(1, self._stream.shuffle_documents // len(self._parts))
        epoch, block, before, document = mark
        while True:
            rows = self._builder.as_streaming_dataset(split=self._stream.split)
            if len(self._parts) > 1:
                rows = rows.shard(len(self._parts), part, contiguous=False)
            # Any nonzero epoch makes `datasets` shuffle its files.
            rows.set_epoch(1 + int(_random(1, self._seed, epoch)[0]) % (1 << 31))
            rows.load_state_dict(before)
            texts = (text for text in self._texts(rows) if self._is_trained_on(text))
            while found := list(islice(texts, together)):
                order = np.argsort(_random(len(found), self._seed, epoch, block), kind="stable")
                for number in range(document, len(found)):
                    yield Mark(epoch, block, before, number), found[order[number]]
                block, before, document = block + 1, rows.state_dict(), 0
            if not block:
                raise UserError(
                    f"The data set '{self._stream.dataset}' has no training text; lower "
                    "data.held_out_fraction or choose another data set."
                )
            epoch, block, before, document = epoch + 1, 0, None, 0

    def _tokenized(
        self, documents: Iterator[tuple[Mark, str]], together: int
    ) -> Iterator[Tokenized]:
        """Tokenize documents in order; documents without tokens are skipped."""
        while some := list(islice(documents, together)):
            texts = [text for _, text in some]
            encoded = encode(self._tokenizer, texts, self._data.parse_special_tokens)
            for (mark, _), ids in zip(some, encoded, strict=True):
                if ids:
                    refuse_not_embedded(self._tokenizer, max(ids), self._vocabulary)
                    yield mark, np.array(ids, np.int64)

    def _texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """The documents of a data set, without blank ones."""
        field, where = self._data.text_field, f"The data set '{self._stream.dataset}'"
        try:
            for row in rows:
                if field not in row:
                    raise no_field(where, field, row)
                text = text_of(row[field], where, field)
                if text.strip():
                    yield text
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{where} cannot be read any further ({reason(error)}); continue the run with "
                "`lrc resume` once it is readable again."
            ) from error

    def _is_held_out(self, text: str) -> bool:
        return text_hash(text) < int(self._data.held_out_fraction * HASH_RANGE)

    def _is_trained_on(self, text: str) -> bool:
        also = self._also_held_out and text_hash(text) in self._also_held_out
        return not (self._is_held_out(text) or also)

    def _read_held_out(
        self, rows: Iterable[dict[str, Any]], sequences: int, progress: Progress | None
    ) -> list[Span]:
        """Read up to `sequences` held-out sequences from the start of the data set."""
        texts = (text for text in self._texts(rows) if self._is_held_out(text))
        # One at a time: reading up to each held-out document passes many training documents.
        documents = self._tokenized(((START, text) for text in texts), 1)
        packer = Packer(documents, self._length)
        spans: list[Span] = []
        for span in islice(packer, sequences):
            spans.append(span)
            if progress is not None:
                progress("held out", len(spans) * self._length)
        if not spans:
            raise UserError(
                f"The held-out text of '{self._stream.dataset}' does not fill one sequence of "
                f"{self._length} tokens; raise data.held_out_fraction."
            )
        return spans


def merged_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a text from those of all processes: of a stream's parts, the latest position of
    each, and of other texts the first state, since they are alike."""
    if "parts" not in states[0]:
        return states[0]
    by_part = zip(*(state["parts"] for state in states), strict=True)
    return {"parts": [max(part, key=lambda state: state["position"]) for part in by_part]}


def _open(stream: StreamSection) -> Any:
    """Open the builder of a data set.

    Raises:
        UserError: if the data set, configuration or split does not exist or cannot be reached.
    """
    import datasets  # Slow to import, and most recipes do not need it.

    local = stream.dataset in BUILDERS or Path(stream.dataset).exists()
    problem = None if local else cache_alone_if_unreachable()
    try:
        builder = datasets.load_dataset_builder(
            stream.dataset,
            stream.config,
            data_files=stream.data_files or None,
            revision=stream.revision,
        )
        builder.as_streaming_dataset(split=stream.split)
    except Exception as error:  # `datasets` lets any error of the network layers through.
        raise UserError(
            f"The data set '{stream.dataset}' cannot be opened ({no_way(problem, error)}); check "
            "data.stream and the connection."
        ) from error
    return builder


def _random(count: int, *seeds: int) -> NDArray[np.uint64]:
    """Random numbers that are the same in every numpy version."""
    return np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
