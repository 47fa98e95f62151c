"""Inspect shards: counts, shares, random documents, and whether any byte has changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lrc.data.shards import SPLITS, TOKENIZER_FOLDER, Shards, Split
from lrc.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class SourceCount(NamedTuple):
    """Documents and tokens of one source in one split."""

    split: Split
    source: str
    documents: int
    tokens: int
    share: float
    """Share of the split's tokens."""


class Sample(NamedTuple):
    """A decoded document."""

    shard: str
    document: int
    """Index in the shard, from 0."""

    source: str
    tokens: int
    text: str


def count_sources(shards: Shards) -> list[SourceCount]:
    """Documents and tokens of every source in each split."""
    counts = []
    for split in SPLITS:
        documents = np.zeros(len(shards.sources), np.int64)
        for shard in shards.of_split(split):
            shard.check_documents(len(documents))
            documents += np.bincount(shard.source_ids(), minlength=len(documents))
        whole = max(1, shards.tokens(split))
        for (name, tokens), number in zip(
            shards.tokens_by_source(split).items(), documents.tolist(), strict=True
        ):
            counts.append(SourceCount(split, name, number, tokens, tokens / whole))
    return counts


def sample_documents(
    shards: Shards, tokenizer: "Tokenizer", count: int, seed: int
) -> Iterator[Sample]:
    """Random training documents, all equally likely.

    Args:
        shards: the shards.
        tokenizer: the tokenizer that built the shards.
        count: number of documents; no document occurs twice.
        seed: seed of the choice.
    """
    train = shards.of_split("train")
    ends = np.cumsum([shard.documents for shard in train])
    number = min(count, int(ends[-1]))
    for chosen in np.random.default_rng(seed).choice(ends[-1], number, replace=False).tolist():
        shard = train[int(np.searchsorted(ends, chosen, side="right"))]
        document = chosen - int(ends[train.index(shard)] - shard.documents)
        start, *rest = shard.offsets()[document : document + 2].tolist()
        end = rest[0] if rest else shard.tokens
        text = tokenizer.decode(shard.token_ids()[start:end].tolist())
        source = shards.sources[int(shard.source_ids()[document])]
        yield Sample(shard.name, document, source, end - start, text)


def check_files(shards: Shards) -> Iterator[tuple[str, list[Path]]]:
    """Every shard's name with the files that do not match their checksums; reads everything.

    Because a rewritten index could match damaged files, the function also checks what readers rely
    on.

    Raises:
        UserError: if document offsets are out of order or outside the shard, or a source is
            unknown.
    """
    for shard in shards.shards:
        damaged = shard.damaged_files()
        yield shard.name, damaged
        if damaged or not shard.documents:
            continue
        shard.check_documents(len(shards.sources))


def own_tokenizer(shards: Shards) -> "Tokenizer":
    """The tokenizer stored with the shards.

    Raises:
        UserError: if the tokenizer is missing or is not the one that built the shards.
    """
    from transformers import AutoTokenizer

    folder = shards.folder / TOKENIZER_FOLDER
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(
            f"The tokenizer of the shards, {folder}, cannot be loaded: set it with --teacher."
        ) from error
    shards.require_tokenizer(tokenizer, str(folder))
    return tokenizer
