"""The tokens of one forward pass of teacher and student."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Batch:
    """Sequences of one micro-batch."""

    input_ids: Tensor
    """Token ids, int64 [batch, sequence]."""

    position_ids: Tensor | None = None
    """Positions that restart at 0 in every document, int64 [batch, sequence]; transformers treats
    the restarts as document boundaries and lets no token attend across them. None: positions
    0, 1, ... and one causal mask over the whole sequence."""

    attention_mask: Tensor | None = None
    """1 for tokens and 0 for padding, int64 [batch, sequence]; None if nothing is padded."""

    source_ids: Tensor | None = None
    """Source index of each token, int64 [batch, sequence]; None if the text has no named
    sources."""

    label_mask: Tensor | None = None
    """True for tokens that may be labels, bool [batch, sequence]; None: all may be."""

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to another device; from pinned memory, the copy overlaps with other
        work."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the batch to memory that CUDA can read on its own."""
        return self._each(torch.Tensor.pin_memory)

    def copy(self) -> "Batch":
        """A copy in memory of its own."""
        return self._each(torch.Tensor.clone)

    def fill(self, other: "Batch") -> None:
        """Overwrite the batch with another of the same `shapes`."""
        for ours, theirs in zip(self._all(), other._all(), strict=True):
            if ours is not None and theirs is not None:
                ours.copy_(theirs, non_blocking=True)

    def shapes(self) -> tuple[torch.Size | None, ...]:
        """The shape of every field; None where there is none."""
        return tuple(None if tensor is None else tensor.shape for tensor in self._all())

    def rows(self, some: slice) -> "Batch":
        """Some sequences of the batch."""
        return self._each(lambda tensor: tensor[some])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed = [None if tensor is None else change(tensor) for tensor in self._optional()]
        return Batch(change(self.input_ids), *changed)

    def split_documents(self) -> "list[Batch]":
        """Every document, or its part in a sequence, as a padded sequence of its own, for models
        that cannot keep the documents of a sequence apart. Requires `position_ids`.

        Sequences of similar length share a batch, so little is padded, and no batch has more
        places than this one.
        """
        assert self.position_ids is not None
        pieces = []
        for row, positions in enumerate(self.position_ids):
            starts = (positions == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], len(positions)]
            pieces += [(row, slice(*part)) for part in zip(starts, ends, strict=True)]
        pieces.sort(key=lambda piece: piece[1].start - piece[1].stop)
        batches = []
        while pieces:
            longest = pieces[0][1].stop - pieces[0][1].start
            rows = max(1, self.input_ids.numel() // longest)
            some, pieces = pieces[:rows], pieces[rows:]
            batches.append(self._padded(some))
        return batches

    def _padded(self, pieces: list[tuple[int, slice]]) -> "Batch":
        """Parts of rows as rows, padded at their ends."""

        def rows(tensor: Tensor) -> Tensor:
            return pad_sequence([tensor[row, part] for row, part in pieces], batch_first=True)

        sources = None if self.source_ids is None else rows(self.source_ids)
        mask = rows(torch.ones_like(self.input_ids))
        labels = None if self.label_mask is None else rows(self.label_mask)
        return Batch(rows(self.input_ids), None, None if mask.all() else mask, sources, labels)

    def _optional(self) -> tuple[Tensor | None, ...]:
        """All fields but the tokens, in their order."""
        return (self.position_ids, self.attention_mask, self.source_ids, self.label_mask)

    def _all(self) -> tuple[Tensor | None, ...]:
        return self.input_ids, *self._optional()

    def token_mask(self) -> Tensor | None:
        """Bool [batch, sequence], true where a token is not padding; None if nothing is padded."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    def first_tokens(self) -> Tensor:
        """Bool [batch, sequence], true where a token sees no earlier token: at the start of each
        sequence, and of each document if documents are masked from each other."""
        if self.position_ids is not None:
            return self.position_ids == 0
        first = torch.zeros_like(self.input_ids, dtype=torch.bool)
        if self.attention_mask is None:
            first[:, 0] = True
            return first
        return first.scatter_(1, self.attention_mask.argmax(1, keepdim=True), True)

    def labels(self) -> Tensor:
        """Next tokens, int64 [batch, sequence]; -100 where there is no label: at the end of a
        sequence, where this or the next token is padding, across a document boundary if documents
        are masked from each other, and where `label_mask` excludes the next token."""
        labels = torch.full_like(self.input_ids, -100)
        labels[:, :-1] = self.input_ids[:, 1:]
        if self.attention_mask is not None:
            padded = self.attention_mask == 0
            labels.masked_fill_(padded, -100)
            labels[:, :-1].masked_fill_(padded[:, 1:], -100)
        if self.position_ids is not None:
            labels[:, :-1].masked_fill_(self.position_ids[:, 1:] == 0, -100)
        if self.label_mask is not None:
            labels[:, :-1].masked_fill_(~self.label_mask[:, 1:], -100)
        return labels

    def label_sources(self) -> Tensor | None:
        """Source index of each label token, int64 [batch, sequence]; -1 where there is no label;
        None if the text has no named sources."""
        if self.source_ids is None:
            return None
        following = torch.full_like(self.source_ids, -1)
        following[:, :-1] = self.source_ids[:, 1:]
        return following.masked_fill_(self.labels() < 0, -1)


def separated(batches: Iterable[Batch], keeps_apart: bool) -> Iterator[Batch]:
    """Batches with masked documents in sequences of their own, for models that cannot keep the
    documents of a sequence apart.

    Args:
        batches: the batches.
        keeps_apart: whether the models can.
    """
    for batch in batches:
        if keeps_apart or batch.position_ids is None:
            yield batch
        else:
            yield from batch.split_documents()
