"""The losses against naive references that hold all logits and leave the gradients to autograd."""

import math
from typing import Any, NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lrc.cloning.objective import (
    VocabularyLosses,
    VocabularyWeights,
    clone_term,
    relative_weight,
    vocabulary_losses,
)
from lrc.cloning.objective.clone import naive_clone_term
from lrc.cloning.objective.vocabulary import naive_vocabulary_losses
from lrc.recipe.sections import Divergence
from lrc.system.errors import UserError
from tiny_runs import tiny_recipe

ROWS, TOKENS, D_S, D_T = 37, 33, 8, 16

DIVERGENCES = get_args(Divergence)


class Inputs(NamedTuple):
    """What the vocabulary losses take before their weights."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    mask: Tensor | None


def random_inputs(
    n: int = 11, seed: int = 0, masked: bool = True, scale: float = 1.0, dtype: Any = torch.float64
) -> Inputs:
    """Random states; with a mask some labels are missing and some tokens do not count."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, TOKENS, (n,), generator=generator)
    mask = None
    if masked:
        mask = torch.rand(n, generator=generator) < 0.7
        mask[:2] = torch.tensor([True, False])
        labels[~mask] = -100
        labels[-1] = -100
    hidden = normal(n, D_S).requires_grad_()
    head = normal(ROWS, D_S).mul_(scale).requires_grad_()
    return Inputs(hidden, head, normal(n, D_T), normal(ROWS, D_T) * scale, labels, mask)


def weights_for(inputs: Inputs, **changes: Any) -> VocabularyWeights:
    """The paper's weights, with the counts of these inputs."""
    mask = inputs.mask
    defaults = {
        "kl_weight": 1.28,
        "lm_weight": 1.0,
        "temperature": 40.0,
        "tokens": len(inputs.labels) if mask is None else int(mask.sum()),
        "labels": int((inputs.labels >= 0).sum()),
        "vocab": TOKENS,
        "chunk_tokens": 3,
    }
    return VocabularyWeights(**{**defaults, **changes})


def with_gradients(
    losses: VocabularyLosses, inputs: Inputs
) -> tuple[VocabularyLosses, tuple[Tensor, ...]]:
    """Losses, and the gradients of 3 times the weighted one by student states and head."""
    leaves = (inputs.student_hidden, inputs.student_head)
    return losses, torch.autograd.grad(3 * losses.weighted, leaves)


def compare(inputs: Inputs, weights: VocabularyWeights, **tolerances: float) -> None:
    """Ours against the naive losses, values and gradients."""
    tolerances = tolerances or {"rtol": 1e-10, "atol": 1e-12}
    ours, our_grads = with_gradients(vocabulary_losses(*inputs, weights), inputs)
    theirs, their_grads = with_gradients(naive_vocabulary_losses(*inputs, weights), inputs)
    torch.testing.assert_close(ours.weighted, theirs.weighted, **tolerances)
    torch.testing.assert_close(ours.lm, theirs.lm.detach(), **tolerances)
    if weights.kl_weight:
        torch.testing.assert_close(ours.divergence, theirs.divergence.detach(), **tolerances)
    for mine, reference in zip(our_grads, their_grads, strict=True):
        assert reference.abs().max() > 1e-6
        torch.testing.assert_close(mine, reference, **tolerances)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 40.0])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 11, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocabulary_losses(
    chunk_tokens: int, temperature: float, masked: bool, divergence: str
) -> None:
    inputs = random_inputs(masked=masked)
    weights = weights_for(
        inputs, chunk_tokens=chunk_tokens, temperature=temperature, divergence=divergence
    )
    compare(inputs, weights)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 40.0])
def test_jsd_of_any_mixture(beta: float, temperature: float) -> None:
    inputs = random_inputs(scale=2.0)
    compare(inputs, weights_for(inputs, temperature=temperature, divergence="jsd", jsd_beta=beta))


