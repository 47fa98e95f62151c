"""Sequences out of packed text, and what the training loop asks of a text.

Packed text is read by number: what comes next depends on the number of sequences taken so far and
nothing else, so that a run resumes without reading what it has seen.
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
    """The text of a run as the training loop takes it."""

    @property
    def sources(self) -> Sequence[str]:
        """Names of the sources that batches give numbers of; empty where they give none."""

    @property
    def training_sequences(self) -> int | None:
        """Training sequences of an epoch; None where that is not known."""

    @property
    def identity(self) -> str | None:
        """A checksum of the text; None where it is not known."""

    def training_batch(self, position: int, count: int) -> Batch:
        """The `count` training sequences that follow the first `position` ones of the run.

        The loop asks for ever later positions, but may begin again at 0.
        """

    def shares(self) -> dict[str, float]:
        """The share of the training sequences that each of the sources has, together 1."""

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Give the sources other shares from `position` on, which lies after all that was read.
        Only where there are sources."""

    def held_out_batches(self, count: int, batch_size: int) -> Iterable[Batch]:
        """`count` held-out sequences, fewer where there are no more, in batches; the same at every
        call."""

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here, as JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken, without reading what was read before.

        Raises:
            UserError: the text is no longer what it was.
        """


class Sequences:
    """Packed text cut into sequences of one length; the last tokens that fill none are left out.

    The cut takes no notice of files: a sequence may begin at the end of one and go on in the next.

    Args:
        tokens: the packed text.
        sequence_length: tokens of a sequence.
        document_mask: give batches the positions that keep documents from attending to each other.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, document_mask: bool = False) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.document_mask = document_mask

    def __len__(self) -> int:
        """Number of whole sequences."""
        return len(self.tokens) // self.sequence_length

    def middle_sources(self) -> NDArray[np.int64]:
        """Number of the source of each sequence's middle token, int64 [len(self)]."""
        middles = np.arange(len(self)) * self.sequence_length + self.sequence_length // 2
        return self.tokens.sources_at(middles)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences of these numbers: input_ids, with a document mask position_ids, and where
        the text has sources source_ids, all int64 [len(indices), sequence_length].

        Raises:
            IndexError: a number is not in [0, len(self)).
        """
        if not all(0 <= index < len(self) for index in indices):
            raise IndexError(f"sequence numbers {list(indices)} are not all below {len(self)}")
        starts = [index * self.sequence_length for index in indices]
        spans = [self.tokens.read(start, start + self.sequence_length) for start in starts]
        return make_batch(spans, self.document_mask)

    def first(self, count: int, batch_size: int = 8) -> Iterator[Batch]:
        """The first `count` sequences (all where there are fewer) in their order, in batches."""
        return self._batches(range(min(count, len(self))), batch_size)

    def spread(self, count: int, batch_size: int = 8) -> Iterator[Batch]:
        """`count` sequences (all where there are fewer) at even distances, in batches."""
        count = min(count, len(self))
        return self._batches([i * len(self) // count for i in range(count)], batch_size)

    def _batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(indices), batch_size):
            yield self.batch(indices[start : start + batch_size])


class TrainingText:
    """Packed text, read in a shuffled order, or source by source once shares are set.

    Which held-out sequences are measured: of shards, some at even distances, so that they stand for
    all documents and sources; of a recipe's own text, the first ones.

    Args:
        train: the training sequences.
        held_out: the held-out sequences.
        seed: decides the order of the training sequences.
        identity: checksum of the tokens, by which a run that resumes finds that they have changed.
        spread: measure held-out sequences at even distances; else the first ones.
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
        """Training sequences of an epoch."""
        return len(self.train)

    def training_batch(self, position: int, count: int) -> Batch:
        """The `count` training sequences that follow the first `position` ones of the run."""
        return self.train.batch(self._order.take(position, count))

    def shares(self) -> dict[str, float]:
        """The share of the training sequences that each of the sources has, together 1."""
        order = self._order if isinstance(self._order, WeightedOrder) else self._by_source()
        return order.shares()

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Give the sources other shares from `position` on, which lies after all that was read."""
        if not isinstance(self._order, WeightedOrder):
            self._order = self._by_source()
        self._order.set_shares(position, shares)

    def _by_source(self) -> WeightedOrder:
        return WeightedOrder(self.sources, self.train.middle_sources(), self._seed)

    def held_out_batches(self, count: int, batch_size: int) -> Iterator[Batch]:
        """`count` held-out sequences in batches, the same at every call."""
        if self._spread:
            return self.held_out.spread(count, batch_size)
        return self.held_out.first(count, batch_size)

    def state(self) -> dict[str, Any]:
        """The text's identity, and the place in every source where shares were set; else the
        position follows from the step."""
        state: dict[str, Any] = {} if self.identity is None else {"identity": self.identity}
        if isinstance(self._order, WeightedOrder):
            state["by_source"] = self._order.state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Make sure that it is the text of before.

        Raises:
            UserError: it is another.
        """
        if state.get("identity") != self.identity:
            raise UserError(
                "The training text is no longer the one that this run began with, so it cannot be "
                "continued exactly; put the old text back, or start a new run."
            )
        if "by_source" in state:
            self._order = self._by_source()
            self._order.load_state(state["by_source"])


def make_batch(spans: Sequence[Span], document_mask: bool) -> Batch:
    """A batch out of stretches of one length."""
    ids = np.stack([span.ids for span in spans])
    positions = sources = None
    if document_mask:
        positions = torch.from_numpy(np.stack([_positions(span) for span in spans]))
    if of_tokens := [span.sources for span in spans if span.sources is not None]:
        sources = torch.from_numpy(np.stack(of_tokens))
    return Batch(torch.from_numpy(ids), position_ids=positions, source_ids=sources)


def _positions(span: Span) -> NDArray[np.int64]:
    """Position of each token in its document, or in the stretch where the document began before
    it: int64 [n]."""
    # The latest beginning at or before each token; the first token always counts as one.
    latest = np.zeros(len(span.ids), np.int64)
    latest[span.begins] = span.begins
    return np.arange(len(span.ids)) - np.maximum.accumulate(latest)
