"""The cost formulas against what torch counts while a step runs."""

import pytest
import torch

from flops import counted_products
from lrc.cloning.cost import matmul_peak, step_flops, widths_of
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.data.batch import Batch
from lrc.recipe.sections import CloneTerms, ObjectiveSection, StudentSection
from lrc.train.batches import count
from tiny import Case, initialize_random, tiny_teacher

OBJECTIVES = [
    ObjectiveSection(),
    ObjectiveSection(attn_out="teacher"),
    ObjectiveSection(alpha=0),
    ObjectiveSection(kl_weight=0, clone=CloneTerms(o=False)),
]


@pytest.mark.parametrize(
    "case", [("llama", True, {}), ("qwen2", False, {})], ids=["tied", "untied"]
)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["paper", "official", "no-clone", "no-kl"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_matrix_products_of_a_step(
    case: Case, objective: ObjectiveSection, micro_batches: int
) -> None:
    family, tied, changes = case
    teacher = tiny_teacher(family, tied, dtype=torch.float32, **changes)
    method = LowRankClone(teacher, StudentSection(hidden_size=8), objective)
    initialize_random(method.projections, 0.02, seed=0)
    batches = [Batch(torch.randint(3, 30, (2, 24))) for _ in range(micro_batches)]
    counts = count(batches)
    counted = counted_products(method, batches, step=0)
    expected = step_flops(
        widths_of(teacher.model),
        widths_of(method.model),
        tied,
        tokens=counts.tokens,
        sequence=0,  # attention scores are not products of `mm`
        objective=objective,
        vocab=teacher.vocab_size,
    )
    assert counted == pytest.approx(sum(expected.values()), rel=1e-9)


def test_matmul_peak_is_a_rate() -> None:
    assert 1e8 < matmul_peak(torch.device("cpu")) < 1e15
