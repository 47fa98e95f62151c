"""The cost formulas against what torch counts while a model or a step runs."""

from typing import Any

import pytest
import torch

from flops import counted_flops, counted_step
from lrc.cloning.cost import CHUNK, matmul_peak, mixing, seen_keys, step_flops, token_weights
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.data.batch import Batch
from lrc.model.families import FAMILIES
from lrc.model.teacher import Teacher
from lrc.recipe.sections import CloneTerms, ObjectiveSection, StudentSection
from lrc.train.batches import count
from tiny import in_turn, initialize_random, tiny_teacher, tiny_tokens

OBJECTIVES = [
    ObjectiveSection(),
    ObjectiveSection(attn_out="teacher"),
    ObjectiveSection(alpha=0),
    ObjectiveSection(kl_weight=0, clone=CloneTerms(o=False)),
]

MAMBA = ("falcon_h1", "granitemoehybrid", "nemotron_h")
"""Families with Mamba layers."""

LENGTH = CHUNK
"""Tokens of a sequence. A gated delta net computes whole chunks."""


def unwindowed(family: str, tied: bool = False, **changes: Any) -> Teacher:
    """A tiny teacher that computes attention as plain products of whole matrices, and a Mamba layer
    in one chunk."""
    changes |= {"sliding_window": LENGTH, "chunk_size": LENGTH, "mamba_chunk_size": LENGTH}
    teacher = tiny_teacher(family, tied, dtype=torch.float32, **changes)
    teacher.model.set_attn_implementation("eager")
    return teacher


def eager_mixing(method: LowRankClone) -> float:
    """Operations per token of a step's attention that plain products of whole matrices add: the
    scores that a causal mask hides, and not the second computation in the backward pass."""
    (theirs, _), (ours, _) = (mixing(m, LENGTH) for m in (method.teacher.model, method.model))
    return theirs + (6 - 3.5) * ours


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_a_forward_pass(family: str) -> None:
    teacher = unwindowed(family)
    ids = tiny_tokens(2, LENGTH)
    with torch.no_grad():
        counted = counted_flops(lambda: teacher.model(ids, use_cache=False))
    attention, recurrence = mixing(teacher.model, LENGTH)
    head = teacher.model.get_output_embeddings().weight.numel()
    weights = sum(token_weights(teacher.model).values()) + head
    expected = 2 * weights + 2 * attention + recurrence
    passed_on = 1e-3 if family in MAMBA else 1e-9  # the state that a chunk gives the next one
    assert counted == pytest.approx(ids.numel() * expected, rel=passed_on)


@pytest.mark.parametrize(("family", "released"), in_turn(list(FAMILIES), [False, True]))
def test_products_of_a_step(family: str, released: bool) -> None:
    teacher = unwindowed(family)
    section = StudentSection(hidden_size=8)
    method = LowRankClone(teacher, section, ObjectiveSection(), steps=2, release_at=0.5)
    initialize_random(method.projections, 0.02, seed=0)
    if released:
        method.next_stage()
    batch = Batch(tiny_tokens(2, LENGTH))
    counted = counted_step(method, [batch], step=int(released))
    formula = method.step_flops(int(released), batch.input_ids.numel(), LENGTH)
    assert formula is not None
    expected = formula + batch.input_ids.numel() * eager_mixing(method)
    # The first state of a gated delta net is zero and has no gradient, nor has the last one.
    _, recurrence = mixing(method.model, LENGTH)
    assert counted == pytest.approx(expected, rel=0.01 if recurrence else 1e-9)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["paper", "official", "no-clone", "no-kl"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_products_of_objectives(
    family: str, tied: bool, objective: ObjectiveSection, micro_batches: int
) -> None:
    teacher = unwindowed(family, tied)
    method = LowRankClone(teacher, StudentSection(hidden_size=8), objective)
    initialize_random(method.projections, 0.02, seed=0)
    batches = [Batch(tiny_tokens(2, LENGTH)) for _ in range(micro_batches)]
    tokens = count(batches).tokens
    counted = counted_step(method, batches, step=0)
    expected = step_flops(
        teacher.model,
        method.model,
        tokens,
        LENGTH,
        objective,
        method.distill.sites,
        teacher.vocab_size,
    )
    assert counted == pytest.approx(
        sum(expected.values()) + tokens * eager_mixing(method), rel=1e-9
    )


def test_llamas_formula() -> None:
    """As docs/cost.md has it."""
    teacher = tiny_teacher("llama", tied=True)
    model, config = teacher.model, teacher.config
    method = LowRankClone(teacher, StudentSection(hidden_size=8), ObjectiveSection())
    layers, d, a = config.num_hidden_layers, config.hidden_size, config.num_attention_heads * 6
    per_width = 2 * a + 2 * config.num_key_value_heads * 6 + 3 * config.intermediate_size
    n, s, rows, used = 100, 10, config.vocab_size, teacher.vocab_size
    sites = teacher.layout.observable()
    assert step_flops(model, method.model, n, s, ObjectiveSection(), sites, used) == {
        "teacher": n * layers * (2 * d * per_width + 2 * s * a),
        "student": n * layers * (6 * 8 * per_width + 7 * s * a),
        "loss": n * (2 * used * d + 6 * used * 8 + 2 * layers * 4 * d * 8),
        "projection": 4 * 8 * (layers * d * per_width + rows * d),
    }


@pytest.mark.parametrize("window", [1, 5, 12, 40])
def test_keys_in_a_window(window: int) -> None:
    """Half a key apart from the count, as in a whole causal matrix, of which half is counted."""
    config = tiny_teacher("mistral", sliding_window=window).config
    counted = sum(min(query + 1, window) for query in range(40)) / 40
    whole = (40 + 1) / 2 - 40 / 2
    assert seen_keys(config, 0, 40) == pytest.approx(counted, abs=whole)


def test_matmul_peak_is_a_rate() -> None:
    assert 1e8 < matmul_peak(torch.device("cpu")) < 1e15
