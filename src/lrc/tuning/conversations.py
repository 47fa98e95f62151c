"""Read conversations, and encode them with a mask of the assistant's tokens."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from lrc.corpus.chat import Malformed, messages_of
from lrc.data.text_files import json_lines
from lrc.model.locate import HUB_ID
from lrc.model.tokenizer import RefusedConversation, chat_text, need_template
from lrc.system.errors import UserError
from lrc.system.hub import cache_alone_if_unreachable, no_way

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

FIELDS = ("messages", "conversations")
"""Fields of a row that may hold its conversation."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens, in arrays: a data set of the hub has hundreds of millions."""

    input_ids: NDArray[np.int32]
    """[tokens]."""
    learned: NDArray[np.bool_]
    """[tokens]; whether each belongs to an answer of the assistant, its end of turn included."""

    def labels(self) -> NDArray[np.int32]:
        """The tokens, with -100 in place of those that are not learned."""
        return np.where(self.learned, self.input_ids, np.int32(-100))


def read_conversations(sources: Sequence[str], split: str) -> Iterator[Messages]:
    """The conversations of JSONL files and of data sets of the hub.

    Raises:
        UserError: if a source is not found or cannot be read, or a row holds no conversation.
    """
    for source in sources:
        path = Path(source).expanduser()
        rows = json_lines(path) if path.is_file() else _hub_rows(source, split)
        for number, row in rows:
            row = row if isinstance(row, dict) else {}
            known = [name for name in FIELDS if name in row]
            where = f"{source}:{number}"
            if row.get("tools"):
                raise UserError(
                    f"{where} describes `tools`, which chat tuning does not show to the model: "
                    "remove the field, or write them into a system turn."
                )
            if not known:
                raise UserError(
                    f"{where} holds no conversation: give rows with turns in `messages` or "
                    "`conversations`."
                )
            try:
                yield messages_of(next((row[name] for name in known if row[name]), None))
            except Malformed as error:
                raise UserError(f"{where} holds {error}: fix or remove the row.") from error


def check_sources(sources: Sequence[str]) -> None:
    """Refuse a source that is neither a JSONL file nor the name of a data set of the hub.

    Raises:
        UserError: if there is one.
    """
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file() and path.name.lower().endswith(SUFFIXES):
            continue
        if path.exists() or not HUB_ID.fullmatch(source) or source.lower().endswith(SUFFIXES):
            what = "is not a JSONL file" if path.exists() else "does not exist"
            raise UserError(
                f"{source} {what}: give a .jsonl file (also .gz or .zst), or the hub id of a data "
                "set."
            )


