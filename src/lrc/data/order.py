"""Which training sequences a step takes, and which of them a process takes.

Everything is a function of seed and position. No state is kept between steps, a run resumes
instantly at any step, and any number of processes sees the same sequences in the same steps.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrc.system.errors import UserError

LARGEST_SORTED = 1 << 20
"""Largest number of sequences for which an epoch is shuffled in memory, at 8 bytes per sequence."""

ROUNDS = 8
"""Rounds of the Feistel network that shuffles larger numbers of sequences."""


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one data-parallel process takes."""

    rank: int = 0
    world_size: int = 1
    """Total number of processes."""

    def positions(self, step: int, sequences: int) -> range:
        """Positions in the sequence stream that this process takes in a step.

        The processes' ranges are consecutive and make up the global batch.

        Args:
            step: step number, from 0.
            sequences: sequences in the global batch, the same in every step.

        Raises:
            UserError: if the sequences cannot be divided evenly among the processes.
        """
        if sequences % self.world_size:
            raise UserError(
                f"{sequences} sequences per step cannot be divided evenly among "
                f"{self.world_size} processes; change train.micro_batch or train.accumulate."
            )
        own = sequences // self.world_size
        first = step * sequences + self.rank * own
        return range(first, first + own)


class ShuffledOrder:
    """An endless stream of sequence numbers: epoch after epoch, each in its own order.

    Memory is bounded for any number of sequences: see `LARGEST_SORTED`.

    Args:
        sequences: number of sequences; each occurs exactly once per epoch.
        seed: seed that, with the epoch number, determines the order.
    """

    def __init__(self, sequences: int, seed: int) -> None:
        self._sequences = sequences
        self._seed = seed % (1 << 64)  # numpy rejects negative seeds.
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
        # Raw Philox numbers are the same in every numpy version. `permutation` may change, and a
        # run resumed after an upgrade would then see some text twice.
        generator = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        if self._sequences > LARGEST_SORTED:
            return permuted(np.arange(start, stop), self._sequences, generator.random_raw(ROUNDS))
        if epoch != self._epoch:
            self._permutation = np.argsort(generator.random_raw(self._sequences), kind="stable")
            self._epoch = epoch
        return self._permutation[start:stop]


def permuted(numbers: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply a pseudo-random permutation of 0, ..., size - 1 to some numbers, without computing the
    whole permutation.

    A Feistel network permutes the smallest square that is at least `size`. A number that leaves the
    range is permuted again until it is back in range (cycle walking). This is rare, because the
    square is barely larger than `size`.

    Args:
        numbers: numbers to permute, int64 in [0, size).
        size: size of the permutation, below 2^62.
        keys: random keys, uint64, one per round.
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
    """The finalizer of splitmix64: every result bit depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
