"""What tokenized text depends on: the tokenizer, and the split that each document belongs to."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrc.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

HASH_RANGE = 1 << 64
"""Upper bound (exclusive) of document hashes."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """All properties of a tokenizer that determine the tokens of a text, in a storable form."""

    tokenizer: str
    """SHA-256 of the fast tokenizer's description (vocabulary, merges, normalizer, ...)."""

    split_special_tokens: bool
    """Whether special tokens in the text are treated as plain text."""

    bos: int | None
    """Id of the token before every document; None if there is none."""

    eos: int | None
    """Id of the token after every document; None if there is none."""


def tokenizer_identity(tokenizer: "Tokenizer") -> TokenizerIdentity:
    """Identify a tokenizer.

    Raises:
        UserError: if it is not a fast tokenizer, or has neither bos nor eos to separate documents.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "The teacher's tokenizer has no fast form (tokenizer.json); use a teacher that has one."
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            "The teacher's tokenizer has neither a bos nor an eos token to separate documents; "
            "set one in its tokenizer_config.json."
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("truncation", "padding"):
        backend.pop(transient, None)  # Left over from the last call; the next call resets them.
    digest = hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()
    split = bool(tokenizer.split_special_tokens)
    return TokenizerIdentity(digest, split, tokenizer.bos_token_id, tokenizer.eos_token_id)


def refuse_not_embedded(tokenizer: "Tokenizer", largest: int, vocabulary: int | None) -> None:
    """Refuse text with a token that the teacher does not embed, such as Gemma 3's image token.

    Args:
        tokenizer: the teacher's tokenizer.
        largest: the largest token id of the text; -1 if there is none.
        vocabulary: number of token ids that the teacher embeds; None: all of the tokenizer.

    Raises:
        UserError: if there is one.
    """
    if vocabulary is not None and largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"The text holds the token '{token}' ({largest}), but the teacher embeds only "
            f"{vocabulary:,} tokens: remove it from the text."
        )


def token_dtype(tokenizer: "Tokenizer") -> str:
    """The smallest of uint16 and uint32 that holds every token id."""
    return "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"


def text_hash(text: str) -> int:
    """A number below 2^64 that depends on the text alone.

    A document is held out if its hash is below `held_out_fraction * HASH_RANGE`. The same text is
    therefore always in the same split, wherever and however often it occurs.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
