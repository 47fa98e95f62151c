"""Packing text into the cache, reading it back, and the order of training."""

import errno
import json
import os
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import LlamaConfig, LlamaForCausalLM

from data_helpers import (
    BOS,
    EOS,
    ByteTokenizer,
    byte_tokenizer,
    data_section,
    one_text,
    packed_part,
    unpack,
    watch_encoding,
    write_jsonl,
)
from lrc.data import Batch, PackedText, Sequences, ShuffledOrder, TrainingText, packing, prepare
from lrc.data.cache import PartWriter
from lrc.system.checksums import cache_root
from lrc.system.errors import UserError

TEXTS = [f"Document number {i} of a few." for i in range(40)]


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_encoding(monkeypatch)


def both(packed: PackedText, tokenizer: ByteTokenizer) -> tuple[list[str], list[str]]:
    """Texts of the training and held-out documents, without bos and eos."""
    sides = []
    for part in (packed.train, packed.held_out):
        documents = unpack(part)
        assert len(documents) == part.documents
        sides.append([tokenizer.decode(ids[1:-1]) for ids in documents])
    return sides[0], sides[1]


@pytest.mark.parametrize(("bos", "eos"), [(BOS, EOS), (BOS, None), (None, EOS)])
def test_packed_tokens_are_the_documents(
    tmp_path: Path, bos: str | None, eos: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 100)
    tokenizer = byte_tokenizer(bos, eos)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    held = write_jsonl(tmp_path / "b.jsonl", ["Held out."])
    packed = prepare(data_section(tmp_path, source, held_out=[str(held)]), tokenizer)
    special = {BOS: tokenizer.bos_token_id, EOS: tokenizer.eos_token_id}
    before = [] if bos is None else [special[BOS]]
    after = [] if eos is None else [special[EOS]]
    for part, texts in ((packed.train, TEXTS), (packed.held_out, ["Held out."])):
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert unpack(part) == [[*before, *ids, *after] for ids in plain]
        assert part.dtype == "uint16"


def test_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(extra=[f"<{i}>" for i in range(1 << 16)])
    tokenizer.add_special_tokens({"eos_token": f"<{(1 << 16) - 1}>"})
    packed = prepare(data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS)), tokenizer)
    assert packed.train.dtype == "uint32"
    batch = Sequences(one_text(packed.train), 8).batch(
        range(len(Sequences(one_text(packed.train), 8)))
    )
    assert int(batch.input_ids.max()) == tokenizer.eos_token_id > 1 << 16


def test_document_without_tokens_is_left_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "xxx"])
    train, held_out = both(prepare(data_section(tmp_path, source), tokenizer), tokenizer)
    assert sorted(train + held_out) == sorted(TEXTS)


def test_cache_is_used_again(tmp_path: Path) -> None:
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    first = byte_tokenizer()
    packed = prepare(section, first)
    assert first.calls == 1
    again = byte_tokenizer()
    again(["a longer text", "b"], truncation=True, max_length=5)  # leaves its setting behind
    again.calls = 0
    other_reader = section.model_copy(update={"sequence_length": 16, "document_mask": True})
    assert prepare(other_reader, again) == packed
    assert again.calls == 0


