"""Draw training sequences by source; each source has a share that may change during the run.

A packed sequence may contain documents of several sources. It counts toward the source of its
middle token. If one document fills more than half of a sequence, its source is the sequence's.
Every token is equally likely to be in the middle, so the rule favors no source.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrc.data.order import ShuffledOrder


class WeightedOrder:
    """An endless stream of sequence numbers in which every source has its share.

    Sources take turns, so after any number of sequences each source is within one or two sequences
    of its share. Random draws would blur the shares of a short run. Every source has its own epochs
    and shuffled order. The stream depends on the shares, when they were set, and the seed, so every
    process sees the same stream.

    Args:
        names: the sources.
        of_sequence: source index of each sequence, int64 [sequences].
        seed: seed of the order in each source.
    """

    def __init__(self, names: Sequence[str], of_sequence: NDArray[np.int64], seed: int) -> None:
        self._members = [np.flatnonzero(of_sequence == number) for number in range(len(names))]
        self._orders = [ShuffledOrder(max(len(own), 1), seed) for own in self._members]
        self._names = list(names)
        self._position = 0
        self._taken = [0] * len(names)
        self._credits = [0.0] * len(names)
        self._shares = [len(own) / len(of_sequence) for own in self._members]

    def shares(self) -> dict[str, float]:
        """The share of each source that has sequences; initially its share of the text."""
        pairs = zip(self._names, self._shares, self._members, strict=True)
        return {name: share for name, share, own in pairs if len(own)}

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Change the shares of the sequences from `position` on.

        Args:
            position: a position at or after all sequences taken so far.
            shares: the share of each source in `shares()`; they sum to 1.
        """
        self._go_to(position)
        self._shares = [shares.get(name, 0.0) for name in self._names]

    def take(self, position: int, count: int) -> list[int]:
        """Sequence numbers at `position` to `position + count - 1`; positions only increase."""
        self._go_to(position)
        taken = []
        for _ in range(count):
            source = self._next()
            number = self._orders[source].take(self._taken[source] - 1, 1)[0]
            taken.append(int(self._members[source][number]))
        return taken

    def state(self) -> dict[str, Any]:
        """The position in the stream, as JSON values."""
        return {
            "position": self._position,
            "taken": list(self._taken),
            "credits": list(self._credits),
            "shares": list(self._shares),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self._position = state["position"]
        self._taken, self._credits = list(state["taken"]), list(state["credits"])
        self._shares = list(state["shares"])

    def _go_to(self, position: int) -> None:
        """Skip sequences, such as those that other processes take."""
        if position < self._position:
            raise IndexError(f"sequence {position} is before {self._position}")
        while self._position < position:
            self._next()

    def _next(self) -> int:
        """The source of the next sequence: the one furthest behind its share."""
        for number, share in enumerate(self._shares):
            self._credits[number] += share
        source = max(range(len(self._credits)), key=self._credits.__getitem__)
        self._credits[source] -= 1
        self._taken[source] += 1
        self._position += 1
        return source
