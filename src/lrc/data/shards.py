"""Shards: tokenized text in many files, with an index. Written by `lrc data build`.

A shards folder contains

    index.json          the contents; written last, so a folder without it is incomplete
    STEM.bin            token ids end to end, little endian uint16 or uint32 [tokens]; every
                        document is enclosed in the tokenizer's bos and eos, or whichever it has
    STEM.offsets.bin    position of each document's first token in STEM.bin, int64 [documents]
    STEM.source.bin     each document's source, an index into `sources`, uint16 [documents]
    tokenizer/          the tokenizer, so that the shards can be read without the teacher

with one STEM per shard, `train-00000` or `held_out-00000`. Every shard mixes documents of all
sources, in an order drawn from the build's seed. Reading shard after shard is therefore already
shuffled, and readers shuffle the sequences again.

The small cache of a recipe (`lrc.data.cache`) is read through the same classes: `Shards.of_cache`
presents it as one shard per split, with a single source.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lrc.data.cache import OFFSET_DTYPE, PackedPart, PackedText, PartWriter
from lrc.data.identity import TokenizerIdentity, tokenizer_identity
from lrc.system.checksums import file_sha256, remembered
from lrc.system.errors import UserError
from lrc.system.files import flush, reading, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FORMAT = 1
"""Increase it whenever the meaning of the files changes."""

INDEX = "index.json"
TOKENIZER_FOLDER = "tokenizer"
SOURCE_DTYPE = np.dtype("<u2")

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True)
class Shard(PackedPart):
    """One shard: a part (tokens and offsets; `name` is the file stem) with its sources."""

    split: Split
    tokens_by_source: dict[str, int]
    """Number of tokens of every source that has documents here, by source name."""

    sha256: dict[str, str]
    """Checksum of every file, by file name."""

    @property
    def source_path(self) -> Path:
        """Path of the documents' sources, uint16 [documents]."""
        return self.folder / f"{self.name}.source.bin"

    def token_ids(self) -> NDArray[np.unsignedinteger[Any]]:
        """Token ids, mapped from the file, [tokens]."""
        return _map(self.tokens_path, np.dtype(self.dtype).newbyteorder("<"), self.tokens)

    def offsets(self) -> NDArray[np.int64]:
        """Position of each document's first token, mapped from the file, int64 [documents]."""
        return _map(self.offsets_path, OFFSET_DTYPE, self.documents)

    def source_ids(self) -> NDArray[np.uint16]:
        """Each document's source, mapped from the file, uint16 [documents]; zeros if there is no
        such file (a recipe's cache)."""
        if self.source_path.name not in self.sha256:
            return np.zeros(self.documents, SOURCE_DTYPE)
        return _map(self.source_path, SOURCE_DTYPE, self.documents)

    def check_sizes(self) -> None:
        """Check that every file has the size that the counts imply.

        Raises:
            UserError: if a file is missing or has the wrong size.
        """
        sizes = {
            self.tokens_path: self.tokens * np.dtype(self.dtype).itemsize,
            self.offsets_path: self.documents * OFFSET_DTYPE.itemsize,
        }
        if self.source_path.name in self.sha256:
            sizes[self.source_path] = self.documents * SOURCE_DTYPE.itemsize
        for path, size in sizes.items():
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise UserError(f"{path} {what}: rebuild the shards, or copy the file again.")

    def check(self, vocabulary: int, sources: int) -> None:
        """Check every byte, once as long as the files are unchanged.

        Args:
            vocabulary: number of token ids in use.
            sources: number of sources in the index.

        Raises:
            UserError: if a file does not match its checksum, a token is not in the vocabulary, or
                documents are out of order or have an unknown source.
        """
        for name, checksum in self.sha256.items():
            path = self.folder / name
            with reading(path, "rebuild the shards, or copy the file again"):
                found = remembered(path, "sha256", file_sha256)
            if found != checksum:
                raise UserError(
                    f"{path} does not match its checksum: copy it again, or rebuild the shards."
                )
        if (largest := self.largest_token()) >= vocabulary:
            raise UserError(
                f"{self.tokens_path} contains the token {largest}, but the tokenizer has "
                f"{vocabulary} tokens: rebuild the shards with this tokenizer."
            )
        self.check_documents(sources)

    def largest_token(self) -> int:
        """The largest token id; -1 if there are no tokens."""
        if not self.tokens:
            return -1
        return remembered(self.tokens_path, "largest", lambda _: int(self.token_ids().max()))

    def check_documents(self, sources: int) -> None:
        """Check what readers rely on; checksums in a rewritten index do not catch these errors.

        Args:
            sources: number of sources in the index.

        Raises:
            UserError: if document offsets are out of order or outside the shard, or a source is
                unknown.
        """
        offsets = self.offsets()
        if not len(offsets):
            return
        ordered = offsets[0] == 0 and bool((np.diff(offsets) > 0).all())
        if not ordered or offsets[-1] >= self.tokens:
            raise UserError(f"{self.offsets_path} has documents out of order; rebuild the shards.")
        if int(self.source_ids().max()) >= sources:
            raise UserError(f"{self.source_path} has an unknown source; rebuild the shards.")

    def damaged_files(self) -> list[Path]:
        """Files that do not match their checksums; reads all files."""
        paths = {name: self.folder / name for name in self.sha256}
        return [
            path
            for name, path in paths.items()
            if not path.is_file() or file_sha256(path) != self.sha256[name]
        ]