def test_every_input_decides_the_cache(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    section = data_section(tmp_path, source)

    def folder(tokenizer: ByteTokenizer | None = None, **update: object) -> Path:
        changed = section.model_copy(update=update)
        return prepare(changed, tokenizer or byte_tokenizer()).folder

    folders = [
        folder(),
        folder(held_out_fraction=0.5),
        folder(held_out=[str(source), str(write_jsonl(tmp_path / "b.jsonl", ["Hm, hm."]))][1:]),
        folder(text=[str(source)] * 2),
        folder(byte_tokenizer(eos=None)),
        folder(byte_tokenizer(extra=["<more>"])),
    ]
    os.utime(source, ns=(0, 0))
    folders.append(folder())
    source.write_text(source.read_text() + '{"text": "One more."}\n')
    os.utime(source, ns=(0, 0))
    folders.append(folder())
    assert len(set(folders)) == len(folders)


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRC_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_root("/zero") == Path("/zero")
    assert cache_root(None) == Path("/one")
    monkeypatch.delenv("LRC_CACHE")
    assert cache_root(None) == Path("/two/lrc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == Path.home() / ".cache" / "lrc"


def test_progress_counts_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 100)
    calls: list[tuple[str, int]] = []
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    packed = prepare(section, byte_tokenizer(), lambda *call: calls.append(call))
    counts = [count for _, count in calls]
    assert counts == sorted(counts)
    assert calls[-1] == ("tokenizing", packed.train.tokens + packed.held_out.tokens)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(alphabet="ab \n", min_size=12), min_size=2, max_size=30),
    st.floats(0.001, 0.999),
    st.randoms(),
)
def test_no_text_is_in_both_splits(
    documents: list[str], fraction: float, random: random.Random
) -> None:
    documents = [d for d in documents if d.strip()]
    documents += [random.choice(documents) for _ in documents]
    assume(len(set(documents)) >= 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_jsonl(folder / "a.jsonl", documents)
        tokenizer = byte_tokenizer()
        packed = prepare(data_section(folder, source, held_out_fraction=fraction), tokenizer)
        train, held_out = both(packed, tokenizer)
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)


def test_share_that_is_held_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"This is document {i}." for i in range(4_000)])
    packed = prepare(data_section(tmp_path, source, held_out_fraction=0.1), byte_tokenizer())
    assert packed.held_out.documents == pytest.approx(400, abs=80)


@pytest.mark.parametrize("given", [False, True])
def test_more_held_out_text_leaves_the_training_text_too(tmp_path: Path, given: bool) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    also = write_jsonl(tmp_path / "also.jsonl", [*TEXTS[5:9], "Not in the text."])
    held = [str(write_jsonl(tmp_path / "held.jsonl", [TEXTS[2]]))] if given else []
    tokenizer, sections = byte_tokenizer(), {"held_out": held, "held_out_fraction": 0.2}
    train, held_out = both(
        prepare(data_section(tmp_path, source, **sections), tokenizer), tokenizer
    )
    section = data_section(tmp_path, source, **sections, also_held_out={"also": [str(also)]})
    fewer, same = both(prepare(section, tokenizer), tokenizer)
    assert same == held_out
    assert fewer == [text for text in train if text not in TEXTS[5:9]]
    assert fewer != train


