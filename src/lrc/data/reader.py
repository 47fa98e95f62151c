"""Cut packed text into sequences, and the interface through which the training loop reads text.

Packed text is read by index. The next sequence depends only on the number of sequences taken so
far, so a run resumes without rereading earlier text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lrc.data.batch import Batch
from lrc.data.order import ShuffledOrder
from lrc.data.tokens import Span, Tokens
from lrc.data.weighted import WeightedOrder
from lrc.system.errors import UserError


class Reader(Protocol):
    """The text of a run as the training loop reads it."""

    @property
    def sources(self) -> Sequence[str]:
        """Names of the sources that batches index; empty if batches have no source indices."""

    @property
    def training_sequences(self) -> int | None:
        """Number of training sequences per epoch; None if unknown."""

    @property
    def identity(self) -> str | None:
        """Checksum of the text; None if unknown."""

    def training_batch(self, position: int, count: int) -> Batch:
        """The `count` training sequences after the first `position` sequences of the run.

        Positions only increase from call to call, except that the loop may restart at 0.
        """

    def shares(self) -> dict[str, float]:
        """Each source's share of the training sequences; the shares sum to 1."""

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Change the shares of the sources from `position` on, which is after everything read so
        far. Requires sources."""

    def held_out_batches(self, count: int, batch_size: int) -> Iterable[Batch]:
        """Up to `count` held-out sequences in batches; the same on every call."""

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to continue from here, as JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from where `state` was taken, without rereading earlier text.

        Raises:
            UserError: if the text has changed.
        """


class Sequences:
    """Packed text cut into sequences of one length, without the incomplete last sequence.

    The cut ignores file boundaries: a sequence may start in one file and continue in the next.

    Args:
        tokens: the packed text.
        sequence_length: tokens per sequence.
        document_mask: whether batches have the positions that prevent attention across documents.
        first_token: token that takes the place of every sequence's first; None: it stays.
    """

    def __init__(
        self,
        tokens: Tokens,
        sequence_length: int,
        document_mask: bool = False,
        first_token: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.document_mask = document_mask
        self.first_token = first_token

    def __len__(self) -> int:
        """Number of complete sequences."""
        return len(self.tokens) // self.sequence_length

    def middle_sources(self) -> NDArray[np.int64]:
        """Source index of each sequence's middle token, int64 [len(self)]."""
        middles = np.arange(len(self)) * self.sequence_length + self.sequence_length // 2
        return self.tokens.sources_at(middles)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences at the given indices: input_ids, position_ids with a document mask, and
        source_ids if the text has sources, all int64 [len(indices), sequence_length].

        Raises:
            IndexError: if an index is not in [0, len(self)).
        """
        if not all(0 <= index < len(self) for index in indices):
            raise IndexError(f"sequence indices {list(indices)} are not all in [0, {len(self)})")
        starts = [index * self.sequence_length for index in indices]
        spans = [self.tokens.read(start, start + self.sequence_length) for start in starts]
        return make_batch(spans, self.document_mask, self.first_token)

    def first(self, count: int, batch_size: int = 8) -> Iterator[Batch]:
        """The first `count` sequences (or all, if fewer) in order, in batches."""
        return self._batches(range(min(count, len(self))), batch_size)

    def spread(self, count: int, batch_size: int = 8) -> Iterator[Batch]:
        """`count` evenly spaced sequences (or all, if fewer), in batches."""
        count = min(count, len(self))
        return self._batches([i * len(self) // count for i in range(count)], batch_size)

    def _batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(indices), batch_size):
            yield self.batch(indices[start : start + batch_size])


class TrainingText:
    """Packed text, read in shuffled order, or source by source once shares are set.

    For shards, the measured held-out sequences are evenly spaced, so that they represent all
    documents and sources. For a recipe's own text, they are the first ones.

    Args:
        train: the training sequences.
        held_out: the held-out sequences.
        seed: seed of the order of the training sequences.
        identity: checksum of the tokens, with which a resumed run detects changed text.
        spread: whether to measure evenly spaced held-out sequences instead of the first ones.
    """

    def __init__(
        self,
        train: Sequences,
        held_out: Sequences,
        seed: int,
        identity: str | None = None,
        spread: bool = False,
    ) -> None:
        self.train = train
        self.held_out = held_out
        self.sources = train.tokens.sources
        self._seed = seed
        self._order: ShuffledOrder | WeightedOrder = ShuffledOrder(len(train), seed)
        self.identity = identity
        self._spread = spread

    @property
    def training_sequences(self) -> int:
        """Number of training sequences per epoch."""
        return len(self.train)

    def training_batch(self, position: int, count: int) -> Batch:
        """The `count` training sequences after the first `position` sequences of the run."""
        return self.train.batch(self._order.take(position, count))

    def shares(self) -> dict[str, float]:
        """Each source's share of the training sequences; the shares sum to 1."""
        order = self._order if isinstance(self._order, WeightedOrder) else self._by_source()
        return order.shares()

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Change the shares from `position` on, which is after everything read so far."""
        if not isinstance(self._order, WeightedOrder):
            self._order = self._by_source()
        self._order.set_shares(position, shares)

    def _by_source(self) -> WeightedOrder:
        return WeightedOrder(self.sources, self.train.middle_sources(), self._seed)

    def held_out_batches(self, count: int, batch_size: int) -> Iterator[Batch]:
        """Up to `count` held-out sequences in batches; the same on every call."""
        if self._spread:
            return self.held_out.spread(count, batch_size)
        return self.held_out.first(count, batch_size)

    def state(self) -> dict[str, Any]:
        """The text's identity and, if shares were set, the position in every source; otherwise the
        position follows from the step."""
        state: dict[str, Any] = {} if self.identity is None else {"identity": self.identity}
        if isinstance(self._order, WeightedOrder):
            state["by_source"] = self._order.state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Check that the text has not changed, and restore the position in every source.

        Raises:
            UserError: if the text has changed.
        """
        if state.get("identity") != self.identity:
            raise UserError(
                "The training text has changed since this run began, so the run cannot continue "
                "exactly; restore the old text, or start a new run."
            )
        if "by_source" in state:
            self._order = self._by_source()
            self._order.load_state(state["by_source"])


def make_batch(spans: Sequence[Span], document_mask: bool, first_token: int | None = None) -> Batch:
    """Build a batch from spans of equal length, as `Sequences` does."""
    ids = np.stack([span.ids for span in spans])
    if first_token is not None:
        ids[:, 0] = first_token
    positions = sources = None
    if document_mask:
        positions = torch.from_numpy(np.stack([_positions(span) for span in spans]))
    if of_tokens := [span.sources for span in spans if span.sources is not None]:
        sources = torch.from_numpy(np.stack(of_tokens))
    return Batch(torch.from_numpy(ids), position_ids=positions, source_ids=sources)


def _positions(span: Span) -> NDArray[np.int64]:
    """Position of each token in its document, or in the span if the document began before it:
    int64 [n]."""
    # The latest document start at or before each token; the first token always counts as one.
    latest = np.zeros(len(span.ids), np.int64)
    latest[span.begins] = span.begins
    return np.arange(len(span.ids)) - np.maximum.accumulate(latest)
