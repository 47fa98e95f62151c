"""Near-duplicates: MinHash signatures by rensa, compared band by band in bounded memory.

Why rensa: of the maintained libraries it is by far the fastest (2 million hashed runs in 0.02 s on
one core, less than 1% of the time to tokenize their text), it is one small wheel, and it accepts
hashes, so that numpy hashes the runs of words once. datasketch needs Python calls for every run.
datatrove passes all documents through its own pipeline several times, so a budget cannot stop
reading early. The in-memory index of either library (and rensa's own) grows by roughly 300 bytes to
2 KB per document.

The index here is a Bloom filter over the bands' keys (LSHBloom, arXiv 2411.04257). It takes 24 bits
per key: 42 bytes per document with 14 bands. 10 billion tokens (10 million documents) take 420 MB.
The cost is that a document may be classified as a duplicate by accident: each of the 14 bands has
one chance in 24,000, so at most 6 documents in 10,000 are lost once a filter is full. The expected
number of such mistakes is counted and reported.
"""

import math

import numpy as np
import rensa
from numpy.typing import NDArray

from lrc.corpus.mix import Deduplicate
from lrc.corpus.words import Hashes, Words, mix, normalize
from lrc.data.identity import text_hash

_SEED = 1
_BITS_OF_KEY = 24
_PROBES = 8
_FIRST_BYTES = 1 << 24
"""Size of the first filter: 400,000 documents."""

_GROWTH = 4
"""Size of each filter relative to the previous one."""

_CHUNK = 1 << 13
"""Documents looked up at once."""


def band_keys(texts: list[str], words: Words, settings: Deduplicate) -> Hashes:
    """A key for every band of every text's signature, [texts, bands].

    A text shorter than a run counts as one run of all its words.
    """
    runs, first = words.runs(settings.words)
    counts = np.diff(first)
    short = np.flatnonzero(counts == 0)
    whole = [text_hash(" ".join(normalize(texts[i])) or texts[i]) for i in short.tolist()]
    flat = np.insert(runs, first[short], np.array(whole, np.uint64))
    offsets = np.concatenate([[0], np.cumsum(np.maximum(counts, 1))]).astype(np.uint64)
    size = settings.bands * settings.rows
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, size, _SEED)
    signatures = np.array(matrix.to_rows(), np.uint64)
    signatures = signatures.reshape(len(texts), settings.bands, settings.rows)
    keys = np.broadcast_to(np.arange(settings.bands, dtype=np.uint64), signatures.shape[:2])
    for row in range(settings.rows):
        keys = mix(keys + mix(signatures[:, :, row] + np.uint64(row + 1)))
    return keys


class SeenDocuments:
    """The documents kept so far, by their keys; documents arrive in the order of the mix.

    Args:
        settings: the deduplication settings of the mix.
    """

    def __init__(self, settings: Deduplicate) -> None:
        self._bytes_left = settings.memory_mib << 20
        self._filters: list[_Filter] = []
        self.mistakes = 0.0
        """Expected number of documents classified as duplicates by accident."""

    def add_new(self, keys: Hashes) -> NDArray[np.bool_]:
        """Find and keep the documents that are not near-duplicates of documents kept earlier.

        Args:
            keys: keys from `band_keys`, [documents, bands].

        Returns:
            [documents], true where a document is kept.
        """
        chunks = [self._add_chunk(keys[i : i + _CHUNK]) for i in range(0, len(keys), _CHUNK)]
        return np.concatenate(chunks) if chunks else np.zeros(0, bool)

    def _add_chunk(self, keys: Hashes) -> NDArray[np.bool_]:
        seen = np.zeros(keys.shape, bool)
        passes = 1.0
        for filter_ in self._filters:
            seen |= filter_.contains(keys)
            passes *= 1 - filter_.accident()
        kept: NDArray[np.bool_] = np.logical_not(seen.any(axis=1))
        passes **= keys.shape[1]
        new = int(kept.sum()) / passes if passes else math.inf  # without accidents
        self.mistakes += min(len(kept), new) - int(kept.sum())
        _drop_repeats(keys, kept)
        self._filter(int(kept.sum()) * keys.shape[1]).add(keys[kept])
        return kept

    def _filter(self, keys: int) -> "_Filter":
        """The filter to which the next keys are added."""
        full = not self._filters or self._filters[-1].keys + keys > self._filters[-1].capacity
        if full and self._bytes_left:
            wanted = len(self._filters[-1].bits) * _GROWTH if self._filters else _FIRST_BYTES
            size = min(wanted, self._bytes_left)
            self._bytes_left -= size
            self._filters.append(_Filter(size))
        return self._filters[-1]


class _Filter:
    """A Bloom filter over 64-bit keys."""

    def __init__(self, size: int) -> None:
        self.bits = np.zeros(size, np.uint8)
        self.capacity = size * 8 // _BITS_OF_KEY
        self.keys = 0

    def contains(self, keys: Hashes) -> NDArray[np.bool_]:
        """Whether each key was added (or appears to be, by accident); same shape as `keys`."""
        found = np.ones(keys.shape, bool)
        for probe in range(_PROBES):
            byte, bit = self._place(keys, probe)
            found &= (self.bits[byte] & bit) != 0
        return found

    def add(self, keys: Hashes) -> None:
        """Add keys."""
        flat = keys.ravel()
        for probe in range(_PROBES):
            byte, bit = self._place(flat, probe)
            np.bitwise_or.at(self.bits, byte, bit)
        self.keys += len(flat)

    def accident(self) -> float:
        """The probability that a key that was never added appears to be present."""
        return float(-np.expm1(-_PROBES * self.keys / (len(self.bits) * 8))) ** _PROBES

    def _place(self, keys: Hashes, probe: int) -> tuple[Hashes, NDArray[np.uint8]]:
        step = keys >> np.uint64(32) | np.uint64(1)
        place = (keys + np.uint64(probe) * step) % np.uint64(len(self.bits) * 8)
        return place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)


def _drop_repeats(keys: Hashes, kept: NDArray[np.bool_]) -> None:
    """Drop documents that share a key with an earlier kept document of the same chunk."""
    documents = np.flatnonzero(kept)
    _, inverse, counts = np.unique(keys[documents], return_inverse=True, return_counts=True)
    shared = counts[inverse].reshape(len(documents), keys.shape[1]) > 1
    taken: set[int] = set()
    for row in np.flatnonzero(shared.any(axis=1)).tolist():
        document = documents[row]
        own = keys[document][shared[row]].tolist()
        if taken.isdisjoint(own):
            taken.update(own)
        else:
            kept[document] = False
