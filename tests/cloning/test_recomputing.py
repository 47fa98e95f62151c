"""FFNs that recompute their activation and product, against transformers' own FFNs."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.cloning.recomputing import RecomputedFfn
from tiny import FFN, LAYERS, LLAMAS, tiny_batch, tiny_teacher

Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture
def student_and_twin() -> Callable[[str], Pair]:
    """A model whose FFNs recompute, and the same model without that."""

    def pair(family: str) -> Pair:
        teacher = tiny_teacher(family)
        twin = teacher.model.requires_grad_(True)
        student = copy.deepcopy(twin)
        for layer in range(LAYERS):
            RecomputedFfn(student, teacher.layout, layer)
        return student, twin

    return pair


def loss_of(model: PreTrainedModel, seed: int = 0) -> Tensor:
    ids = tiny_batch(seed=seed).input_ids
    return model(ids, labels=ids, use_cache=False).loss


def assert_same_gradients(student: PreTrainedModel, twin: PreTrainedModel) -> None:
    for (name, mine), (_, theirs) in zip(
        student.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert torch.equal(mine.grad, theirs.grad), name


def ffn_of(model: PreTrainedModel, layer: int = 0) -> nn.Module:
    return model.model.layers[layer].mlp


@pytest.mark.parametrize("family", LLAMAS)
def test_losses_and_gradients_are_the_same(
    family: str, student_and_twin: Callable[[str], Pair]
) -> None:
    student, twin = student_and_twin(family)
    mine, theirs = loss_of(student), loss_of(twin)
    assert torch.equal(mine, theirs)
    mine.backward()
    theirs.backward()
    assert_same_gradients(student, twin)


@pytest.mark.parametrize("frozen", ["down_proj", "gate_proj", "up_proj"])
def test_linear_maps_without_gradient(frozen: str, student_and_twin: Callable[[str], Pair]) -> None:
    """Autograd then saves less, and asks for less."""
    student, twin = student_and_twin("llama")
    for model in (student, twin):
        for layer in range(LAYERS):
            getattr(ffn_of(model, layer), frozen).requires_grad_(False)
        loss_of(model).backward()
    assert_same_gradients(student, twin)


def test_two_passes_before_one_backward_pass(student_and_twin: Callable[[str], Pair]) -> None:
    student, twin = student_and_twin("llama")
    for model in (student, twin):
        (loss_of(model, 1) + loss_of(model, 2)).backward()
    assert_same_gradients(student, twin)


def test_autocast(student_and_twin: Callable[[str], Pair]) -> None:
    student, twin = student_and_twin("llama")
    for model in (student.float(), twin.float()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
    assert_same_gradients(student, twin)


def test_neither_activation_nor_product_is_kept(student_and_twin: Callable[[str], Pair]) -> None:
    """Of tensors as wide as the FFN autograd saves the gate's output for the activation function
    and up's for the product, and forms the activation once more."""
    student, _ = student_and_twin("llama")
    ffn, calls = ffn_of(student), []
    ffn.act_fn.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, student.config.hidden_size, dtype=torch.float64, requires_grad=True)
    output = ffn(x)
    kept: dict[int, Tensor] = {}
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        for name in (name for name in dir(node) if name.startswith("_raw_saved_")):
            saved = getattr(node, name).data if hasattr(getattr(node, name), "data") else None
            if isinstance(saved, Tensor) and saved.shape[-1] == FFN and saved.ndim == 3:
                kept[saved.data_ptr()] = saved
    assert len(kept) == 2
    assert len(calls) == 1
    output.sum().backward()
    assert len(calls) == 2


def test_passes_without_gradients_or_with_errors_leave_nothing_behind(
    student_and_twin: Callable[[str], Pair],
) -> None:
    student, twin = student_and_twin("llama")
    with torch.no_grad():
        loss_of(student)
    with pytest.raises(RuntimeError):
        ffn_of(student)(torch.randn(1, 2, 3, dtype=torch.float64))
    for model in (student, twin):
        loss_of(model).backward()
    assert_same_gradients(student, twin)


def test_the_backward_pass_works_after_the_hooks_are_removed() -> None:
    teacher = tiny_teacher("llama")
    twin = teacher.model.requires_grad_(True)
    student = copy.deepcopy(twin)
    ffns = [RecomputedFfn(student, teacher.layout, layer) for layer in range(LAYERS)]
    loss = loss_of(student)
    for hook in (hook for ffn in ffns for hook in ffn.hooks):
        hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    loss.backward()
    loss_of(twin).backward()
    assert_same_gradients(student, twin)
