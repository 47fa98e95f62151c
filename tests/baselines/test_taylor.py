"""Taylor importance against finite differences and against loops over single weights."""

from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrc.baselines.pruning.taylor import lm_gradients, taylor_importance
from lrc.data.batch import Batch
from lrc.model.teacher import Teacher
from lrc.recipe.method_sections import Grouping, Taylor
from tiny import (
    FFN,
    HEAD_DIM,
    LAYERS,
    TINY_CASES,
    TOKENS,
    Case,
    linear_path,
    tiny_batch,
    tiny_teacher,
)

GROUPS, SIZE = 2, 2
"""Number of key/value heads, and of query heads per key/value head."""

HEADS = {"num_attention_heads": GROUPS * SIZE, "num_key_value_heads": GROUPS}


def grouped(case: Case) -> Teacher:
    """A teacher with two groups of two query heads."""
    family, tied, changes = case
    return tiny_teacher(family, tied, **HEADS, **changes)


def vectors(layer: int, kind: str) -> Iterator[tuple[int, int, str, list[int]]]:
    """The rows or columns of every group: group, the linear map's position in it, path, numbers."""
    if kind == "neurons":
        for neuron in range(FFN):
            for place, name in enumerate(("gate", "up", "down")):
                yield neuron, place, linear_path(layer, name), [neuron]
        return
    for group in range(GROUPS):
        for place, name in enumerate("qkvo"):
            width = HEAD_DIM * (SIZE if name in "qo" else 1)
            numbers = range(group * width, (group + 1) * width)
            yield group, place, linear_path(layer, name), list(numbers)


def is_writer(path: str) -> bool:
    return path.endswith(("o_proj", "down_proj"))


