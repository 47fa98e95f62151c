"""The decisions that depend on all earlier documents: near-duplicates and budgets.

The main process makes them unit by unit in the order of the mix, regardless of which unit finishes
first. A resumed build makes the same decisions again from the units' results (about a minute for
10 million documents). Selected documents are written to disk, 24 bytes per document, so memory does
not grow with the input.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lrc.corpus import filters
from lrc.corpus.duplicates import SeenDocuments
from lrc.corpus.mix import Source
from lrc.corpus.unit import Count, Report, Result

SELECTED = np.dtype([("unit", "<u4"), ("length", "<i4"), ("offset", "<i8"), ("held_out", "<u1")])
"""A selected document: unit number, length in tokens, and offset in the unit's tokens."""

HISTOGRAM_BITS = 24
"""Lengths are counted by their number of binary digits: 1, 2-3, 4-7, ..."""

_RECORDS = 1 << 20
"""Documents read from disk at once."""


@dataclass
class Tally:
    """What happened to a source's documents so far."""

    read: Count = field(default_factory=Count)
    divided: int = 0
    dropped: dict[str, Count] = field(default_factory=dict)
    tokenized: Count = field(default_factory=Count)
    """All tokenized documents; used to estimate the tokens of the other documents."""

    train: Count = field(default_factory=Count)
    held_out: Count = field(default_factory=Count)
    repeated: Count = field(default_factory=Count)
    """Training documents added by `repeat`; included in `train`."""

    histogram: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(HISTOGRAM_BITS, dtype=np.int64)
    )
    """Number of documents by the binary digits of their length in tokens."""

    def add_report(self, report: Report) -> None:
        """Add what a unit's worker dropped."""
        self.read.add(**vars(report.read))
        self.divided += report.divided
        for name, count in report.dropped.items():
            self.dropped.setdefault(name, Count()).add(**vars(count))
            if count.tokens:
                self.tokenized.add(**vars(count))


class SourceSelection:
    """Selects the documents of one source.

    Args:
        source: the source.
        budget: training tokens to take from the source; None to take everything.
        seen: documents kept so far, of this and all earlier sources; None to keep duplicates.
        path: where the selected documents are written.
    """

    def __init__(
        self, source: Source, budget: int | None, seen: SeenDocuments | None, path: Path
    ) -> None:
        self._repeat = source.repeat
        self._budget = budget
        self._seen = seen
        self._path = path
        self.tally = Tally()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    @property
    def is_full(self) -> bool:
        """Whether the budget is met."""
        return self._budget is not None and self.tally.train.tokens >= self._budget

    def add(self, unit: int, result: Result) -> None:
        """Select from the next unit.

        Args:
            unit: number of the unit in the source.
            result: result of the unit.
        """
        self.tally.add_report(result.report)
        self.tally.tokenized.add(*_sums(result, np.ones(len(result.lengths), bool)))
        train_tokens = int(result.lengths[~result.held_out].sum())
        left = None if self._budget is None else self._budget - self.tally.train.tokens
        # If the budget may be met within the unit, take documents one by one: those after the
        # end must not count as seen.
        step = len(result.lengths) if left is None or train_tokens < left else 1
        new = np.zeros(len(result.lengths), bool)
        done, taken = 0, 0
        while done < len(new) and (left is None or taken < left):
            now = slice(done, done + step)
            new[now] = True if self._seen is None else self._seen.add_new(result.keys[now])
            taken += int(result.lengths[now][new[now] & ~result.held_out[now]].sum())
            done += step
        self._count(result, new, min(done, len(new)))
        with self._path.open("ab") as file:
            file.write(_records(unit, result, new).tobytes())

    def _count(self, result: Result, new: NDArray[np.bool_], done: int) -> None:
        """Count what happened to a unit's documents; the first `done` of them were examined."""
        tally = self.tally
        looked_at = np.arange(len(new)) < done
        for name, mask in (
            (filters.NEAR_DUPLICATES, looked_at & ~new),
            (filters.BUDGET, ~looked_at),
        ):
            if mask.any():
                tally.dropped.setdefault(name, Count()).add(*_sums(result, mask))
        tally.train.add(*_sums(result, new & ~result.held_out))
        tally.held_out.add(*_sums(result, new & result.held_out))
        tally.histogram += histogram(result.lengths[new])

    def finish(self) -> None:
        """Repeat documents if the source ran dry and the mix allows it."""
        size = self._path.stat().st_size
        for _ in range(self._repeat - 1):
            if self.is_full or not self.tally.train.tokens:
                return
            with self._path.open("rb") as known, self._path.open("ab") as more:
                self._repeat_once(known, size, more)

    def _repeat_once(self, known: BinaryIO, size: int, more: BinaryIO) -> None:
        assert self._budget is not None
        for records in read_records(known, size):
            train = records[records["held_out"] == 0]
            before = np.cumsum(train["length"], dtype=np.int64) - train["length"]
            train = train[before < self._budget - self.tally.train.tokens]
            more.write(train.tobytes())
            tokens = int(train["length"].sum())
            for count in (self.tally.train, self.tally.repeated):
                count.add(len(train), 0, tokens)
            self.tally.histogram += histogram(train["length"])


def read_records(file: BinaryIO, size: int | None = None) -> Iterator[NDArray[np.void]]:
    """Read the selected documents of a file (of its first `size` bytes) in chunks."""
    left = -1 if size is None else size
    while left:
        wanted = _RECORDS * SELECTED.itemsize
        data = file.read(wanted if left < 0 else min(wanted, left))
        if not data:
            return
        left = left if left < 0 else left - len(data)
        yield np.frombuffer(data, SELECTED)


def histogram(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Number of documents by the binary digits of their length, [HISTOGRAM_BITS]."""
    digits = np.frexp(lengths.astype(np.float64))[1]
    return np.bincount(np.minimum(digits, HISTOGRAM_BITS) - 1, minlength=HISTOGRAM_BITS)


def _records(unit: int, result: Result, new: NDArray[np.bool_]) -> NDArray[np.void]:
    offsets = np.cumsum(result.lengths) - result.lengths
    records = np.zeros(int(new.sum()), SELECTED)
    records["unit"] = unit
    records["length"] = result.lengths[new]
    records["offset"] = offsets[new]
    records["held_out"] = result.held_out[new]
    return records


def _sums(result: Result, mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Number of documents, characters and tokens of a subset of a unit's documents."""
    characters, tokens = result.characters[mask].sum(), result.lengths[mask].sum()
    return int(mask.sum()), int(characters), int(tokens)
