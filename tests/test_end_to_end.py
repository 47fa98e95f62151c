"""From a teacher to an assistant that llama.cpp runs, each step one command (docs/chat.md)."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks_data import ROWS
from command_line import Command
from data_helpers import write_rows
from gguf_helpers import byte_level_bpe, read_fields

pytestmark = pytest.mark.slow

QUESTION = "How many legs has a cow?"


def save_teacher(folder: Path) -> None:
    """A random Llama with sizes that q8_0 can hold, and a chat template."""
    tokenizer = byte_level_bpe()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Text, conversations, and rows of a benchmark."""
    lines = [
        f"A cow has {n % 9} legs and the bee {n} has {n * n % 7} eyes. " * 4 for n in range(80)
    ]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (folder / "text.jsonl").write_text(text)
    turns = [
        [
            {"role": "user", "content": QUESTION.replace("cow", animal)},
            {"role": "assistant", "content": f"It has {n} legs."},
        ]
        for animal, n in (("cow", 4), ("bee", 6), ("hen", 2), ("fish", 0), ("dog", 4))
    ]
    chats = "".join(json.dumps({"messages": row}) + "\n" for row in turns * 8)
    (folder / "chat.jsonl").write_text(chats)
    (folder / "rows").mkdir()
    write_rows(folder / "rows/piqa.jsonl", ROWS["piqa"](4))


def test_from_a_teacher_to_an_assistant(
    tmp_path: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_teacher(Path("teacher"))
    write_data(tmp_path)

    def run(*arguments: Any) -> str:
        code, out, err = lrc(*arguments)
        assert code == 0, err
        return out

    small = {
        "train.tokens": 2048,
        "train.micro_batch": 4,
        "train.eval_every": 10,
        "data.sequence_length": 64,
        "data.held_out_fraction": 0.1,
        "data.cache": "cache",
        "initialize.calibration_tokens": 512,
    }
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    teacher = ("--teacher", "teacher", "--hidden-size", "32", "--text", "text.jsonl")
    out = run("compress", *teacher, *settings, "--out", "clone")
    assert "hold no conversation" in out
    run("resume", "clone")
    tuning = ("steps=40", "learning_rate=0.01", "max_length=128", "device=cpu")
    sets = [part for one in tuning for part in ("--set", one)]
    run("sft", "clone", "--data", "chat.jsonl", "--teacher", "teacher", *sets, "--out", "assistant")
    summary = json.loads(Path("assistant/summary.json").read_text())
    assert summary["held_out_lm"] < 0.5 * summary["held_out_lm_before"]
    run("eval", "assistant", "--tasks", "piqa", "--data", "rows", "--apply-chat-template")
    out = run("push", "assistant", "me/assistant", "--gguf", "q8_0", "--dry-run")
    assert "assistant-q8_0.gguf" in out
    run("export", "assistant", "assistant.gguf", "--dtype", "q8_0", "--modelfile")
    answer = run("generate", "assistant", QUESTION, "--chat", "--max-new-tokens", "24").strip()

    tokenizer = AutoTokenizer.from_pretrained("assistant/student")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained("teacher").chat_template
    fields = read_fields(Path("assistant.gguf"))
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert Path("Modelfile").read_text().startswith("FROM ./assistant.gguf\nTEMPLATE")
    assert AutoModelForCausalLM.from_pretrained("assistant/student").config.hidden_size == 32

    if importlib.util.find_spec("llama_cpp") is None:
        return  # `make test-gguf` builds it
    import llama_cpp

    model = llama_cpp.Llama("assistant.gguf", n_ctx=256, verbose=False)
    messages = [{"role": "user", "content": QUESTION}]
    found = model.create_chat_completion(messages, max_tokens=24, temperature=0.0)
    assert found["choices"][0]["message"]["content"].strip() == answer
