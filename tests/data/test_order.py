"""The order of training sequences, in one process and divided among several."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.data import Share, ShuffledOrder, order
from lrc.data.order import permuted
from lrc.system.errors import UserError


def keys(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, order.ROUNDS, np.uint64)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permutation_reaches_every_number_once(size: int, seed: int) -> None:
    result = permuted(np.arange(size), size, keys(seed))
    assert np.array_equal(np.sort(result), np.arange(size))


@settings(deadline=None)
@given(st.integers(1, 2**61), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5))
def test_permutation_of_any_size_needs_no_others(size: int, places: list[float]) -> None:
    numbers = np.array([min(int(place * size), size - 1) for place in places])
    result = permuted(numbers, size, keys(0))
    assert ((result >= 0) & (result < size)).all()
    assert [permuted(numbers[i : i + 1], size, keys(0))[0] for i in range(len(numbers))] == list(
        result
    )


def test_permutation_mixes_well() -> None:
    """Neighbors end up far apart, and every number is about equally often at every position."""
    size, trials = 30, 3000
    results = np.stack([permuted(np.arange(size), size, keys(seed)) for seed in range(trials)])
    for place in (0, 1, 17, 29):
        counts = np.bincount(results[:, place], minlength=size)
        chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
        assert chi_square < 70  # 29 degrees of freedom: seldom above 58
    large = permuted(np.arange(20_000), 10**9, keys(1)).astype(float)
    steps = np.diff(large) / 1e9
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.03
    assert abs(np.abs(steps).mean() - 1 / 3) < 0.01  # the mean distance of two random points


@pytest.fixture(params=["sorted", "network"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to shuffle, whatever the number of sequences."""
    monkeypatch.setattr(order, "LARGEST_SORTED", 1 << 20 if request.param == "sorted" else 0)


@pytest.mark.usefixtures("way")
def test_every_epoch_has_its_own_order() -> None:
    orders = [
        tuple(ShuffledOrder(50, seed).take(epoch * 50, 50)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert all(sorted(o) == list(range(50)) for o in orders)


def test_order_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run must find its order, whatever the version of numpy."""
    monkeypatch.setattr(order, "LARGEST_SORTED", 0)
    assert ShuffledOrder(8, 0).take(0, 8) == [0, 2, 5, 6, 7, 1, 4, 3]


def test_a_billion_sequences_take_no_memory() -> None:
    tracemalloc.start()
    taken = ShuffledOrder(10**9, 0).take(10**9 - 50, 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert max(taken) > 10**8
    assert len(set(taken[:50])) == len(set(taken[50:])) == 50


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.booleans(),
    st.integers(0, 9),
)
def test_shares_make_up_the_stream(
    sequences: int, factor: int, world_size: int, network: bool, first: int
) -> None:
    """At every number of processes: no overlap, no loss, the same sequences in the same step."""
    batch = 12 * factor
    steps = range(first, first + -(-sequences // batch) + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "LARGEST_SORTED", 0 if network else 1 << 20)
        whole = ShuffledOrder(sequences, 3)
        for step in steps:
            ours: list[int] = []
            positions: list[int] = []
            for rank in range(world_size):
                own = Share(rank, world_size).positions(step, batch)
                positions += own
                # Every process has its own order, which begins at this step.
                ours += ShuffledOrder(sequences, 3).take(own.start, len(own))
            assert positions == list(range(step * batch, (step + 1) * batch))
            assert ours == whole.take(step * batch, batch)
        epoch = whole.take(first * sequences, sequences)
    assert sorted(epoch) == list(range(sequences))


def test_share_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"6 sequences per step .* among 4 processes"):
        Share(0, 4).positions(0, 6)
