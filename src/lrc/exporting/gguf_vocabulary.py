"""A tokenizer in a GGUF file: tokens, their types, merges or scores, special ids, chat template.

llama.cpp does not read tokenizer.json. Byte-level BPE (Llama 3, Qwen, SmolLM2) is stored as tokens,
merges and the *name* of the rule that splits text before merging. BPE with byte fallback (Llama 2,
Mistral), which comes from sentencepiece, is stored as tokens and scores.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lrc.model.tokenizer import framing, tokens_of_its_own
from lrc.system.errors import UserError

SPACE = "\u2581"
"""The character for a space in sentencepiece tokens."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte token in a vocabulary with byte fallback."""

DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+",
)
"""The expressions by which DeepSeek V3 and Hunyuan split text, one after another."""

EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
)
"""The expression by which K-EXAONE splits text."""

THEN = " then "
NAMES = ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")
SPLITS = {
    **{GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in NAMES},
    THEN.join(DEEPSEEK_V3): "deepseek-v3",
    THEN.join(EXAONE_MOE): "exaone-moe",
}
"""llama.cpp's pre-tokenizer name by regular expressions; most are from transformers' own table."""


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, rows: int) -> list[str]:
    """Write a tokenizer's vocabulary, settings and chat template.

    Args:
        writer: writer of the GGUF file.
        tokenizer: a tokenizer backed by the `tokenizers` library.
        rows: rows of the embedding; rows beyond the tokens become unused tokens, and added tokens
            beyond the rows, which the model cannot read, are left out.

    Returns:
        Notes for the user about cases where llama.cpp may split text differently.

    Raises:
        UserError: if llama.cpp has no tokenizer of this kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "This tokenizer has no tokenizer.json, which the GGUF export needs: convert it to a "
            "fast tokenizer first."
        )
    settings = json.loads(backend.to_str())
    kind = settings["model"]["type"]
    if kind != "BPE":
        raise UserError(
            f"A {kind} tokenizer cannot be written as GGUF, only BPE tokenizers; use safetensors."
        )
    if (tokens := tokens_of_its_own(tokenizer)) > rows:
        raise UserError(f"The tokenizer has {tokens} tokens but the model embeds {rows}.")
    fallback = bool(settings["model"].get("byte_fallback"))
    notes = []
    if fallback:
        notes = _add_sentencepiece(writer, tokenizer, settings, rows)
    else:
        _add_byte_level(writer, tokenizer, settings, rows)
    _add_special(writer, tokenizer, load_merges=not fallback, rows=rows)
    return notes


def _add_byte_level(
    writer: GGUFWriter, tokenizer: Tokenizer, settings: dict[str, Any], rows: int
) -> None:
    tokens, types = zip(*_tokens(tokenizer, settings, rows), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(settings))
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def _add_sentencepiece(
    writer: GGUFWriter, tokenizer: Tokenizer, settings: dict[str, Any], rows: int
) -> list[str]:
    pairs = list(_tokens(tokenizer, settings, rows))
    types = [kind for _, kind in pairs]
    tokens = [
        token.replace(" ", SPACE) if kind == TokenType.NORMAL else token for token, kind in pairs
    ]
    rank = _ranks(settings)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    # The score of a token is the rank of the merge that makes it, so the best merge comes first.
    writer.add_token_scores([float(-rank.get(token, len(rank))) for token in tokens])
    writer.add_token_types(types)
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[0]
    writer.add_add_space_prefix(first[0] in (SPACE, " "))
    odd = _not_from_sentencepiece(tokens, types, settings)
    if not odd:
        return []
    return [
        f"{odd} tokens have merges that sentencepiece would not produce, so llama.cpp may split "
        "text differently."
    ]


def _tokens(
    tokenizer: Tokenizer, settings: dict[str, Any], rows: int
) -> Iterator[tuple[str, TokenType]]:
    """The token and its type for every row, in order of id."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in settings["added_tokens"]}
    fallback = settings["model"].get("byte_fallback")
    unknown = tokenizer.unk_token if fallback else None
    for number in range(rows):
        token = by_id.get(number)
        if token is None:
            yield f"[PAD{number}]", TokenType.UNUSED
        elif token == unknown:
            yield token, TokenType.UNKNOWN
        elif number in added:
            special = added[number]["special"]
            yield token, TokenType.CONTROL if special else TokenType.USER_DEFINED
        elif fallback and BYTE.fullmatch(token):
            yield token, TokenType.BYTE
        else:
            yield token, TokenType.NORMAL


def _merges(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges in order, with spaces in sentencepiece's form."""
    for merge in settings["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left.replace(" ", SPACE), right.replace(" ", SPACE)


def _ranks(settings: dict[str, Any]) -> dict[str, int]:
    """For each token, the index of the first merge that makes it."""
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(_merges(settings)):
        rank.setdefault(left + right, place)
    return rank


def _not_from_sentencepiece(
    tokens: list[str], types: list[TokenType], settings: dict[str, Any]
) -> int:
    """Number of tokens that two other tokens can form in ways that are not listed as merges.

    llama.cpp joins any two neighbors that form a token. A converted sentencepiece vocabulary lists
    all such pairs as merges.
    """
    normal = {t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    listed = Counter(left + right for left, right in _merges(settings))
    possible = {
        token: sum(token[:i] in normal and token[i:] in normal for i in range(1, len(token)))
        for token in normal
    }
    return sum(listed[token] < ways for token, ways in possible.items())


def _add_special(writer: GGUFWriter, tokenizer: Tokenizer, load_merges: bool, rows: int) -> None:
    """Write merges, ids of special tokens, which of them frame a text, and the chat template."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(Path(folder), load_merges=load_merges, n_vocab=rows)
    special.add_special_token = dict(zip(("bos", "eos"), framing(tokenizer), strict=True))
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer_name(settings: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits text before merging.

    The rule itself decides, not the tokenizer's origin. A tokenizer that transformers rebuilt from
    a GGUF file may split text differently from the original, and the student learned with the
    rebuilt one.

    Raises:
        UserError: if llama.cpp has no known rule that matches.
    """
    normalizer = settings["normalizer"]
    rule = settings["pre_tokenizer"] or {"type": "none"}
    steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    kinds = [step["type"] for step in steps]
    if (normalizer is None or normalizer["type"] == "NFC") and kinds[-1] == "ByteLevel":
        last, before = steps[-1], steps[:-1]
        if not last["add_prefix_space"] and last["use_regex"]:
            if not before:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and before[0]["individual_digits"]:
                return "smollm"
        plain = all(
            step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
            for step in before
        )
        if plain and not last["add_prefix_space"] and not last["use_regex"]:
            rules = tuple(step["pattern"].get("Regex", "") for step in before)
            name = SPLITS.get(THEN.join(rules))
            # llama-bpe keeps words that are tokens; smaug-bpe always merges.
            if name == "llama-bpe" and not settings["model"].get("ignore_merges"):
                return "smaug-bpe"
            if name:
                return name
    raise UserError(
        f"No known llama.cpp pre-tokenizer matches this tokenizer ({', '.join(kinds)}): export "
        "to safetensors, or convert that export with llama.cpp's own converter."
    )