def test_given_held_out_text_leaves_the_training_text(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *TEXTS[:3]])
    held = write_jsonl(tmp_path / "b.jsonl", [TEXTS[2], "Something else."])
    tokenizer = byte_tokenizer()
    packed = prepare(data_section(tmp_path, source, held_out=[str(held)]), tokenizer)
    train, held_out = both(packed, tokenizer)
    assert held_out == [TEXTS[2], "Something else."]
    assert train == [t for t in [*TEXTS, *TEXTS[:3]] if t != TEXTS[2]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_broken_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 100)
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    tokenizer = byte_tokenizer()

    def fail(calls: int) -> None:
        if calls == 3:
            assert len(list((tmp_path / "cache").iterdir())) == 1
            raise error

    tokenizer.at_call = fail
    with pytest.raises(error):
        prepare(section, tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []
    assert prepare(section, byte_tokenizer()).train.documents > 30


def test_files_of_a_killed_build_are_removed_later(tmp_path: Path) -> None:
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    packed = prepare(section, byte_tokenizer())
    young, old = (packed.folder.with_name(f"{packed.folder.name}.tmp-{n}") for n in "ab")
    packed.folder.rename(old)
    young.mkdir()
    yesterday = time.time() - 25 * 3600
    for path in (*old.iterdir(), old):
        os.utime(path, (yesterday, yesterday))
    assert prepare(section, byte_tokenizer()) == packed
    assert sorted(packed.folder.parent.iterdir()) == [packed.folder, young]


def test_two_builds_at_once(tmp_path: Path) -> None:
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    slow = byte_tokenizer()
    inodes = []

    def other_process(calls: int) -> None:
        first = prepare(section, byte_tokenizer())
        inodes.append(first.train.tokens_path.stat().st_ino)

    slow.at_call = other_process
    packed = prepare(section, slow)
    assert [packed.train.tokens_path.stat().st_ino] == inodes
    assert list((tmp_path / "cache").iterdir()) == [packed.folder]


@pytest.mark.parametrize("name", ["train.bin", "held_out.offsets.bin", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_cache_is_built_again(tmp_path: Path, name: str, damage: str) -> None:
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    file = prepare(section, byte_tokenizer()).folder / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1])
    tokenizer = byte_tokenizer()
    prepare(section, tokenizer)
    assert tokenizer.calls == 1
    assert file.read_bytes() == whole


def test_index_describes_the_cache(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = prepare(data_section(tmp_path, source), byte_tokenizer())
    index = json.loads((packed.folder / "index.json").read_text())
    assert index["inputs"]["text"][0][0] == str(source.resolve())
    assert index["parts"]["train"]["documents"] == packed.train.documents
    assert set(index["parts"]["train"]["sha256"]) == {"train.bin", "train.offsets.bin"}


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartWriter, "write", full)
    with pytest.raises(UserError, match="disk is full"):
        prepare(data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS)), byte_tokenizer())
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_little_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    long = write_jsonl(tmp_path / "long.jsonl", ["A long document of many tokens.", "Another one."])
    short = write_jsonl(tmp_path / "short.jsonl", ["ab", "cd"])
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", " \n"])
    single = write_jsonl(tmp_path / "single.jsonl", ["One document."] * 5)

    def refused(message: str, *text: Path, **more: object) -> None:
        with pytest.raises(UserError, match=message):
            prepare(data_section(tmp_path, *text, **more), tokenizer)

    refused(r"training text has 4 tokens.*sequence of 8; give data.text more text\.$", short)
    refused(
        "held-out text has 14 tokens.*sequence of 20; raise data.held_out_fraction.*at most 14",
        long,
        sequence_length=20,
    )
    refused(
        "held-out text has 8 tokens.*sequence of 20; give data.held_out more",
        long,
        sequence_length=20,
        held_out=[str(short)],
    )
    refused("data.text contains no text;", blank)
    refused("data.held_out contains no text;", long, held_out=[str(blank)])
    refused("data.text contains no text;", blank, held_out=[str(long)])
    refused("no text that is not held out too", long, held_out=[str(long)])
    refused("single document.*give more text, or set data.held_out", single)


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    with pytest.raises(UserError, match="neither a bos nor an eos"):
        prepare(section, byte_tokenizer(bos=None, eos=None))
    with pytest.raises(UserError, match="no fast form"):
        prepare(section, object())


def test_sequences_are_the_packed_tokens(tmp_path: Path) -> None:
    part = packed_part(tmp_path, [list(range(5)), list(range(100, 130)), [7] * 11])
    sequences = Sequences(one_text(part), 8)
    tokens = [t for document in unpack(part) for t in document]
    assert len(sequences) == 5
    batch = sequences.batch([3, 0])
    assert batch.input_ids.dtype == torch.int64
    assert batch.input_ids.tolist() == [tokens[24:32], tokens[:8]]
    assert batch.position_ids is None
    assert batch.attention_mask is None
    assert [b.input_ids.shape[0] for b in sequences.first(4, batch_size=3)] == [3, 1]
    whole = torch.cat([b.input_ids for b in sequences.first(99, batch_size=2)])
    assert whole.flatten().tolist() == tokens[:40]
    for index in (5, -1):
        with pytest.raises(IndexError):
            sequences.batch([index])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=30), st.integers(1, 17))
