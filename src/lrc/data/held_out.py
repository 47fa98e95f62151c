"""More held-out text, measured beside the main one at the end of a run."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.data.batch import Batch
from lrc.data.packing import encode
from lrc.data.reader import make_batch
from lrc.data.sources import read_documents
from lrc.data.tokens import Span
from lrc.recipe.sections import DataSection
from lrc.system.errors import UserError


def also_held_out(
    data: DataSection,
    tokenizer: Tokenizer,
    count: int,
    batch_size: int,
    first_token: int | None = None,
) -> Iterator[tuple[str, list[Batch]]]:
    """The texts of `data.also_held_out` by name: the first `count` sequences of each, or all if
    there are fewer, in batches.

    Args:
        data: the recipe's data section.
        tokenizer: the teacher's tokenizer.
        count: number of sequences.
        batch_size: sequences of a batch.
        first_token: token that takes the place of every sequence's first; None: it stays.

    Raises:
        UserError: if a text cannot be read or does not fill one sequence.
    """
    length = data.sequence_length
    for name, sources in data.also_held_out.items():
        documents: list[list[int]] = []
        tokens = 0
        for text in read_documents(sources, data.text_field, held_out=True):
            documents += encode(tokenizer, [text], data.parse_special_tokens)
            tokens += len(documents[-1])
            if tokens >= count * length:
                break
        ids = np.array(list(chain.from_iterable(documents)), np.int64)
        if len(ids) < length:
            raise UserError(
                f"data.also_held_out.{name} has {len(ids)} tokens, fewer than one sequence of "
                f"{length}; give it more text."
            )
        begins = np.cumsum([0, *map(len, documents)])
        starts = range(0, min(len(ids) // length, count) * length, length)
        spans = [Span(ids[s : s + length], _inside(begins, s, length), None) for s in starts]
        yield name, list(_batches(spans, batch_size, data.document_mask, first_token))


def _inside(begins: np.ndarray, start: int, length: int) -> np.ndarray:
    """Where documents begin in a span."""
    return begins[(begins >= start) & (begins < start + length)] - start


def _batches(
    spans: Sequence[Span], size: int, document_mask: bool, first_token: int | None
) -> Iterator[Batch]:
    for first in range(0, len(spans), size):
        yield make_batch(spans[first : first + size], document_mask, first_token)
