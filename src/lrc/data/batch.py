"""The tokens of one forward pass of teacher and student."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
        """Copy the batch to another device; copies to cuda use pinned memory and overlap with
        computation."""

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        moved = [None if tensor is None else move(tensor) for tensor in self._optional()]
        return Batch(move(self.input_ids), *moved)

    def rows(self, some: slice) -> "Batch":
        """Some sequences of the batch."""
        cut = [None if tensor is None else tensor[some] for tensor in self._optional()]
        return Batch(self.input_ids[some], *cut)

    def _optional(self) -> tuple[Tensor | None, ...]:
        """All fields but the tokens, in their order."""
        return (self.position_ids, self.attention_mask, self.source_ids, self.label_mask)

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
            labels[padded] = -100
            labels[:, :-1][padded[:, 1:]] = -100
        if self.position_ids is not None:
            labels[:, :-1][self.position_ids[:, 1:] == 0] = -100
        if self.label_mask is not None:
            labels[:, :-1][~self.label_mask[:, 1:]] = -100
        return labels

    def label_sources(self) -> Tensor | None:
        """Source index of each label token, int64 [batch, sequence]; -1 where there is no label;
        None if the text has no named sources."""
        if self.source_ids is None:
            return None
        following = torch.full_like(self.source_ids, -1)
        following[:, :-1] = self.source_ids[:, 1:]
        return following.masked_fill_(self.labels() < 0, -1)
