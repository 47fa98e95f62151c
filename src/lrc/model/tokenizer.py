"""A model's tokenizer as its own files describe it, and conversations in its chat template."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.model.locate import ModelFiles, refuse_pointer
from lrc.system.errors import UserError, reason
from lrc.system.files import reading
from lrc.system.limits import bounded

DESCRIPTION = "tokenizer.json"

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
"""Text that tokenizers differ on."""

TEMPLATE_SECONDS, TEMPLATE_GIB = 5, 1.0
"""What rendering a conversation may take: real templates take milliseconds."""


class RefusedConversation(UserError):
    """A chat template raised an error; the message is what it said."""


def load_tokenizer_files(files: ModelFiles) -> Tokenizer:
    """The tokenizer of a model.

    transformers rebuilds the tokenizers of some classes from their vocabulary alone; where that
    gives other tokens than the folder's own tokenizer.json, the file is believed.

    Raises:
        UserError: it cannot be read, or comes out other than its file describes it.
    """
    if files.gguf_path is not None:
        from lrc.model.gguf import read_tokenizer

        return read_tokenizer(files.gguf_path)
    path = files.folder / DESCRIPTION
    if path.is_file():
        refuse_pointer(path)
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
        f"transformers makes another tokenizer of {path} than the file describes (text becomes "
        "other tokens): set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json, "
        "or remove what changes it there."
    )


def _agree(own: Backend, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer gives the tokens of a file's own one on text that tells them apart."""
    own.no_truncation()
    own.no_padding()
    theirs = [own.encode(text, add_special_tokens=False).ids for text in PROBES]
    ours = tokenizer(list(PROBES), add_special_tokens=False, verbose=False)["input_ids"]
    return theirs == ours


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], generation_prompt: bool = False
) -> str:
    """A conversation in the tokenizer's chat template, special tokens and all.

    Args:
        tokenizer: the tokenizer.
        messages: turns with `role` and `content`.
        generation_prompt: end with what begins the assistant's next turn.

    Raises:
        RefusedConversation: the template raises something for it.
        UserError: there is no template, or it does not come to an end.
    """
    need_template(tokenizer)
    endless = (
        f"The chat template needs more than {TEMPLATE_SECONDS} s or {TEMPLATE_GIB:.0f} GiB for one "
        "conversation: mend or replace it (chat_template.jinja)."
    )
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_GIB, endless):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
    except UserError:
        raise
    except Exception as error:  # whatever the template raises
        raise RefusedConversation(reason(error)) from error
    return str(text)


def need_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without one usable chat template.

    Raises:
        UserError: it has none, or several of which none is called `default`.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(templates)
        raise UserError(
            f"The tokenizer has several chat templates ({names}) and none called 'default': name "
            "one of them so."
        )
    if not templates:
        raise UserError("The tokenizer has no chat template.")


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts before a text and nothing after it: a
    model does not go on after an end of text."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    while ids and len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
