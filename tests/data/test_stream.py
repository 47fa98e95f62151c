"""Streaming a data set: packing on the fly, order, and exact continuation."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_helpers import byte_tokenizer
from lrc.data import Share, StreamedText
from lrc.data.identity import HASH_RANGE, text_hash
from lrc.data.stream import merged_state
from lrc.recipe.sections import DataSection, StreamSection
from lrc.system.errors import UserError

FILES, DOCUMENTS, LENGTH = 3, 40, 16
HELD_OUT = 0.1


def text_of(number: int) -> str:
    return f"Document {number} " + "x" * random.Random(number).randrange(60)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """JSONL files of numbered documents; every second one of the last file is in the first too."""
    folder = tmp_path_factory.mktemp("stream")
    paths = []
    for file in range(FILES):
        numbers = [file * DOCUMENTS + i for i in range(DOCUMENTS)]
        if file == FILES - 1:
            numbers += range(0, DOCUMENTS, 2)
        rows = [{"text": text_of(n), "id": n} for n in numbers] + [{"text": " ", "id": -1}]
        paths.append(folder / f"{file}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def opened(files: list[str]) -> Callable[..., StreamedText]:
    """Opens the files as a stream, with settings of the data section and of the stream."""

    def open_stream(
        seed: int = 0, held_out: int = 3, parts: int = 1, block: int = 1, **data: Any
    ) -> StreamedText:
        stream = {"dataset": "json", "data_files": files, "shuffle_documents": 7}
        stream |= data.pop("stream", {})
        values = {"sequence_length": LENGTH, "held_out_fraction": HELD_OUT, **data}
        section = DataSection(stream=StreamSection(**stream), **values)
        tokenizer = byte_tokenizer()
        return StreamedText(section, tokenizer, seed, held_out, parts=parts, block=block)

    return open_stream


def is_held_out(number: int) -> bool:
    return text_hash(text_of(number)) < HELD_OUT * HASH_RANGE


def documents(batch_ids: list[torch.Tensor]) -> list[str]:
    """The whole documents in consecutive sequences."""
    tokens = [int(t) for ids in batch_ids for t in ids.flatten()]
    tokenizer = byte_tokenizer()
    marked = tokenizer.decode(tokens)
    return re.findall(r"<\|bos\|>(.*?)<\|eos\|>", marked)


TRAINING = [n for n in [*range(FILES * DOCUMENTS), *range(0, DOCUMENTS, 2)] if not is_held_out(n)]
"""Numbers of all training documents, as often as they occur."""


def test_every_document_once_an_epoch(opened: Callable[..., StreamedText]) -> None:
    tokens = sum(len(text_of(n)) + 2 for n in TRAINING)
    text = opened()
    ids = [text.training_batch(i, 1).input_ids for i in range(2 * tokens // LENGTH)]
    seen = documents(ids)
    first, second = seen[: len(TRAINING)], seen[len(TRAINING) :]
    assert Counter(first) == Counter(map(text_of, TRAINING))
    # The last document may be cut.
    assert set(first) >= set(second)
    assert len(second) >= len(first) - 1
    assert first[: len(second)] != second
    read = [int(re.match(r"Document (\d+)", text).group(1)) for text in first]
    assert read != TRAINING


def test_files_are_shuffled(opened: Callable[..., StreamedText]) -> None:
    """Not only the documents of a block: runs of other seeds begin with other files."""
    first = [documents([opened(seed).training_batch(0, 12).input_ids])[0] for seed in range(6)]
    assert len({int(text.split()[1]) // DOCUMENTS for text in first}) > 1


def test_order_is_that_of_the_seed(opened: Callable[..., StreamedText]) -> None:
    one, same, other = (opened(seed).training_batch(0, 20).input_ids for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_held_out_text_is_never_trained_on(opened: Callable[..., StreamedText]) -> None:
    text = opened(held_out=12)
    (held,) = text.held_out_batches(12, 16)
    texts = documents([held.input_ids])
    assert len(texts) > 2
    expected = [text_of(n) for n in range(FILES * DOCUMENTS) if is_held_out(n)]
    assert texts == expected[: len(texts)]
    assert [b.input_ids.shape[0] for b in text.held_out_batches(3, 2)] == [2, 1]
    assert [b.input_ids.shape[0] for b in text.held_out_batches(99, 8)] == [8, 4]


def test_more_held_out_text_is_not_trained_on(
    opened: Callable[..., StreamedText], files: list[str]
) -> None:
    text = opened(also_held_out={"first": files[:1]})
    ids = [text.training_batch(i, 1).input_ids for i in range(200)]
    assert set(documents(ids)).isdisjoint(map(text_of, range(DOCUMENTS)))


def test_it_continues_from_any_place(opened: Callable[..., StreamedText]) -> None:
    """Through JSON, and into the second epoch."""
    whole, states = [], []
    text = opened(document_mask=True)
    for position in range(500):
        states.append(json.dumps(text.state()))
        whole.append(text.training_batch(position, 1))
    assert json.loads(states[-1])["parts"][0]["epoch"] == 1
    resumed = opened(document_mask=True)
    for position in [*range(0, 490, 7), 0]:
        resumed.load_state(json.loads(states[position]))
        for later in range(position, position + 10):
            batch = resumed.training_batch(later, 1)
            assert torch.equal(batch.input_ids, whole[later].input_ids)
            assert torch.equal(batch.position_ids, whole[later].position_ids)


def test_continuing_reads_one_block_again(
    opened: Callable[..., StreamedText], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.data.stream.DOCUMENTS_PER_BATCH", 1)
    text = opened()
    text.training_batch(0, 400)
    state = text.state()
    resumed = opened()
    read = []
    monkeypatch.setattr("lrc.data.stream.text_hash", lambda t: read.append(t) or text_hash(t))
    resumed.load_state(state)
    resumed.training_batch(400, 1)
    assert 0 < len(read) <= 2 * 7 + 6  # two blocks of 7, and the held-out documents among them


@pytest.mark.parametrize(("parts", "block"), [(1, 1), (3, 2)])
def test_it_can_go_back(opened: Callable[..., StreamedText], parts: int, block: int) -> None:
    """The closed-form start and the search for conversations read the head of the text, which may
    be longer than what the run leaves out."""
    text = opened(parts=parts, block=block)
    head = text.training_batch(0, 9).input_ids
    assert torch.equal(text.training_batch(0, 5).input_ids, head[:5])
    assert torch.equal(text.training_batch(3, 6).input_ids, head[3:])
    text.load_state(text.state())
    assert torch.equal(text.training_batch(2, 2).input_ids, head[2:4])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("parts", "block"), [(1, 6), (3, 2), (3, 1), (3, 4), (4, 2)])
def test_shares_of_processes(
    opened: Callable[..., StreamedText], world_size: int, parts: int, block: int
) -> None:
    """Each step equals that of one process, also when another number of processes continues, and
    where blocks are not those that processes take. Four parts are more than there are files."""

    def new() -> StreamedText:
        return opened(parts=parts, block=block)

    whole = new()
    whole.training_batch(0, 2)  # calibration
    steps = [whole.training_batch(2 + 6 * step, 6).input_ids for step in range(4)]

    def step_of(readers: list[StreamedText], step: int) -> torch.Tensor:
        shares = [Share(rank, len(readers)).positions(step, 6) for rank in range(len(readers))]
        pairs = zip(readers, shares, strict=True)
        return torch.cat([r.training_batch(2 + own.start, len(own)).input_ids for r, own in pairs])

    readers = [new() for _ in range(world_size)]
    for step in range(2):
        assert torch.equal(step_of(readers, step), steps[step])
    state = json.loads(json.dumps(merged_state([reader.state() for reader in readers])))
    others = [new() for _ in range(6 // world_size)]
    for reader in others:
        reader.load_state(state)
    for step in range(2, 4):
        assert torch.equal(step_of(others, step), steps[step])


def test_parts_have_files_of_their_own(
    opened: Callable[..., StreamedText], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, they are the data set. A process tokenizes its own part only."""
    alone = []
    for rank in range(FILES):
        text, read = opened(parts=FILES, block=1), []
        monkeypatch.setattr(
            "lrc.data.stream.text_hash", lambda t, r=read: r.append(t) or text_hash(t)
        )
        batches = [text.training_batch(rank + FILES * step, 1).input_ids for step in range(120)]
        monkeypatch.setattr("lrc.data.stream.text_hash", text_hash)
        own = {int(document.split()[1]) for document in documents(batches)}
        assert own <= {int(document.split()[1]) for document in read}
        alone.append(own)
    firsts = [{n // DOCUMENTS for n in own if n >= DOCUMENTS or n % 2} for own in alone]
    assert sorted(firsts, key=min) == [{0}, {1}, {2}]
    assert set.union(*alone) == set(TRAINING)


def test_a_data_set_with_other_files_is_not_continued(opened: Callable[..., StreamedText]) -> None:
    state = opened(parts=3, block=2).state()
    with pytest.raises(UserError, match="in 3 parts, and now there are 1"):
        opened(parts=4, block=2).load_state(state)


def test_what_is_refused(opened: Callable[..., StreamedText], tmp_path: Path) -> None:
    def refused(**data: Any) -> str:
        with pytest.raises(UserError) as error:
            opened(**data).training_batch(0, 1)
        message = str(error.value)
        assert "\n" not in message
        assert message.count("The data set") <= 1, "a message inside another"
        return message

    assert "no field 'body'; set data.text_field to one of its fields (text, id)" in refused(
        text_field="body"
    )
    assert "has type int in 'id' instead of text" in refused(text_field="id")
    assert "does not fill one sequence" in refused(held_out_fraction=1e-9)
    assert "has no training text" in refused(held_out_fraction=1 - 1e-9)
    assert "cannot be opened" in refused(stream={"split": "test"})
    assert "cannot be opened" in refused(stream={"data_files": [str(tmp_path / "no.jsonl")]})
    assert "cannot be opened" in refused(stream={"dataset": str(tmp_path / "no"), "data_files": []})
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    assert "cannot be read any further" in refused(stream={"data_files": [str(broken)]})
    with pytest.raises(UserError, match="does not say where"):
        opened().load_state({})