def test_jsd_lies_between_both_directions() -> None:
    """Divided by 1 - beta or beta, it comes near KL or the reverse KL at the ends."""
    inputs = random_inputs()
    plain, reverse, low, high = (
        vocabulary_losses(*inputs, weights_for(inputs, divergence=name, jsd_beta=beta)).divergence
        for name, beta in (("kl", 0.5), ("reverse_kl", 0.5), ("jsd", 1e-6), ("jsd", 1 - 1e-6))
    )
    torch.testing.assert_close(low / 1e-6, plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(high / 1e-6, reverse, rtol=1e-4, atol=0)


@pytest.mark.parametrize("logits", [1, 60, 10**6])
def test_rows_that_a_processor_works_on_at_once(
    logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change nothing, whether they divide the chunk or not."""
    monkeypatch.setattr("lrc.cloning.objective.vocabulary.CACHED_LOGITS", logits)
    inputs = random_inputs(23)
    compare(inputs, weights_for(inputs, chunk_tokens=7))


@pytest.mark.parametrize(("kl_weight", "lm_weight"), [(0, 1), (1, 0), (0.3, 2.5)])
def test_loss_weights(kl_weight: float, lm_weight: float) -> None:
    inputs = random_inputs()
    compare(inputs, weights_for(inputs, kl_weight=kl_weight, lm_weight=lm_weight))


def test_both_weights_off() -> None:
    inputs = random_inputs()
    weights = weights_for(inputs, kl_weight=0.0, lm_weight=0.0)
    losses, grads = with_gradients(vocabulary_losses(*inputs, weights), inputs)
    assert losses.weighted == 0
    assert all((grad == 0).all() for grad in grads)


def test_counts_are_the_callers() -> None:
    """A micro-batch is averaged over the tokens of the whole step."""
    inputs = random_inputs()
    compare(inputs, weights_for(inputs, tokens=1000, labels=77))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20),
    chunk_tokens=st.integers(1, 25),
    vocab=st.integers(TOKENS, ROWS),
    temperature=st.floats(0.5, 50),
    masked=st.booleans(),
    divergence=st.sampled_from(DIVERGENCES),
    scale=st.sampled_from([0.05, 1.0, 12.0]),
    seed=st.integers(0, 999),
)
def test_any_shape(
    n: int,
    chunk_tokens: int,
    vocab: int,
    temperature: float,
    masked: bool,
    divergence: str,
    scale: float,
    seed: int,
) -> None:
    inputs = random_inputs(max(n, 3) if masked else n, seed, masked, scale)
    labels = max(int((inputs.labels >= 0).sum()), 1)
    weights = weights_for(
        inputs,
        chunk_tokens=chunk_tokens,
        vocab=vocab,
        temperature=temperature,
        labels=labels,
        divergence=divergence,
    )
    compare(inputs, weights, rtol=1e-8, atol=1e-11)


def test_losses_of_bfloat16_are_added_up_in_float32() -> None:
    """Thousands of chunks, of which each is less than the last digit of the sum."""
    inputs = random_inputs(n=4000)
    low = inputs._replace(
        student_hidden=inputs.student_hidden.detach().bfloat16().requires_grad_(),
        student_head=inputs.student_head.detach().bfloat16().requires_grad_(),
        teacher_hidden=inputs.teacher_hidden.bfloat16(),
        teacher_head=inputs.teacher_head.bfloat16(),
    )
    weights = weights_for(inputs, temperature=1.0)
    ours, theirs = (vocabulary_losses(*given, weights) for given in (low, inputs))
    assert ours.lm.dtype == torch.float32
    torch.testing.assert_close(ours.lm.double(), theirs.lm, rtol=3e-3, atol=0)
    torch.testing.assert_close(ours.divergence.double(), theirs.divergence, rtol=2e-2, atol=0)


def test_no_label_at_all() -> None:
    inputs = random_inputs()
    inputs.labels.fill_(-100)
    losses = vocabulary_losses(*inputs, weights_for(inputs, labels=1))
    assert losses.lm == 0
    assert losses.divergence > 0


@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padded_rows_never_count(temperature: float, divergence: str) -> None:
    inputs = random_inputs()
    weights = weights_for(inputs, temperature=temperature, divergence=divergence)
    losses, (by_hidden, by_head) = with_gradients(vocabulary_losses(*inputs, weights), inputs)
    assert (by_head[TOKENS:] == 0).all()
    assert (by_head[:TOKENS] != 0).all()
    with torch.no_grad():
        inputs.student_head[TOKENS:] = 100.0
        inputs.teacher_head[TOKENS:] = -50.0
    changed, (by_hidden_2, by_head_2) = with_gradients(vocabulary_losses(*inputs, weights), inputs)
    assert torch.equal(torch.stack(losses), torch.stack(changed))
    assert torch.equal(by_hidden, by_hidden_2)
    assert torch.equal(by_head, by_head_2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_tokens_never_count(divergence: str) -> None:
    inputs = random_inputs()
    weights = weights_for(inputs, divergence=divergence)
    losses, (by_hidden, by_head) = with_gradients(vocabulary_losses(*inputs, weights), inputs)
    assert inputs.mask is not None
    assert (by_hidden[~inputs.mask] == 0).all()
    with torch.no_grad():
        inputs.student_hidden[~inputs.mask] = 7.0
        inputs.teacher_hidden[~inputs.mask] = -3.0
    changed, (_, by_head_2) = with_gradients(vocabulary_losses(*inputs, weights), inputs)
    torch.testing.assert_close(torch.stack(changed), torch.stack(losses), rtol=1e-14, atol=0)
    torch.testing.assert_close(by_head_2, by_head, rtol=1e-12, atol=1e-14)


def test_only_the_student_gets_gradients() -> None:
    inputs = random_inputs()
    losses = vocabulary_losses(*inputs, weights_for(inputs))
    assert losses.weighted.requires_grad
    assert not losses.divergence.requires_grad
    assert not losses.lm.requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_divergence(divergence: str) -> None:
    inputs = random_inputs()
    hidden, head = inputs.student_hidden, inputs.student_head
    same = inputs._replace(teacher_hidden=hidden.detach(), teacher_head=head.detach())
    weights = weights_for(same, lm_weight=0.0, divergence=divergence)
    losses, grads = with_gradients(vocabulary_losses(*same, weights), same)
    assert abs(losses.divergence.item()) < 1e-12
    assert all(grad.abs().max() < 1e-12 for grad in grads)


@pytest.mark.parametrize("scale", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_accurate_at_temperature_40(scale: float, divergence: str) -> None:
    """Flat, nearly equal distributions: the plain sum of p log(p / q) fails here at scale 0.05."""
    exact = random_inputs(n=64, scale=scale)
    rounded = [t.detach().float() if t.is_floating_point() else t for t in exact[:5]]
    single = Inputs(*(t.requires_grad_(i < 2) for i, t in enumerate(rounded)), exact.mask)
    widened = [t.detach().double() if t.is_floating_point() else t for t in rounded]
    double = Inputs(*(t.requires_grad_(i < 2) for i, t in enumerate(widened)), exact.mask)
    weights = weights_for(single, lm_weight=0.0, divergence=divergence)
    ours, our_grads = with_gradients(vocabulary_losses(*single, weights), single)
    theirs, their_grads = with_gradients(naive_vocabulary_losses(*double, weights), double)
    assert ours.divergence.dtype == torch.float32
    assert abs(ours.divergence.item() / theirs.divergence.item() - 1) < 1e-4
    for mine, reference in zip(our_grads, their_grads, strict=True):
        assert ((mine - reference).norm() / reference.norm()).item() < 1e-4


def test_weight_1_28_is_the_official_definition() -> None:
    """Sequences of 2,048, T = 40: a sum over positions divided by the batch size, without T^2."""
    batch, length = 3, 2048
    inputs = random_inputs(batch * length, masked=False)
    weights = weights_for(inputs, kl_weight=1.28, lm_weight=0.0, vocab=ROWS, chunk_tokens=128)
    ours = vocabulary_losses(*inputs, weights).weighted
    student = (inputs.student_hidden @ inputs.student_head.T).view(batch, length, ROWS)
    teacher = (inputs.teacher_hidden @ inputs.teacher_head.T).view(batch, length, ROWS)
    official = functional.kl_div(
        (student / 40).log_softmax(-1), (teacher / 40).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(ours, official, rtol=1e-10, atol=0)
    assert pytest.approx(1) == 1.28 * 40**2 / 2048


def extreme_inputs(dtype: torch.dtype) -> Inputs:
    """Logits of +-10,000; student and teacher agree on row 0, and not at all on the others."""
    student = torch.zeros(4, 3, dtype=dtype)
    teacher = torch.zeros(4, 3, dtype=dtype)
    student[:, 0], teacher[0, 0] = 1.0, 1.0
    teacher[1, 1] = teacher[2, 2] = 1.0
    student[3], teacher[3] = torch.tensor([1, -1, 0]), torch.tensor([-1, 1, 0])
    head = torch.zeros(ROWS, 3, dtype=dtype)
    head[:3] = 1e4 * torch.eye(3, dtype=dtype)
    labels = torch.tensor([0, 1, -100, 2])
    return Inputs(
        student.requires_grad_(), head.clone().requires_grad_(), teacher, head, labels, None
    )


@pytest.fixture(params=["asks", "does not ask"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, which asks whether rows are far apart, and as on a GPU."""
    if request.param == "does not ask":
        for name in ("kl", "jsd"):
            monkeypatch.setattr(
                f"lrc.cloning.objective.{name}.answers_at_once", lambda _tensor: False
            )


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(
    temperature: float, dtype: torch.dtype, divergence: str
) -> None:
    inputs = extreme_inputs(dtype)
    weights = weights_for(inputs, temperature=temperature, divergence=divergence)
    losses, grads = with_gradients(vocabulary_losses(*inputs, weights), inputs)
    assert torch.stack(losses).isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert losses.divergence >= 0


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_are_right(temperature: float, dtype: torch.dtype, divergence: str) -> None:
    """A student that is far off has a large loss and a gradient, not a vanished one."""
    inputs = extreme_inputs(dtype)
    weights = weights_for(inputs, temperature=temperature, divergence=divergence)
    compare(inputs, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("gap", [10.0, 60.0, 300.0])
def test_jsd_of_opposed_models_is_that_of_distant_distributions(gap: float) -> None:
    """Both directions end at -log of their weight in the mixture."""
    head = torch.eye(2).double()
    teacher = torch.tensor([[gap, 0.0]]).double()
    student = torch.tensor([[0.0, gap]]).double().requires_grad_()
    weights = VocabularyWeights(1.0, 0.0, 1.0, 1, 1, 2, 1, "jsd", 0.3)
    label = torch.tensor([-100])
    losses = vocabulary_losses(student, head, teacher, head, label, None, weights)
    expected = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert losses.divergence.item() == pytest.approx(expected, rel=5e-3)
    (grad,) = torch.autograd.grad(losses.weighted, student)
    assert grad.isfinite().all()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("gap", [10.0, 60.0, 100.0, 300.0])
def test_confident_teacher_and_opposed_student(gap: float) -> None:
    head = torch.eye(2).double()
    teacher = torch.tensor([[gap, 0.0]]).double()
    student = torch.tensor([[0.0, gap]]).double().requires_grad_()
    weights = VocabularyWeights(1.0, 0.0, 1.0, tokens=1, labels=1, vocab=2, chunk_tokens=1)
    label = torch.tensor([-100])
    losses = vocabulary_losses(student, head, teacher, head, label, None, weights)
    (grad,) = torch.autograd.grad(losses.weighted, student)
    assert losses.divergence.item() == pytest.approx(gap, rel=1e-3)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 1.0]]).double(), rtol=1e-3, atol=0)


