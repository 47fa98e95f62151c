"""A tokenizer and packed text small enough to check by hand."""

import gzip
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrc.data import PackedPart, Tokens, packing
from lrc.data.cache import PartWriter
from lrc.data.identity import TokenizerIdentity
from lrc.data.shards import Shard, Shards, ShardWriter, Split, write_shards_index
from lrc.recipe.sections import DataSection

BOS, EOS = "<|bos|>", "<|eos|>"


class ByteTokenizer(PreTrainedTokenizerFast):
    """One token per byte, then bos and eos. `watch_encoding` counts the calls, and runs `at_call`
    with their number."""

    calls = 0
    at_call: Any = None


def watch_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every `ByteTokenizer` count how often it encodes documents for packing."""
    real = packing.encode

    def counted(tokenizer: ByteTokenizer, *arguments: Any) -> list[list[int]]:
        tokenizer.calls += 1
        if tokenizer.at_call is not None:
            tokenizer.at_call(tokenizer.calls)
        return real(tokenizer, *arguments)

    monkeypatch.setattr(packing, "encode", counted)


def byte_tokenizer(
    bos: str | None = BOS, eos: str | None = EOS, extra: Sequence[str] = ()
) -> ByteTokenizer:
    """A tokenizer with the special tokens that are given; `extra` enlarges its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, BOS, EOS, *extra]
    backend = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return ByteTokenizer(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def wide_tokenizer() -> ByteTokenizer:
    """A tokenizer with a thousand more tokens, for documents whose tokens are numbered."""
    return byte_tokenizer(extra=[f"<{number}>" for number in range(1000)])


def data_section(folder: Path, *text: Path | str, **settings: Any) -> DataSection:
    """A recipe's data section with its cache in `folder`."""
    values = {"sequence_length": 8, "cache": str(folder / "cache"), **settings}
    return DataSection(text=[str(source) for source in text], **values)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A JSONL file, compressed if its name says so; a row that is a string is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    """A JSONL file of documents."""
    return write_rows(path, ({"text": document} for document in documents))


def packed_part(folder: Path, documents: Sequence[Sequence[int]]) -> PackedPart:
    """Documents, given as tokens, packed into a folder."""
    writer = PartWriter(folder, "train", "uint16")
    writer.write(documents)
    return PackedPart(folder, "train", "uint16", writer.tokens, writer.documents)


def one_text(part: PackedPart) -> Tokens:
    """A packed part in the form that readers take."""
    place = (part.folder, part.name, part.dtype, part.tokens, part.documents)
    return Tokens([Shard(*place, split="train", tokens_by_source={}, sha256={})])


def unpack(part: PackedPart) -> list[list[int]]:
    """The tokens of each document of a packed part."""
    tokens = np.fromfile(part.tokens_path, part.dtype).tolist()
    offsets = np.fromfile(part.offsets_path, np.int64).tolist()
    ends = [*offsets[1:], len(tokens)]
    return [tokens[start:end] for start, end in zip(offsets, ends, strict=True)]


Document = tuple[str, Sequence[int]]
"""The source of a document, and its tokens."""


def write_shards(
    folder: Path,
    shards: Sequence[tuple[Split, Sequence[Document]]],
    tokenizer: TokenizerIdentity,
    sources: Sequence[str] = ("a", "b"),
) -> Shards:
    """A new folder of token shards, each given as its split and its documents."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written = []
    for number, (split, documents) in enumerate(shards):
        writer = ShardWriter(folder, f"{split}-{number:05d}", "uint16", split, sources)
        ids = [np.array(tokens, np.uint16) for _, tokens in documents]
        writer.write(
            np.concatenate([np.empty(0, np.uint16), *ids]),
            np.array([len(tokens) for tokens in ids], np.int64),
            np.array([sources.index(source) for source, _ in documents], np.int64),
        )
        with mock.patch("lrc.data.shards.flush"):  # slow, and no test needs it
            written.append(writer.close())
    whole = Shards(folder, "uint16", "a teacher", tokenizer, tuple(sources), tuple(written), {})
    write_shards_index(whole)
    return whole
