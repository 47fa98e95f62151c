"""Which training sequences a step takes, and which of them a process takes.

All of it is a function of seed and position: nothing is kept between steps, a run resumes at any
step at once, and every number of processes sees the same sequences in the same steps.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrc.system.errors import UserError

LARGEST_SORTED = 1 << 20
"""Sequences up to which an epoch is shuffled as a whole; it takes 8 bytes a sequence."""

ROUNDS = 8
"""Rounds of the network that shuffles more sequences than that."""


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one of several data-parallel processes takes."""

    rank: int = 0
    world_size: int = 1
    """Processes in all."""

    def positions(self, step: int, sequences: int) -> range:
        """Positions in the stream of sequences that are this process's own in a step.

        The processes' ranges follow each other and make up the global batch.

        Args:
            step: number of the step, from 0.
            sequences: sequences of the global batch, the same in every step.

        Raises:
            UserError: they cannot be divided evenly among the processes.
        """
        if sequences % self.world_size:
            raise UserError(
                f"{sequences} sequences a step cannot be divided among {self.world_size} "
                "processes; change train.micro_batch or train.accumulate."
            )
        own = sequences // self.world_size
        first = step * sequences + self.rank * own
        return range(first, first + own)


class ShuffledOrder:
    """An endless stream of sequence numbers: epoch after epoch, each in an order of its own.

    Memory is bounded whatever the number of sequences: see `LARGEST_SORTED`.

    Args:
        sequences: number of sequences; each comes exactly once an epoch.
        seed: decides the order, with the number of the epoch.
    """

    def __init__(self, sequences: int, seed: int) -> None:
        self._sequences = sequences
        self._seed = seed % (1 << 64)  # numpy refuses negative seeds.
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def take(self, position: int, count: int) -> list[int]:
        """Sequence numbers at `position` to `position + count - 1` of the stream."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(position + len(taken), self._sequences)
            stop = min(offset + count - len(taken), self._sequences)
            taken.extend(self._slice(epoch, offset, stop).tolist())
        return taken

    def _slice(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Sequence numbers at `start` to `stop - 1` of an epoch."""
        # Raw Philox numbers are the same in every version of numpy; `permutation` may change, and
        # a run resumed after an upgrade would then see some text twice.
        generator = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        if self._sequences > LARGEST_SORTED:
            return permuted(np.arange(start, stop), self._sequences, generator.random_raw(ROUNDS))
        if epoch != self._epoch:
            self._permutation = np.argsort(generator.random_raw(self._sequences), kind="stable")
            self._epoch = epoch
        return self._permutation[start:stop]


def permuted(numbers: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of 0, ..., size - 1 sends some of them, without forming
    the rest of it.

    A Feistel network permutes the square that the size just fits in; a number that leaves the
    range is sent on until it is back (cycle walking), which is rare, the square being hardly
    larger.

    Args:
        numbers: int64, in [0, size).
        size: below 2^62.
        keys: random uint64, one a round.
    """
    side = np.uint64(math.isqrt(max(size - 1, 0)) + 1)
    result = numbers.astype(np.uint64)
    outside = np.full(len(result), True)
    while outside.any():
        left, right = np.divmod(result[outside], side)
        for key in keys:
            left, right = right, (left + _mixed(right ^ key) % side) % side
        result[outside] = left * side + right
        outside = result >= size
    return result.astype(np.int64)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
