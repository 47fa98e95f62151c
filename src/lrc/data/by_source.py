"""The LM loss of each source of the text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrc.data.batch import Batch


class SourceLosses:
    """Accumulates token losses by source.

    Args:
        names: the sources, in the order of their indices.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.totals: dict[str, Tensor] = {}
        """The sums and the numbers of tokens [sources], on the losses' device; empty if nothing was
        added."""

    def add(self, losses: Tensor, sources: Tensor) -> None:
        """Add the losses of tokens.

        Args:
            losses: losses in nats, any shape.
            sources: source index of each token, int64, same shape; tokens with negative indices
                are not counted.
        """
        numbers = torch.arange(len(self.names), device=losses.device)
        # One row per source: sums by index are not reproducible on a GPU.
        of_source = sources.flatten() == numbers[:, None]
        sums = torch.where(of_source, losses.detach().flatten(), 0).sum(1)
        self.merge({"source_sums": sums, "source_counts": of_source.sum(1)})

    def add_batch(self, losses: Tensor | None, batch: Batch) -> None:
        """Add the losses of a batch, by the source of each label token.

        Args:
            losses: LM loss of every position, [batch, sequence]; if None (unknown), nothing is
                added.
            batch: the batch; if it has no source indices, nothing is added.
        """
        sources = batch.label_sources()
        if losses is not None and sources is not None:
            self.add(losses, sources)

    def merge(self, totals: Mapping[str, Tensor]) -> None:
        """Add the `totals` of other losses."""
        for name, value in totals.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value

    def report(self, prefix: str = "") -> dict[str, Any]:
        """Metrics entries: `lm_by_source`, in nats, and `labels_by_source`, the number of tokens in
        each mean; empty if nothing was added."""
        means = self.means()
        if not means:
            return {}
        return {f"{prefix}lm_by_source": means, f"{prefix}labels_by_source": self.labels()}

    def means(self) -> dict[str, float]:
        """Mean token loss of each source that has tokens."""
        sums = self.totals["source_sums"].tolist() if self.totals else []
        counts = self.labels()
        by_name = zip(self.names, sums, strict=False)
        return {name: total / counts[name] for name, total in by_name if name in counts}

    def labels(self) -> dict[str, int]:
        """Number of tokens added for each source that has tokens."""
        counts = self.totals["source_counts"].tolist() if self.totals else []
        return {name: n for name, n in zip(self.names, counts, strict=False) if n}
