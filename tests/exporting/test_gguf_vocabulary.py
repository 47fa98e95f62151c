"""Tokenizers in GGUF files."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from gguf_helpers import (
    PADDING_ROWS,
    TEXTS,
    byte_level_bpe,
    read_fields,
    tiny_student,
)
from lrc.exporting.gguf_file import About, write_gguf
from lrc.exporting.gguf_vocabulary import DEEPSEEK_V3, pre_tokenizer_name
from lrc.system.errors import UserError

ABOUT = About("tiny")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_bpe()


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "t.gguf"
    write_gguf(tiny_student("llama", tokenizer), tokenizer, path, Kind.F32, ABOUT)
    return path


def test_tokens_and_their_types(vocabulary_file: Path, tokenizer: Any) -> None:
    fields = read_fields(vocabulary_file)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[len(tokenizer) :] == [f"[PAD{len(tokenizer) + i}]" for i in range(PADDING_ROWS)]
    assert types[:3] == [TokenType.CONTROL] * 3
    assert types[tokens.index("<think>")] == TokenType.USER_DEFINED
    assert types[len(tokenizer) :] == [TokenType.UNUSED] * PADDING_ROWS
    assert types[tokens.index("a")] == TokenType.NORMAL
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.add_eos_token"] is False


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_transformers_reads_the_same_tokenizer(
    text: str, vocabulary_file: Path, tokenizer: Any
) -> None:
    assert read_tokenizer(vocabulary_file).encode(text) == tokenizer.encode(text)


TOKENIZERS: dict[Path, Any] = {}


def read_tokenizer(path: Path) -> Any:
    if path not in TOKENIZERS:
        TOKENIZERS[path] = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return TOKENIZERS[path]


def test_byte_fallback_round_trip(tmp_path: Path, clone: tuple[Any, Any]) -> None:
    student, tokenizer = clone
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    assert not any("sentencepiece" in note for note in notes)
    fields = read_fields(tmp_path / "t.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert types[3:259] == [TokenType.BYTE] * 256
    read = read_tokenizer(tmp_path / "t.gguf")
    for text in TEXTS:
        if not text.startswith(" "):  # transformers' Llama tokenizer puts no space before a space
            assert read.encode(text) == tokenizer.encode(text), text
    # A second round is the first again: what transformers rebuilt is written as it was read.
    write_gguf(student, read, tmp_path / "again.gguf", Kind.F32, ABOUT)
    again = read_fields(tmp_path / "again.gguf")
    for name in ("tokens", "token_type", "pre", "model", "add_space_prefix"):
        assert again[f"tokenizer.ggml.{name}"] == fields[f"tokenizer.ggml.{name}"]
    assert read_tokenizer(tmp_path / "again.gguf").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_merges_that_sentencepiece_would_not_make_are_reported(
    tmp_path: Path, clone: tuple[Any, Any], stories_folder: Path
) -> None:
    student, tokenizer = clone[0], AutoTokenizer.from_pretrained(stories_folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"] = backend["model"]["merges"][:-40]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    assert any("sentencepiece" in note for note in notes)


def bpe_settings(
    pre_tokenizer: Any, normalizer: Any = None, ignore_merges: bool = False
) -> dict[str, Any]:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    return json.loads(backend.to_str())


def split(*patterns: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in the tokenizer.json of Llama 3."""


def test_pre_tokenizers_by_what_they_do() -> None:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert pre_tokenizer_name(bpe_settings(gpt2)) == "gpt-2"
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert pre_tokenizer_name(bpe_settings(pre_tokenizers.Sequence([digits, gpt2]))) == "smollm"
    assert pre_tokenizer_name(bpe_settings(split(LLAMA3_SPLIT), ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer_name(bpe_settings(split(LLAMA3_SPLIT))) == "smaug-bpe"
    qwen = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())
    assert qwen["normalizer"]["type"] == "NFC"
    assert pre_tokenizer_name(qwen) == "qwen2"
    qwen = json.loads(Qwen3_5Tokenizer().backend_tokenizer.to_str())
    assert pre_tokenizer_name(qwen) == "qwen35"
    assert pre_tokenizer_name(bpe_settings(split(*DEEPSEEK_V3))) == "deepseek-v3"


@pytest.mark.parametrize(
    "rule",
    [
        bpe_settings(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        bpe_settings(pre_tokenizers.Whitespace()),
        bpe_settings(split(r"\w+")),
        bpe_settings(split(*DEEPSEEK_V3[::-1])),
        bpe_settings(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
        bpe_settings(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        ),
    ],
    ids=[
        "prefix-space",
        "whitespace",
        "unknown-split",
        "other-order",
        "lowercase",
        "whole-numbers",
    ],
)
def test_unknown_pre_tokenizers_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"No known llama\.cpp pre-tokenizer"):
        pre_tokenizer_name(rule)


def test_added_tokens_that_the_model_does_not_embed_are_left_out(
    tmp_path: Path, tokenizer: Any
) -> None:
    """As the image token of Gemma 3's text models."""
    student, path = tiny_student("llama", tokenizer), tmp_path / "t.gguf"
    rows, longer = student.config.vocab_size, byte_level_bpe()
    longer.add_tokens([f"<image{i}>" for i in range(PADDING_ROWS + 1)], special_tokens=True)
    assert len(longer) == rows + 1
    write_gguf(student, longer, path, Kind.F32, ABOUT)
    tokens = read_fields(path)["tokenizer.ggml.tokens"]
    assert tokens[-2:] == [f"<image{PADDING_ROWS - 2}>", f"<image{PADDING_ROWS - 1}>"]
    assert len(tokens) == rows
