"""Write the selected documents into shards, in an order drawn from the seed.

Every document gets a random shard and a random position in it. Sources are therefore mixed across
all shards as if all documents had been shuffled, and shards are only approximately equal in size.
Any process can write any shard independently from the units' results.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrc.corpus.draw import draw
from lrc.corpus.pieces import Unit
from lrc.corpus.selection import read_records
from lrc.corpus.workspace import Workspace
from lrc.data.shards import (
    SPLITS,
    Shard,
    ShardWriter,
    Split,
    shard_entry,
    shard_of_entry,
)
from lrc.system.errors import UserError
from lrc.system.files import disk_errors, flush, write_text

PLACED = np.dtype(
    [("key", "<u8"), ("source", "<u2"), ("unit", "<u4"), ("offset", "<i8"), ("length", "<i4")]
)
"""A document of a shard: its position in the order, and where its tokens are."""

WINDOW_TOKENS = 1 << 22
"""Tokens held in memory at once."""


@dataclass(frozen=True)
class ShardPlan:
    """A shard to write."""

    stem: str
    split: Split


def place_documents(
    space: Workspace, sources: int, tokens: dict[Split, int], shard_tokens: int, seed: int
) -> list[ShardPlan]:
    """Draw a shard and a position for every selected document.

    Args:
        space: the build's workspace.
        sources: number of sources.
        tokens: total tokens of each split.
        shard_tokens: approximate number of tokens per shard.
        seed: seed of the draw.

    Returns:
        The shards to write; the documents of each are listed in the workspace.
    """
    counts = {s: max(1, round(n / shard_tokens)) if n else 0 for s, n in tokens.items()}
    plans = [ShardPlan(f"{s}-{i:05d}", s) for s, count in counts.items() for i in range(count)]
    for plan in plans:
        path = space.documents(plan.stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    drawn = dict.fromkeys(SPLITS, 0)
    for source in range(sources):
        with space.selection(source).open("rb") as file:
            for records in read_records(file):
                for side, split in enumerate(SPLITS):
                    chosen = records[records["held_out"] == side]
                    _place(space, chosen, source, split, counts[split], drawn[split], seed)
                    drawn[split] += len(chosen)
    return plans


def _place(
    space: Workspace,
    records: NDArray[np.void],
    source: int,
    split: Split,
    count: int,
    drawn: int,
    seed: int,
) -> None:
    """Append documents to the files of their shards; `drawn` documents were placed before."""
    if not len(records):
        return
    numbers = np.arange(drawn, drawn + len(records), dtype=np.uint64)
    placed = np.zeros(len(records), PLACED)
    placed["key"] = draw(numbers, seed)
    placed["source"] = source
    for name in ("unit", "offset", "length"):
        placed[name] = records[name]
    shards = draw(numbers, seed, again=1) % np.uint64(count)
    order = np.argsort(shards, kind="stable")
    ends = np.cumsum(np.bincount(shards.astype(np.int64), minlength=count))
    for shard, part in enumerate(np.split(placed[order], ends[:-1])):
        if len(part):
            with space.documents(f"{split}-{shard:05d}").open("ab") as file:
                file.write(part.tobytes())


def make_shard(folder: Path, out: Path, plan: ShardPlan, dtype: str, sources: list[str]) -> None:
    """Write one shard into `out`, and its index entry into the workspace.

    Args:
        folder: the build's workspace.
        out: the shards folder.
        plan: the shard to write.
        dtype: element type of the tokens.
        sources: names of all sources.

    Raises:
        UserError: if the disk is full.
    """
    space = Workspace(folder)
    documents = np.fromfile(space.documents(plan.stem), PLACED)
    documents = documents[np.argsort(documents["key"], kind="stable")]
    writing = folder / "shards" / f"{plan.stem}.{os.getpid()}.tmp"
    with disk_errors(out / plan.stem):
        writing.mkdir(parents=True, exist_ok=True)
        for left in writing.iterdir():
            left.unlink()
        writer = ShardWriter(writing, plan.stem, dtype, plan.split, sources)
        for window in _windows(documents):
            tokens = gather(space, window, dtype)
            writer.write(tokens, window["length"], window["source"])
        shard = writer.close()
        for name in shard.sha256:
            os.replace(writing / name, out / name)
        flush(out)
        writing.rmdir()
    write_text(space.shard(plan.stem), json.dumps(shard_entry(shard)))


def made_shard(space: Workspace, out: Path, plan: ShardPlan, dtype: str) -> Shard | None:
    """A shard that is already finished, or None."""
    try:
        shard = shard_of_entry(out, dtype, json.loads(space.shard(plan.stem).read_text()))
        shard.check_sizes()
    except (OSError, UserError):
        return None
    return shard


def gather(
    space: Workspace, documents: NDArray[np.void], dtype: str
) -> NDArray[np.unsignedinteger]:
    """The token ids of documents, end to end in the given order; files are read sequentially."""
    size = np.dtype(dtype).itemsize
    ends = np.cumsum(documents["length"], dtype=np.int64)
    tokens = np.empty(int(ends[-1]), np.dtype(dtype).newbyteorder("<"))
    by_file = np.lexsort((documents["offset"], documents["unit"], documents["source"]))
    path, file = None, None
    try:
        for i in by_file.tolist():
            source, unit = int(documents["source"][i]), int(documents["unit"][i])
            wanted = space.tokens(Unit(source, unit, ()).name)
            if wanted != path or file is None:
                if file is not None:
                    file.close()
                path, file = wanted, wanted.open("rb", buffering=0)
            length = int(documents["length"][i])
            file.seek(int(documents["offset"][i]) * size)
            if file.readinto(tokens[int(ends[i]) - length : int(ends[i])].data) != length * size:
                raise UserError(f"{path} is cut off: remove {space.folder.parent} and rebuild.")
    finally:
        if file is not None:
            file.close()
    return tokens


def _windows(documents: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
    """Group documents into windows of about WINDOW_TOKENS."""
    windows = np.cumsum(documents["length"], dtype=np.int64) // WINDOW_TOKENS
    cuts = np.flatnonzero(np.diff(windows)) + 1
    yield from (window for window in np.split(documents, cuts) if len(window))
