"""`lrc data build` and `lrc data inspect`, and the shipped mix for local data."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from build_helpers import TEMPLATE, documents, rows
from command_line import Command
from data_helpers import byte_tokenizer, write_rows
from lrc.cli import data as commands
from lrc.cli.console import TextConsole
from lrc.corpus import splitting
from lrc.data.shards import open_shards
from lrc.model.teacher import load_tokenizer
from stories import shared_data


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "console", TextConsole(width=160))


def save_teacher(folder: Path, **more: Any) -> Path:
    """A folder with a tokenizer that passes for a model."""
    tokenizer = byte_tokenizer(**more)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A generated folder with the files that `local-small` needs."""
    folder = tmp_path / "data"
    texts = documents(80, words=60)
    (folder / "text").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows([*texts, texts[0], "short"], source="x"))
    (folder / "text" / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(documents(20, 1), documents(20, 2), strict=True)
    ]
    write_rows(folder / "chat" / "sft.jsonl", [*chats, "{"])
    write_rows(folder / "eval" / "boolq.jsonl", [{"passage": texts[5]}])
    return folder


def test_local_small_on_a_stand_in(lrc: Command, stand_in: Path, tmp_path: Path) -> None:
    teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
    command = ("build", "local-small", out, "--root", stand_in, "--teacher", teacher)
    printed = lrc.printed("data", *command, "--workers", 1)
    assert printed.splitlines()[:3] == ["Reading prose", "Reading chat", "Writing shards"]
    assert "Note: 'chat': " in printed
    assert "sft.jsonl:21 is not valid JSON" in printed
    shards = open_shards(out)
    assert shards.sources == ("prose", "chat")
    documents_in = shards.documents("train") + shards.documents("held_out")
    assert documents_in == 79 + 20
    steps = {line.split("|")[2].strip() for line in printed.splitlines() if line.count("|") > 5}
    assert {"characters 200 to ∞", "near-duplicates", "tokens 16 to 4096"} <= steps
    assert f"{shards.tokens('train'):,} training tokens in 1 shard are" in printed

    printed = lrc.printed("data", "inspect", out, "--documents", 2, "--teacher", teacher)
    assert "Every file is intact." in printed
    assert printed.count("<|bos|>") == 2
    for tokens in shards.tokens_by_source("train").values():
        assert f"{tokens:,}" in printed
    other = save_teacher(tmp_path / "other", extra=["<more>"])
    message = lrc.refusal("data", "inspect", out, "--teacher", other)
    assert f"not with that of '{other}': rebuild them" in message

    flipped = out / "train-00000.bin"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    message = lrc.refusal("data", "inspect", out)
    assert message.startswith(f"Error: Damaged files: {flipped}; copy them again")
    assert "document" in lrc.printed("data", "inspect", out, "--no-checksums", "--documents", 1)
    content[100] ^= 1
    flipped.write_bytes(content)
    flipped = out / "train-00000.source.bin"
    flipped.write_bytes(b"\xff" * flipped.stat().st_size)
    assert str(flipped) in lrc.refusal("data", "inspect", out)
    message = lrc.refusal("data", "inspect", out, "--no-checksums")
    assert f"{flipped} has an unknown source" in message


def test_settings_override_the_mix(lrc: Command, stand_in: Path, tmp_path: Path) -> None:
    command = ("build", "local-small", tmp_path / "out", "--root", stand_in, "--workers", 1)
    command += ("--teacher", save_teacher(tmp_path / "teacher"))
    changes = ("--set", "sources.prose.tokens=3k", "--evaluation", stand_in / "sets")
    write_rows(stand_in / "sets" / "one.jsonl", [{"q": "none"}])
    lrc.printed("data", *command, *changes, "--set", "held_out_fraction=0")
    shards = open_shards(tmp_path / "out")
    assert shards.tokens_by_source("train")["prose"] == pytest.approx(3_000, abs=400)
    assert shards.build["mix"]["decontaminate"]["folder"] == str(stand_in / "sets")


def test_bad_arguments(lrc: Command, tmp_path: Path) -> None:
    assert "There is no mix 'nothing'" in lrc.refusal("data", "build", "nothing", tmp_path / "out")
    assert "contains no finished shards" in lrc.refusal("data", "inspect", tmp_path)
    message = lrc.refusal(
        "data", "build", "local-small", tmp_path / "out", "--set", "sources.prose.weigt=1"
    )
    assert "unknown key 'sources.prose.weigt' (nearest: 'sources.prose.weight')" in message


def test_local_small_on_real_data(
    lrc: Command, tmp_path: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped mix on some of the real prose and conversations."""
    monkeypatch.setattr(splitting, "UNIT_BYTES", 1 << 19)
    teacher = tmp_path / "teacher"
    tokenizer = load_tokenizer(str(stories_folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(teacher)
    (teacher / "config.json").write_text((stories_folder / "config.json").read_text())
    command = (
        "build",
        "local-small",
        tmp_path / "out",
        "--root",
        shared_data("text", "chat", "eval"),
    )
    command += ("--teacher", teacher, "--workers", 1)
    lrc.printed(
        "data", *command, "--set", "sources.prose.tokens=300k", "--set", "sources.chat.tokens=100k"
    )
    shards = open_shards(tmp_path / "out")
    assert shards.tokens_by_source("train")["prose"] == pytest.approx(300_000, abs=9_000)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    # Another program has removed these sets from the prose, and nearly so from the conversations.
    dropped = sum(one["documents_dropped"] for one in summary["evaluation_sets"].values())
    assert dropped <= 1
    assert {"boolq", "sciq", "mmlu", "winogrande"} <= set(summary["evaluation_sets"])
    assert summary["sources"]["prose"]["steps"][0]["documents_in"] < 1_500


def test_filters_are_shown_with_their_square_brackets(lrc: Command, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    texts = documents(30)
    data = [{"text": t, "language": "en" if i % 3 else "de"} for i, t in enumerate(texts)]
    write_rows(tmp_path / "web.jsonl", [*data, "[broken"])
    mix = {
        "teacher": str(tmp_path / "teacher"),
        "sources": {
            "web": {
                "files": [str(tmp_path / "web.jsonl")],
                "filters": {"values": {"language": ["en"]}, "drop_matching": "[0-9]{9}"},
            }
        },
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    printed = lrc.printed("data", "build", tmp_path / "mix.yaml", tmp_path / "out", "--workers", 1)
    assert "language in [en]" in printed
    assert "drop /[0-9]{9}/" in printed
    assert "training tokens in 1 shard are in" in printed
