"""Load a model's tokenizer as its files describe it, and render its chat template."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.model.locate import ModelFiles, refuse_pointer
from lrc.system.errors import UserError, reason
from lrc.system.files import reading
from lrc.system.limits import bounded

DESCRIPTION = "tokenizer.json"

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""What the files of a tokenizer are called."""

ADVICE = "give a model folder with a valid tokenizer"

PROBES = (
    "The quick brown fox, 12 of 34567 times, jumped over 1,000.50 lazy dogs.",
    " leading and trailing space ",
    "  two  spaces\tand a tab\r\n\n\nand lines \n",
    "It's they'LL, we'd I'M don't o'clock",
    "def f(x: int) -> str:\n    return f'{x ** 2:>8}'  # code_with_names",
    "https://example.org/a?b=c&d=%20 user@example.org",
    "Ödön's café, naïve façade — “quotes” … ½ x² ≠ ∑",
    "北京欢迎你 こんにちは 안녕하세요 Привет мир שלום مرحبا नमस्ते ไทย",
    "🙂👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b ﬁ Ⅷ",
    "<s></s> <|endoftext|> <pad> [INST] <think> </think>",
    "aaaaaaaaaaaaaaaa!!!!!!!!????----____====",
    "\u2581 \u2581\u2581 a\u2581b",
    "",
)
"""Texts on which tokenizers differ."""

TEMPLATE_SECONDS, TEMPLATE_GIB = 5, 1.0
"""Limits for rendering a conversation. Real templates take milliseconds."""


class RefusedConversation(UserError):
    """An error that a chat template raised, with the template's own message."""


def load_tokenizer_files(files: ModelFiles) -> Tokenizer:
    """Load the tokenizer of a model.

    transformers rebuilds some tokenizer classes from the vocabulary alone. If the result gives
    different tokens than the folder's tokenizer.json, the file wins.

    Raises:
        UserError: if it cannot be read, or does not load as its file describes it.
    """
    if files.gguf_path is not None:
        from lrc.model.gguf import read_tokenizer

        return read_tokenizer(files.gguf_path)
    path = files.folder / DESCRIPTION
    if path.is_file():
        refuse_pointer(path)
    elif not any(list(files.folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(f"'{files.name}' has no tokenizer: add its {DESCRIPTION} to the folder.")
    with reading(f"The tokenizer of '{files.name}'", ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **files.options())
        if not path.is_file():
            return tokenizer
        own = Backend.from_file(str(path))
        if _agree(own, tokenizer):
            return tokenizer
        tokenizer = PreTrainedTokenizerFast.from_pretrained(files.folder, **files.options())
        if _agree(own, tokenizer):
            return tokenizer
    raise UserError(
        f"transformers does not load {path} as the file describes it (text gives different "
        "tokens): set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json, or "
        "remove the setting there that changes the tokenizer."
    )


def _agree(own: Backend, tokenizer: Tokenizer) -> bool:
    """Whether a loaded tokenizer gives the same tokens as the file's own on `PROBES`."""
    own.no_truncation()
    own.no_padding()
    theirs = [own.encode(text, add_special_tokens=False).ids for text in PROBES]
    ours = tokenizer(list(PROBES), add_special_tokens=False, verbose=False)["input_ids"]
    return theirs == ours


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], generation_prompt: bool = False
) -> str:
    """Render a conversation in the tokenizer's chat template, including special tokens.

    Args:
        tokenizer: the tokenizer.
        messages: turns with `role` and `content`.
        generation_prompt: whether to end with the start of the assistant's next turn.

    Raises:
        RefusedConversation: if the template raises an error.
        UserError: if there is no template, or rendering exceeds its limits.
    """
    need_template(tokenizer)
    endless = (
        f"The chat template needs more than {TEMPLATE_SECONDS} s or {TEMPLATE_GIB:.0f} GiB for one "
        "conversation: fix or replace it (chat_template.jinja)."
    )
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_GIB, endless):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
    except UserError:
        raise
    except Exception as error:  # the template can raise anything
        raise RefusedConversation(reason(error)) from error
    return str(text)


def need_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without one usable chat template.

    Raises:
        UserError: if it has none, or several and none is called `default`.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(templates)
        raise UserError(
            f"The tokenizer has several chat templates ({names}) and none called 'default': rename "
            "one of them to 'default'."
        )
    if not templates:
        raise UserError(
            "The tokenizer has no chat template: use a chat model's, or put a chat_template.jinja "
            "beside it."
        )


def answer_mark(tokenizer: Tokenizer) -> list[int]:
    """The tokens between a question and its answer in the chat template; none if it puts nothing
    there, or refuses the conversation."""
    question, answer = "QUESTION", "ANSWER"
    roles = (("user", question), ("assistant", answer))
    try:
        text = chat_text(tokenizer, [{"role": role, "content": said} for role, said in roles])
    except UserError:
        return []
    between = text.partition(question)[2].partition(answer)[0].strip()
    return list(tokenizer(between, add_special_tokens=False, verbose=False)["input_ids"])


def tokens_of_its_own(tokenizer: Tokenizer) -> int:
    """Number of token ids up to the last that is not an added token. A model may have no embedding
    for added ones: Gemma 3's text models have none for the image token."""
    ids = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    return max(ids, default=-1) + 1


def framing(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether a tokenizer puts BOS before a text, and EOS after it."""
    framed, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return (
        framed[0] == tokenizer.bos_token_id and framed[0] != bare[0],
        framed[-1] == tokenizer.eos_token_id and framed[-1] != bare[-1],
    )


def end_tokens(tokenizer: Tokenizer, generation: GenerationConfig | None) -> list[int]:
    """Every token that ends a text: the tokenizer's EOS and those of a generation config."""
    known = getattr(generation, "eos_token_id", None)
    ends = {known} if isinstance(known, int) else set(known or ())
    eos = tokenizer.eos_token_id
    return sorted(ends | ({eos} if isinstance(eos, int) else set()))


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a prompt, without an end-of-text token.

    Tokens that the tokenizer adds before the text stay. A model does not continue after an end of
    text.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    while ids and len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
