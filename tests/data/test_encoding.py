"""Text to token ids: special tokens as text, and long documents in parts."""

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lrc.data.encoding import encode_texts, parts_of

PROSE = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Once upon a time there was a fox who could not jump at all. ",
    "It's 1,024 dogs!  Two spaces\nand a line; naïve café — 日本語 text.",
] * 20
CONTROL = "</s>"

words = st.sampled_from(
    [
        "the",
        "fox",
        "jumps,",
        "it's",
        "café",
        "日本語",
        "1,024",
        "\n",
        "\t",
        "",
        CONTROL,
        "dog.\n\nOnce",
    ]
)
texts = st.lists(words, max_size=60).map(" ".join)


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(backend, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))


def metaspace() -> Tokenizer:
    """Like sentencepiece: a space before every text, which is part of the word's first token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    return trained(backend, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"]))


def trained(backend: Tokenizer, trainer: trainers.BpeTrainer) -> Tokenizer:
    backend.train_from_iterator(PROSE, trainer)
    backend.add_special_tokens([AddedToken(CONTROL, special=True, normalized=False)])
    return backend


BACKENDS = {"byte_level": byte_level(), "metaspace": metaspace()}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@settings(max_examples=150, deadline=None)
@given(documents=st.lists(texts, max_size=3), longest=st.integers(40, 80))
def test_long_texts_in_parts_give_the_same_tokens(
    backend: Tokenizer, documents: list[str], longest: int
) -> None:
    cuts = [part for text in documents for part in [*parts_of(text, longest)][1:]]
    assume(all(part.startswith(" ") for part in cuts))
    whole = encode_texts(backend, documents, parse_special_tokens=False)
    assert encode_texts(backend, documents, False, longest) == whole


@settings(deadline=None)
@given(text=st.text(max_size=300), longest=st.integers(2, 50))
def test_parts_make_up_the_text(text: str, longest: int) -> None:
    parts = list(parts_of(text, longest))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= longest


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_special_tokens_are_text_by_default(make: Callable[[], Tokenizer]) -> None:
    backend = make()
    control = backend.token_to_id(CONTROL)
    document = [f"The fox {CONTROL} jumps"]
    assert control not in encode_texts(backend, document, parse_special_tokens=False)[0]
    assert control in encode_texts(backend, document, parse_special_tokens=True)[0]
    assert not backend.encode_special_tokens
