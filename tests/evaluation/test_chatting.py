"""`lrc chat`: the template, the turns that are kept, commands, and stopping an answer."""

import io
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import Command
from lrc.evaluation.chatting import Chat
from lrc.system.errors import UserError
from tiny import tiny_teacher

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ {'system': 'w5', 'user': 'w3', 'assistant': 'w4'}"
    "[m.role] }} {{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %} w4{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random Llama with a chat template; its tokenizer adds BOS to plain text."""
    teacher = tiny_teacher("llama", tied=True, dtype=torch.float32)
    teacher.model.generation_config.update(do_sample=False, top_k=50)
    teacher.model.save_pretrained(tmp_path / "model")
    teacher.tokenizer.chat_template = TEMPLATE
    teacher.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def talk(folder: Path) -> Chat:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Chat(model, AutoTokenizer.from_pretrained(folder), max_new_tokens=5)


def never() -> bool:
    return False


def test_answers_are_the_models_own_in_its_template(talk: Chat) -> None:
    """The prompt is the whole conversation with one BOS; pieces add up to the answer."""
    seen: list[torch.Tensor] = []
    generate = talk._model.generate

    def watched(ids: torch.Tensor, **options: Any) -> Any:
        seen.append(ids[0])
        return generate(ids, **options)

    talk._model.generate = watched
    talk.system = "w6"
    pieces: list[str] = []
    first = talk.answer("w7", pieces.append, never)
    assert "".join(pieces).strip() == first
    second = talk.answer("w8", pieces.append, never)
    assert [turn["content"] for turn in talk.turns] == ["w7", first, "w8", second]
    tokenizer = talk._tokenizer
    told = f"<s> w5 w6 </s> w3 w7 </s> w4 {first} </s> w3 w8 </s> w4"
    assert tokenizer.decode(seen[1]) == told
    assert (seen[1] == tokenizer.bos_token_id).sum() == 1
    expected = generate(
        seen[1][None], max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    assert second == tokenizer.decode(expected[0, len(seen[1]) :], skip_special_tokens=True)
    talk.reset()
    talk.answer("w7", pieces.append, never)
    assert torch.equal(seen[2], seen[0])


def test_the_oldest_turns_give_way_in_a_long_conversation(talk: Chat) -> None:
    """The tiny model has 64 positions."""
    for _ in range(12):
        talk.answer("w7 w8", lambda _: None, never)
    assert talk.turns[0]["role"] == "user"
    assert len(talk.turns) < 24
    before = list(talk.turns)
    with pytest.raises(UserError, match="do not fit"):
        talk.answer("w7 " * 70, lambda _: None, never)
    assert talk.turns == before


def test_an_answer_takes_half_of_a_short_context_by_default(folder: Path) -> None:
    """The tiny model has 64 positions, fewer than the 512 tokens of an answer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    talk = Chat(model, AutoTokenizer.from_pretrained(folder))
    lengths: list[int] = []
    generate = model.generate

    def watched(ids: torch.Tensor, **options: Any) -> Any:
        lengths.append(options["max_new_tokens"])
        return generate(ids, **options)

    model.generate = watched
    talk.answer("w7 w8", lambda _: None, never)
    assert lengths == [32]


def test_a_stopped_answer_stays_in_the_conversation(talk: Chat) -> None:
    talk._max_new_tokens = 40
    counted: list[None] = []

    def stop() -> bool:
        counted.append(None)
        return len(counted) == 3

    answer = talk.answer("w9", lambda _: None, stop)
    assert len(counted) == 3 or len(answer.split()) < 3
    assert talk.turns[-1] == {"role": "assistant", "content": answer}


def test_the_command_line(folder: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, the end of the input, and the same answer as `lrc generate --chat`."""
    lines = "w7\n/reset\n\nw7\n/system w6\nw7\n/nonsense\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = lrc("chat", folder, "--max-new-tokens", "5", "--temperature", "0")
    assert code == 0, err
    answers = re.findall(r"w\d+(?: w\d+)*", out)
    assert len(answers) == 3
    assert answers[0] == answers[1] != answers[2]
    assert out.count("/reset forgets") == 2
    code, generated, err = lrc("generate", folder, "w7", "--chat", "--max-new-tokens", "5")
    assert code == 0, err
    assert generated.strip() == answers[0].strip()


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    folder: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Chat.answer
    stops = []

    def interrupted(self: Chat, text: str, show: Any, stopped: Any) -> str:
        if text == "w7":
            signal.raise_signal(signal.SIGINT)
        stops.append(stopped())
        return answer(self, text, show, stopped)

    monkeypatch.setattr(Chat, "answer", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("w7\nw8\n/exit\nw9\n"))
    code, _, err = lrc("chat", folder, "--max-new-tokens", "5")
    assert code == 0, err
    assert stops == [True, False]


def test_a_model_without_a_template_is_refused(folder: Path, lrc: Command) -> None:
    (folder / "chat_template.jinja").unlink()
    code, _, err = lrc("chat", folder)
    assert code == 2
    assert "no chat template" in err