def _hub_rows(source: str, split: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    problem = cache_alone_if_unreachable()
    try:
        rows = load_dataset(source, split=split)
    except Exception as error:  # `datasets` may raise anything
        raise UserError(
            f"The data set {source} (split {split}) cannot be loaded ({no_way(problem, error)}): "
            "check its name and split, or give a .jsonl file."
        ) from error
    yield from enumerate(rows, 1)


class Encoder:
    """Encodes conversations in a tokenizer's chat template.

    The answers are found by the template's own generation markers, or by those of TRL's version of
    the template. If there are neither, or if they leave out the end of a turn, a conversation is
    rendered again up to the start and the end of each answer.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Raises UserError if the tokenizer has no chat template or gives no positions."""
        need_template(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length
        self.template = _marked_template(tokenizer)
        self._warned = False
        if self.template is None and not tokenizer.is_fast:
            raise UserError(
                "The chat template has no generation markers and the tokenizer gives no positions "
                "of its tokens: add {% generation %} to the template, or a tokenizer.json."
            )

    def encode(self, messages: Messages) -> Encoded | None:
        """Encode a conversation; None if no token of an answer is left.

        Raises:
            RefusedConversation: if the template refuses it, or renders an answer in another way
                when more turns follow.
            UserError: as in `chat_text`.
        """
        text = chat_text(self._tokenizer, messages)
        ids, learned = self._marked(messages) if self.template else self._rendered(messages, text)
        ids, learned = ids[: self._max_length], learned[: self._max_length]
        if not any(learned[1:]):
            return None
        return Encoded(np.array(ids, np.int32), np.array(learned))

    def _marked(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """By the markers of the template."""
        found = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]

    def _rendered(self, messages: Messages, text: str) -> tuple[list[int], list[bool]]:
        """By the text before and after every answer."""
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != ASSISTANT or turn == 0:
                continue
            before = chat_text(self._tokenizer, messages[:turn], generation_prompt=True)
            after = chat_text(self._tokenizer, messages[: turn + 1]).rstrip()
            if not (after.startswith(before) and text.startswith(after)):
                raise RefusedConversation(
                    "the template renders an answer in another way when more turns follow: add "
                    "{% generation %} and {% endgeneration %} around the answers in it"
                )
            if after.endswith(str(message["content"]).rstrip()) and not self._warned:
                self._warned = True
                logger.warning(
                    "The chat template writes nothing after an answer, so the model does not learn "
                    "where answers end: let the template write the EOS token there."
                )
            spans.append((len(before), len(after)))
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        learned = [
            any(start < to and end > begin for begin, to in spans)
            for start, end in found["offset_mapping"]
        ]
        return list(found["input_ids"]), learned


def _marked_template(tokenizer: Tokenizer) -> str | None:
    """A chat template with generation markers that cover the end of a turn; None if there is none.

    It is the tokenizer's own, or TRL's version of it.
    """
    template = tokenizer.chat_template
    template = template["default"] if isinstance(template, dict) else template
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(tokenizer)
        except Exception:  # TRL does not know it, or probes what the template refuses
            return None
    if template is None or not is_chat_template_stop_token_trained(tokenizer, template):
        return None
    return str(template)


@dataclass(frozen=True)
class Conversations:
    """The conversations of a tuning, as tokens."""

    training: list[Encoded]
    held_out: list[Encoded]
    training_messages: list[Messages]
    """Empty lists, unless they were to be kept."""
    left_out: dict[str, int]
    """Number of conversations that were left out, by the reason."""

    def answer_end(self, tokenizer: Tokenizer) -> int | None:
        """The special token by which most answers end; None if none does."""
        special = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        special.update(tokenizer.all_special_ids)
        ends: Counter[int] = Counter()
        for one in self.training:
            learned = one.input_ids[one.learned].tolist()
            # White space may follow.
            ends.update(next(([token] for token in learned[:-4:-1] if token in special), ()))
        return max(ends, key=lambda token: ends[token], default=None)

    def fingerprint(self) -> str:
        """A checksum of all tokens and labels."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for one in part:
                digest.update(one.input_ids.tobytes() + one.learned.tobytes())
            digest.update(b"\n")
        return digest.hexdigest()


def encode_all(
    conversations: Iterable[Messages],
    encoder: Encoder,
    held_out_fraction: float,
    held_out_conversations: int,
    seed: int,
    keep_messages: bool = False,
) -> Conversations:
    """Encode conversations and hold some out, chosen by their content and the seed.

    Args:
        conversations: the conversations.
        encoder: what encodes them.
        held_out_fraction: share to hold out; at least one.
        held_out_conversations: maximum number to hold out.
        seed: seed of the choice.
        keep_messages: whether the training messages are needed, too.

    Raises:
        UserError: if none can be learned from, or fewer than two are left.
    """
    kept: list[tuple[str, Messages, Encoded]] = []
    left_out: dict[str, int] = defaultdict(int)
    refusal = ""
    for messages in conversations:
        if any(map(_is_blank_answer, messages)):
            left_out["an answer is empty"] += 1
            continue
        try:
            encoded = encoder.encode(messages)
        except RefusedConversation as error:
            refusal = refusal or f"the chat template refuses them ({error})"
            left_out[refusal] += 1
            continue
        if encoded is None:
            left_out["there is no answer within max_length"] += 1
            continue
        drawn = hashlib.sha256(f"{seed}:".encode() + encoded.input_ids.tobytes()).hexdigest()
        kept.append((drawn, messages if keep_messages else [], encoded))
    if len(kept) < 2:
        why = "".join(f" Left out: {count:,}, because {why}." for why, count in left_out.items())
        raise UserError(
            f"Of {len(kept) + sum(left_out.values()):,} conversations, {len(kept)} can be learned "
            f"from, but two are needed.{why}"
        )
    number = min(
        held_out_conversations, max(1, round(held_out_fraction * len(kept))), len(kept) - 1
    )
    chosen = set(islice(sorted(drawn for drawn, _, _ in kept), number))
    training = [(messages, encoded) for drawn, messages, encoded in kept if drawn not in chosen]
    if not training:
        raise UserError("All conversations are the same: there is nothing to learn from.")
    return Conversations(
        [encoded for _, encoded in training],
        [encoded for drawn, _, encoded in kept if drawn in chosen],
        [messages for messages, _ in training],
        dict(left_out),
    )


def _is_blank_answer(message: dict[str, Any]) -> bool:
    """Whether a turn would teach the assistant to end its turn at once."""
    said = message["content"].strip() or message.get("tool_calls")
    return message["role"] == ASSISTANT and not said
