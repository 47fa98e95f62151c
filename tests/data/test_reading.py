"""Reading token shards: the contents of sequences, and refusals."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import Document, byte_tokenizer, wide_tokenizer, write_shards
from lrc.data import Batch, Sequences, Share, Tokens, TrainingText, open_text, tokens
from lrc.data.identity import tokenizer_identity
from lrc.data.shards import Shards
from lrc.recipe import Recipe, make_recipe
from lrc.system.errors import UserError

IDENTITY = tokenizer_identity(wide_tokenizer())

documents_of_shards = st.lists(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 25)), max_size=8),
    min_size=1,
    max_size=6,
).filter(any)


def numbered(shards: Sequence[Sequence[tuple[str, int]]]) -> list[list[Document]]:
    """Documents of given lengths, whose tokens are 0, 1, 2, ... from the first to the last."""
    result, token = [], 0
    for documents in shards:
        result.append([])
        for source, length in documents:
            result[-1].append((source, range(token, token + length)))
            token += length
    return result


def text_of(shards: Shards) -> Tokens:
    return Tokens(shards.of_split("train"), shards.sources)


@settings(max_examples=60, deadline=None)
@given(documents_of_shards, st.integers(1, 17))
def test_sequences_continue_across_shards(
    lengths: list[list[tuple[str, int]]], sequence_length: int
) -> None:
    """Ids, positions and sources against a plain list of all tokens."""
    shards = numbered(lengths)
    ids_of_all, expected_positions, expected_sources = [], [], []
    for documents in shards:
        for source, ids in documents:
            for place, token in enumerate(ids):
                in_sequence = len(ids_of_all) % sequence_length
                ids_of_all.append(token)
                expected_positions.append(
                    0 if not place or not in_sequence else expected_positions[-1] + 1
                )
                expected_sources.append("ab".index(source))
    with tempfile.TemporaryDirectory() as name:
        whole = write_shards(Path(name), [("train", d) for d in shards], IDENTITY)
        sequences = Sequences(text_of(whole), sequence_length, document_mask=True)
        assert len(sequences) == len(ids_of_all) // sequence_length
        batches = list(sequences.first(len(sequences), batch_size=3))
    used = len(sequences) * sequence_length
    for attribute, expected in (
        ("input_ids", ids_of_all),
        ("position_ids", expected_positions),
        ("source_ids", expected_sources),
    ):
        got = [int(x) for batch in batches for x in getattr(batch, attribute).flatten()]
        assert got == expected[:used], attribute


@settings(max_examples=40, deadline=None)
@given(documents_of_shards, st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_every_sequence_once_an_epoch(
    lengths: list[list[tuple[str, int]]], sequence_length: int, world_size: int
) -> None:
    """With any number of processes. The last tokens, which fill no sequence, are left out."""
    with tempfile.TemporaryDirectory() as name:
        whole = write_shards(Path(name), [("train", d) for d in numbered(lengths)], IDENTITY)
        sequences = Sequences(text_of(whole), sequence_length)
        total = len(sequences)
        if not total:
            return
        readers = [TrainingText(sequences, sequences, seed=5) for _ in range(world_size)]
        seen: list[int] = []
        steps = -(-total // 12)
        for step in range(steps):
            for rank, reader in enumerate(readers):
                own = Share(rank, world_size).positions(step, 12)
                seen += reader.training_batch(own.start, len(own)).input_ids.flatten().tolist()
    assert sorted(seen[: total * sequence_length]) == list(range(total * sequence_length))


def test_label_sources() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    sources = torch.tensor([[0, 0, 2, 2, 1]])
    batch = Batch(ids, source_ids=sources)
    assert batch.label_sources().tolist() == [[0, 2, 2, 1, -1]]
    masked = Batch(ids, position_ids=torch.tensor([[3, 4, 0, 1, 0]]), source_ids=sources)
    assert masked.label_sources().tolist() == [[0, -1, 2, -1, -1]]
    assert Batch(ids).label_sources() is None
    assert torch.equal(batch.to(torch.device("cpu")).source_ids, sources)


def recipe(*folders: Path, **data: Any) -> Recipe:
    return make_recipe(
        {
            "teacher": {"model": "some/model"},
            "student": {"hidden_size": 8},
            "data": {"shards": [str(f) for f in folders], "sequence_length": 8, **data},
        }
    )


def side(source: str, first: int, documents: int = 4) -> list[Document]:
    """Documents of 10 tokens each, all different."""
    return [(source, range(first + 10 * i, first + 10 * i + 10)) for i in range(documents)]


def test_folders_are_read_together(tmp_path: Path) -> None:
    """Sources are identified by name, whatever their order in a folder."""
    one, two = tmp_path / "one", tmp_path / "two"
    write_shards(one, [("train", side("a", 0)), ("held_out", side("b", 300))], IDENTITY)
    order = ("c", "b", "a")
    write_shards(two, [("held_out", side("c", 400)), ("train", side("b", 100))], IDENTITY, order)
    text = open_text(recipe(one, two), wide_tokenizer())
    assert list(text.sources) == ["a", "b", "c"]
    names = {}
    for position in range(10):
        batch = text.training_batch(position, 1)
        for token, source in zip(batch.input_ids[0], batch.source_ids[0], strict=True):
            names[int(token)] = text.sources[source]
    assert names == {i: "a" for i in range(40)} | {i: "b" for i in range(100, 140)}
    (held,) = text.held_out_batches(10, 16)
    assert [text.sources[s] for s in held.source_ids.flatten()] == ["b"] * 40 + ["c"] * 40


def test_measured_sequences_represent_the_whole(tmp_path: Path) -> None:
    """Not the first documents alone, which may all be of one source."""
    held = ("held_out", side("a", 300, 30) + side("b", 700, 10))
    write_shards(tmp_path, [("train", side("a", 0)), held], IDENTITY)
    text = open_text(recipe(tmp_path), wide_tokenizer())
    batches = list(text.held_out_batches(10, 4))
    assert [len(batch.input_ids) for batch in batches] == [4, 4, 2]
    starts = [int(ids[0]) for batch in batches for ids in batch.input_ids]
    assert starts == [*range(300, 600, 40), 720, 760]
    whole = torch.cat([batch.input_ids for batch in text.held_out_batches(999, 8)])
    assert whole.flatten().tolist() == [*range(300, 600), *range(700, 800)]


def test_a_single_source_is_not_reported(tmp_path: Path) -> None:
    sides = [("train", side("a", 0)), ("held_out", side("a", 300))]
    write_shards(tmp_path, sides, IDENTITY, ("a",))
    text = open_text(recipe(tmp_path), wide_tokenizer())
    assert not text.sources
    assert text.training_batch(0, 2).source_ids is None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_many_shards_open_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "OPEN_SHARDS", 2)
    whole = write_shards(tmp_path, [("train", side("a", 10 * i, 1)) for i in range(40)], IDENTITY)
    sequences = Sequences(text_of(whole), 10)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        ids = [int(sequences.batch([i]).input_ids[0, 0]) for i in range(40)]
        assert ids == [10 * i for i in range(40)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 6


def refused(recipe: Recipe, **tokenizer: Any) -> str:
    with pytest.raises(UserError) as error:
        open_text(recipe, byte_tokenizer(**tokenizer) if tokenizer else wide_tokenizer())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good"
    write_shards(good, [("train", side("a", 0)), ("held_out", side("a", 300))], IDENTITY)
    assert "tokenizer of 'a teacher'" in refused(recipe(good), extra=["<more>"])
    assert "no finished shards" in refused(recipe(tmp_path / "none"))
    message = refused(recipe(good, sequence_length=64))
    assert "40 tokens of training text, fewer than one sequence of 64" in message
    assert "at most 40" in message
    only = tmp_path / "only"
    write_shards(only, [("train", side("a", 0))], IDENTITY)
    assert "no held-out text: rebuild them with a larger held_out_fraction" in refused(recipe(only))
    write_shards(only, [("held_out", side("a", 0))], IDENTITY)
    assert "no training text" in refused(recipe(only))


@pytest.mark.parametrize("name", ["train-00000.bin", "held_out-00001.source.bin"])
def test_damaged_shards_are_refused(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, [("train", side("a", 0)), ("held_out", side("a", 300))], IDENTITY)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-1])
    assert name in refused(recipe(tmp_path))
    file.unlink()
    assert f"{name} is missing" in refused(recipe(tmp_path))


def test_changed_shards_do_not_continue_a_run(tmp_path: Path) -> None:
    sides = [("train", side("a", 0)), ("held_out", side("a", 300))]
    write_shards(tmp_path, sides, IDENTITY)
    state = open_text(recipe(tmp_path), wide_tokenizer()).state()
    open_text(recipe(tmp_path), wide_tokenizer()).load_state(state)
    write_shards(tmp_path, [("train", side("a", 1)), sides[1]], IDENTITY)
    with pytest.raises(UserError, match="training text has changed since this run began"):
        open_text(recipe(tmp_path), wide_tokenizer()).load_state(state)


def test_one_origin_is_given() -> None:
    base = {"teacher": {"model": "m"}, "student": {"hidden_size": 8}}
    for data, message in (
        ({}, "give one of data.text, data.shards and data.stream, not none"),
        ({"text": "a", "shards": "b"}, "not data.text and data.shards"),
        ({"shards": "b", "held_out": "c"}, "data.held_out goes with data.text"),
        ({"stream": {"dataset": "d", "splt": "e"}}, "nearest: 'data.stream.split'"),
    ):
        with pytest.raises(UserError) as error:
            make_recipe({**base, "data": data})
        assert message in str(error.value)


def test_a_setting_replaces_the_origin_of_the_recipe() -> None:
    base = {
        "teacher": {"model": "m"},
        "student": {"hidden_size": 8},
        "data": {"text": ["a"], "held_out": ["b"], "sequence_length": 64},
    }
    shards = make_recipe(base, {"data.shards": "folder"}).data
    assert (shards.text, shards.held_out, shards.shards) == ([], [], ["folder"])
    assert shards.sequence_length == 64
    stream = make_recipe(base, {"data.stream.dataset": "d", "data.stream.split": "s"}).data
    assert stream.stream is not None
    assert (stream.stream.dataset, stream.stream.split, stream.text) == ("d", "s", [])
    text = make_recipe(base, {"data.text": "c"}).data
    assert (text.text, text.held_out) == (["c"], ["b"])
    assert base["data"]["text"] == ["a"]
    assert np.array_equal(make_recipe(base, {"data.sequence_length": 8}).data.text, ["a"])
