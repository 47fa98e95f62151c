"""Conversations of either common form, rendered with the teacher's chat template."""

from typing import TYPE_CHECKING, Any

from lrc.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Roles by the names that ShareGPT data sets give them."""


class Malformed(Exception):
    """A row holds no conversation; the message says why."""


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Conversation turns as messages with `role` and `content`.

    Args:
        value: a list of `{role, content}` or of `{from, value}`; null is an empty conversation.

    Raises:
        Malformed: it is neither.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(f"no list of turns but a {type(value).__name__}")
    return [_message(turn) for turn in value]


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise Malformed(f"a turn that is no object but a {type(turn).__name__}")
    if isinstance(turn.get("content"), str) and isinstance(turn.get("role"), str):
        return turn
    if isinstance(turn.get("value"), str) and isinstance(turn.get("from"), str):
        role = SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise Malformed(f"a turn from '{turn['from']}', which is no known role")
        return {"role": role, "content": turn["value"]}
    raise Malformed("a turn without `role` and `content` or `from` and `value` in text")


def render(messages: list[dict[str, Any]], tokenizer: "Tokenizer") -> str:
    """A conversation as the teacher reads it, special tokens and all; empty where it is.

    Raises:
        Malformed: the template refuses the conversation (two turns of the same role, say).
        UserError: the tokenizer has no chat template.
    """
    from lrc.model.tokenizer import RefusedConversation, chat_text

    if not messages:
        return ""
    try:
        return chat_text(tokenizer, messages)
    except RefusedConversation as error:
        raise Malformed(f"a conversation that the chat template refuses ({error})") from error


def require_template(tokenizer: "Tokenizer") -> None:
    """Check that a tokenizer has a chat template.

    Raises:
        UserError: it has none.
    """
    from lrc.model.tokenizer import need_template

    try:
        need_template(tokenizer)
    except UserError as error:
        raise UserError(
            f"Chat sources cannot be rendered: {error} Name a teacher that has one (its instruct "
            "version), or leave these sources out."
        ) from error