def sides(seed: int = 0, dtype: Any = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's activations [2, 5, 6], and a mask [2, 5]."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, 2, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    return ours.requires_grad_(), theirs.requires_grad_(), mask


def test_clone_term() -> None:
    ours, theirs, _ = sides()
    expected = functional.mse_loss(ours, theirs)
    torch.testing.assert_close(naive_clone_term(ours, theirs, None, 10), expected)
    _, term = clone_term(ours, theirs, None, tokens=10)
    torch.testing.assert_close(term, expected, rtol=1e-13, atol=0)
    mine = torch.autograd.grad(3 * term, (ours, theirs))
    reference = torch.autograd.grad(3 * expected, (ours, theirs))
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=0)


def test_clone_term_with_a_mask() -> None:
    ours, theirs, mask = sides()
    expected = functional.mse_loss(ours[mask], theirs[mask])
    _, term = clone_term(ours, theirs, mask, tokens=7)
    torch.testing.assert_close(term, expected, rtol=1e-13, atol=0)
    mine = torch.autograd.grad(term, (ours, theirs))
    reference = torch.autograd.grad(expected, (ours, theirs))
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=0)
    assert all((grad[~mask] == 0).all() for grad in mine)


@pytest.mark.parametrize("masked", [False, True])
def test_clone_term_gradcheck(masked: bool) -> None:
    ours, theirs, mask = sides(1)
    used = mask if masked else None
    assert torch.autograd.gradcheck(lambda a, b: clone_term(a, b, used, 7)[1], (ours, theirs))


