"""What tokenized text depends on: which tokenizer made it, and which side a document stands on."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrc.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

HASH_RANGE = 1 << 64
"""Hashes of documents are below it."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """All of a tokenizer that decides which tokens a text becomes, in a form that can be kept."""

    tokenizer: str
    """SHA-256 of the fast tokenizer's own description (vocabulary, merges, normalizer, ...)."""

    split_special_tokens: bool
    """Whether special tokens that stand in the text are taken for plain text."""

    bos: int | None
    """Id of the token before every document; None: there is none."""

    eos: int | None
    """Id of the token after every document; None: there is none."""


def tokenizer_identity(tokenizer: "Tokenizer") -> TokenizerIdentity:
    """Identify a tokenizer.

    Raises:
        UserError: it is not a fast one, or has neither bos nor eos to part documents with.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "The teacher's tokenizer has no fast form (tokenizer.json); use a teacher that has one."
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            "The teacher's tokenizer has neither a bos nor an eos token to part documents with; "
            "set one in its tokenizer_config.json."
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("truncation", "padding"):
        backend.pop(transient, None)  # Left behind by the last call, and set anew by the next.
    digest = hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()
    split = bool(tokenizer.split_special_tokens)
    return TokenizerIdentity(digest, split, tokenizer.bos_token_id, tokenizer.eos_token_id)


def token_dtype(tokenizer: "Tokenizer") -> str:
    """The smallest of uint16 and uint32 that holds every token id."""
    return "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"


def text_hash(text: str) -> int:
    """A number below 2^64 that depends on the text alone.

    A document is held out where it is below `held_out_fraction * HASH_RANGE`: the same text stands
    on the same side wherever and however often it occurs.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
