"""A data set that is tokenized and packed while it is downloaded, with nothing kept on the disk.

Documents are read in blocks and shuffled in each; `datasets` shuffles the order of the data set's
files. A position in the stream is that of a block, which `datasets` goes to, and of a document and
a token in it: resuming reads one block again and gives the very same sequences. (The shuffle buffer
of `datasets` itself loses what it holds when a run resumes.) A document is held out by its own
wording, as in packed text, so it is never trained on wherever it comes again.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.data.batch import Batch
from lrc.data.identity import HASH_RANGE, text_hash, tokenizer_identity
from lrc.data.packing import Progress, encode
from lrc.data.reader import make_batch
from lrc.data.sources import no_field, text_of
from lrc.data.tokens import Span
from lrc.recipe.sections import DataSection, StreamSection
from lrc.system.errors import UserError, reason
from lrc.system.hub import cache_alone_if_unreachable, no_way

BUILDERS = ("json", "csv", "parquet", "text", "arrow", "xml", "pandas", "webdataset")
"""Names of `datasets`' own readers of files, which need no hub."""

DOCUMENTS_PER_BATCH = 64
"""Documents that are tokenized at once."""


class Mark(NamedTuple):
    """The place of a document in the stream."""

    epoch: int
    block: int
    before: dict[str, Any] | None
    """State of the data set before the block; None at its beginning."""
    document: int
    """Number in the shuffled block."""


START = Mark(0, 0, None, 0)

Tokenized = tuple[Mark, NDArray[np.int64]]
"""A document as its place and its token ids."""


class Packer:
    """Puts documents end to end and gives them as sequences of one length.

    Args:
        documents: the documents, none of them empty.
        length: tokens of a sequence.
        used: tokens of the first document that are left out.
    """

    def __init__(self, documents: Iterator[Tokenized], length: int, used: int = 0) -> None:
        self._documents = documents
        self._length = length
        self._document: Tokenized | None = None
        self._used = used

    def place(self) -> tuple[Mark, int]:
        """The document that the next sequence begins in, and the token of it."""
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
        """The document that is being given out."""
        if self._document is None:
            self._document = next(self._documents)
        return self._document


class StreamedText:
    """A data set as the training loop reads it; see `lrc.data.reader.Reader`.

    Args:
        data: the recipe's section; its `stream` is set.
        tokenizer: the teacher's.
        seed: decides the order of files and documents.
        held_out: held-out sequences that are wanted.
        progress: called with the held-out tokens read so far.

    Raises:
        UserError: the data set cannot be read or has no such field, there is too little held-out
            text for one sequence, or the tokenizer does not fit.
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
    ) -> None:
        assert data.stream is not None
        tokenizer_identity(tokenizer)  # refuses one that does not fit
        self._data, self._stream = data, data.stream
        self._tokenizer = tokenizer
        self._seed = seed % (1 << 64)
        self._builder = _open(data.stream)
        self._held_out = self._read_held_out(held_out, progress)
        self._position = 0
        self._packer = self._packed_from(START, 0)

    def training_batch(self, position: int, count: int) -> Batch:
        """The `count` training sequences that follow the first `position` ones of the run.

        Sequences between the last one given and `position` are read and thrown away: they are those
        of other processes, less than a step's.
        """
        if position == 0 and self._position:
            self._position, self._packer = 0, self._packed_from(START, 0)
        if position < self._position:
            raise ValueError("a stream is read forwards only")
        for _ in range(self._position, position):
            next(self._packer)
        spans = [next(self._packer) for _ in range(count)]
        self._position = position + count
        return make_batch(spans, self._data.document_mask)

    def held_out_batches(self, count: int, batch_size: int) -> Iterator[Batch]:
        """The first `count` held-out sequences in batches, the same at every call."""
        spans = self._held_out[:count]
        for start in range(0, len(spans), batch_size):
            yield make_batch(spans[start : start + batch_size], self._data.document_mask)

    def shares(self) -> dict[str, float]:
        """None: a stream names no sources."""
        return {}

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Never called: a stream names no sources."""
        raise AssertionError("a stream names no sources")

    def state(self) -> dict[str, Any]:
        """The place that the next sequence begins at, as JSON values."""
        mark, used = self._packer.place()
        return {**mark._asdict(), "used": used, "position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a place.

        Raises:
            UserError: the state holds no place.
        """
        try:
            mark = Mark(*(state[name] for name in Mark._fields))
            self._packer = self._packed_from(mark, state["used"])
            self._position = state["position"]
        except KeyError as error:
            raise UserError(
                "The checkpoint does not say where in its stream the run was; start a new run."
            ) from error

    def _packed_from(self, mark: Mark, used: int) -> Packer:
        """The sequences from a token of a document on."""
        return Packer(
            self._tokenized(self._documents(mark), DOCUMENTS_PER_BATCH), self._length, used
        )

    @property
    def _length(self) -> int:
        return self._data.sequence_length

    def _documents(self, mark: Mark) -> Iterator[tuple[Mark, str]]:
        """The training documents from a place on, epoch after epoch."""
        epoch, block, before, document = mark
        while True:
            rows = self._builder.as_streaming_dataset(split=self._stream.split)
            # Any number but 0 makes it shuffle its files.
            rows.set_epoch(1 + int(_random(1, self._seed, epoch)[0]) % (1 << 31))
            rows.load_state_dict(before)
            texts = (text for text in self._texts(rows) if not self._is_held_out(text))
            while found := list(islice(texts, self._stream.shuffle_documents)):
                order = np.argsort(_random(len(found), self._seed, epoch, block), kind="stable")
                for number in range(document, len(found)):
                    yield Mark(epoch, block, before, number), found[order[number]]
                block, before, document = block + 1, rows.state_dict(), 0
            if not block:
                raise UserError(
                    f"The data set '{self._stream.dataset}' holds no training text; lower "
                    "data.held_out_fraction or choose another one."
                )
            epoch, block, before, document = epoch + 1, 0, None, 0

    def _tokenized(
        self, documents: Iterator[tuple[Mark, str]], together: int
    ) -> Iterator[Tokenized]:
        """Documents as tokens, in the same order; those without any are left out."""
        while some := list(islice(documents, together)):
            texts = [text for _, text in some]
            encoded = encode(self._tokenizer, texts, self._data.parse_special_tokens)
            for (mark, _), ids in zip(some, encoded, strict=True):
                if ids:
                    yield mark, np.array(ids, np.int64)

    def _texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """The documents of a data set, but for blank ones."""
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
                f"{where} cannot be read on ({reason(error)}); continue the run with "
                "`lrc resume` when it can."
            ) from error

    def _is_held_out(self, text: str) -> bool:
        return text_hash(text) < int(self._data.held_out_fraction * HASH_RANGE)

    def _read_held_out(self, sequences: int, progress: Progress | None) -> list[Span]:
        """The first held-out sequences, as many as are wanted and there are."""
        rows = self._builder.as_streaming_dataset(split=self._stream.split)
        texts = (text for text in self._texts(rows) if self._is_held_out(text))
        # One by one: each of them stands for many that are read and left.
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


def _open(stream: StreamSection) -> Any:
    """The builder of a data set.

    Raises:
        UserError: there is no such data set, configuration or split, or no way to it.
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
    except Exception as error:  # `datasets` passes on whatever the network layers raise.
        raise UserError(
            f"The data set '{stream.dataset}' cannot be opened ({no_way(problem, error)}); check "
            "data.stream and the connection."
        ) from error
    return builder


def _random(count: int, *seeds: int) -> NDArray[np.uint64]:
    """Random numbers, the same in every version of numpy."""
    return np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
