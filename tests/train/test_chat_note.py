"""A warning when a chat model is cloned on text without a conversation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lrc.model.tokenizer import answer_mark
from lrc.recipe import make_recipe
from lrc.train import train
from tiny import tiny_teacher, tiny_tokenizer
from tiny_runs import new_run

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|> {{ m.content }} {{ eos_token }}{% endfor %}"
)


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_answers_are_known_by_what_the_template_puts_before_them() -> None:
    assert answer_mark(chat_tokenizer()) == [1, 33]
    assert answer_mark(chat_tokenizer("{{ messages[0].content }}{{ messages[1].content }}")) == []
    assert answer_mark(chat_tokenizer("{{ raise_exception('no') }}")) == []


@pytest.mark.parametrize(
    ("template", "conversations", "warned"),
    [(TEMPLATE, 0, True), (TEMPLATE, 1, False), (None, 0, False)],
    ids=["no-conversation", "one-conversation", "base-model"],
)
def test_the_warning(
    tmp_path: Path,
    template: str | None,
    conversations: int,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = new_run(tmp_path)
    parsed = make_recipe(run.recipe.model_dump(), {"data.parse_special_tokens": True})
    run = replace(run, recipe=parsed)
    text = tmp_path / "text.jsonl"
    chats = [{"text": f"w5 w{7 + i} </s> <|turn|> w6"} for i in range(20 * conversations)]
    text.write_text(text.read_text() + "".join(json.dumps(chat) + "\n" for chat in chats))
    teacher = tiny_teacher("llama")
    object.__setattr__(teacher, "tokenizer", chat_tokenizer(template))
    train(run, teacher)
    assert ("hold no conversation" in caplog.text) == warned
    caplog.clear()
    train(run, teacher)  # it has ended, and says nothing again
    assert "hold no conversation" not in caplog.text
