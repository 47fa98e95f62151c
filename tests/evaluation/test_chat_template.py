"""`lrc eval --apply-chat-template`, and ifeval, which generates."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from benchmarks_data import ROWS, save_byte_model
from command_line import Command
from data_helpers import write_rows
from lrc.evaluation.harness import harness_model
from lrc.system.errors import UserError

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model over bytes with a chat template."""
    folder = save_byte_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows/piqa.jsonl", ROWS["piqa"](4))
    return folder


def asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt of the next evaluation, as the model sees it."""
    lm = harness_model(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), 1
    )
    seen: list[str] = []
    kept = type(lm).mro()[1]._loglikelihood_tokens

    def watched(self, requests, *rest, **more):
        seen.extend(self.tokenizer.decode(context) for _, context, _ in requests)
        return kept(self, requests, *rest, **more)

    monkeypatch.setattr(type(lm).mro()[1], "_loglikelihood_tokens", watched)
    return seen


def test_prompts_are_in_the_template_with_one_bos(
    folder: Path, tmp_path: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(folder, monkeypatch)
    common = ("eval", folder, "--tasks", "piqa", "--data", tmp_path / "rows", "--limit", 2)
    out = tmp_path / "out"
    code, _, err = lrc(*common, "--out", out, "--apply-chat-template")
    assert code == 0, err
    bos = AutoTokenizer.from_pretrained(folder).bos_token
    assert len(seen) == 4
    for prompt in seen:
        assert prompt.startswith(f"{bos}[user]Question:")
        assert prompt.endswith("\n[assistant]")
        assert prompt.count(bos) == 1
    seen.clear()
    code, _, err = lrc(*common, "--out", out)  # other settings, so it is evaluated again
    assert code == 0, err
    assert len(seen) == 4
    assert not any("[user]" in prompt for prompt in seen)


def test_a_model_without_a_template_is_refused(folder: Path, tmp_path: Path, lrc: Command) -> None:
    (folder / "chat_template.jinja").unlink()
    rows = ("--data", tmp_path / "rows", "--out", tmp_path / "out")
    code, _, err = lrc("eval", folder, "--tasks", "piqa", *rows, "--apply-chat-template")
    assert code == 2
    assert "no chat template" in err


@pytest.mark.slow
def test_ifeval_runs(folder: Path, tmp_path: Path, lrc: Command) -> None:
    """A model of random bytes writes no comma by chance alone, and never 300 words in capitals."""
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    rows = [
        {
            "key": 1,
            "prompt": "Say something without a comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
        {
            "key": 2,
            "prompt": "Wrap everything in double quotes.",
            "instruction_id_list": ["startend:quotation"],
            "kwargs": [{}],
        },
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows/ifeval.jsonl").write_text(text)
    data = ("--data", tmp_path / "rows", "--out", tmp_path / "out")
    code, out, err = lrc("eval", folder, "--tasks", "ifeval", *data, "--apply-chat-template")
    assert code == 0, err
    found = json.loads((tmp_path / "out/results.json").read_text())
    metrics = found["models"][0]["tasks"]["ifeval"]["metrics"]
    assert set(metrics) == {
        f"{level}_level_{kind}_acc" for level in ("prompt", "inst") for kind in ("strict", "loose")
    }
    assert found["models"][0]["tasks"]["ifeval"]["rows"] == 2
    assert "ifeval" in out


def test_answers_longer_than_the_context_are_refused(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.api.instance import Instance

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 64
    lm = harness_model(model, AutoTokenizer.from_pretrained(folder), 1)

    def asks(length: int) -> list[Instance]:
        arguments = ("Say it.", {"until": ["\n"], "max_gen_toks": length})
        return [Instance("generate_until", {}, arguments, 0, metadata=("ifeval", 0, 1))]

    with pytest.raises(UserError, match=r"'ifeval' lets a model write 64 tokens.*of 64 tokens"):
        lm.generate_until(asks(64))
    answered = []
    lm.progress = lambda done, total: answered.append((done, total))
    assert len(lm.generate_until(asks(8))) == 1
    assert answered == [(1, 1)]
    assert "generate_until" not in capfd.readouterr().err, "the harness's own bar is shown"
