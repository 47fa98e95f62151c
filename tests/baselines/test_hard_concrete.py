"""Hard-concrete masks and their constraint, in float64 against the papers' formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc.baselines.pruning.hard_concrete import log_alpha_of, open_probability, sample, settled
from lrc.baselines.pruning.learned import LearnedMasks
from lrc.model.pruned_shape import PrunedShape

TEACHER = PrunedShape(layers=3, hidden=10, kv_heads=2, neurons=12)
TARGET = PrunedShape(layers=2, hidden=6, kv_heads=1, neurons=5)
GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3


def formula(log_alpha: float, u: float) -> float:
    """One sample by equations 10 and 11 of arXiv 1712.01312."""
    exponent = -(math.log(u) - math.log(1 - u) + log_alpha) / BETA
    stretched = 1 / (1 + math.exp(exponent)) * (ZETA - GAMMA) + GAMMA
    return min(1.0, max(0.0, stretched))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(0.001, 0.999)), min_size=1))
def test_samples_are_those_of_the_formula(cases: list[tuple[float, float]]) -> None:
    log_alpha, uniform = torch.tensor(cases, dtype=torch.float64).T
    expected = torch.tensor([formula(*case) for case in cases], dtype=torch.float64)
    torch.testing.assert_close(sample(log_alpha, uniform), expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_a_sample() -> None:
    log_alpha = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    uniform = torch.linspace(0.2, 0.8, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sample(x, uniform), log_alpha)
    sample(log_alpha, uniform).sum().backward()
    assert log_alpha.grad is not None
    assert (log_alpha.grad > 0).any()


@pytest.mark.parametrize("log_alpha", [-4.0, -1.5, 0.0, 2.0])
def test_masks_open_with_their_probability(log_alpha: float) -> None:
    """By Monte Carlo and by the distribution function of the stretched concrete variable at 0."""
    generator = torch.Generator().manual_seed(0)
    number = 200_000
    uniform = torch.rand(number, generator=generator, dtype=torch.float64)
    location = torch.tensor(log_alpha, dtype=torch.float64)
    found = (sample(location, uniform) > 0).double().mean().item()
    said = open_probability(location).item()
    assert abs(found - said) < 4 * math.sqrt(said * (1 - said) / number)
    x = -GAMMA / (ZETA - GAMMA)
    logits = BETA * (math.log(x) - math.log(1 - x)) - log_alpha
    assert said == pytest.approx(1 - 1 / (1 + math.exp(-logits)), rel=1e-12)
    assert log_alpha_of(said) == pytest.approx(log_alpha, abs=1e-12)


def test_settled_masks() -> None:
    log_alpha = torch.tensor([-9.0, -math.log(11), math.log(11), 9.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([0, 0, 1, 1, 0.5], dtype=torch.float64)
    torch.testing.assert_close(settled(log_alpha), expected)


def random_masks(seed: int = 0, target: PrunedShape = TARGET) -> LearnedMasks:
    masks = LearnedMasks(TEACHER, target, 0.9, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in masks.parameters().values():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return masks


def probability(log_alpha: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-(log_alpha.detach() - BETA * math.log(-GAMMA / ZETA))))


def test_lagrangian_and_its_gradients_by_hand() -> None:
    masks = random_masks()
    shares = {"layers": 2 / 3, "hidden": 6 / 10, "groups": 1 / 2, "neurons": 5 / 12}
    progress, total = 0.25, 0.0
    masks.lagrangian(progress).backward()
    assert set(masks.units) == set(shares)
    for kind, share in shares.items():
        p = probability(masks.log_alpha[kind])
        gap = p.mean(-1) - (0.75 + 0.25 * share)
        linear, quadratic = masks.linear[kind], masks.quadratic[kind]
        total += (linear * gap + quadratic * gap**2).sum().item()
        slope = (linear + 2 * quadratic * gap).detach()[..., None]
        torch.testing.assert_close(
            masks.log_alpha[kind].grad, slope * p * (1 - p) / p.shape[-1], rtol=1e-12, atol=1e-14
        )
        torch.testing.assert_close(linear.grad, gap)
        torch.testing.assert_close(quadratic.grad, gap**2)
        torch.testing.assert_close(masks.gaps(progress)[kind].detach(), gap)
    assert masks.lagrangian(progress).item() == pytest.approx(total, rel=1e-12)


def test_ascent_meets_the_constraint() -> None:
    """With only the constraint as the loss, descent in the masks and ascent in the multipliers
    bring the expected number of open units of every kind and layer to the target."""
    masks = LearnedMasks(TEACHER, TARGET, 0.95, dtype=torch.float64)
    groups = [
        {"params": list(masks.log_alpha.values())},
        {"params": list(masks.multipliers()), "maximize": True},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for _ in range(1500):
        optimizer.zero_grad()
        masks.lagrangian().backward()
        optimizer.step()
    for kind, gap in masks.gaps().items():
        assert gap.abs().max() < 1e-3, kind


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 10), st.integers(1, 2), st.integers(1, 12)),
    st.integers(0, 99),
)
def test_kept_units_have_the_exact_shape(sizes: tuple[int, int, int, int], seed: int) -> None:
    target = PrunedShape(*sizes)
    masks = random_masks(seed, target)
    kept = masks.kept()
    assert len(kept.layers) == len(kept.groups) == len(kept.neurons) == target.layers
    assert len(kept.hidden) == target.hidden
    assert kept.shape == target
    for row in (torch.tensor(kept.layers), kept.hidden, *kept.groups, *kept.neurons):
        assert row.tolist() == sorted(set(row.tolist()))
    # No removed unit scores higher than a kept one.
    if "hidden" in masks.units:
        scores = masks.log_alpha["hidden"].tolist()
        left = set(range(TEACHER.hidden)) - set(kept.hidden.tolist())
        assert max(scores[i] for i in left) <= min(scores[i] for i in kept.hidden)
    if "neurons" in masks.units:
        for layer, row in zip(kept.layers, kept.neurons, strict=True):
            scores = masks.log_alpha["neurons"][layer].tolist()
            left = set(range(TEACHER.neurons)) - set(row.tolist())
            assert max(scores[i] for i in left) <= min(scores[i] for i in row)


def test_units_that_the_rank_decides_are_counted() -> None:
    masks = LearnedMasks(TEACHER, TARGET, 0.9, dtype=torch.float64)
    with torch.no_grad():
        masks.log_alpha["hidden"].copy_(torch.tensor([9.0] * 6 + [-9.0] * 4))
        masks.log_alpha["neurons"].fill_(-9.0)  # all are closed, but five of twelve must stay
        masks.log_alpha["groups"].fill_(9.0)  # both are open, but only one of two may stay
    counts = masks.undecided()
    assert counts["hidden"] == (0, 10)
    assert counts["neurons"] == (15, 36)
    assert counts["groups"] == (3, 6)
    assert [row.tolist() for row in masks.kept().groups] == [[0], [0]]  # the first of equal ones


def test_noise_depends_only_on_the_seed() -> None:
    masks = random_masks()
    one, same, other = (masks.draw(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    for kind, values in one.items():
        assert torch.equal(values, same[kind])
        assert not torch.equal(values, other[kind])
        assert values.shape == masks.log_alpha[kind].shape
