"""Render conversations of either common format with the teacher's chat template."""

from typing import TYPE_CHECKING, Any

from lrc.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Roles, by their names in ShareGPT data sets, in lower case."""


class Malformed(Exception):
    """A row contains no conversation; the message says why."""


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Conversation turns as messages with `role` and `content`.

    Args:
        value: a list of `{role, content}` or of `{from, value}`; null is an empty conversation.
            Other keys of the former, such as `tool_calls`, are kept.

    Raises:
        Malformed: if the value is neither.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(f"not a list of turns but a {type(value).__name__}")
    return [_message(turn) for turn in value]


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise Malformed(f"a turn that is not an object but a {type(turn).__name__}")
    # The hub's data sets have null where a turn lacks what others have; templates take it for more.
    turn = {key: value for key, value in turn.items() if value is not None}
    name, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if text is None and turn.get("tool_calls"):
        text = ""
    if not (isinstance(name, str) and isinstance(text, str)):
        raise Malformed("a turn without text in `role` and `content`, or in `from` and `value`")
    role = SHAREGPT_ROLES.get(name.lower())
    if "role" not in turn:
        if role is None:
            raise Malformed(f"a turn from '{name}', which is not a known role")
        return {"role": role, "content": text}
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    # Other names, such as `observation`, are the template's matter.
    role = role if role in ("system", "user", "assistant") else name
    return {**rest, "role": role, "content": text}


def render(messages: list[dict[str, Any]], tokenizer: "Tokenizer") -> str:
    """Render a conversation as the teacher reads it, including special tokens; an empty
    conversation gives an empty text.

    Raises:
        Malformed: if the template rejects the conversation (for example, two consecutive turns of
            the same role).
        UserError: if the tokenizer has no chat template.
    """
    from lrc.model.tokenizer import RefusedConversation, chat_text

    if not messages:
        return ""
    try:
        return chat_text(tokenizer, messages)
    except RefusedConversation as error:
        raise Malformed(f"a conversation that the chat template rejects ({error})") from error


def require_template(tokenizer: "Tokenizer") -> None:
    """Check that a tokenizer has a chat template.

    Raises:
        UserError: if the tokenizer has no chat template.
    """
    from lrc.model.tokenizer import need_template

    try:
        need_template(tokenizer)
    except UserError as error:
        raise UserError(
            f"Chat sources cannot be rendered: {error} Use a teacher that has one (its instruct "
            "version), or remove these sources."
        ) from error
