"""The pass over both models: hooks that are installed once, and the plain view of the student."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.model.student import plain_view
from lrc.recipe.sections import ObjectiveSection, StudentSection
from lrc.train.batches import count
from tiny import LAYERS, gradients, randomize, tiny_batch, tiny_teacher


def a_method(teacher: Any = None, **changes: Any) -> LowRankClone:
    teacher = teacher or tiny_teacher("llama")
    section = StudentSection(hidden_size=8)
    method = LowRankClone(
        teacher, section, ObjectiveSection(), **{"token_grad_clip": 2.0, **changes}
    )
    randomize(method.parameters(), 1)
    return method


def hooks_of(model: nn.Module) -> list[tuple[str, int, int]]:
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("recomputes", [False, True])
def test_hooks_are_installed_once(recomputes: bool) -> None:
    method = a_method(gradient_checkpointing=recomputes)
    models = method.model, method.teacher.model
    before = [hooks_of(model) for model in models]
    assert all(any(n for _, n, _ in hooks) for hooks in before)
    gradients(method, tiny_batch(), tiny_batch(seed=2))
    assert [hooks_of(model) for model in models] == before


def test_the_order_of_the_hooks_on_a_linear_map() -> None:
    """Clip, recompute, compare: torch keeps the documented order."""
    method = a_method()
    up = method.model.get_submodule("model.layers.0.mlp.up_proj")
    names = []
    for hook in up._forward_hooks.values():
        names.append(getattr(hook, "func", hook).__name__)
    assert names == ["_clip", "_read_up", "_compare"]


def test_hooks_do_nothing_outside_a_pass() -> None:
    method = a_method()
    batch = tiny_batch()
    gradients(method, batch)
    plain = plain_view(method.model)
    with torch.no_grad():
        assert torch.equal(method.model(batch.input_ids).logits, plain(batch.input_ids).logits)
    assert method.distill._micro_batch is None
    losses, _ = gradients(method, batch)
    again, _ = gradients(method, batch)
    assert torch.equal(losses["loss"], again["loss"])


def test_two_passes_over_one_teacher_do_not_interfere() -> None:
    teacher = tiny_teacher("llama")
    first, second = a_method(teacher), a_method(teacher)
    alone, _ = gradients(a_method(tiny_teacher("llama")), tiny_batch())
    for method in (first, second, first):
        losses, _ = gradients(method, tiny_batch())
        assert torch.equal(losses["loss"], alone["loss"])
    del first, second, method
    gc.collect()
    assert not any(n or m for _, n, m in hooks_of(teacher.model))


def test_a_pass_releases_its_tensors() -> None:
    """The teacher's activations during the student's pass, everything else after the step."""
    method = a_method()
    method.begin_step(0)
    losses = method.losses(tiny_batch(), count([tiny_batch()]))
    assert method.distill._micro_batch is None
    losses.loss.backward()
    method.end_step()
    again = a_method(gradient_checkpointing=True)
    again.begin_step(0)
    losses = again.losses(tiny_batch(), count([tiny_batch()]))
    kept = again.distill._micro_batch
    assert kept is not None
    assert len(kept.targets) == 7 * LAYERS  # the layers run again in the backward pass
    terms = dict(kept.terms)
    losses.loss.backward()
    assert not kept.targets
    assert all(kept.terms[site] is term for site, term in terms.items())
    again.end_step()
    assert again.distill._micro_batch is None


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_student_is_a_plain_view(recomputes: bool) -> None:
    method = a_method(gradient_checkpointing=recomputes)
    gradients(method, tiny_batch())
    student = method.student()
    assert student is not method.model
    assert not any(n or m for _, n, m in hooks_of(student))
    assert not any(module.training for module in student.modules())
    live = dict(method.model.named_parameters())
    for name, value in student.named_parameters():
        assert value.grad is None
        assert not value.requires_grad
        assert value.data_ptr() == live[name].data_ptr()
    assert type(student) is type(method.teacher.model)
    # It follows training. Only changes of its weights affect training.
    student.requires_grad_(True)
    student(tiny_batch().input_ids).logits.sum().backward()
    assert all(
        p.grad is None or p.grad is not s.grad
        for p, s in zip(method.model.parameters(), student.parameters(), strict=True)
    )
    with torch.no_grad():
        live["model.norm.weight"].add_(1.0)
    assert torch.equal(student.get_parameter("model.norm.weight"), live["model.norm.weight"])


def test_a_tied_view_stays_tied() -> None:
    method = a_method(tiny_teacher("llama", tied=True))
    student = method.student()
    assert student.lm_head.weight is student.model.embed_tokens.weight
