"""Gradients from the student's weights back to the projections, and which parameters get any."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.projection import Projections, project, projection_gradient
from lrc.data.batch import Batch
from lrc.recipe.sections import StudentSection
from tiny import (
    NORM_BEFORE,
    READERS,
    STUDENT_HIDDEN,
    WRITERS,
    Case,
    clone_of,
    expected_weights,
    gradients,
    initialize_random,
    linear_path,
    stream_norms,
    tiny_batch,
    tiny_method,
    tiny_teacher,
)


def some_loss(logits: Tensor) -> Tensor:
    """A function of every logit."""
    return logits.square().mean() + logits.log_softmax(-1)[..., 5].mean()


def backward_by_hand(method: LowRankClone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the student's weights, and what `Projections.backward` computes from them."""
    method.begin_step(0)
    some_loss(method.model(tiny_batch().input_ids).logits).backward()
    on_weights = {
        n: p.grad.clone() for n, p in method.model.named_parameters() if p.grad is not None
    }
    method.end_step()
    return on_weights, {key: value.grad for key, value in method.projections.values.items()}


def same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 1e-6
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_readers_and_writers(case: Case) -> None:
    method = clone_of(case)
    weights = method.teacher.model.get_parameter
    on_weights, on_projections = backward_by_hand(method)
    for layer in range(2):
        for name in READERS:
            path = f"{linear_path(layer, name)}.weight"
            same(on_projections[f"layers.{layer}.{name}"], weights(path).T @ on_weights[path])
        for name in WRITERS:
            path = linear_path(layer, name)
            expected = weights(f"{path}.weight") @ on_weights[f"{path}.weight"].T
            if f"{path}.bias" in on_weights:
                expected = expected + torch.outer(
                    weights(f"{path}.bias"), on_weights[f"{path}.bias"]
                )
            same(on_projections[f"layers.{layer}.{name}"], expected)


def test_writer_biases_get_gradients() -> None:
    on_weights, _ = backward_by_hand(clone_of(("llama", False, {"mlp_bias": True})))
    assert f"{linear_path(0, 'down')}.bias" in on_weights


def test_folded_gains(case: Case) -> None:
    method = clone_of(case, fold_gains=True)
    weights = method.teacher.model.get_parameter
    on_weights, on_projections = backward_by_hand(method)
    for layer in range(2):
        for name in READERS:
            gain = weights(f"model.layers.{layer}.{NORM_BEFORE[name]}.weight")
            path = f"{linear_path(layer, name)}.weight"
            expected = torch.diag(gain) @ weights(path).T @ on_weights[path]
            same(on_projections[f"layers.{layer}.{name}"], expected)
    if not method.teacher.config.tie_word_embeddings:
        gain = weights("model.norm.weight")
        expected = torch.diag(gain) @ weights("lm_head.weight").T @ on_weights["lm_head.weight"]
        same(on_projections["head"], expected)


def test_embedding_and_head_apart() -> None:
    method = clone_of(("qwen2", False, {}))
    weights = method.teacher.model.get_parameter
    on_weights, on_projections = backward_by_hand(method)
    for key, path in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        same(on_projections[key], weights(path).T @ on_weights[path])


def test_embedding_and_head_tied() -> None:
    """The gradient is the sum of both uses, which a copy of the weight separates here."""
    method = clone_of(("llama", True, {}))
    embedding = method.teacher.model.get_parameter("model.embed_tokens.weight")
    _, on_projections = backward_by_hand(method)
    weight = method.model.get_parameter("model.embed_tokens.weight").detach()
    uses = [weight.clone().requires_grad_(), weight.clone().requires_grad_()]
    swapped = {"model.embed_tokens.weight": uses[0], "lm_head.weight": uses[1]}
    output = functional_call(method.model, swapped, (tiny_batch().input_ids,), tie_weights=False)
    by_embedding, by_head = torch.autograd.grad(some_loss(output.logits), uses)
    assert by_embedding.abs().max() > 1e-6
    same(on_projections["embedding"], embedding.T @ (by_embedding + by_head))