def test_vocabulary_gradcheck() -> None:
    inputs = random_inputs(4)
    weights = weights_for(inputs, temperature=2.0)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        changed = inputs._replace(student_hidden=hidden, student_head=head)
        return vocabulary_losses(*changed, weights).weighted

    assert torch.autograd.gradcheck(loss, (inputs.student_hidden, inputs.student_head))


def test_clone_term_leaves_its_inputs_alone() -> None:
    ours, theirs, mask = sides()
    copies = ours.detach().clone(), theirs.detach().clone()
    clone_term(ours, theirs, mask, 7)[1].backward()
    assert torch.equal(ours, copies[0])
    assert torch.equal(theirs, copies[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_reused_target_holds_the_difference(weighted: bool) -> None:
    """Same loss and gradient, and no buffer beside the target's own."""
    ours, theirs, mask = sides(4)
    target = theirs.detach().clone()
    weight = relative_weight(ours, target, mask) if weighted else None
    _, expected = clone_term(ours, theirs.detach(), weight, tokens=7)
    (expected_grad,) = torch.autograd.grad(expected, ours)
    _, term = clone_term(ours, target, weight, tokens=7, reuse_target_buffer=True)
    assert torch.equal(target, (ours - theirs).detach())
    assert torch.equal(term, expected)
    assert torch.equal(torch.autograd.grad(term, ours)[0], expected_grad)


def test_a_target_is_reused_only_if_possible() -> None:
    """Not where it takes a gradient, and not where the difference needs another precision."""
    ours, theirs, _ = sides()
    copy = theirs.detach().clone()
    clone_term(ours, theirs, None, 10, reuse_target_buffer=True)
    assert torch.equal(theirs, copy)
    half = copy.bfloat16()
    clone_term(ours.bfloat16(), half, None, 10, reuse_target_buffer=True)
    assert torch.equal(half, copy.bfloat16())


def test_clone_term_of_bfloat16_sums_in_float32() -> None:
    ours, theirs, _ = sides(dtype=torch.bfloat16)
    _, term = clone_term(ours, theirs, None, tokens=10)
    term.backward()
    expected = (ours.detach() - theirs.detach()).float().square().mean()
    assert term.dtype == torch.float32
    torch.testing.assert_close(term.detach(), expected, rtol=1e-6, atol=0)
    assert ours.grad is not None
    assert ours.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [False, True])
def test_relative_weights(masked: bool) -> None:
    ours, theirs, mask = sides(2)
    with torch.no_grad():
        theirs[0, 0] *= 1000  # a massive activation
        ours[1, 1] *= 1000  # and one that the teacher does not have
        mask[0, 0] = mask[1, 1] = True
    used = mask if masked else None
    weight = relative_weight(ours, theirs, used)
    kept = mask if masked else torch.ones_like(mask)
    own, squares = (side.detach().square().mean(-1) for side in (ours, theirs))
    expected = kept / (torch.maximum(own, squares) + squares[kept].median())
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=0)
    errors = weight * (ours - theirs).detach().square().mean(-1)
    assert errors[1, 1] == pytest.approx(1, rel=0.1)
    assert errors.max() <= 4

    _, term = clone_term(ours, theirs, weight, tokens=7)
    naive = (expected[..., None] * (ours - theirs).square()).sum() / (7 * 6)
    torch.testing.assert_close(term, naive, rtol=1e-13, atol=0)
    mine = torch.autograd.grad(term, (ours, theirs))
    reference = torch.autograd.grad(naive, (ours, theirs))
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=0)


