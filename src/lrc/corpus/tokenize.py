"""Tokenize at the speed of `tokenizers`, without importing transformers."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from lrc.data.encoding import document_frame, encode_texts
from lrc.data.identity import TokenizerIdentity


class Tokenizer:
    """A fast tokenizer that separates documents as packed text requires.

    Args:
        file: the tokenizer.json file.
        identity: the identity with the tokenizer's bos and eos.
    """

    def __init__(self, file: Path, identity: TokenizerIdentity) -> None:
        self._before, self._after = document_frame(identity.bos, identity.eos)
        self._backend = Backend.from_file(str(file))

    def encode(
        self, texts: list[str], brings_frame: bool = False, parse_special_tokens: bool = False
    ) -> list[list[int]]:
        """Token ids of texts, without bos and eos.

        Args:
            texts: the texts.
            brings_frame: whether texts may begin with bos and end with eos, as text from chat
                templates does; these tokens are removed.
            parse_special_tokens: whether special tokens written out in a text become control
                tokens, as they always do in text from a chat template.
        """
        ids = encode_texts(self._backend, texts, parse_special_tokens or brings_frame)
        return [self._bare(one) for one in ids] if brings_frame else ids

    def framed(self, ids: list[list[int]], dtype: str) -> tuple[NDArray[Any], list[int]]:
        """Documents end to end, each between bos and eos, and the length of each."""
        frame = len(self._before) + len(self._after)
        lengths = [len(one) + frame for one in ids]
        parts = ((self._before, one, self._after) for one in ids)
        flat = chain.from_iterable(chain.from_iterable(parts))
        return np.fromiter(flat, np.dtype(dtype), sum(lengths)), lengths

    def _bare(self, ids: list[int]) -> list[int]:
        start = len(self._before) if self._before and ids[:1] == self._before else 0
        end = len(ids) - (1 if self._after and ids[-1:] == self._after else 0)
        return ids[start:end]
