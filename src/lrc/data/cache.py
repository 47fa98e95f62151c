"""Tokenized text on disk: the files of a cache folder, and how the folder is created atomically.

A folder contains, for both `train` and `held_out`, `NAME.bin` (token ids end to end) and
`NAME.offsets.bin` (where each document begins), plus `index.json`, which is written last. It is
built in a temporary folder next to its final location and renamed once everything is on disk, so
neither a killed nor a concurrent build can leave a partial cache that looks complete. If several
processes build the same cache at once, the first one wins and the others' work is lost: let one
process build and the others wait.
"""

import errno
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrc.system.checksums import file_sha256, remembered
from lrc.system.files import disk_errors, flush

FORMAT = 2
"""Increase it when the same inputs would give other files; caches in old formats are ignored."""

INDEX = "index.json"
OFFSET_DTYPE = np.dtype("<i8")

_ABANDONED_SECONDS = 24 * 3600
"""A build that has written nothing for this long was killed; the next build removes its folder."""


@dataclass(frozen=True)
class PackedPart:
    """One split: the tokens of all its documents, end to end."""

    folder: Path
    name: str
    """`train` or `held_out`."""

    dtype: str
    """Element type of the tokens: uint16, or uint32 for vocabularies beyond 65,536."""

    tokens: int
    documents: int

    @property
    def tokens_path(self) -> Path:
        """Path of the token ids, [tokens]."""
        return self.folder / f"{self.name}.bin"

    @property
    def offsets_path(self) -> Path:
        """Path of the positions of each document's first token, ascending int64 [documents]."""
        return self.folder / f"{self.name}.offsets.bin"

    def file_names(self) -> tuple[str, str]:
        """Names of the two files."""
        return self.tokens_path.name, self.offsets_path.name

    def is_whole(self) -> bool:
        """Whether both files have the sizes that the counts imply."""
        return (
            self.tokens_path.stat().st_size == self.tokens * np.dtype(self.dtype).itemsize
            and self.offsets_path.stat().st_size == self.documents * OFFSET_DTYPE.itemsize
        )


@dataclass(frozen=True)
class PackedText:
    """Tokenized text, split into training and held-out documents."""

    folder: Path
    train: PackedPart
    held_out: PackedPart
    sha256: dict[str, str]
    """Checksum of every file, by file name."""


class PartWriter:
    """Writes the two files of one part, a few documents at a time."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        part = PackedPart(folder, name, dtype, tokens=0, documents=0)
        self._hashes = {path: hashlib.sha256() for path in (part.tokens_path, part.offsets_path)}
        for path in self._hashes:
            path.touch()
        self.tokens = 0
        self.documents = 0

    def write(self, documents: Sequence[Sequence[int]]) -> None:
        """Append the token ids of some documents."""
        lengths = np.fromiter(map(len, documents), np.int64, count=len(documents))
        ids = np.fromiter(chain.from_iterable(documents), self._dtype, count=int(lengths.sum()))
        self.write_array(ids, lengths)

    def write_array(self, ids: NDArray[Any], lengths: NDArray[np.integer[Any]]) -> None:
        """Append documents given end to end.

        Args:
            ids: token ids of all documents, [tokens].
            lengths: number of tokens of each document, [documents].
        """
        starts = self.tokens + np.cumsum(lengths, dtype=OFFSET_DTYPE) - lengths
        arrays = (ids.astype(self._dtype, copy=False), starts.astype(OFFSET_DTYPE, copy=False))
        for (path, checksum), array in zip(self._hashes.items(), arrays, strict=True):
            data = array.tobytes()
            checksum.update(data)
            with path.open("ab") as file:
                file.write(data)
        self.tokens += len(ids)
        self.documents += len(lengths)

    def entry(self) -> dict[str, Any]:
        """The index entry of the part."""
        checksums = {path.name: checksum.hexdigest() for path, checksum in self._hashes.items()}
        return {"tokens": self.tokens, "documents": self.documents, "sha256": checksums}


def cache_key(inputs: dict[str, Any]) -> str:
    """Name of the cache folder for these inputs (JSON values)."""
    text = json.dumps({"format": FORMAT, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_cache(folder: Path) -> PackedText | None:
    """The cache in a folder, or None if there is none or it is damaged."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        train, held_out = (
            PackedPart(folder, name, index["dtype"], part["tokens"], part["documents"])
            for name, part in ((n, index["parts"][n]) for n in ("train", "held_out"))
        )
        sha256 = {**index["parts"]["train"]["sha256"], **index["parts"]["held_out"]["sha256"]}
        whole = index["format"] == FORMAT and train.is_whole() and held_out.is_whole()
        # Checksums are computed only once for an unchanged file.
        for name, checksum in sha256.items():
            whole = whole and remembered(folder / name, "sha256", file_sha256) == checksum
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return PackedText(folder, train, held_out, sha256) if whole else None


@contextmanager
def new_cache(folder: Path) -> Iterator[Path]:
    """Build a cache: yields an empty folder, which becomes `folder` when the block succeeds.

    If the block fails, nothing of the build remains. Unlike `lrc.system.files.new_folder`, this
    keeps a complete cache that already exists, because other processes may be reading it.

    Raises:
        UserError: if the disk is full, or the folder cannot be written.
    """
    building = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with disk_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            building.mkdir()
            yield building
            for path in (*building.iterdir(), building):
                flush(path)
            _put_in_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_index(folder: Path, dtype: str, parts: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Write `index.json`; `parts` has the `PartWriter` entry of each part."""
    index = {"format": FORMAT, "dtype": dtype, "parts": parts, "inputs": inputs}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _put_in_place(building: Path, folder: Path) -> None:
    """Rename a finished build; keep a complete cache that another process created meanwhile."""
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if open_cache(folder) is not None:
            return
        shutil.rmtree(folder)
        building.rename(folder)
    flush(folder.parent)


def _remove_abandoned(folder: Path) -> None:
    """Remove the remains of killed builds of this cache."""
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        try:
            changed = max(path.stat().st_mtime for path in [left, *left.iterdir()])
        except OSError:
            continue  # The process that owns it has just removed it.
        if changed < time.time() - _ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