@dataclass(frozen=True)
class Shards:
    """A shards folder, opened by `open_shards`."""

    folder: Path
    dtype: str
    """Element type of the tokens: uint16, or uint32 for vocabularies beyond 65,536."""

    teacher: str
    """Name of the model whose tokenizer was used; empty if unknown."""

    tokenizer: TokenizerIdentity
    sources: tuple[str, ...]
    """Names of the sources; documents refer to them by index."""

    shards: tuple[Shard, ...]
    build: dict[str, Any]
    """What determined the content, as JSON values (the mix, the input files, versions)."""

    @classmethod
    def of_cache(cls, packed: PackedText, tokenizer: TokenizerIdentity, source: str) -> "Shards":
        """A recipe's cache as shards: one per split, all documents from one source."""
        shards = tuple(
            Shard(
                *(part.folder, part.name, part.dtype, part.tokens, part.documents),
                split=split,
                tokens_by_source={source: part.tokens},
                sha256={name: packed.sha256[name] for name in part.file_names()},
            )
            for split, part in zip(SPLITS, (packed.train, packed.held_out), strict=True)
        )
        return cls(packed.folder, packed.train.dtype, "", tokenizer, (source,), shards, {})

    def of_split(self, split: Split) -> list[Shard]:
        """The shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        """Number of tokens in one split."""
        return sum(shard.tokens for shard in self.of_split(split))

    def documents(self, split: Split) -> int:
        """Number of documents in one split."""
        return sum(shard.documents for shard in self.of_split(split))

    def tokens_by_source(self, split: Split) -> dict[str, int]:
        """Number of tokens of every source in one split, in the order of `sources`."""
        shards = self.of_split(split)
        return {
            name: sum(shard.tokens_by_source.get(name, 0) for shard in shards)
            for name in self.sources
        }

    def require_tokenizer(self, tokenizer: "Tokenizer", name: str) -> None:
        """Check that a tokenizer is the one that produced the tokens.

        Args:
            tokenizer: the tokenizer to compare.
            name: name of its model, for the message.

        Raises:
            UserError: if it is a different tokenizer.
        """
        if tokenizer_identity(tokenizer) != self.tokenizer:
            of_whom = f"of '{self.teacher}'" if self.teacher else "of another model"
            raise UserError(
                f"The shards in {self.folder} were built with the tokenizer {of_whom}, not with "
                f"that of '{name}': rebuild them with `lrc data build --teacher {name}`."
            )


def open_shards(folder: Path) -> Shards:
    """Open a shards folder and check that every file is complete (by its size).

    Raises:
        UserError: if it is not a shards folder, is unfinished, has another format, or a file is
            missing or has the wrong size.
    """
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder} contains no finished shards (no {INDEX}): build them, or finish a stopped "
            f"build, with `lrc data build MIX.yaml {folder}`."
        )
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version = index["format"]
        shards = _from_index(folder, index) if version == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / INDEX} is damaged or not a shards index ({error}); rebuild the shards."
        ) from error
    if shards is None:
        raise UserError(
            f"The shards in {folder} have format {version}, but this version reads {FORMAT}: "
            "rebuild them."
        )
    for shard in shards.shards:
        shard.check_sizes()
    return shards


def write_shards_index(shards: Shards) -> None:
    """Write `index.json`, which marks the folder as complete.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    index = {
        "format": FORMAT,
        "dtype": shards.dtype,
        "teacher": shards.teacher,
        "tokenizer": asdict(shards.tokenizer),
        "sources": shards.sources,
        "shards": [shard_entry(shard) for shard in shards.shards],
        "build": shards.build,
    }
    write_text(shards.folder / INDEX, json.dumps(index, indent=1) + "\n")


