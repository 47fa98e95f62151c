"""Overlap with evaluation sets: runs of words that occur in both (13 words, as for GPT-3).

Every text field of every item counts separately, at any depth: questions, choices, passages,
answers. Texts with fewer words than a run cannot be found this way; the report counts the items
without a long enough text. Hash matches are verified word by word, so a hash collision never drops
a document.
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
"""A hash is looked up only if the sieve contains its lowest bits, which saves 19 of 20 lookups."""

_BATCH = 1 << 10
"""Evaluation set texts hashed at once."""


class Overlap(NamedTuple):
    """What a document shares with an evaluation set."""

    text: int
    """Index of the document in its batch."""

    evaluation_set: str
    run: str
    """The shared words, normalized."""


@dataclass(frozen=True)
class EvaluationSet:
    """What the index knows about one evaluation set."""

    items: int
    too_short: int
    """Items without a text long enough to be found."""


class OverlapIndex:
    """The runs of words of evaluation sets, as written by `write_index`.

    Args:
        folder: the folder that `write_index` wrote to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._words = json.loads((folder / "sets.json").read_text())["words"]
        # Memory-mapped, so that all processes share one copy.
        self._hashes: Hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._owners = np.load(folder / "owners.npy", mmap_mode="r")
        self._sieve: NDArray[np.uint8] = np.load(folder / "sieve.npy", mmap_mode="r")

    def find(self, texts: list[str], words: Words) -> list[Overlap]:
        """The first overlap of every text that has one, in the order of the texts.

        Args:
            texts: the texts of a batch.
            words: result of `hash_words` for the texts.
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
        """Every text of the sets, as set name and words; read only on the first hit."""
        return json.loads((self._folder / "texts.json").read_text(encoding="utf-8"))


def write_index(sets: Path, words: int, folder: Path) -> dict[str, EvaluationSet]:
    """Index the runs of words of evaluation sets.

    Args:
        sets: folder of JSONL files, one per set.
        words: words per run.
        folder: where the index is written.

    Returns:
        What was found, by set name.

    Raises:
        UserError: if the folder does not exist, contains no set, or a set cannot be read.
    """
    texts: list[tuple[str, str]] = []
    found = {}
    for path in evaluation_files(sets):
        name = path.name
        for suffix in (*COMPRESSED_SUFFIXES, *JSONL_SUFFIXES):
            name = name.removesuffix(suffix)
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
        UserError: if the folder does not exist or contains no evaluation set.
    """
    plain = tuple(JSONL_SUFFIXES)
    endings = plain + tuple(a + b for a in plain for b in COMPRESSED_SUFFIXES)
    files = sorted(sets.iterdir()) if sets.is_dir() else []
    files = [file for file in files if file.name.lower().endswith(endings)]
    if not files:
        raise UserError(
            f"The folder '{sets}' contains no evaluation sets; set decontaminate.folder to a "
            "folder of JSONL files, one per set."
        )
    return files


def _texts_of(value: Any) -> Iterator[str]:
    """All texts inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_of(inner)
