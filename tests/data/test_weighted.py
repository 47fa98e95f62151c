"""Training sequences drawn by source, in shares that change during training."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import Document, write_shards
from lrc.data.identity import tokenizer_identity
from lrc.data.order import Share
from lrc.data.reader import Sequences, TrainingText
from lrc.data.tokens import Tokens
from lrc.data.weighted import WeightedOrder
from tiny import tiny_tokenizer

NAMES = ("web", "code", "none")
OF = np.array([0, 1, 0, 0, 1, 0, 0, 0, 0, 1])
"""Seven sequences of the web and three of code; none of a third source."""


def order(seed: int = 0) -> WeightedOrder:
    return WeightedOrder(NAMES, OF, seed)


def test_it_starts_with_the_shares_of_the_text() -> None:
    assert order().shares() == {"web": 0.7, "code": 0.3}
    taken = order().take(0, 10)
    assert sorted(taken) == list(range(10)), "an epoch of both is one of the text"
    assert taken != order(1).take(0, 10)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 40)), min_size=1, max_size=5))
def test_shares_are_kept_at_every_step(stretches: list[tuple[float, int]]) -> None:
    stream, position, wanted, found = order(), 0, np.zeros(2), np.zeros(2)
    for web, number in stretches:
        stream.set_shares(position, {"web": web, "code": 1 - web})
        for _ in range(number):
            found[OF[stream.take(position, 1)[0]]] += 1
            wanted += [web, 1 - web]
            position += 1
            assert np.abs(found - wanted).max() <= 1.0 + 1e-9


def test_every_source_has_its_own_epochs() -> None:
    stream = order()
    stream.set_shares(0, {"web": 0.5, "code": 0.5})
    taken = stream.take(0, 12)
    code = [number for number in taken if OF[number] == 1]
    assert len(code) == 6
    assert Counter(code) == {1: 2, 4: 2, 9: 2}
    web = [number for number in taken if OF[number] == 0]
    assert len(set(web)) == 6


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4))
def test_it_continues_from_its_state(cut: int, shares: list[float]) -> None:
    def run(stop: int, start: int = 0, state: str | None = None) -> tuple[list[int], str]:
        stream, taken = order(), []
        if state is not None:
            stream.load_state(json.loads(state))
        for position in range(start, stop):
            if position % 10 == 0 and position // 10 < len(shares):
                web = shares[position // 10]
                stream.set_shares(position, {"web": web, "code": 1 - web})
            taken += stream.take(position, 1)
        return taken, json.dumps(stream.state())

    whole, _ = run(40)
    first, state = run(cut)
    assert first + run(40, cut, state)[0] == whole


def test_processes_share_one_stream() -> None:
    """Two processes that take halves of every step see what one sees alone."""

    def steps(rank: int, world_size: int) -> list[list[int]]:
        stream, found = order(), []
        for step in range(6):
            if step % 2 == 0:
                stream.set_shares(4 * step, {"web": 0.2 + 0.1 * step, "code": 0.8 - 0.1 * step})
            own = Share(rank, world_size).positions(step, 4)
            found.append(stream.take(own.start, len(own)))
        return found

    pairs = zip(steps(0, 2), steps(1, 2), strict=True)
    assert [first + second for first, second in pairs] == steps(0, 1)


def test_it_never_goes_back() -> None:
    stream = order()
    stream.take(0, 4)
    with pytest.raises(IndexError):
        stream.take(3, 1)


def test_source_of_a_sequence_is_that_of_its_middle_token(tmp_path: Path) -> None:
    def document(source: str, length: int) -> Document:
        return source, [0, *[5] * (length - 2), 1]

    shards = write_shards(
        tmp_path / "shards",
        [
            ("train", [document("web", 10), document("code", 3), document("web", 12)]),
            ("train", []),
            ("train", [document("code", 9), document("web", 6)]),
        ],
        tokenizer_identity(tiny_tokenizer()),
        ("web", "code"),
    )
    tokens = Tokens(shards.of_split("train"), ("web", "code"))
    of_token = tokens.read(0, len(tokens)).sources
    assert of_token is not None
    assert tokens.sources_at(np.arange(len(tokens))).tolist() == of_token.tolist()
    text = Sequences(tokens, 8)
    middles = [int(of_token[8 * i + 4]) for i in range(len(text))]
    assert text.middle_sources().tolist() == middles
    assert set(middles) == {0, 1}

    reader = TrainingText(text, text, seed=0)
    natural = [reader.training_batch(i, 1).input_ids.tolist() for i in range(4)]
    assert reader.shares() == {"web": middles.count(0) / 5, "code": middles.count(1) / 5}
    assert reader.state() == {}
    reader.set_shares(4, {"web": 0.0, "code": 1.0})
    batch = reader.training_batch(4, 3)
    assert batch.source_ids is not None
    assert batch.source_ids[:, 4].tolist() == [1, 1, 1]
    resumed = TrainingText(text, text, seed=0)
    resumed.load_state(json.loads(json.dumps(reader.state())))
    assert resumed.shares() == {"web": 0.0, "code": 1.0}
    following = [r.training_batch(7, 2).input_ids.tolist() for r in (reader, resumed)]
    assert following[0] == following[1]
    other = TrainingText(text, text, seed=0)
    assert natural == [other.training_batch(i, 1).input_ids.tolist() for i in range(4)]
