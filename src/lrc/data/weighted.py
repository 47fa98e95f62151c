"""Training sequences drawn source by source, each source having a share that may change on the way.

A packed sequence may hold documents of several sources: it counts as of the source of its middle
token. Where a document fills more than half of a sequence, that is its source; and since any token
is as likely to stand in the middle as any other, no source gains by it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrc.data.order import ShuffledOrder


class WeightedOrder:
    """An endless stream of sequence numbers in which every source has its share.

    Sources take turns, so that after any number of sequences each has had its share to within one
    or two: drawing them at random would blur the shares of a short run. Every source has epochs and
    a shuffled order of its own. The stream depends on the shares, when they were set, and the
    seed: every process sees the same.

    Args:
        names: the sources.
        of_sequence: number of the source of each sequence, int64 [sequences].
        seed: decides the order in each source.
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
        """The share of each source that has sequences; at first that of the text."""
        pairs = zip(self._names, self._shares, self._members, strict=True)
        return {name: share for name, share, own in pairs if len(own)}

    def set_shares(self, position: int, shares: Mapping[str, float]) -> None:
        """Change the shares of the sequences from `position` on.

        Args:
            position: at or after all that were taken.
            shares: for each of the sources in `shares()`, together 1.
        """
        self._go_to(position)
        self._shares = [shares.get(name, 0.0) for name in self._names]

    def take(self, position: int, count: int) -> list[int]:
        """Sequence numbers at `position` to `position + count - 1`; never before the last ones."""
        self._go_to(position)
        taken = []
        for _ in range(count):
            source = self._next()
            number = self._orders[source].take(self._taken[source] - 1, 1)[0]
            taken.append(int(self._members[source][number]))
        return taken

    def state(self) -> dict[str, Any]:
        """The place in the stream, as JSON values."""
        return {
            "position": self._position,
            "taken": list(self._taken),
            "credits": list(self._credits),
            "shares": list(self._shares),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a place."""
        self._position = state["position"]
        self._taken, self._credits = list(state["taken"]), list(state["credits"])
        self._shares = list(state["shares"])

    def _go_to(self, position: int) -> None:
        """Pass over sequences, such as those that other processes take."""
        if position < self._position:
            raise IndexError(f"sequence {position} lies before {self._position}")
        while self._position < position:
            self._next()

    def _next(self) -> int:
        """The source of the next sequence: that which is furthest behind its share."""
        for number, share in enumerate(self._shares):
            self._credits[number] += share
        source = max(range(len(self._credits)), key=self._credits.__getitem__)
        self._credits[source] -= 1
        self._taken[source] += 1
        self._position += 1
        return source
