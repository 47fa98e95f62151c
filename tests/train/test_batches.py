"""Batches that are read ahead are those that are read in time; a step waits for the device once."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_helpers import byte_tokenizer, write_jsonl, write_shards
from lrc.cloning.activations import known_padding, last_hidden
from lrc.data import Reader, Share, open_text
from lrc.data.batch import Batch
from lrc.data.identity import tokenizer_identity
from lrc.recipe.sections import TrainSection
from lrc.run import Run
from lrc.train.batches import BatchReader, count
from lrc.train.loop import fetch
from lrc.train.session import open_loop
from tiny import tiny_batch, tiny_teacher
from tiny_runs import new_run, tiny_recipe, without_times


class Numbers:
    """A text whose sequences are their positions; its state counts what was read."""

    def __init__(self) -> None:
        self.read, self.threads = 0, set[str]()

    def training_batch(self, position: int, count: int) -> Batch:
        if position > 40:
            raise OSError("the text has ended")
        self.read += count
        self.threads.add(threading.current_thread().name)
        return Batch(torch.arange(position, position + count)[:, None].expand(count, 3).clone())

    def state(self) -> dict[str, Any]:
        return {"read": self.read}


def reader(ahead: bool, share: Share = Share()) -> tuple[BatchReader, Numbers]:  # noqa: B008
    text = Numbers()
    train = TrainSection(tokens=1, micro_batch=2, accumulate=3)
    return BatchReader(text, train, share, 5, torch.device("cpu"), True, ahead), text  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_gets_its_own_batches_and_state(ahead: bool) -> None:
    batches, text = reader(ahead)
    for step in range(4):
        found = batches.take(step, is_last=step == 3)
        ids = [batch.input_ids[:, 0].tolist() for batch in found.batches]
        first = 5 + 6 * step
        assert ids == [[first, first + 1], [first + 2, first + 3], [first + 4, first + 5]]
        assert batches.text_state() == {"read": 6 * (step + 1)}
        assert found.counts == count(found.batches)
    batches.close()
    assert text.read == 24  # nothing after the last step
    assert ("MainThread" in text.threads, len(text.threads)) == (True, 1 + ahead)


def test_an_error_of_the_text_is_raised_by_the_step_that_needs_it() -> None:
    batches, _ = reader(ahead=True)
    for step in range(6):
        batches.take(step)
    with pytest.raises(OSError, match="the text has ended"):
        batches.take(6)
    batches.close()


def test_a_run_that_reads_ahead_is_the_same(tmp_path: Path) -> None:
    runs = []
    for ahead in (False, True):
        run = new_run(tmp_path, name=f"ahead-{ahead}")
        with run.hold():
            loop = open_loop(run, tiny_teacher("llama"))
            loop.reads_ahead = ahead
            loop.go(7)
        with run.hold():  # from a checkpoint: the text goes on after what was trained on
            loop = open_loop(Run.open(run.folder), tiny_teacher("llama"))
            loop.reads_ahead = ahead
            loop.go(run.recipe.steps())
        runs.append(run)
    assert without_times(runs[0].metrics()) == without_times(runs[1].metrics())


def test_fetched_values_are_the_same() -> None:
    values = {
        "scalar": torch.tensor(1 / 3),
        "counts": torch.tensor([3, 2**40]),
        "layers": torch.tensor([[1e-30, torch.nan], [torch.inf, -7.1]]),
    }
    for name, value in fetch(values).items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "ministral"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"documents": [[9], [9]]}, {"documents": [[4, 5], [2, 7]]}, {"lengths": [9, 4]}],
    ids=str,
)
def test_known_padding_changes_nothing(family: str, shape: dict[str, Any]) -> None:
    teacher, batch = tiny_teacher(family), tiny_batch(**shape)
    with torch.no_grad():
        expected = last_hidden(teacher.model, batch)
        with known_padding(batch):
            found = last_hidden(teacher.model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_some_lines_have_terms_by_layer(tmp_path: Path) -> None:
    run = new_run(tmp_path, eval_every=1000, tokens=16 * 2 * 250)
    with run.hold():
        open_loop(run, tiny_teacher("llama")).go(10)
    lines = run.metrics()[1:]
    assert [line["step"] for line in lines if "clone_layers" in line] == [2, 4, 6, 8, 10]
    assert all("clone" in line for line in lines)


# Several processes read what one reads: no overlap, no loss.

MICRO_BATCH, ACCUMULATE, LENGTH = 2, 6, 16


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Reader]]:
    """Opens the same documents as text, as shards and as a stream."""
    folder = tmp_path_factory.mktemp("text")
    drawn = random.Random(0)
    documents = ["".join(drawn.choices("abcdefgh", k=5 + 7 * d % 60)) for d in range(60)]
    tokenizer = byte_tokenizer()
    files = [str(write_jsonl(folder / f"{n}.jsonl", documents[n::3])) for n in range(3)]
    identity = tokenizer_identity(tokenizer)
    sources = ["a" if d % 3 else "b" for d in range(60)]
    tokens = list(zip(sources, tokenizer(documents).input_ids, strict=True))
    parts = [("train", tokens[:40]), ("train", tokens[40:56]), ("held_out", tokens[56:])]
    write_shards(folder / "shards", parts, identity)  # type: ignore[arg-type]
    data: dict[str, dict[str, Any]] = {
        "text": {"text": files, "cache": str(folder / "cache")},
        "shards": {"shards": [str(folder / "shards")]},
        "stream": {
            "stream": {"dataset": "json", "data_files": files, "shuffle_documents": 7},
            "held_out_fraction": 0.1,
        },
    }

    def opening(kind: str) -> Callable[[], Reader]:
        recipe = tiny_recipe(data={"sequence_length": LENGTH, **data[kind]})
        return lambda: open_text(recipe, tokenizer)

    return {kind: opening(kind) for kind in data}


@pytest.mark.parametrize("kind", ["text", "shards", "stream"])
@settings(max_examples=12, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 6]),
    later=st.sampled_from([1, 2, 3, 6]),
    calibration=st.integers(0, 5),
    ahead=st.booleans(),
    steps=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_processes_share_every_step(
    readers: dict[str, Callable[[], Reader]],
    kind: str,
    world: int,
    later: int,
    calibration: int,
    ahead: bool,
    steps: tuple[int, int],
) -> None:
    """Whatever the text, the micro-batches of all processes are those of one process, in its
    order, also if other processes continue from the first one's state."""

    def opened(rank: int, size: int, state: dict[str, Any] | None) -> BatchReader:
        text = readers[kind]()
        if state is not None:
            text.load_state(json.loads(json.dumps(state)))
        train = TrainSection(tokens=1, micro_batch=MICRO_BATCH, accumulate=ACCUMULATE)
        share = Share(rank, size)
        return BatchReader(text, train, share, calibration, torch.device("cpu"), True, ahead)

    def read(size: int, first: int, count: int, state: Any) -> tuple[list[list[Tensor]], Any]:
        processes = [opened(rank, size, state) for rank in range(size)]
        found = []
        for step in range(first, first + count):
            taken = [process.take(step, step == first + count - 1) for process in processes]
            found.append([batch.input_ids for own in taken for batch in own.batches])
        for process in processes:
            process.close()
        return found, processes[0].text_state()

    alone, _ = read(1, 0, sum(steps), None)
    begun, state = read(world, 0, steps[0], None)
    continued, _ = read(later, steps[0], steps[1], state)
    for ours, theirs in zip(begun + continued, alone, strict=True):
        assert len(ours) == len(theirs) == ACCUMULATE
        assert all(map(torch.equal, ours, theirs))
    every = torch.cat([ids for step in alone for ids in step])
    if kind != "stream" and len(every) <= (readers[kind]().training_sequences or 0):
        assert len({tuple(row) for row in every.tolist()}) == len(every)
