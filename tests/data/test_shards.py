"""The format of shards: written and read back, damage found and named, tokenizers compared."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from build_helpers import build, documents, make_mix, rows, texts_of
from data_helpers import byte_tokenizer, data_section, write_jsonl, write_rows, write_shards
from lrc.corpus import summary
from lrc.corpus.inspect import check_files, count_sources, own_tokenizer, sample_documents
from lrc.data import open_text, prepare
from lrc.data.identity import tokenizer_identity
from lrc.data.shards import (
    Shards,
    ShardWriter,
    documents_of,
    open_shards,
    write_shards_index,
)
from lrc.evaluation.agreement import HeldOut
from lrc.recipe import Recipe, validated
from lrc.recipe.sections import DataSection, TeacherSection
from lrc.system.errors import UserError
from tiny_runs import save_teacher, tiny_recipe


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    monkeypatch.setattr(summary, "draw", lambda _: Figure(figsize=(1, 1)))
    write_rows(tmp_path / "a.jsonl", rows(documents(100)))
    write_rows(tmp_path / "b.jsonl", rows(documents(50, seed=1)))
    sources = {"a": {"files": ["a.jsonl"]}, "b": {"files": ["b.jsonl"]}}
    mix = make_mix(tmp_path, sources, held_out_fraction=0.1, shard_tokens=3_000)
    return build(mix, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    identity = tokenizer_identity(byte_tokenizer())
    writer = ShardWriter(tmp_path, "train-00000", dtype, "train", ["x", "y", "z"])
    high = (1 << 16) - 1 if dtype == "uint16" else (1 << 31) + 5
    writer.write(np.array([1, 2, high, 4]), np.array([3, 1]), np.array([2, 0]))
    writer.write(np.array([7, 8]), np.array([2]), np.array([2]))
    shard = writer.close()
    empty = ShardWriter(tmp_path, "held_out-00000", dtype, "held_out", ["x", "y", "z"]).close()
    whole = Shards(tmp_path, dtype, "t", identity, ("x", "y", "z"), (shard, empty), {"a": 1})
    write_shards_index(whole)
    found = open_shards(tmp_path)
    assert found == whole
    (train,) = found.of_split("train")
    read = [(source, ids.tolist()) for source, ids in documents_of(train)]
    assert read == [(2, [1, 2, high]), (0, [4]), (2, [7, 8])]
    assert train.tokens_by_source == {"x": 1, "z": 5}
    assert found.tokens_by_source("train") == {"x": 1, "y": 0, "z": 5}
    assert (found.tokens("train"), found.documents("held_out")) == (6, 0)
    assert list(documents_of(found.of_split("held_out")[0])) == []


def test_the_cache_of_a_recipe_is_readable_as_shards(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    texts = [f"Document number {i}." for i in range(30)]
    packed = prepare(data_section(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts)), tokenizer)
    shards = Shards.of_cache(packed, tokenizer_identity(tokenizer), "text")
    for shard in shards.shards:
        shard.check_sizes()
    found = texts_of(shards) + texts_of(shards, "held_out")
    assert sorted(found) == sorted(("text", text) for text in texts)


def test_flipped_byte_is_found_and_named(shards: Shards) -> None:
    assert [names for _, names in check_files(shards)] == [[]] * len(shards.shards)
    for name in [name for shard in shards.shards for name in shard.sha256]:
        path = shards.folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        damaged = [bad for _, names in check_files(shards) for bad in names]
        assert damaged == [path]
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_file_of_another_size_is_named(shards: Shards, damage: str) -> None:
    path = shards.folder / "train-00001.source.bin"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else path.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"train-00001\.source\.bin (is missing|has \d+ bytes)"):
        open_shards(shards.folder)


def recipe_of(shards: Shards) -> Recipe:
    values = {
        "teacher": {"model": "bytes"},
        "student": {"hidden_size": 16},
        "data": {"shards": [str(shards.folder)], "sequence_length": 32},
    }
    return validated(Recipe, values, "The recipe")


def test_damage_is_reported_when_training_opens_shards(shards: Shards) -> None:
    tokenizer = byte_tokenizer()
    recipe = recipe_of(shards)
    open_text(recipe, tokenizer)
    name = f"{shards.of_split('train')[0].name}.bin"
    path = shards.folder / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    with pytest.raises(UserError, match=f"{name} does not match its checksum"):
        open_text(recipe, tokenizer)
    path.write_bytes(content)
    open_text(recipe, tokenizer)


def test_tokens_beyond_the_vocabulary_are_refused_whatever_the_checksum(shards: Shards) -> None:
    name = f"{shards.of_split('train')[0].name}.bin"
    path = shards.folder / name
    ids = np.frombuffer(path.read_bytes(), np.uint16).copy()
    ids[5] = 40_000
    path.write_bytes(ids.tobytes())
    text = (shards.folder / "index.json").read_text()
    entries = json.loads(text)
    entries["shards"][0]["sha256"][name] = hashlib.sha256(ids.tobytes()).hexdigest()
    (shards.folder / "index.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"{name} contains the token 40000"):
        open_text(recipe_of(shards), byte_tokenizer())


def test_unusable_indices_are_refused(shards: Shards) -> None:
    file = shards.folder / "index.json"
    index = json.loads(file.read_text())
    for change, message in (
        ({"format": 2}, "have format 2, but this version reads 1"),
        ({"dtype": "int8"}, "is damaged or not a shards index"),
        ({"shards": [{}]}, "is damaged or not a shards index"),
    ):
        file.write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=message):
            open_shards(shards.folder)
    file.unlink()
    with pytest.raises(UserError, match="contains no finished shards"):
        open_shards(shards.folder)


def test_offsets_out_of_order_are_refused_whatever_the_checksum(shards: Shards) -> None:
    shard = shards.of_split("train")[0]
    offsets = np.fromfile(shard.offsets_path, np.int64)
    offsets[[2, 3]] = offsets[[3, 2]]
    offsets.tofile(shard.offsets_path)
    shard.sha256[shard.offsets_path.name] = hashlib.sha256(offsets.tobytes()).hexdigest()
    with pytest.raises(UserError, match="documents out of order"):
        list(check_files(shards))


def test_counts_and_samples(shards: Shards) -> None:
    counts = count_sources(shards)
    found = {(count.split, count.source): (count.documents, count.tokens) for count in counts}
    for split in ("train", "held_out"):
        texts = texts_of(shards, split)
        for source in ("a", "b"):
            own = [text for name, text in texts if name == source]
            assert found[split, source] == (len(own), sum(len(text) + 2 for text in own))
    assert sum(count.share for count in counts if count.split == "train") == pytest.approx(1)
    tokenizer = own_tokenizer(shards)
    samples = list(sample_documents(shards, tokenizer, 10**6, seed=0))
    texts = [(sample.source, sample.text[len("<|bos|>") : -len("<|eos|>")]) for sample in samples]
    assert sorted(texts) == sorted(texts_of(shards))
    few = list(sample_documents(shards, tokenizer, 5, seed=3))
    assert few == list(sample_documents(shards, tokenizer, 5, seed=3))
    assert few != list(sample_documents(shards, tokenizer, 5, seed=4))
    for sample in few:
        shard = next(shard for shard in shards.shards if shard.name == sample.shard)
        source, ids = list(documents_of(shard))[sample.document]
        assert (shards.sources[source], len(ids)) == (sample.source, sample.tokens)


def test_another_tokenizer_is_refused(shards: Shards) -> None:
    shards.require_tokenizer(byte_tokenizer(), "same")
    others = [byte_tokenizer(extra=["<more>"]), byte_tokenizer(eos=None)]
    for other in others:
        with pytest.raises(UserError, match=r"tokenizer of 'bytes', not with that of 'mine'"):
            shards.require_tokenizer(other, "mine")
    for path in (shards.folder / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="cannot be loaded: set it with --teacher"):
        own_tokenizer(shards)


@pytest.mark.parametrize("second", [0.1, 0.2])
def test_folders_with_other_held_out_fractions_are_noticed(
    tmp_path: Path, second: float, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer()
    for name, fraction in (("one", 0.1), ("two", second)):
        parts: Any = [(split, [("a", [5] * 40)]) for split in ("train", "held_out")]
        folder = write_shards(tmp_path / name, parts, tokenizer_identity(tokenizer))
        write_shards_index(replace(folder, build={"mix": {"held_out_fraction": fraction}}))
    shards = [str(tmp_path / name) for name in ("one", "two")]
    open_text(tiny_recipe(data={"shards": shards, "sequence_length": 16}), tokenizer)
    assert ("different held-out fractions" in caplog.text) == (second != 0.1)


def test_numbers_on_other_shards_of_a_folder_are_not_kept(tmp_path: Path) -> None:
    """`lrc eval` keeps what it measured by this key."""
    tokenizer = tokenizer_identity(byte_tokenizer())
    teacher = TeacherSection(model=str(save_teacher(tmp_path / "teacher")))

    def key(last: int) -> dict[str, Any]:
        write_shards(tmp_path / "shards", [("held_out", [("a", [5, 6, last])])], tokenizer)
        data = DataSection(shards=[str(tmp_path / "shards")])
        return HeldOut(teacher, data, None, sequences=1, batch_size=1).key()

    assert key(7) == key(7)
    assert key(7) != key(8)
