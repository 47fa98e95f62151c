"""`train.token_grad_clip`: what no single token may do."""

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import Counts
from lrc.cloning.token_clipping import clip_tokens
from lrc.data.batch import Batch
from lrc.model.layout import LinearSite
from lrc.recipe.sections import ObjectiveSection, StudentSection
from tiny import LLAMAS, STUDENT_HIDDEN, TOKENS, tiny_teacher
from tiny_runs import go, new_run

LIMIT = 1.2
SITES = [
    LinearSite(layer, name)
    for layer in range(2)
    for name in ("q", "k", "v", "o", "gate", "up", "down")
]


@hypothesis.given(
    st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(0, 99), st.booleans()
)
def test_norms_are_bounded_by_multiples_of_the_median(
    sequences: int, length: int, width: int, seed: int, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(sequences, length, width, generator=generator, dtype=torch.float64)
    gradient *= torch.randn(sequences, length, 1, generator=generator, dtype=torch.float64).exp()
    if padded:
        gradient[0, length // 2 :] = 0
    spared = torch.rand(sequences, length, generator=generator) < 0.3
    clipped = clip_tokens(gradient, spared, LIMIT)
    norms = gradient.norm(dim=-1)
    there = norms[norms > 0].sort().values
    largest = LIMIT * there[(len(there) - 1) // 2] if len(there) else 0.0
    tokens = norms.flatten(), spared.flatten(), gradient.flatten(0, 1), clipped.flatten(0, 1)
    for norm, free, before, after in zip(*tokens, strict=True):
        expected = before if free or norm <= largest else before * largest / norm
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0)


def test_what_is_not_finite_stays_so() -> None:
    gradient = torch.ones(1, 3, 2)
    gradient[0, 1, 0] = torch.inf
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert not clip_tokens(gradient, none, 5.0).isfinite().all()
    gradient[0, 1, 0] = torch.nan
    assert not clip_tokens(gradient, none, 5.0).isfinite().all()


def a_batch(kind: str) -> Batch:
    ids = torch.randint(0, TOKENS, (2, 12), generator=torch.Generator().manual_seed(1))
    if kind == "documents":
        return Batch(ids, position_ids=torch.tensor([[*range(5), *range(7)]] * 2))
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        return Batch(ids, attention_mask=mask)
    return Batch(ids)


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("plain", [(0, 0), (1, 0)]),
        ("padded", [(0, 0), (1, 0)]),
        ("documents", [(0, 0), (0, 5), (1, 0), (1, 5)]),
    ],
)
def test_first_tokens(kind: str, places: list[tuple[int, int]]) -> None:
    found = a_batch(kind).first_tokens().nonzero().tolist()
    assert found == [list(place) for place in places]


def test_the_first_token_after_padding_is_found() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    found = Batch(torch.zeros(2, 4, dtype=torch.int64), attention_mask=mask).first_tokens()
    assert found.nonzero().tolist() == [[0, 2], [1, 0]]


def learn(method: LowRankClone, batch: Batch) -> dict[LinearSite, Tensor]:
    """One pass there and back; gradients at the outputs of linear maps, as they are passed on."""
    outputs: dict[LinearSite, Tensor] = {}

    def keep(site: LinearSite, output: Tensor) -> None:
        output.retain_grad()  # after all other hooks of the tensor
        outputs.setdefault(site, output)

    for site in SITES:
        linear = method.model.get_submodule(method.teacher.layout.linear(site))
        linear.register_forward_hook(
            lambda _module, _inputs, output, site=site: keep(site, output), prepend=True
        )
    tokens = batch.input_ids.numel() if batch.attention_mask is None else 21
    method.begin_step(0)
    method.losses(batch, Counts(tokens, tokens)).loss.backward()
    method.end_step()
    found = {site: output.grad for site, output in outputs.items()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((family, False) for family in LLAMAS), ("llama", True)],
)
@pytest.mark.parametrize("kind", ["plain", "padded", "documents"])
def test_gradients_of_a_pass(family: str, kind: str, checkpointing: bool) -> None:
    """At every linear map, the clone terms' gradients included; what one map passes on is clipped
    before the next one, and so reaches the parameters."""
    teacher, batch = tiny_teacher(family, num_hidden_layers=2), a_batch(kind)
    section = StudentSection(hidden_size=STUDENT_HIDDEN)
    found = []
    for limit in (0.0, LIMIT):
        method = LowRankClone(
            teacher, section, ObjectiveSection(), checkpointing, token_grad_clip=limit
        )
        for value in method.projections.values.values():
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(2))
        found.append(learn(method, batch))
    free, bound = found
    assert set(bound) == set(free) == set(SITES)
    spared = batch.first_tokens()
    for gradient in bound.values():
        norms = gradient.norm(dim=-1)
        median = norms[norms > 0].median()  # clipping leaves it
        assert (norms[~spared] <= LIMIT * median * (1 + 1e-6)).all()
    last = 1, "down"  # nothing comes before it
    torch.testing.assert_close(bound[last], clip_tokens(free[last], spared, LIMIT))
    assert not torch.equal(bound[last], free[last])


def test_training_clips_as_the_recipe_says(tmp_path: Path) -> None:
    students = []
    for limit in (0.0, 1e9, 1.0):
        run = new_run(tmp_path, name=f"run-{limit}", token_grad_clip=limit)
        go(run)
        students.append(run.student().state_dict())
    off, far, near = students
    for name, value in off.items():
        assert torch.equal(value, far[name])
    assert any(not torch.equal(value, near[name]) for name, value in off.items())
