"""Sequences out of packed text, and the order in which training takes them.

Both are stateless: what comes next depends on the number of sequences taken so far and nothing
else, so that a run resumes without reading what it has seen.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lrc.data.batch import Batch
from lrc.data.cache import OFFSET_DTYPE, PackedPart, PackedText
from lrc.sections import DataSection


class Sequences:
    """Packed text cut into sequences of one length; the last tokens that fill none are left out.

    Args:
        part: the packed text.
        sequence_length: tokens of a sequence.
        document_mask: give batches the positions that keep documents from attending to each other.
    """

    def __init__(self, part: PackedPart, sequence_length: int, document_mask: bool = False) -> None:
        self.sequence_length = sequence_length
        self.document_mask = document_mask
        dtype = np.dtype(part.dtype).newbyteorder("<")
        self._tokens = np.memmap(part.tokens_path, dtype, mode="r")
        self._offsets = np.memmap(part.offsets_path, OFFSET_DTYPE, mode="r")

    def __len__(self) -> int:
        """Number of whole sequences."""
        return len(self._tokens) // self.sequence_length

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences of these numbers: input_ids, and with a document mask position_ids, both
        int64 [len(indices), sequence_length].

        Raises:
            IndexError: a number is not in [0, len(self)).
        """
        if not all(0 <= index < len(self) for index in indices):
            raise IndexError(f"sequence numbers {list(indices)} are not all below {len(self)}")
        starts = [index * self.sequence_length for index in indices]
        rows = [self._tokens[start : start + self.sequence_length] for start in starts]
        input_ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        if not self.document_mask:
            return Batch(input_ids)
        positions = np.stack([self._positions(start) for start in starts])
        return Batch(input_ids, position_ids=torch.from_numpy(positions))

    def first(self, count: int, batch_size: int = 8) -> Iterator[Batch]:
        """The first `count` sequences (all where there are fewer) in their order, in batches."""
        count = min(count, len(self))
        for start in range(0, count, batch_size):
            yield self.batch(range(start, min(start + batch_size, count)))

    def _positions(self, start: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Position of each token in its document, or in the sequence where the document began
        before it: int64 [sequence_length]."""
        first, last = np.searchsorted(self._offsets, [start, start + self.sequence_length])
        begins = self._offsets[first:last] - start
        # The latest beginning at or before each token; the first token always counts as one.
        latest = np.zeros(self.sequence_length, np.int64)
        latest[begins] = begins
        return np.arange(self.sequence_length) - np.maximum.accumulate(latest)


class ShuffledOrder:
    """An endless stream of sequence numbers: epoch after epoch, each in an order of its own.

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
            missing = count - len(taken)
            taken.extend(self._order_of(epoch)[offset : offset + missing].tolist())
        return taken

    def _order_of(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The permutation of an epoch; the last one is kept."""
        if epoch != self._epoch:
            # Raw Philox numbers are the same in every version of numpy; `permutation` may change,
            # and a run resumed after an upgrade would then see some text twice.
            generator = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
            self._permutation = np.argsort(generator.random_raw(self._sequences), kind="stable")
            self._epoch = epoch
        return self._permutation


class TrainingText:
    """The text of a run as the training loop takes it.

    Args:
        packed: the packed text of `data`.
        data: the recipe's section.
        seed: decides the order of the training sequences.
    """

    def __init__(self, packed: PackedText, data: DataSection, seed: int) -> None:
        self.train = Sequences(packed.train, data.sequence_length, data.document_mask)
        self.held_out = Sequences(packed.held_out, data.sequence_length, data.document_mask)
        self._order = ShuffledOrder(len(self.train), seed)

    def training_batch(self, position: int, count: int) -> Batch:
        """The `count` training sequences that follow the first `position` ones of the run."""
        return self.train.batch(self._order.take(position, count))

    def held_out_batches(self, count: int, batch_size: int) -> Iterator[Batch]:
        """The first `count` held-out sequences in batches, the same at every call."""
        return self.held_out.first(count, batch_size)
