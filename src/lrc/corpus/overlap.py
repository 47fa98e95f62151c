"""Overlap with evaluation sets: runs of words that stand in both (13 words, as for GPT-3).

Every field of text of every item counts, by itself and as deep as it lies: questions, choices,
passages, answers. Texts of fewer words than a run cannot be found this way; the report counts the
items that have none that is long enough. A hash that is found is compared word by word, so that
nothing is dropped for an accident of hashing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrc.corpus.words import Hashes, Words, hash_words, normalize
from lrc.data.sources import JSONL_SUFFIXES
from lrc.data.text_files import COMPRESSED_SUFFIXES, json_lines
from lrc.system.errors import UserError
from lrc.system.files import new_file, write_text

_SIEVE_BITS = 26
"""A hash is looked up only where the sieve has its lowest bits: it spares 19 of 20 lookups."""

_BATCH = 1 << 10
"""Texts of evaluation sets that are hashed at once."""


class Overlap(NamedTuple):
    """What a document shares with an evaluation set."""

    text: int
    """Index of the document in its batch."""

    evaluation_set: str
    run: str
    """The words that both have, normalized."""


@dataclass(frozen=True)
class EvaluationSet:
    """What the index holds of one evaluation set."""

    items: int
    too_short: int
    """Items without a text that is long enough to be found."""


class OverlapIndex:
    """The runs of words of some evaluation sets, as `write_index` left them.

    Args:
        folder: the folder that `write_index` wrote to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._words = json.loads((folder / "sets.json").read_text())["words"]
        # Mapped, so that all processes share one copy.
        self._hashes: Hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._owners = np.load(folder / "owners.npy", mmap_mode="r")
        self._sieve: NDArray[np.uint8] = np.load(folder / "sieve.npy", mmap_mode="r")

    def find(self, texts: list[str], words: Words) -> list[Overlap]:
        """The first overlap of every text that has one, in the order of the texts.

        Args:
            texts: the texts of a batch.
            words: what `hash_words` gave for them.
        """
        runs, first = words.runs(self._words)
        low = runs & np.uint64((1 << _SIEVE_BITS) - 1)
        candidates = np.flatnonzero(self._sieve[low >> np.uint64(3)] >> (low & np.uint64(7)) & 1)
        places = np.searchsorted(self._hashes, runs[candidates])
        places = np.minimum(places, len(self._hashes) - 1)
        hits = self._hashes[places] == runs[candidates] if len(self._hashes) else candidates < 0
        found: dict[int, Overlap] = {}
        for run, place in zip(candidates[hits].tolist(), places[hits].tolist(), strict=True):
            text = int(np.searchsorted(first, run, side="right")) - 1
            if text in found:
                continue
            name, item = self._texts[self._owners[place]]
            start = run - int(first[text])
            shared = " ".join(normalize(texts[text])[start : start + self._words])
            if f" {shared} " in f" {item} ":
                found[text] = Overlap(text, name, shared)
        return list(found.values())

    @cached_property
    def _texts(self) -> list[tuple[str, str]]:
        """Every text of the sets: the set's name, and its words; read at the first hit only."""
        return json.loads((self._folder / "texts.json").read_text(encoding="utf-8"))


def write_index(sets: Path, words: int, folder: Path) -> dict[str, EvaluationSet]:
    """Index the runs of words of evaluation sets.

    Args:
        sets: folder of JSONL files, one a set.
        words: words of a run.
        folder: where the index is written.

    Returns:
        What was found, by the name of the set.

    Raises:
        UserError: there is no such folder, it holds no set, or one cannot be read.
    """
    texts: list[tuple[str, str]] = []
    found = {}
    for path in evaluation_files(sets):
        name = path.name.partition(".")[0]
        items = too_short = 0
        for _, item in json_lines(path):
            items += 1
            normal = [normalize(text) for text in _texts_of(item)]
            long = [" ".join(one) for one in normal if len(one) >= words]
            too_short += not long
            texts += [(name, text) for text in long]
        found[name] = EvaluationSet(items, too_short)
    hashes: list[Hashes] = []
    owners: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), _BATCH):
        batch = [text for _, text in texts[start : start + _BATCH]]
        runs, first = hash_words(batch).runs(words)
        hashes.append(runs)
        numbers = np.arange(start, start + len(batch), dtype=np.int32)
        owners.append(np.repeat(numbers, np.diff(first)))
    flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    unique, places = np.unique(flat, return_index=True)
    owner = np.concatenate(owners)[places] if owners else np.empty(0, np.int32)
    low = unique & np.uint64((1 << _SIEVE_BITS) - 1)
    sieve = np.zeros(1 << (_SIEVE_BITS - 3), np.uint8)
    np.bitwise_or.at(sieve, low >> np.uint64(3), np.uint8(1) << (low & np.uint64(7)).astype("u1"))
    for stem, array in (("hashes", unique), ("owners", owner), ("sieve", sieve)):
        with new_file(folder / f"{stem}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)
    write_text(folder / "texts.json", json.dumps(texts))
    write_text(folder / "sets.json", json.dumps({"words": words}))
    return found


def evaluation_files(sets: Path) -> list[Path]:
    """The files of the evaluation sets in a folder, in order.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    plain = tuple(JSONL_SUFFIXES)
    endings = plain + tuple(a + b for a in plain for b in COMPRESSED_SUFFIXES)
    files = sorted(sets.iterdir()) if sets.is_dir() else []
    files = [file for file in files if file.name.lower().endswith(endings)]
    if not files:
        raise UserError(
            f"The folder '{sets}' holds no evaluation sets; name a folder of JSONL files in "
            "decontaminate.folder, one a set."
        )
    return files


def _texts_of(value: Any) -> Iterator[str]:
    """All texts inside JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_of(inner)