def test_one_projection_for_an_untied_head() -> None:
    method = clone_of(("mistral", False, {}), tie_projections=True)
    weights = method.teacher.model.get_parameter
    on_weights, on_projections = backward_by_hand(method)
    assert "head" not in on_projections
    paths = ("model.embed_tokens.weight", "lm_head.weight")
    same(on_projections["embedding"], sum(weights(p).T @ on_weights[p] for p in paths))


@pytest.mark.parametrize("fold_gains", [False, True])
def test_plain_autograd_agrees(case: Case, fold_gains: bool) -> None:
    method = clone_of(case, fold_gains=fold_gains)
    _, on_projections = backward_by_hand(method)
    leaves = {
        key: value.detach().clone().requires_grad_()
        for key, value in method.projections.values.items()
    }
    weights = expected_weights(method.teacher, leaves, fold_gains)
    output = functional_call(method.model, weights, (tiny_batch().input_ids,))
    some_loss(output.logits).backward()
    assert set(leaves) == set(on_projections)
    for key, leaf in leaves.items():
        same(on_projections[key], leaf.grad)


def test_only_projections_and_gains_are_trained(case: Case) -> None:
    method = clone_of(case)
    parameters = method.parameters()
    expected = {f"projections.{key}" for key in method.projections.values}
    expected |= {f"{path}.weight" for path in stream_norms()}
    assert set(parameters) == expected
    before = {name: value.clone() for name, value in method.teacher.model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    _, grads = gradients(method, tiny_batch())
    assert all(grad.abs().max() > 0 for grad in grads.values())
    was = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer.step()
    assert all(not torch.equal(value, was[name]) for name, value in parameters.items())
    for name, value in method.teacher.model.named_parameters():
        assert value.grad is None, name
        assert not value.requires_grad
    after = method.teacher.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_student_follows_the_optimizer() -> None:
    method = clone_of(("qwen3", True, {}))
    before = method.student().get_parameter(f"{linear_path(0, 'q')}.weight").clone()
    gradients(method, tiny_batch())
    torch.optim.SGD(method.parameters().values(), lr=0.1).step()
    student = method.student()
    values = {key: value.detach() for key, value in method.projections.values.items()}
    for name, value in expected_weights(method.teacher, values).items():
        torch.testing.assert_close(student.get_parameter(name), value, rtol=0, atol=1e-13)
    assert not torch.equal(student.get_parameter(f"{linear_path(0, 'q')}.weight"), before)


def test_gradients_do_not_add_up_over_steps(case: Case) -> None:
    """The second of two equal steps gives the gradients of the first, not their sum."""
    method = clone_of(case)
    _, first = gradients(method, tiny_batch())
    method.student()  # a measurement between steps changes nothing
    _, second = gradients(method, tiny_batch())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (1, 3)])
def test_micro_batches_add_up(case: Case, sizes: tuple[int, ...], padded: bool) -> None:
    method = clone_of(case)
    whole = tiny_batch(rows=4, lengths=[9, 3, 7, 9] if padded else None)
    ids = whole.input_ids.split(sizes)
    masks = whole.attention_mask.split(sizes) if padded else [None] * len(sizes)
    parts = [Batch(i, attention_mask=m) for i, m in zip(ids, masks, strict=True)]
    losses, grads = gradients(method, whole)
    summed, gathered = gradients(method, *parts)
    for name, value in losses.items():
        torch.testing.assert_close(summed[name], value, rtol=1e-12, atol=1e-12)
    for name, value in grads.items():
        torch.testing.assert_close(gathered[name], value, rtol=1e-12, atol=1e-12)


def fresh(seed: int, std: float = 0.02) -> dict[str, Tensor]:
    projections = Projections(tiny_teacher("llama"), StudentSection(hidden_size=STUDENT_HIDDEN))
    initialize_random(projections, std, seed)
    return projections.values