def test_positions_restart_with_documents(lengths: list[int], sequence_length: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        part = packed_part(Path(name), [[1] * length for length in lengths])
        sequences = Sequences(one_text(part), sequence_length, document_mask=True)
        positions = [b.position_ids for b in sequences.first(len(sequences), batch_size=4)]
    expected, owner = [], [i for i, length in enumerate(lengths) for _ in range(length)]
    for token in range(len(sequences) * sequence_length):
        new = token % sequence_length == 0 or owner[token] != owner[token - 1]
        expected.append(0 if new else expected[-1] + 1)
    assert [int(p) for batch in positions for p in batch.flatten()] == expected


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = f"ab{EOS}cd{BOS}ef"
    source = write_jsonl(tmp_path / "a.jsonl", [text, "ghi"])
    held = write_jsonl(tmp_path / "b.jsonl", [f"Held {EOS} out."])
    section = data_section(tmp_path, source, held_out=[str(held)])
    train, held_out = both(prepare(section, tokenizer), tokenizer)
    assert (train, held_out) == ([text, "ghi"], [f"Held {EOS} out."])
    packed = prepare(section, tokenizer)
    assert [len(d) for d in unpack(packed.train)] == [len(text) + 2, 5]
    parsed = prepare(section.model_copy(update={"parse_special_tokens": True}), tokenizer)
    assert [len(d) for d in unpack(parsed.train)] == [10, 5]


def test_special_token_in_the_text_is_no_boundary(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    texts = [f"ab{EOS}cd{BOS}ef", "ghi"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    held = write_jsonl(tmp_path / "b.jsonl", ["Held out."])
    section = data_section(tmp_path, source, held_out=[str(held)], parse_special_tokens=True)
    packed = prepare(section, tokenizer)
    batch = Sequences(one_text(packed.train), 15, document_mask=True).batch([0])
    assert (batch.input_ids == tokenizer.bos_token_id).sum() == 3
    assert batch.position_ids.tolist() == [[*range(10), *range(5)]]


@given(st.integers(1, 50), st.integers(-(2**70), 2**70), st.integers(0, 5))
def test_every_sequence_occurs_once_per_epoch(sequences: int, seed: int, epoch: int) -> None:
    taken = ShuffledOrder(sequences, seed).take(epoch * sequences, sequences)
    assert sorted(taken) == list(range(sequences))


@given(st.integers(1, 20), st.integers(0, 9), st.lists(st.integers(0, 30), max_size=10))
def test_order_continues_from_any_position(sequences: int, seed: int, counts: list[int]) -> None:
    whole = ShuffledOrder(sequences, seed).take(0, sum(counts))
    order, position = ShuffledOrder(sequences, seed), 0
    for count in counts:
        expected = whole[position : position + count]
        assert order.take(position, count) == expected
        assert ShuffledOrder(sequences, seed).take(position, count) == expected
        position += count


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [ShuffledOrder(50, seed).take(epoch * 50, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    # Written out: a resumed run must find its order, whatever the version of numpy.
    assert ShuffledOrder(8, 0).take(0, 8) == [0, 3, 7, 5, 1, 2, 6, 4]


def test_training_text(tmp_path: Path) -> None:
    section = data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS), document_mask=True)
    packed = prepare(section, byte_tokenizer())
    sides = [Sequences(one_text(p), 8, True) for p in (packed.train, packed.held_out)]
    text = TrainingText(*sides, seed=3)
    order = ShuffledOrder(len(text.train), 3)
    batch = text.training_batch(5, 3)
    assert torch.equal(batch.input_ids, text.train.batch(order.take(5, 3)).input_ids)
    assert batch.position_ids is not None
    held = [b.input_ids for b in text.held_out_batches(2, 1)]
    assert torch.equal(torch.cat(held), text.held_out.batch([0, 1]).input_ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_documents_are_as_if_alone(tmp_path: Path, attention: str) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, length).tolist() for length in (5, 1, 9, 7, 4, 11, 20)]
    sequences = Sequences(one_text(packed_part(tmp_path, documents)), 16, document_mask=True)
    batch = sequences.batch(range(len(sequences)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
        pieces = 0
        for row, (ids, positions) in enumerate(
            zip(batch.input_ids, batch.position_ids, strict=True)
        ):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in pairwise(starts):
                alone = model(input_ids=ids[None, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone)
                pieces += 1
    assert pieces > len(sequences)


def test_labels() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    assert Batch(ids).labels().tolist() == [[2, 3, 4, 5, -100]]
    restarts = torch.tensor([[3, 4, 0, 0, 1]])
    assert Batch(ids, position_ids=restarts).labels().tolist() == [[2, -100, -100, 5, -100]]
    right = Batch(ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    assert right.labels().tolist() == [[2, 3, -100, -100, -100]]
    left = Batch(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    assert left.labels().tolist() == [[-100, -100, 4, 5, -100]]
    assert right.token_mask().tolist() == [[True, True, True, False, False]]
    assert Batch(ids).token_mask() is None
    together = Batch(ids, restarts, torch.tensor([[1, 1, 1, 1, 0]]))
    assert together.labels().tolist() == [[2, -100, -100, -100, -100]]
