"""Read the tokens of many shards as one long text."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrc.data.shards import Shard

OPEN_SHARDS = 64
"""Shards mapped at once, three files each; systems allow a process about a thousand open files."""


class Span(NamedTuple):
    """A span of text."""

    ids: NDArray[np.int64]
    """Token ids, [n]."""
    begins: NDArray[np.int64]
    """Where documents begin in the span, ascending."""
    sources: NDArray[np.int64] | None
    """Source index of each token, [n]."""


class Tokens:
    """The documents of several shards, one shard after another.

    Args:
        shards: the shards; a document never continues into the next shard.
        sources: names of the sources; if empty, document sources are not read.
        numbers: for each shard, the index in `sources` of each source in the shard's own index;
            None if both number the sources the same way.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        sources: Sequence[str] = (),
        numbers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.shards = list(shards)
        self.sources = tuple(sources)
        same = range(len(self.sources))
        self._numbers = [np.array(n, np.int64) for n in numbers or [same] * len(self.shards)]
        self._starts = np.array([*accumulate((s.tokens for s in shards), initial=0)], np.int64)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        """Number of tokens in all shards."""
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Span:
        """Read the text from token `start` to token `stop - 1`."""
        first, last = np.searchsorted(self._starts, [start, stop])
        first -= self._starts[first] > start
        parts = [self._read_shard(number, start, stop) for number in range(first, last)]
        ids, begins, sources = zip(*parts, strict=True)
        return Span(
            np.concatenate(ids),
            np.concatenate(begins),
            np.concatenate(sources) if self.sources else None,
        )

    def sources_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Source index of the token at each place, int64 [places]; reads no token ids."""
        found = np.empty(len(places), np.int64)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(shards):
            here = shards == number
            _, offsets, of_documents = self._open(int(number))
            inside = places[here] - self._starts[number]
            documents = np.searchsorted(offsets, inside, side="right") - 1
            found[here] = self._numbers[number][of_documents[documents]]
        return found

    def _read_shard(self, number: int, start: int, stop: int) -> Span:
        """Read the part of a span that lies in one shard."""
        before = int(self._starts[number])
        begin, end = max(start - before, 0), min(stop - before, self.shards[number].tokens)
        ids, offsets, of_documents = self._open(number)
        first, last = np.searchsorted(offsets, [begin, end])
        begins = np.asarray(offsets[first:last]) - begin
        sources = None
        if self.sources:
            # Count the document that began before the span, too.
            owners = first - 1 + np.searchsorted(begins, np.arange(end - begin), side="right")
            sources = self._numbers[number][of_documents[owners]]
        return Span(ids[begin:end].astype(np.int64), begins + before + begin - start, sources)

    def _map(self, number: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Map the token ids, offsets and sources of a shard; pages are read on access."""
        shard = self.shards[number]
        return shard.token_ids(), shard.offsets(), shard.source_ids()