def test_random_start_follows_its_seed() -> None:
    first, again, other = fresh(3), fresh(3), fresh(4)
    torch.manual_seed(99)  # the global generator has no effect
    later = fresh(3)
    for key, value in first.items():
        assert torch.equal(value, again[key])
        assert torch.equal(value, later[key])
        assert not torch.equal(value, other[key])
    distinct = {tuple(value.flatten().tolist()) for value in first.values()}
    assert len(distinct) == len(first)


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_random_start_has_its_std(std: float) -> None:
    numbers = torch.cat([value.detach().flatten() for value in fresh(0, std).values()]) / std
    assert len(numbers) == 16 * 128
    assert abs(numbers.std().item() - 1) < 0.05
    assert abs(numbers.mean().item()) < 0.07
    within = (numbers.abs() < 1).double().mean().item()
    assert abs(within - 0.683) < 0.04  # a normal distribution, not a uniform one


even = st.integers(1, 8).map(lambda n: 2 * n)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), even, st.integers(1, 12), st.booleans(), st.integers(0, 999))
def test_project_any_shape(wide: int, d_t: int, d_s: int, writes: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn((d_t, wide) if writes else (wide, d_t), dtype=torch.float64)
    p = torch.randn(d_t, d_s, dtype=torch.float64, requires_grad=True)
    axis = -2 if writes else -1
    result = project(weight, p, axis)
    formula = "to,ts->so" if writes else "ot,ts->os"
    torch.testing.assert_close(result, torch.einsum(formula, weight, p))
    upstream = torch.randn_like(result)
    (grad,) = torch.autograd.grad(result, p, upstream)
    expected = weight @ upstream.T if writes else weight.T @ upstream
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(projection_gradient(weight, upstream, axis), expected)
    if writes:
        bias = torch.randn(d_t, dtype=torch.float64)
        torch.testing.assert_close(project(bias, p, axis), torch.einsum("t,ts->s", bias, p))


@settings(max_examples=15, deadline=None)
@given(
    hidden=st.integers(2, 10).map(lambda n: 2 * n),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.integers(1, 4).map(lambda n: 2 * n),
    ffn=st.integers(1, 24),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    fold=st.booleans(),
    data=st.data(),
)
def test_student_of_any_shape(
    hidden: int,
    kv_heads: int,
    groups: int,
    head_dim: int,
    ffn: int,
    layers: int,
    tied: bool,
    fold: bool,
    data: st.DataObject,
) -> None:
    small = data.draw(st.integers(1, hidden // 2 - 1)) * 2
    teacher = tiny_teacher(
        "qwen3",
        tied,
        hidden_size=hidden,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * groups,
        head_dim=head_dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
    )
    method = tiny_method(teacher, {"hidden_size": small, "fold_gains": fold})
    student = method.student()
    assert student(tiny_batch().input_ids).logits.isfinite().all()
    values = {key: value.detach() for key, value in method.projections.values.items()}
    for name, value in expected_weights(teacher, values, fold).items():
        torch.testing.assert_close(student.get_parameter(name), value, rtol=0, atol=1e-12)


def test_weights_and_gradients_keep_their_memory(case: Case) -> None:
    method = clone_of(case)
    backward_by_hand(method)
    student = method.model
    before = {n: (p.data_ptr(), p.grad.data_ptr()) for n, p in trained(student)}
    weights = {n: p.clone() for n, p in trained(student)}
    with torch.no_grad():
        for value in method.projections.values.values():
            value.mul_(2)
    first = {n: p.grad.clone() for n, p in trained(student)}
    method.begin_step(0)
    assert all(not p.grad.any() for _, p in trained(student))
    some_loss(student(tiny_batch().input_ids).logits).backward()
    assert {n: (p.data_ptr(), p.grad.data_ptr()) for n, p in trained(student)} == before
    for name, parameter in trained(student):
        if parameter.ndim == 2:
            torch.testing.assert_close(parameter.detach(), 2 * weights[name])
            assert not torch.equal(parameter.grad, first[name])


def trained(student: Any) -> list[tuple[str, Any]]:
    """The student's projected parameters, whose gradients add up within a step."""
    return [(n, p) for n, p in student.named_parameters() if p.grad is not None and "norm" not in n]
