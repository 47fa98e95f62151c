"""The micro-batches of every step, read ahead of time where a device computes in the meantime."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from lrc.cloning.method import Counts
from lrc.data import Reader, Share
from lrc.data.batch import Batch, separated
from lrc.recipe.sections import TrainSection


@dataclass(frozen=True)
class StepBatches:
    """What one optimizer step reads."""

    batches: list[Batch]
    counts: Counts
    text_state: dict[str, Any]
    """The state of the text after these batches."""


@dataclass
class BatchReader:
    """Reads the micro-batches of one step after another. Their order depends only on the step."""

    text: Reader
    train: TrainSection
    share: Share
    """The share of every step's sequences that this process takes."""
    first_sequence: int
    """The sequence that step 0 begins with."""
    device: torch.device
    keeps_documents_apart: bool
    """Whether the models keep the documents of a sequence apart."""
    reads_ahead: bool
    """Whether to read the next step's batches in a thread, while the device works on the present
    ones. Not if something between two steps changes what is read."""
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _taken: StepBatches | None = None
    _next: tuple[int, "Future[StepBatches]"] | None = None

    def take(self, step: int, is_last: bool = False) -> StepBatches:
        """The batches of a step, on the device.

        Args:
            step: number of completed steps of the run.
            is_last: whether no other step will follow.
        """
        if self._next is not None and self._next[0] == step:
            found = self._next[1].result()
        else:
            found = self._read(step)
        self._taken, self._next = found, None
        if self.reads_ahead and not is_last:
            self._next = step + 1, self._thread.submit(self._read, step + 1)
        batches = [batch.to(self.device) for batch in found.batches]
        return StepBatches(batches, found.counts, found.text_state)

    def text_state(self) -> dict[str, Any]:
        """The state of the text after the last step's batches, for a checkpoint."""
        if self.reads_ahead and self._taken:
            return self._taken.text_state
        return self.text.state()

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()

    def _read(self, step: int) -> StepBatches:
        size = self.train.micro_batch
        own = self.share.positions(step, self.train.step_sequences())
        read = (
            self.text.training_batch(self.first_sequence + first, min(size, own.stop - first))
            for first in range(own.start, own.stop, size)
        )
        batches = list(separated(read, self.keeps_documents_apart))
        counts = count(batches)
        if self.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        return StepBatches(batches, counts, self.text.state())


def count(batches: Sequence[Batch]) -> Counts:
    """Tokens and labels of all micro-batches of a step."""
    tokens = sum(
        int(b.input_ids.numel() if b.attention_mask is None else b.attention_mask.sum())
        for b in batches
    )
    return Counts(tokens, sum(int((b.labels() >= 0).sum()) for b in batches))
