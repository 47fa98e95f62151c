"""Convert text to token ids with the `tokenizers` library alone, in bounded memory."""

import re
from collections.abc import Iterator

from tokenizers import Tokenizer as Backend

LONGEST_PART = 1 << 20
"""Characters tokenized at once: the library takes 140 bytes per character. Longer texts are cut
between two words and tokenized part by part. This gives the same tokens if no token of the
tokenizer spans two words; otherwise one token per part may differ."""

_GAP = re.compile(r"(?<=\S) (?=\S)")
"""The space between two words."""


def document_frame(bos: int | None, eos: int | None) -> tuple[list[int], list[int]]:
    """The tokens before and after each document: bos and eos, or whichever of the two exists."""
    return [] if bos is None else [bos], [] if eos is None else [eos]


def encode_texts(
    backend: Backend, texts: list[str], parse_special_tokens: bool, longest: int = LONGEST_PART
) -> list[list[int]]:
    """Token ids of texts, without bos and eos.

    Args:
        backend: the tokenizer; truncation and padding are turned off.
        texts: the texts.
        parse_special_tokens: whether special tokens written out in a text become control tokens;
            otherwise they are plain text.
        longest: maximum number of characters tokenized at once.
    """
    backend.no_truncation()
    backend.no_padding()
    before = backend.encode_special_tokens
    backend.encode_special_tokens = not parse_special_tokens
    try:
        if all(len(text) <= longest for text in texts):
            return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        adds_space = _adds_space(backend)
        return [_encode_parts(backend, text, longest, adds_space) for text in texts]
    finally:
        backend.encode_special_tokens = before


def _encode_parts(backend: Backend, text: str, longest: int, adds_space: bool) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(parts_of(text, longest)):
        # The tokenizer would add a second space to a part that begins with one.
        bare = part[1:] if number and adds_space and part.startswith(" ") else part
        ids += backend.encode(bare, add_special_tokens=False).ids
    return ids


def parts_of(text: str, longest: int) -> Iterator[str]:
    """Cut a text into parts of at most `longest` characters. Each cut is before a space between two
    words, if the second half of the part has one. Joined, the parts give the text."""
    start = 0
    while len(text) - start > longest:
        gaps = list(_GAP.finditer(text, start + longest // 2, start + longest))
        end = gaps[-1].start() if gaps else start + longest
        yield text[start:end]
        start = end
    yield text[start:]


def _adds_space(backend: Backend) -> bool:
    """Whether the tokenizer adds a space before a text, as sentencepiece does."""
    first = backend.encode("a", add_special_tokens=False).tokens[:1]
    return bool(first) and first[0][:1] in (" ", "\u2581", "\u0120")