def test_relative_weights_of_nothing_are_finite() -> None:
    nothing = torch.zeros(2, 3, 4)
    assert torch.isfinite(relative_weight(nothing, nothing, None)).all()


@pytest.mark.parametrize("weighting", ["none", "mask", "relative"])
def test_clone_term_of_a_product(weighting: str) -> None:
    """The gradient of P that is formed at once is that of the plain definition."""
    torch.manual_seed(0)
    ours = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    source = torch.randn(2, 5, 7, dtype=torch.float64)
    projection = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5) > 0.3
    target = source @ projection
    weight = {"none": None, "mask": mask, "relative": relative_weight(ours, target, mask)}[
        weighting
    ]
    factor = torch.ones(2, 5).double() if weight is None else weight.double()
    naive = ((ours - target).square() * factor[..., None]).sum() / (3 * 7)
    _, term = clone_term(ours, target.detach(), weight, 7, (source, projection))
    torch.testing.assert_close(term, naive)
    expected = torch.autograd.grad(3 * naive, (ours, projection))
    found = torch.autograd.grad(3 * term, (ours, projection))
    torch.testing.assert_close(found, expected)


def test_every_divergence_is_a_setting_of_the_recipe() -> None:
    for name in DIVERGENCES:
        assert tiny_recipe({"objective.divergence": name}).objective.divergence == name
    with pytest.raises(UserError, match="'kl', 'reverse_kl' or 'jsd'"):
        tiny_recipe({"objective.divergence": "js"})
    with pytest.raises(UserError, match="jsd_beta goes with divergence: jsd"):
        tiny_recipe({"objective.jsd_beta": 0.3})
