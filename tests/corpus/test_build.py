"""Building shards from a mix in one process: results, and messages about bad input."""

import errno
import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from matplotlib.figure import Figure
from PIL import Image

from build_helpers import TEMPLATE, build, documents, make_mix, rows, steps_of, summary_of, texts_of
from data_helpers import ByteTokenizer, byte_tokenizer, write_rows
from lrc.corpus import hub, splitting, summary
from lrc.corpus.unit import UnitWorker
from lrc.data.identity import HASH_RANGE, text_hash
from lrc.data.shards import Shards, open_shards
from lrc.system.errors import UserError


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "UNIT_BYTES", 2_000)
    monkeypatch.setattr(
        summary, "draw", lambda _: Figure(figsize=(1, 1))
    )  # It takes half a second.


def chat_tokenizer() -> ByteTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_every_kind_of_file(tmp_path: Path) -> None:
    """Every format, each divided into units in its own way, gives the same documents."""
    texts = {kind: documents(60, seed) for seed, kind in enumerate("abcdefgh")}
    plain = "".join(json.dumps(row) + "\n" for row in rows(texts["b"])).encode()
    write_rows(tmp_path / "a.jsonl", rows(texts["a"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    plain = "".join(json.dumps(row) + "\n" for row in rows(texts["c"])).encode()
    (tmp_path / "c.json.zst").write_bytes(zstandard.ZstdCompressor().compress(plain))
    pq.write_table(pa.table({"text": texts["d"], "x": [1] * 60}), tmp_path / "d.parquet", 7)
    datasets.Dataset.from_dict({"text": texts["e"]}).save_to_disk(str(tmp_path / "e"))
    (tmp_path / "f").mkdir()
    for i, text in enumerate(texts["f"]):
        (tmp_path / "f" / f"{i:02d}.txt").write_text(f"{text}\n")
    names = {
        **{"a": "a.jsonl", "b": "b.jsonl.gz", "c": "c.json.zst"},
        **{"d": "*.parquet", "e": "e", "f": "f"},
    }
    sources = {kind: {"files": [name]} for kind, name in names.items()}
    shards = build(make_mix(tmp_path, sources, held_out_fraction=0), tmp_path / "out")
    assert not (tmp_path / "out" / "build").exists()
    expected = [(kind, text) for kind in names for text in texts[kind]]
    assert sorted(texts_of(shards)) == sorted(expected)
    assert shards == open_shards(tmp_path / "out")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_text_is_cut_into_documents_as_in_recipes(tmp_path: Path, ending: str) -> None:
    paragraphs = [text + "." for text in documents(300, words=40)]
    data = "\n\n".join(paragraphs).encode()
    name = f"a.txt{ending}"
    (tmp_path / name).write_bytes(gzip.compress(data) if ending else data)
    found = texts_of(build(make_mix(tmp_path, {"a": {"files": [name]}}), tmp_path / "out"))
    assert len(found) > 5
    pieces = [paragraph for _, text in found for paragraph in text.split("\n\n")]
    held_out = texts_of(open_shards(tmp_path / "out"), "held_out")
    pieces += [paragraph for _, text in held_out for paragraph in text.split("\n\n")]
    assert sorted(pieces) == sorted(paragraphs)


def test_conversations_of_both_forms(tmp_path: Path) -> None:
    chat = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
        {"messages": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]},
        {"messages": []},
        {"messages": [{"from": "nobody", "value": "A"}]},
        {"messages": "text"},
        {"messages": [{"role": "user"}]},
        {
            "messages": [
                {"role": "user", "content": "\ud83d"},
                {"role": "assistant", "content": "C"},
            ]
        },
    ]
    write_rows(tmp_path / "a.jsonl", chat)
    mix = make_mix(tmp_path, {"a": {"files": ["a.jsonl"], "chat": "messages"}})
    shards = build(mix, tmp_path / "out", tokenizer=chat_tokenizer())
    # bos and eos of the template are not doubled: `texts_of` takes one of each off.
    found = [text for _, text in texts_of(shards) + texts_of(shards, "held_out")]
    whole = ["<user>?<assistant>C", "<user>A<assistant>B", "<user>Hi<assistant>Yes"]
    assert sorted(found) == whole
    assert steps_of(shards, "a") == {"malformed": 3, "blank": 1}
    shown = summary_of(shards)["sources"]["a"]["malformed_rows"]
    assert f"{tmp_path / 'a.jsonl'}:4 is a turn from 'nobody', which is not a known role" in shown
    with pytest.raises(
        UserError, match="Chat sources cannot be rendered: The tokenizer has no chat template"
    ):
        build(mix, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_filters_one_by_one(tmp_path: Path) -> None:
    good = documents(20)
    field = {"int_score": 4, "meta": {"language": "en"}, "score": 0.5}
    bad = [
        {"text": good[0] + " a", **field, "int_score": 3},
        {"text": good[0] + " b", **field, "int_score": None},
        {"text": good[0] + " c", **field, "score": 1.5},
        {"text": good[0] + " d", **field, "meta": {"language": "de"}},
        {"text": "short", **field},
        {"text": good[0] + " DROP", **field},
        {"text": good[0] + "!", **field},
        {"text": " \n", **field},
        {"text": None, **field},
        {"text": "x" * 50 + ".", **field},
        "{",
    ]
    write_rows(tmp_path / "a.jsonl", [*({"text": f"{t}.", **field} for t in good), *bad])
    filters = {
        "numbers": {"int_score": ">= 4", "score": "> 0 and <= 1"},
        "values": {"meta.language": ["en", "fr"]},
        "characters": {"min": 20},
        "keep_matching": r"\.$|DROP$",
        "drop_matching": "DROP",
        "tokens": {"max": 50},
    }
    # Filters of tokens take long documents only: these have fewer characters than 50.
    texts = [f"{text}." for text in good if len(text) < 50]
    shards = build(
        make_mix(tmp_path, {"a": {"files": ["a.jsonl"], "filters": filters}}, held_out_fraction=0),
        tmp_path / "out",
    )
    assert sorted(text for _, text in texts_of(shards)) == sorted(texts)
    assert steps_of(shards, "a") == {
        "malformed": 1,
        "blank": 2,
        "int_score >= 4": 2,
        "score > 0 and <= 1": 1,
        "meta.language in [en, fr]": 1,
        "characters 20 to ∞": 1,
        r"keep /\.$|DROP$/": 1,
        "drop /DROP/": 1,
        "tokens 0 to 50": 1 + len(good) - len(texts),
    }


def test_summary_adds_up(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows(documents(200, 1), n=1) + rows(documents(50, 2), n=0))
    write_rows(tmp_path / "b.jsonl", rows(documents(100, 3)))
    sources = {
        "a": {"files": ["a.jsonl"], "weight": 1, "filters": {"numbers": {"n": "> 0"}}},
        "b": {"files": ["b.jsonl"], "weight": 1},
    }
    mix = make_mix(tmp_path, sources, tokens=10_000, held_out_fraction=0.1, deduplicate=True)
    shards = build(mix, tmp_path / "out")
    summary = summary_of(shards)
    for split in ("train", "held_out"):
        assert summary["tokens"][split] == shards.tokens(split)
        assert summary["documents"][split] == shards.documents(split)
        by_source = {name: s[split]["tokens"] for name, s in summary["sources"].items()}
        assert by_source == shards.tokens_by_source(split)
        counts = Counter(name for name, _ in texts_of(shards, split))
        assert counts == {n: s[split]["documents"] for n, s in summary["sources"].items()}
    for name, source in summary["sources"].items():
        steps = source["steps"]
        for before, after in pairwise(steps):
            assert before["documents_out"] == after["documents_in"]
            assert before["tokens_out"] == after["tokens_in"]
        last = steps[-1]
        assert (
            last["documents_out"] == source["train"]["documents"] + source["held_out"]["documents"]
        )
        assert last["tokens_out"] == source["train"]["tokens"] + source["held_out"]["tokens"]
        estimated = {step["step"] for step in steps if step["tokens_estimated"]}
        assert "near-duplicates" not in estimated
        histogram = summary["length_histogram"]["documents"][name]
        assert sum(histogram) == last["documents_out"]
    assert sum(source["share"] for source in summary["sources"].values()) == pytest.approx(1)


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    write_rows(tmp_path / "a.jsonl", rows(documents(20, 1)))
    build(make_mix(tmp_path, {"a": {"files": ["a.jsonl"]}}), tmp_path / "out")
    with Image.open(tmp_path / "out" / "summary.png") as picture:
        assert picture.size[0] > 1_000
        assert len(picture.convert("L").getcolors()) > 10


def test_held_out_documents_are_those_of_their_hash(tmp_path: Path) -> None:
    texts = documents(400)
    write_rows(tmp_path / "a.jsonl", rows(texts + texts[:100]))
    mix = make_mix(tmp_path, {"a": {"files": ["a.jsonl"]}}, held_out_fraction=0.2)
    shards = build(mix, tmp_path / "out")
    held_out = [text for text in texts + texts[:100] if text_hash(text) < 0.2 * HASH_RANGE]
    assert 40 < len(held_out) < 160
    assert sorted(text for _, text in texts_of(shards, "held_out")) == sorted(held_out)
    assert len(texts_of(shards)) == 500 - len(held_out)


def test_near_duplicates_within_and_across_sources(tmp_path: Path) -> None:
    texts = documents(50, words=80)
    near = [text.replace(" ", ", ").upper() + " more" for text in texts[:10]]
    other = documents(20, seed=9, words=80)
    write_rows(tmp_path / "a.jsonl", rows([*texts, *texts[:5]]))
    write_rows(tmp_path / "b.jsonl", rows([*near, *other, other[0]]))
    sources = {"a": {"files": ["a.jsonl"]}, "b": {"files": ["b.jsonl"]}}
    mix = make_mix(tmp_path, sources, deduplicate=True, held_out_fraction=0)
    shards = build(mix, tmp_path / "out")
    expected = [("a", text) for text in texts] + [("b", text) for text in other]
    assert sorted(texts_of(shards)) == sorted(expected)
    assert steps_of(shards, "a") == {"near-duplicates": 5}
    assert steps_of(shards, "b") == {"near-duplicates": 11}


def test_overlap_with_evaluation_sets_is_reported(tmp_path: Path) -> None:
    texts = documents(30, words=60)
    words = texts[7].split()
    write_rows(tmp_path / "eval" / "sciq.jsonl", [{"support": " ".join(words[20:40]), "id": "1"}])
    write_rows(tmp_path / "eval" / "piqa.jsonl", [{"goal": "too short"}])
    write_rows(tmp_path / "a.jsonl", [*rows(texts[:20]), "{", *rows(texts[20:])])
    mix = make_mix(tmp_path, {"a": {"files": ["a.jsonl"]}}, decontaminate={"folder": "eval"})
    shards = build(mix, tmp_path / "out")
    assert steps_of(shards, "a") == {"malformed": 1, "overlap with evaluation sets": 1}
    assert texts[7] not in [text for _, text in texts_of(shards) + texts_of(shards, "held_out")]
    assert summary_of(shards)["evaluation_sets"] == {
        "piqa": {"items": 1, "too_short": 1, "documents_dropped": 0},
        "sciq": {"items": 1, "too_short": 0, "documents_dropped": 1},
    }
    (line,) = (tmp_path / "out" / "decontamination.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "a",
        "file": str(tmp_path / "a.jsonl"),
        "row": 8,
        "evaluation_set": "sciq",
        "shared": " ".join(words[20:33]),
        "begins": texts[7][:200],
    }


def tokens_of(texts: list[str]) -> int:
    """Training tokens of texts: a byte each, bos and eos."""
    return sum(len(text) + 2 for text in texts)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_budget_takes_the_first_documents(tmp_path: Path, deduplicate: bool) -> None:
    texts, others = documents(200, words=30), documents(100, seed=1, words=30)
    write_rows(tmp_path / "a.jsonl", rows(texts))
    # The end of `a`, which is beyond its budget, may occur in `b`.
    write_rows(tmp_path / "b.jsonl", rows([*others, *texts[60:80]]))
    budget = tokens_of(texts[:60]) - 5
    sources = {"a": {"files": ["a.jsonl"], "tokens": budget}, "b": {"files": ["b.jsonl"]}}
    mix = make_mix(tmp_path, sources, held_out_fraction=0, deduplicate=deduplicate)
    shards = build(mix, tmp_path / "out")
    expected = [("a", text) for text in texts[:60]]
    expected += [("b", text) for text in [*others, *texts[60:80]]]
    assert sorted(texts_of(shards)) == sorted(expected)
    read = summary_of(shards)["sources"]["a"]["steps"][0]["documents_in"]
    assert 60 <= read < 90  # The rest of the file was not asked for.


def test_weights_are_shares_of_tokens(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows(documents(600, words=8)))
    write_rows(tmp_path / "b.jsonl", rows(documents(100, seed=1, words=90)))
    sources = {
        "a": {"files": ["a.jsonl"], "weight": 0.25},
        "b": {"files": ["b.jsonl"], "weight": 0.75},
    }
    shards = build(make_mix(tmp_path, sources, tokens=40_000), tmp_path / "out")
    assert shards.tokens("train") == pytest.approx(40_000, abs=600)
    shares = summary_of(shards)["sources"]
    assert shares["a"]["share"] == pytest.approx(0.25, abs=0.01)
    assert shares["b"]["share_asked"] == 0.75


@pytest.mark.parametrize("repeat", [1, 2, 5])
def test_a_source_that_is_too_short(tmp_path: Path, repeat: int) -> None:
    texts = documents(50)
    write_rows(tmp_path / "a.jsonl", rows(texts))
    once = tokens_of(texts)
    source = {"files": ["a.jsonl"], "tokens": round(3.5 * once), "repeat": repeat}
    shards = build(make_mix(tmp_path, {"a": source}, held_out_fraction=0), tmp_path / "out")
    counts = Counter(text for _, text in texts_of(shards))
    summary = summary_of(shards)["sources"]["a"]
    if repeat < 5:
        assert set(counts.values()) == {repeat}
        assert summary["ran_dry"]
    else:
        assert set(counts.values()) == {3, 4}
        assert list(counts.values()).count(4) == pytest.approx(25, abs=3)
        assert not summary["ran_dry"]
    assert summary["repeated"]["documents"] == counts.total() - 50
    assert shards.tokens("train") == pytest.approx(min(repeat, 3.5) * once, abs=80)


def test_documents_are_mixed_over_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "UNIT_BYTES", 40_000)
    a, b = documents(1_000), documents(500, seed=1)
    write_rows(tmp_path / "a.jsonl", rows(a))
    write_rows(tmp_path / "b.jsonl", rows(b))
    sources = {"a": {"files": ["a.jsonl"]}, "b": {"files": ["b.jsonl"]}}
    orders = []
    for seed in (0, 0, 1):
        mix = make_mix(tmp_path, sources, held_out_fraction=0, shard_tokens=24_000, seed=seed)
        shards = build(mix, tmp_path / f"out{len(orders)}")
        assert len(shards.of_split("train")) == round(shards.tokens("train") / 24_000) > 2
        for shard in shards.of_split("train"):
            assert np.mean(shard.source_ids()) == pytest.approx(1 / 3, abs=0.08)
            assert shard.tokens == pytest.approx(24_000, rel=0.2)
        orders.append(texts_of(shards))
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[2]
    places = [a.index(text) for name, text in orders[0] if name == "a"]
    assert abs(np.corrcoef(places, range(len(places)))[0, 1]) < 0.1


def test_long_documents_are_divided(tmp_path: Path) -> None:
    long = documents(1, words=900)[0]
    write_rows(tmp_path / "a.jsonl", rows([long, *documents(5, seed=1)]))
    mix = make_mix(tmp_path, {"a": {"files": ["a.jsonl"]}}, longest_document=1_000)
    shards = build(mix, tmp_path / "out")
    texts = [text for _, text in texts_of(shards) + texts_of(shards, "held_out")]
    parts = [text for text in texts if text in long and len(text) > 400]
    assert sorted(word for part in parts for word in part.split()) == sorted(long.split())
    assert all(len(text) <= 1_000 for text in texts)
    assert steps_of(shards, "a") == {"long ones divided": 1 - len(parts)}


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """Special tokens in the text, half characters and all, like the tokenizer's own call."""
    texts = ["a<|eos|>b", "\u00e9\U0001f642", "half \ud83d", "  two  ", "<|bos|>x"]
    write_rows(tmp_path / "a.jsonl", rows(texts))
    for parse in (False, True):
        tokenizer = byte_tokenizer()
        source = {"files": ["a.jsonl"], "parse_special_tokens": parse}
        mix = make_mix(tmp_path, {"a": source}, held_out_fraction=0)
        shards = build(mix, tmp_path / f"out{parse}", tokenizer=tokenizer)
        whole = [text.encode("utf-8", "replace").decode() for text in texts]
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.encode_special_tokens = not parse
        expected = [tokenizer.backend_tokenizer.encode(text).ids for text in whole]
        (shard,) = shards.of_split("train")
        starts = [*shard.offsets().tolist(), shard.tokens]
        ids = shard.token_ids().tolist()
        found = [ids[a + 1 : b - 1] for a, b in pairwise(starts)]
        assert sorted(found) == sorted(expected)


class FakeHub:
    """`datasets.load_dataset` on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, name: str, config: str | None, **options: Any) -> Any:
        self.calls.append((name, config, options))
        files = {"train": [str(file) for file in sorted(self.path.glob("*.parquet"))]}
        return self.real(
            "parquet", data_files=files, split=options["split"], streaming=options["streaming"]
        )

    real = staticmethod(datasets.load_dataset)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(datasets, "load_dataset", fake)
    for i in range(2):
        texts = documents(80, seed=i)
        table = pa.table({"text": texts, "meta": [{"n": k} for k in range(80)], "x": [0] * 80})
        pq.write_table(table, tmp_path / "hub" / f"{i}.parquet", 16)
    return fake


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_data_set(tmp_path: Path, fake_hub: FakeHub, streaming: bool) -> None:
    source = {
        "hub": "org/name",
        "config": "small",
        "streaming": streaming,
        "filters": {"numbers": {"meta.n": "< 40"}},
    }
    shards = build(make_mix(tmp_path, {"h": source}, held_out_fraction=0), tmp_path / "out")
    expected = [text for i in range(2) for text in documents(80, seed=i)[:40]]
    assert sorted(text for _, text in texts_of(shards)) == sorted(expected)
    options = {"split": "train", "revision": None, "streaming": streaming}
    assert fake_hub.calls == [("org/name", "small", options)]


@pytest.mark.parametrize("kind", ["streamed", "downloaded", "local"])
def test_files_are_shuffled(tmp_path: Path, fake_hub: FakeHub, kind: str) -> None:
    """A third of the text comes from files all over the source."""
    for i in range(2, 12):
        table = pa.table({"text": documents(80, seed=i), "meta": [{"n": 0}] * 80, "x": [0] * 80})
        pq.write_table(table, tmp_path / "hub" / f"{i}.parquet")
    place = {"files": ["hub"]} if kind == "local" else {"hub": "a", "streaming": kind == "streamed"}
    owner = {text: i for i in range(12) for text in documents(80, seed=i)}
    taken = []
    for shuffled in (False, True, True):
        source = {**place, "tokens": 17_000, "shuffle_files": shuffled}
        mix = make_mix(tmp_path, {"h": source}, held_out_fraction=0)
        shards = build(mix, tmp_path / f"out{len(taken)}")
        taken.append({owner[text] for _, text in texts_of(shards)})
    if kind != "downloaded":  # `datasets` makes one file of them.
        assert taken[1] == taken[2] != taken[0]
        assert 4 <= len(taken[1]) <= 5


def test_a_streamed_data_set_continues_where_it_stopped(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = make_mix(tmp_path, {"h": {"hub": "org/name"}}, held_out_fraction=0)
    whole = build(mix, tmp_path / "whole")
    read: list[str] = []

    def counted(source: Any, columns: set[str]) -> Any:
        return real(source, columns).map(lambda row: read.append(row["text"]) or row)

    real = hub.load
    monkeypatch.setattr(hub, "load", counted)
    tokenizer = byte_tokenizer()
    fail_at(monkeypatch, 5)
    with pytest.raises(RuntimeError):
        build(mix, tmp_path / "out", tokenizer=tokenizer)
    first = len(read)
    monkeypatch.undo()
    monkeypatch.setattr(splitting, "UNIT_BYTES", 2_000)
    monkeypatch.setattr(datasets, "load_dataset", fake_hub)
    monkeypatch.setattr(hub, "load", counted)
    assert texts_of(build(mix, tmp_path / "out")) == texts_of(whole)
    # Finished rows are not downloaded again, except those that `datasets` reads ahead.
    assert first > 100
    assert len(read) - first < 110


def fail_at(monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    """Let the work on a unit fail."""
    real = UnitWorker.process

    def process(self: UnitWorker, wanted: Any) -> None:
        if wanted.number == unit:
            raise RuntimeError("stopped")
        real(self, wanted)

    monkeypatch.setattr(UnitWorker, "process", process)


def refused(mix: Any, out: Path, message: str, tokenizer: Any = None) -> None:
    """The build is refused with a message and leaves nothing that looks finished."""
    with pytest.raises(UserError, match=message):
        build(mix, out, tokenizer=tokenizer)
    assert not (out / "index.json").exists()
    assert not list(out.glob("*.bin"))
    if out.exists():
        with pytest.raises(UserError, match="no finished shards"):
            open_shards(out)


def test_malformed_rows_are_shown_and_skipped_up_to_a_limit(tmp_path: Path) -> None:
    good = rows(documents(100))
    bad = ["{bad", "[]", "nonsense"]
    write_rows(tmp_path / "a.jsonl", [*good[:70], *bad, *good[70:]])
    source = {"a": {"files": ["a.jsonl"]}}
    shards = build(make_mix(tmp_path, source, bad_rows=3), tmp_path / "out")
    assert shards.documents("train") + shards.documents("held_out") == 100
    assert steps_of(shards, "a") == {"malformed": 3}
    shown = summary_of(shards)["sources"]["a"]["malformed_rows"]
    assert [row.partition(" is ")[0] for row in shown] == [
        f"{tmp_path / 'a.jsonl'}:{number}" for number in (71, 72, 73)
    ]
    mix = make_mix(tmp_path, source, bad_rows=2)
    refused(mix, tmp_path / "no", r"'a' has more than 2 malformed rows \(.*a\.jsonl:71 is not val")


def test_bad_input(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows(documents(20)))
    write_rows(tmp_path / "body.jsonl", [{"body": "text", "n": 1}])
    write_rows(tmp_path / "list.jsonl", [{"text": ["a"]}])
    write_rows(tmp_path / "word.jsonl", [{"text": "a", "n": "many"}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 " * 10)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 5_000)[:-9])
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" * 10)
    latin = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": latin}), tmp_path / "latin.parquet")
    write_rows(tmp_path / "huge.jsonl", [{"text": "a", "n": 10**400}])
    number = {"filters": {"numbers": {"n": "> 1"}}}
    for name, message, more in (
        ("nothing.jsonl", "There is no file or folder", {}),
        ("empty.jsonl", "The source 's' is empty: give it text, or remove it", {}),
        ("body.jsonl", r"A row of .*body\.jsonl has no field 'text'; use one .* \(body, n\)", {}),
        ("a.jsonl", "has no field 'n'", number),
        ("word.jsonl", "In a row of .*, the field 'n' is 'many', which is not a number", number),
        ("list.jsonl", "has type list in 'text' instead of text; set `text`", {}),
        ("bad.txt", r"bad\.txt is not UTF-8 text", {}),
        ("cut.jsonl.gz", "is damaged or cut off", {}),
        ("a.parquet", r"a\.parquet has no field 'text'.*\(body\)", {}),
        ("bad.parquet", "cannot be read", {}),
        ("latin.parquet", "cannot be read", {}),
        ("huge.jsonl", "which is not a number", number),
        ("a.jsonl", "No document passed the filters", {"filters": {"characters": {"min": 5_000}}}),
    ):
        mix = make_mix(tmp_path, {"s": {"files": [name], **more}})
        refused(mix, tmp_path / f"out-{name}-{len(more)}-{message[:3]}", message)
    mix = make_mix(tmp_path, {"s": {"files": ["a.jsonl"]}})
    refused(mix, tmp_path / "t", "neither a bos nor an eos", byte_tokenizer(None, None))
    refused(mix, tmp_path / "t", "no fast form", object())
    empty = make_mix(tmp_path, {"s": {"files": ["a.jsonl"]}}, decontaminate={"folder": "none"})
    refused(empty, tmp_path / "e", "contains no evaluation sets")


def test_another_chat_template_is_another_mix(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    write_rows(tmp_path / "a.jsonl", [{"messages": chat}] * 3)
    mix = make_mix(tmp_path, {"a": {"files": ["a.jsonl"], "chat": "messages"}})
    tokenizer = chat_tokenizer()
    build(mix, tmp_path / "out", tokenizer=tokenizer)
    tokenizer.chat_template += " "
    with pytest.raises(UserError, match=r"another mix \(other libraries or chat template"):
        build(mix, tmp_path / "out", tokenizer=tokenizer)


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0", "test-0", "wiki_val"):
        write_rows(tmp_path / "in" / f"{name}.jsonl", rows(documents(20, len(name))))
    for number, files in enumerate(("in", "in/*.jsonl")):
        caplog.clear()
        with caplog.at_level("INFO"):
            mix = make_mix(tmp_path, {"a": {"files": [files]}}, held_out_fraction=0)
            found = build(mix, tmp_path / f"out{number}")
        assert len(texts_of(found)) == 20
        assert "test-0.jsonl" in caplog.text
        assert "wiki_val.jsonl" in caplog.text


def test_hub_data_set_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub.\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    mix = make_mix(tmp_path, {"h": {"hub": "org/name", "split": "test"}})
    message = r"'org/name' \(config None, split test\) cannot be loaded \(Couldn't reach the hub\)"
    monkeypatch.setattr(hub, "cache_alone_if_unreachable", lambda: None)
    refused(mix, tmp_path / "out", message)


@pytest.mark.parametrize("place", ["units", "copies", "shards", "summary"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    plain = "".join(json.dumps(row) + "\n" for row in rows(documents(100))).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    mix = make_mix(tmp_path, {"a": {"files": ["a.jsonl.gz"]}}, held_out_fraction=0)
    whole = build(mix, tmp_path / "whole")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "units": "lrc.corpus.unit.np.savez",
        "copies": "pathlib.Path.write_bytes",
        "shards": "lrc.corpus.assemble.ShardWriter.write",
        "summary": "lrc.corpus.summary.draw",
    }[place]
    monkeypatch.setattr(target, full)
    with pytest.raises(UserError, match="disk is full"):
        build(mix, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(splitting, "UNIT_BYTES", 2_000)
    assert same_files(build(mix, tmp_path / "out"), whole)


def same_files(a: Shards, b: Shards) -> bool:
    """Whether two builds gave the same shards."""
    return [shard.sha256 for shard in a.shards] == [shard.sha256 for shard in b.shards]


def test_folder_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl", rows(documents(60)))
    mix = make_mix(tmp_path, {"a": {"files": ["a.jsonl"]}})
    other = make_mix(tmp_path, {"a": {"files": ["a.jsonl"]}}, seed=1, held_out_fraction=0.1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        build(mix, tmp_path / "taken")
    own = tmp_path / "project" / "build" / "copies" / "mine.txt"
    own.parent.mkdir(parents=True)
    (own.parents[1] / "Makefile").touch()
    own.touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        build(mix, tmp_path / "project")
    assert own.exists()
    done = build(mix, tmp_path / "out")
    message = r"of another mix \(other settings: held_out_fraction and seed\)"
    with pytest.raises(UserError, match=message):
        build(other, tmp_path / "out")
    # The second build has nothing to do.
    inode = (tmp_path / "out" / "train-00000.bin").stat().st_ino
    assert build(mix, tmp_path / "out") == done
    assert (tmp_path / "out" / "train-00000.bin").stat().st_ino == inode

    fail_at(monkeypatch, 1)
    with pytest.raises(RuntimeError):
        build(mix, tmp_path / "half")
    with pytest.raises(UserError, match="contains an unfinished build of another mix"):
        build(other, tmp_path / "half")
    write_rows(tmp_path / "a.jsonl", rows(documents(61)))
    with pytest.raises(UserError, match=r"unfinished build of another mix \(other input files\)"):
        build(mix, tmp_path / "half")