def pieces(teacher: Teacher, path: str, number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameter and index of every weight of a row (with its bias) or of a column."""
    module = teacher.model.get_submodule(path)
    rows, columns = module.weight.shape
    if is_writer(path):
        yield from ((f"{path}.weight", (row, number)) for row in range(rows))
        return
    yield from ((f"{path}.weight", (number, column)) for column in range(columns))
    if module.bias is not None:
        yield f"{path}.bias", (number,)


def loss_of(teacher: Teacher, batch: Batch) -> Tensor:
    """Mean cross-entropy over all labels, by transformers' own logits; padded rows never count."""
    logits = teacher.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits[..., :TOKENS]
    return cross_entropy(logits.flatten(0, 1), batch.labels().flatten(), ignore_index=-100)


def row_of(batch: Batch, row: int) -> Batch:
    one = slice(row, row + 1)
    positions, mask = batch.position_ids, batch.attention_mask
    return Batch(
        batch.input_ids[one],
        None if positions is None else positions[one],
        None if mask is None else mask[one],
    )


def gradient(teacher: Teacher, batch: Batch) -> dict[str, Tensor]:
    """Gradients of all parameters by plain autograd."""
    parameters = dict(teacher.model.named_parameters())
    teacher.model.requires_grad_(True)
    values = torch.autograd.grad(loss_of(teacher, batch), parameters.values())
    teacher.model.requires_grad_(False)
    return dict(zip(parameters, values, strict=True))


def combine(shares: list[float], grouping: Grouping) -> float:
    product = 1.0
    for share in shares:
        product *= share
    return {"sum": sum(shares), "prod": product, "max": max(shares), "last": shares[-1]}[grouping]


def naive(
    teacher: Teacher, kind: str, grouping: Grouping, of_vector: Callable[[str, int], float]
) -> Tensor:
    """Importance [layers, groups] from that of single rows and columns."""
    places, groups = (4, GROUPS) if kind == "groups" else (3, FFN)
    result = torch.zeros(LAYERS, groups, dtype=torch.float64)
    for layer in range(LAYERS):
        shares = [[0.0] * places for _ in range(groups)]
        for group, place, path, numbers in vectors(layer, kind):
            shares[group][place] = sum(of_vector(path, number) for number in numbers)
        result[layer] = torch.tensor([combine(row, grouping) for row in shares])
    return result


BATCHES = {
    "whole": tiny_batch(3, 7),
    "padded": tiny_batch(3, 7, lengths=[7, 3, 5]),
    "documents": tiny_batch(2, 8, documents=[[3, 5], [6, 2]]),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("taylor", get_args(Taylor))
def test_against_a_loop_over_weights(
    taylor: Taylor, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lrc.baselines.pruning.taylor.PASS", 16
    )  # two sequences, and the remaining one
    teacher = grouped(("qwen2", False, {}))  # biases on q, k and v
    whole = gradient(teacher, batch)
    single = [gradient(teacher, row_of(batch, row)) for row in range(len(batch.input_ids))]
    weights = {name: value.detach() for name, value in teacher.model.named_parameters()}

    def salience(name: str, index: tuple[int, ...]) -> float:
        w, g = float(weights[name][index]), float(whole[name][index])
        fisher = sum(float(own[name][index]) ** 2 for own in single) / len(single)
        return {
            "vectorize": w * g,
            "param_first": w * g,
            "param_second": w * fisher * w,
            "param_mix": w * g - 0.5 * fisher * w**2,
        }[taylor]

    def of_vector(path: str, number: int) -> float:
        values = [salience(*piece) for piece in pieces(teacher, path, number)]
        return abs(sum(values)) if taylor == "vectorize" else sum(map(abs, values))

    found = taylor_importance(teacher, batch, taylor, "sum")
    for kind in ("groups", "neurons"):
        expected = naive(teacher, kind, "sum", of_vector)
        torch.testing.assert_close(getattr(found, kind), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("case", TINY_CASES[4::2])
def test_against_finite_differences(case: Case) -> None:
    """A row's first-order importance is the slope of the loss when the row is scaled."""
    teacher, batch, step = grouped(case), BATCHES["padded"], 1e-5
    parameters = dict(teacher.model.named_parameters())

    def of_vector(path: str, number: int) -> float:
        losses = []
        for scale in (1 + step, 1 - step):
            before = {}
            for name, index in pieces(teacher, path, number):
                before[name, index] = parameters[name][index].item()
                parameters[name][index] *= scale
            losses.append(loss_of(teacher, batch).item())
            for (name, index), value in before.items():
                parameters[name][index] = value
        return abs(losses[0] - losses[1]) / (2 * step)

    with torch.no_grad():
        expected = {kind: naive(teacher, kind, "sum", of_vector) for kind in ("groups", "neurons")}
    found = taylor_importance(teacher, batch, "vectorize", "sum")
    for kind, value in expected.items():
        torch.testing.assert_close(getattr(found, kind), value, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("exact_norms")
def test_it_is_the_change_of_the_loss_without_a_neuron() -> None:
    """Removing a neuron with a small output changes the loss by its importance."""
    teacher, batch = grouped(("llama", False, {})), BATCHES["whole"]
    downs = [teacher.model.get_submodule(linear_path(i, "down")).weight for i in range(LAYERS)]
    with torch.no_grad():
        for weight in downs:
            weight.mul_(1e-4)
        found = taylor_importance(teacher, batch, "vectorize", "last").neurons
        before = loss_of(teacher, batch)
        for layer, weight in enumerate(downs):
            for neuron in range(FFN):
                column = weight[:, neuron].clone()
                weight[:, neuron] = 0
                change = (loss_of(teacher, batch) - before).abs().item()
                weight[:, neuron] = column
                assert change == pytest.approx(found[layer, neuron].item(), rel=0.01, abs=1e-10)
    assert found.min() > 0


@pytest.mark.parametrize("grouping", get_args(Grouping))
def test_how_scores_of_linear_maps_are_combined(grouping: Grouping) -> None:
    teacher, batch = grouped(("qwen3", True, {})), BATCHES["whole"]
    slopes = gradient(teacher, batch)
    weights = dict(teacher.model.named_parameters())

    def of_vector(path: str, number: int) -> float:
        values = (weights[name] * slopes[name] for name in [f"{path}.weight"])
        (salience,) = values
        return float((salience[:, number] if is_writer(path) else salience[number]).abs().sum())

    found = taylor_importance(teacher, batch, "param_first", grouping)
    for kind in ("groups", "neurons"):
        expected = naive(teacher, kind, grouping, of_vector)
        torch.testing.assert_close(getattr(found, kind), expected, rtol=1e-5, atol=0)


def test_nothing_is_left_in_the_model() -> None:
    teacher = tiny_teacher("qwen2")
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    seen: list[tuple[int, int]] = []
    found = lm_gradients(
        teacher, BATCHES["whole"], squared=True, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found.mean.keys() == found.squared.keys()
    for name, parameter in teacher.model.named_parameters():
        assert parameter.grad is None, name
        assert not parameter.requires_grad, name
        assert not parameter._post_accumulate_grad_hooks, name
        assert torch.equal(parameter, before[name])


def test_gradients_of_a_low_precision_teacher_are_float32() -> None:
    teacher = tiny_teacher("llama", dtype=torch.bfloat16)
    found = lm_gradients(teacher, BATCHES["whole"], squared=True)
    assert {value.dtype for value in [*found.mean.values(), *found.squared.values()]} == {
        torch.float32
    }
    importance = taylor_importance(teacher, BATCHES["whole"], "param_mix", "sum")
    assert importance.neurons.dtype == torch.float64
    assert importance.neurons.isfinite().all()
