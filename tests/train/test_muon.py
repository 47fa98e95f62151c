"""Muon against exact singular values, against torch's, and in runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lrc.methods import METHODS
from lrc.train.muon import (
    COEFFICIENTS,
    MOMENTUM,
    STEPS,
    Muon,
    orthogonal_flops,
    orthogonal_parameters,
    orthogonalize,
)
from lrc.train.setup import new_state
from tiny import tiny_method, tiny_teacher
from tiny_runs import assert_same_run, copy_until, go, new_run, tiny_recipe

MUON = {"optimizer": "muon", "weight_decay": 0.1}


def exact(matrix: Tensor) -> Tensor:
    """What the steps make of a matrix [rows, columns], by its singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    first, third, fifth = COEFFICIENTS
    for _ in range(STEPS):
        values = first * values + third * values**3 + fifth * values**5
    return left @ torch.diag(values) @ right


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_singular_values_become_one(number: int, rows: int, columns: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    matrices = torch.randn(number, rows, columns, generator=source, dtype=torch.float64)
    found = orthogonalize(matrices)
    for matrix, result in zip(matrices, found, strict=True):
        torch.testing.assert_close(result, exact(matrix), rtol=1e-8, atol=1e-8)
        values = torch.linalg.svdvals(matrix)
        flat = torch.linalg.svdvals(result)[values > 0.05 * values.norm()]
        assert ((flat > 0.65) & (flat < 1.25)).all()


def test_nothing_stays_nothing() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


def groups(matrices: list[nn.Parameter], gains: nn.Parameter) -> list[dict[str, Any]]:
    return [
        {"params": [gains], "weight_decay": 0.0},
        {"params": matrices, "weight_decay": 0.1, "orthogonal": True},
    ]


def test_it_moves_as_torchs_muon_and_adamw() -> None:
    """torch computes the same in bfloat16."""
    torch.manual_seed(0)
    shapes = [(6, 9), (9, 6), (6, 9), (5, 5)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(value.detach().clone()) for value in ours]
    gains, other = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    settings = {"betas": (0.9, 0.999), "eps": 1e-8}
    muon = Muon(groups(ours, gains), lr=0.01, **settings)
    torch_muon = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([other], lr=0.01, weight_decay=0.0, **settings)
    before = [value.detach().clone() for value in ours]
    for _ in range(4):
        for mine, its in zip([*ours, gains], [*theirs, other], strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        for optimizer in (muon, torch_muon, adamw):
            optimizer.step()
    assert torch.equal(gains, other)
    for mine, its, start in zip(ours, theirs, before, strict=True):
        error = (mine - its).norm() / (its - start).norm()
        assert error < 0.02


def test_a_stack_is_many_matrices() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 4, 5))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    gains = nn.Parameter(torch.ones(1))
    together, apart = (
        Muon(groups(values, gains), lr=0.01, betas=(0.9, 0.999), eps=1e-8)
        for values in ([stack], alone)
    )
    stack.grad = torch.randn_like(stack)
    for value, gradient in zip(alone, stack.grad.clone(), strict=True):
        value.grad = gradient
    together.step()
    apart.step()
    torch.testing.assert_close(stack, torch.stack(tuple(alone)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("release", [0.0, 1.0])
def test_what_it_updates(tied: bool, release: float) -> None:
    method = tiny_method(tiny_teacher("llama", tied=tied), steps=4, release_at=release)
    if release == 0:
        method.next_stage()
    orthogonal = orthogonal_parameters(method)
    names = set(orthogonal)
    if release:
        assert names == {name for name, value in method.parameters().items() if value.ndim == 2}
        return
    tokens = ("embed_tokens", "lm_head", "norm")
    expected = {n for n in method.parameters() if not any(token in n for token in tokens)}
    assert names == expected
    assert any("q_proj" in name for name in names)
    pairs = [sorted(method.parameters()[name].shape) for name in names]
    assert orthogonal_flops(orthogonal.values()) == pytest.approx(
        sum(5 * (4 * a * a * b + 2 * a**3) for a, b in pairs)
    )


@pytest.mark.parametrize("name", ["scratch", "slicegpt", "sheared-llama", "minitron"])
def test_groups_of_other_methods(name: str) -> None:
    """Every parameter is in one group, and masks keep their own rates."""
    recipe = tiny_recipe(method=name, train=MUON)
    method = METHODS[name].build(tiny_teacher("llama", dtype=torch.float32), recipe)
    optimizer = new_state(method, recipe).optimizer
    assert isinstance(optimizer, Muon)
    found = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(found) == sorted(id(value) for value in method.parameters().values())
    [group] = [group for group in optimizer.param_groups if group.get("orthogonal")]
    assert {value.ndim for value in group["params"]} == {2}


@pytest.mark.parametrize("release", [0.5, 1.0])
def test_a_run_goes_on_bit_by_bit(tmp_path: Path, release: float) -> None:
    run = new_run(tmp_path, **MUON, release_at=release, keep_checkpoints=9)
    go(run)
    other = copy_until(run, tmp_path / "again", 6)
    before = (other.checkpoints / "step-00000006").stat().st_mtime_ns
    go(other)
    assert (other.checkpoints / "step-00000006").stat().st_mtime_ns == before  # not made again
    assert_same_run(other, run)