def shard_entry(shard: Shard) -> dict[str, Any]:
    """The index entry of a shard, as JSON values."""
    entry = asdict(shard)
    for constant in ("folder", "dtype"):
        del entry[constant]
    return entry


def shard_of_entry(folder: Path, dtype: str, entry: dict[str, Any]) -> Shard:
    """The shard that an index entry describes."""
    return Shard(folder=folder, dtype=dtype, **entry)


class ShardWriter:
    """Writes one shard, a few documents at a time, into a folder that is renamed or moved later.

    Args:
        folder: where the files are written.
        stem: file name without suffixes.
        dtype: element type of the tokens.
        split: the split of the documents.
        sources: names of all sources in the index.
    """

    def __init__(
        self, folder: Path, stem: str, dtype: str, split: Split, sources: Sequence[str]
    ) -> None:
        self._part = PartWriter(folder, stem, dtype)
        self._place = (folder, stem, dtype)
        self._split = split
        self._sources = sources
        self._tokens_by_source = np.zeros(len(sources), np.int64)
        self._source_hash = hashlib.sha256()
        self._source_path = folder / f"{stem}.source.bin"
        self._source_path.touch()

    def write(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.integer[Any]],
        source_ids: NDArray[np.integer[Any]],
    ) -> None:
        """Append documents.

        Args:
            tokens: ids of all documents end to end, including bos and eos, [tokens].
            lengths: number of tokens of each document, [documents].
            source_ids: source index of each document, [documents].
        """
        self._part.write_array(tokens, lengths)
        data = source_ids.astype(SOURCE_DTYPE).tobytes()
        self._source_hash.update(data)
        with self._source_path.open("ab") as file:
            file.write(data)
        counts = np.bincount(source_ids, weights=lengths, minlength=len(self._sources))
        self._tokens_by_source += counts.astype(np.int64)

    def close(self) -> Shard:
        """Flush the files to disk and return the shard for the index."""
        entry = self._part.entry()
        folder, stem, dtype = self._place
        checksums = entry["sha256"] | {self._source_path.name: self._source_hash.hexdigest()}
        for name in checksums:
            flush(folder / name)
        pairs = zip(self._sources, self._tokens_by_source.tolist(), strict=True)
        return Shard(
            *(folder, stem, dtype, entry["tokens"], entry["documents"]),
            split=self._split,
            tokens_by_source={name: count for name, count in pairs if count},
            sha256=checksums,
        )


def documents_of(shard: Shard) -> Iterator[tuple[int, NDArray[np.unsignedinteger[Any]]]]:
    """Every document of a shard in order: its source index and its token ids."""
    tokens, offsets, sources = shard.token_ids(), shard.offsets(), shard.source_ids()
    ends = np.append(offsets, shard.tokens)[1:]
    for source, start, end in zip(sources, offsets, ends, strict=True):
        yield int(source), tokens[start:end]


def _from_index(folder: Path, index: dict[str, Any]) -> Shards:
    dtype = index["dtype"]
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"unknown dtype {dtype!r}")
    return Shards(
        folder=folder,
        dtype=dtype,
        teacher=index["teacher"],
        tokenizer=TokenizerIdentity(**index["tokenizer"]),
        sources=tuple(index["sources"]),
        shards=tuple(shard_of_entry(folder, dtype, entry) for entry in index["shards"]),
        build=index["build"],
    )


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Map a file into memory; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
