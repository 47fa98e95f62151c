"""Tokenize the text of a recipe once and pack it end to end into a cache on disk.

Each document is enclosed in the tokenizer's bos and eos, or whichever of the two it has. The
content of a document determines its split, held-out or training, so the same text is never in both
splits, wherever and however often it occurs. The cache depends neither on the sequence length nor
on the document mask, so runs that differ in these share a cache.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.data.cache import (
    PackedPart,
    PackedText,
    PartWriter,
    cache_key,
    new_cache,
    open_cache,
    write_index,
)
from lrc.data.encoding import document_frame, encode_texts
from lrc.data.identity import HASH_RANGE, text_hash, token_dtype, tokenizer_identity
from lrc.data.sources import read_documents, source_files
from lrc.recipe.sections import DataSection
from lrc.system.checksums import cache_root
from lrc.system.errors import UserError

BATCH_CHARACTERS = 1 << 20
"""Characters tokenized at once: enough to use all cores, and it bounds memory."""

SHORTEST_SEQUENCE = 8
"""Shortest sequence that a recipe allows; error messages never suggest a shorter one."""

Progress = Callable[[str, int], None]
"""Callback that receives the current activity (`tokenizing`) and the tokens so far."""


def prepare(
    data: DataSection, tokenizer: Tokenizer, progress: Progress | None = None
) -> PackedText:
    """Load the tokenized text of a recipe from the cache, or build it.

    Raises:
        UserError: if a source cannot be read, there is too little text for one training or
            held-out sequence, the tokenizer does not fit, or the cache cannot be written.
    """
    inputs = _inputs(data, tokenizer)
    folder = cache_root(data.cache) / cache_key(inputs)
    packed = open_cache(folder)
    if packed is None:
        with new_cache(folder) as building:
            _build(building, data, tokenizer, inputs, progress)
        packed = open_cache(folder)
        assert packed is not None
    _check_length(packed.train, data, "The training text", "give data.text more text")
    more = "give data.held_out more text" if data.held_out else "raise data.held_out_fraction"
    _check_length(packed.held_out, data, "The held-out text", more)
    return packed


def encode(
    tokenizer: Tokenizer, texts: list[str], parse_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of documents, each between bos and eos; empty if a text has no tokens.

    Args:
        tokenizer: the teacher's tokenizer.
        texts: the documents.
        parse_special_tokens: whether special tokens written out in a text become control tokens;
            otherwise they are plain text.
    """
    before, after = document_frame(tokenizer.bos_token_id, tokenizer.eos_token_id)
    encoded = encode_texts(tokenizer.backend_tokenizer, texts, parse_special_tokens)
    # A tokenizer may return no tokens for a text.
    return [[*before, *ids, *after] if ids else [] for ids in encoded]


def _inputs(data: DataSection, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that determines the content of the cache, as JSON values."""
    identity = asdict(tokenizer_identity(tokenizer))
    return {
        "text": source_files(data.text),
        "held_out": source_files(data.held_out, held_out=True),
        "held_out_fraction": None if data.held_out else data.held_out_fraction,
        **({"also_held_out": also} if (also := source_files(_also(data), held_out=True)) else {}),
        "text_field": data.text_field,
        "parse_special_tokens": data.parse_special_tokens,
        **identity,
    }


def _build(
    folder: Path,
    data: DataSection,
    tokenizer: Tokenizer,
    inputs: dict[str, Any],
    progress: Progress | None,
) -> None:
    """Write all files of the cache."""
    dtype = token_dtype(tokenizer)
    writers = {name: PartWriter(folder, name, dtype) for name in ("train", "held_out")}
    for batch in _batches(_split(data)):
        encoded = encode(tokenizer, [text for _, text in batch], data.parse_special_tokens)
        sides = [side for side, _ in batch]
        for name, writer in writers.items():
            writer.write([d for side, d in zip(sides, encoded, strict=True) if d and side == name])
        if progress is not None:
            progress("tokenizing", sum(writer.tokens for writer in writers.values()))
    parts = {name: writer.entry() for name, writer in writers.items()}
    write_index(folder, dtype, parts, inputs)


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group documents into batches of about BATCH_CHARACTERS; documents are never split."""
    batch: list[tuple[str, str]] = []
    size = 0
    for side, text in documents:
        batch.append((side, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split(data: DataSection) -> Iterator[tuple[str, str]]:
    """All documents in reading order, each with its split, `train` or `held_out`. Those of
    `also_held_out` are not trained on."""
    held_out = also_held_out_hashes(data)
    if not data.held_out:
        limit = _held_out_limit(read_documents(data.text, data.text_field), data.held_out_fraction)
        for text in read_documents(data.text, data.text_field):
            if (found := text_hash(text)) < limit:
                yield "held_out", text
            elif found not in held_out:
                yield "train", text
        return
    empty = True
    for text in read_documents(data.held_out, data.text_field, held_out=True):
        held_out.add(text_hash(text))
        yield "held_out", text
        empty = False
    if empty:
        raise UserError("data.held_out contains no text; give sources that contain text.")
    counts = {True: 0, False: 0}
    for text in read_documents(data.text, data.text_field):
        known = text_hash(text) in held_out
        counts[known] += 1
        if not known:
            yield "train", text
    if not counts[False]:
        why = "no text" if not counts[True] else "no text that is not held out too"
        raise UserError(f"data.text contains {why}; give other sources.")


def also_held_out_hashes(data: DataSection) -> set[int]:
    """Hashes of the documents of `data.also_held_out`."""
    sources = _also(data)
    if not sources:
        return set()
    return {text_hash(text) for text in read_documents(sources, data.text_field, held_out=True)}


def _also(data: DataSection) -> list[str]:
    return [source for sources in data.also_held_out.values() for source in sources]


def _held_out_limit(documents: Iterable[str], fraction: float) -> int:
    """The hash below which a document is held out.

    The limit holds out a share of `fraction`, but at least one document, and leaves at least one
    for training. Reading stops once both are found, usually after a few hundred documents.

    Raises:
        UserError: if there are no two different documents.
    """
    limit = int(fraction * HASH_RANGE)
    smallest, largest = HASH_RANGE, -1
    for text in documents:
        smallest, largest = min(smallest, value := text_hash(text)), max(largest, value)
        if smallest < limit <= largest:
            return limit
    if largest < 0:
        raise UserError("data.text contains no text; give sources that contain text.")
    if smallest == largest:
        raise UserError(
            "data.text is a single document, which cannot be both trained on and held out; give "
            "more text, or set data.held_out."
        )
    return smallest + 1 if smallest >= limit else largest


def _check_length(part: PackedPart, data: DataSection, what: str, more: str) -> None:
    """Reject a part that does not fill one sequence."""
    if part.tokens >= data.sequence_length:
        return
    lower = f" or lower data.sequence_length to at most {part.tokens}"
    raise UserError(
        f"{what} has {part.tokens} tokens, fewer than one sequence of {data.sequence_length}; "
        f"{more}{lower if part.tokens >= SHORTEST_SEQUENCE else ''}."
    )
