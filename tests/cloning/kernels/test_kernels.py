"""The Triton kernels against the torch code, in float64. Without a GPU, Triton's interpreter runs
them, which cuts what it rounds to bfloat16."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from lrc.cloning.kernels import clipping, use_triton, vocabulary
from lrc.cloning.objective import VocabularyWeights, vocabulary_losses
from lrc.cloning.objective.clone import compare_activations, naive_clone_term, relative_weight
from lrc.cloning.objective.vocabulary import naive_vocabulary_losses
from lrc.cloning.token_clipping import (
    clip_output,
    clip_tokens,
    known_norms,
    remember_norms,
)
from lrc.system.errors import UserError
from tiny import in_turn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts what the interpreter does")
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")

ONE_ROUNDING = 2.0**-7
"""Largest relative error of cutting a number to bfloat16, which the interpreter does."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Rows of more than `size` elements take several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "BLOCK", size)
        patch.setattr(clipping, "BLOCK", size)
        patch.setattr(clipping, "TOKENS", size // 4)
        yield


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the bytes that the interpreter loads and stores."""
    from triton.runtime import interpreter

    found = {"load": 0, "store": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found["load"] += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found["store"] += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        yield found


def error(ours: Tensor, truth: Tensor) -> float:
    """Relative error in the norm."""
    return float((ours.detach().double() - truth).norm() / truth.norm().clamp_min(1e-30))


class Chunk:
    """Random logits of both models, and what the losses need besides."""

    def __init__(
        self, n: int, vocab: int, temperature: float, scale: float, distance: float, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(n, vocab, generator=generator)

        self.student = (normal() * scale).bfloat16().float()
        teacher = self.student + distance * normal()
        self.teacher = (teacher / temperature).bfloat16().float()
        self.labels = torch.randint(0, vocab, (n,), generator=generator)
        self.labels[-1] = -100
        self.mask = torch.rand(n, generator=generator) < 0.7
        self.mask[0] = True
        self.settings: dict[str, Any] = {
            "kl_weight": 1.28,
            "lm_weight": 0.7,
            "temperature": temperature,
            "tokens": max(1, int(self.mask.sum())),
            "label_count": max(1, n - 1),
            "softcap": None,
        }

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """KL and LM of each token, and the gradient, by autograd in float64."""
        use = self.settings
        t = use["temperature"]
        logits = self.student.double().requires_grad_()
        s, q = logits, self.teacher.double()
        if (c := use["softcap"]) is not None:
            s, q = c * (s / c).tanh(), c / t * (q * t / c).tanh()
        log_p, log_q = q.log_softmax(-1), (s / t).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1) * self.mask
        lm = -s.log_softmax(-1).gather(1, self.labels.clamp(min=0)[:, None])[:, 0]
        lm = lm.where(self.labels >= 0, 0)
        loss = use["kl_weight"] * t**2 * kl.sum() / use["tokens"]
        loss = loss + use["lm_weight"] * lm.sum() / use["label_count"]
        (gradient,) = torch.autograd.grad(loss, logits)
        return kl.detach(), lm.detach(), gradient

    def ours(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the kernel."""
        gradient, teacher = (x.to(DEVICE, dtype) for x in (self.student.clone(), self.teacher))
        kl, lm = vocabulary.losses_in_place(
            gradient, teacher, self.labels.to(DEVICE), self.mask.to(DEVICE), **self.settings
        )
        return kl.cpu(), lm.cpu(), gradient.cpu()


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 4),
    vocab=st.integers(1, 200),
    block=st.sampled_from([16, 64, 512]),
    temperature=st.sampled_from([0.7, 1.0, 2.0, 40.0]),
    scale=st.sampled_from([0.05, 1.0, 5.0, 30.0]),
    distance=st.sampled_from([0.003, 0.3, 3.0, 60.0]),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_logits_of_any_shape(
    n: int,
    vocab: int,
    block: int,
    temperature: float,
    scale: float,
    distance: float,
    softcap: float | None,
    seed: int,
) -> None:
    """Read from bfloat16, the gradient is float32's. Only its last rounding is bfloat16's."""
    chunk = Chunk(n, vocab, temperature, scale, distance, seed)
    chunk.settings["softcap"] = softcap
    truth = chunk.reference()
    with blocks_of(block):
        ours, rounded = chunk.ours(), chunk.ours(torch.bfloat16)
    floor = 1e-6 * chunk.settings["kl_weight"]  # where both models say the same
    for mine, theirs in zip(ours, truth, strict=True):
        assert float((mine - theirs).norm()) <= 2e-5 * float(theirs.norm()) + floor * vocab**0.5
    assert torch.equal(rounded[0], ours[0])
    assert torch.equal(rounded[1], ours[1])
    wrong = (rounded[2].float() - ours[2]).abs()
    assert (wrong <= ONE_ROUNDING * ours[2].abs() + 1e-37).all()


@pytest.mark.parametrize(("temperature", "distance"), in_turn([1.0, 40.0], [1e-3, 0.1, 3.0]))
def test_a_small_divergence_does_not_cancel(temperature: float, distance: float) -> None:
    """More exact than the torch code, over many blocks, although one read must do."""
    chunk = Chunk(4, 3000, temperature, 3.0, distance)
    chunk.teacher = chunk.student / temperature  # without the rounding to bfloat16
    chunk.teacher += distance / temperature * torch.randn(chunk.teacher.shape)
    kl, lm, gradient = chunk.reference()
    with blocks_of(128):
        ours = chunk.ours()
    assert error(ours[0], kl) < 1e-4
    assert error(ours[1], lm) < 1e-6
    assert error(ours[2], gradient) < 1e-5


def test_mass_that_comes_after_many_blocks() -> None:
    """The teacher's likely tokens are last, and the first ones differ by far more nats than e^d
    can take, up and down."""
    for shift in (-500.0, -70.0, -15.0, 15.0, 70.0, 500.0):
        chunk = Chunk(2, 320, 1.0, 1.0, 0.1)
        chunk.student[:, :160] += -40 + shift
        chunk.teacher[:, :160] -= 40
        kl, _, gradient = chunk.reference()
        with blocks_of(32):
            ours = chunk.ours()
        assert error(ours[0], kl) < 1e-4, shift
        assert error(ours[2], gradient) < 1e-5, shift


def test_a_block_with_a_wide_range_in_a_row_without() -> None:
    """Within the first block, e^d would be too large, but not about the mean of the row."""
    chunk = Chunk(1, 64, 1.0, 1.0, 0.0)
    chunk.student[:], chunk.teacher[:] = 2.0, 2.0
    chunk.student[:, :16], chunk.teacher[:, :16] = 0.0, 0.0
    chunk.student[:, :10] = -100.0
    kl, _, gradient = chunk.reference()
    with blocks_of(16):
        ours = chunk.ours()
    assert error(ours[0], kl) < 1e-5
    assert error(ours[2], gradient) < 1e-5


def test_a_confident_teacher_and_an_opposed_student() -> None:
    for gap in (10.0, 60.0, 300.0, 1e4):
        chunk = Chunk(2, 2, 1.0, 1.0, 1.0)
        chunk.student[:] = torch.tensor([0.0, gap])
        chunk.teacher[:] = torch.tensor([gap, 0.0])
        chunk.settings["lm_weight"] = 0.0
        kl, _, gradient = chunk.reference()
        ours = chunk.ours()
        assert error(ours[0], kl) < 1e-5
        assert error(ours[2], gradient) < 1e-5


def hidden_states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Last hidden states and heads of student and teacher, labels and mask."""
    generator = torch.Generator().manual_seed(3)
    n, rows = 13, 37
    shapes = (n, 8), (rows, 8), (n, 16), (rows, 16)
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    labels = torch.randint(0, 33, (n,), generator=generator)
    labels[2::5] = -100
    mask = torch.arange(n) % 4 > 0
    leaves = [x.to(DEVICE, dtype).requires_grad_(i < 2) for i, x in enumerate(states)]
    return (*leaves, labels.to(DEVICE), mask.to(DEVICE))


@pytest.mark.parametrize("changes", [{}, {"kl_weight": 0.0}, {"lm_weight": 0.0}, {"softcap": 4.0}])
@pytest.mark.parametrize("masked", [False, True])
def test_vocabulary_losses_by_the_kernel(changes: dict[str, Any], masked: bool) -> None:
    """Through heads with padded rows, in chunks, with the losses by token."""
    *states, labels, mask = hidden_states()
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in states]
    weights = VocabularyWeights(1.28, 1.0, 2.0, 9, 10, 33, 5)._replace(**changes)
    chosen = mask if masked else None
    naive = naive_vocabulary_losses(*double, labels, chosen, weights)
    expected = torch.autograd.grad(naive.weighted, double[:2])
    by_token = torch.full((13,), torch.nan, device=DEVICE)
    weights = weights._replace(triton=True)
    losses = vocabulary_losses(*states, labels, chosen, weights, by_token)
    found = torch.autograd.grad(losses.weighted, states[:2])
    torch.testing.assert_close(losses.weighted.double(), naive.weighted, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.lm.double(), naive.lm, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_token.sum() / 10, losses.lm)
    assert ((by_token == 0) == (labels < 0)).all()
    for mine, reference in zip(found, expected, strict=True):
        assert error(mine, reference) < 1e-5
    assert (found[1][33:] == 0).all()


def test_other_divergences_and_float64_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "losses_in_place", None)
    *states, labels, mask = hidden_states()
    weights = VocabularyWeights(1.0, 1.0, 2.0, 9, 10, 33, 5, "jsd", triton=True)
    assert vocabulary_losses(*states, labels, mask, weights).weighted > 0
    *states, labels, mask = hidden_states(torch.float64)
    weights = weights._replace(divergence="kl")
    assert vocabulary_losses(*states, labels, mask, weights).weighted > 0


@on_gpu
def test_bfloat16_on_a_gpu_rounds_once() -> None:
    """The kernel adds at most 1e-3 to what rounding the gradient to bfloat16 costs anyway."""
    for temperature in (1.0, 40.0):
        chunk = Chunk(64, 32_003, temperature, 3.0, 0.5)
        _, _, gradient = chunk.reference()
        _, _, ours = chunk.ours(torch.bfloat16)
        assert error(ours, gradient.bfloat16().double()) < 1e-3


@interpreted
def test_bytes_of_a_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Chunk(3, 1000, 1.0, 1.0, 1.0)
    with counted(monkeypatch) as found:
        chunk.ours(torch.bfloat16)
    logits, rows = 3 * 1000, 3 * (8 + 2 + 1 + 4 + 4)
    assert found == {"load": 8 * logits + 3 * (8 + 2 + 1), "store": 2 * logits + 3 * 8}
    assert sum(found.values()) <= 12 * logits + rows


# ------------------------------------------------------------------------------------------------


class Sides:
    """Activations of student and teacher, and a gradient from the rest of the model."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.student, self.target, self.gradient = normal(), normal(), normal()
        self.student[0, 0] *= 100  # a massive activation
        self.mask = torch.rand(shape[:2], generator=generator) < 0.7
        self.mask[0, 0] = True

    def ours(self, masked: bool, relative: bool) -> tuple[Tensor, Tensor]:
        """The loss, and the gradient of 3 losses and the rest."""
        student = self.student.to(DEVICE).requires_grad_()
        target = self.target.to(DEVICE)
        mask = self.mask.to(DEVICE) if masked else None
        compared, loss = compare_activations(student, target, mask, 11, relative, triton=True)
        assert torch.equal(compared, student)
        outputs = (compared, loss)
        received = (self.gradient.to(DEVICE), torch.tensor(3.0, device=DEVICE))
        (gradient,) = torch.autograd.grad(outputs, student, received)
        return loss.cpu(), gradient.cpu()

    def reference(self, masked: bool, relative: bool) -> tuple[Tensor, Tensor]:
        student = self.student.double().requires_grad_()
        target, mask = self.target.double(), self.mask if masked else None
        weight = relative_weight(student, target, mask) if relative else mask
        loss = naive_clone_term(student, target, weight, 11)
        rest = (student * self.gradient.double()).sum()
        (gradient,) = torch.autograd.grad(rest + 3 * loss, student)
        return loss.detach(), gradient


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 6),
    width=st.integers(1, 200),
    block=st.sampled_from([16, 64, 256]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    masked=st.booleans(),
    relative=st.booleans(),
    seed=st.integers(0, 999),
)
def test_clone_terms_of_any_shape(
    batch: int,
    sequence: int,
    width: int,
    block: int,
    dtype: str,
    masked: bool,
    relative: bool,
    seed: int,
) -> None:
    sides = Sides((batch, sequence, width), DTYPES[dtype], seed)
    loss, gradient = sides.reference(masked, relative)
    with blocks_of(block):
        ours = sides.ours(masked, relative)
    assert error(ours[0], loss) < 1e-5
    # The difference and the gradient are each rounded once.
    assert error(ours[1], gradient) < (1e-6 if dtype == "float32" else 2 * ONE_ROUNDING)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_a_target_that_is_a_product(masked: bool, relative: bool) -> None:
    """The projection gets the gradient that the torch code gives it."""
    sides = Sides((2, 5, 7), torch.float32)
    source = torch.randn(2, 5, 11, device=DEVICE)
    projection = torch.randn(11, 7, device=DEVICE, requires_grad=True)
    mask = sides.mask.to(DEVICE) if masked else None
    found = []
    for triton in (False, True):
        student = sides.student.to(DEVICE).requires_grad_()
        target = (source @ projection).detach()
        _, loss = compare_activations(
            student, target, mask, 11, relative, (source, projection), triton=triton
        )
        found.append(torch.autograd.grad(2 * loss, (student, projection)))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def clipped_gradient(sides: Sides, triton: bool, consumers: int = 1) -> tuple[Tensor, list[bool]]:
    """The gradient that a linear map's input gets through clipping and a clone term, and whether
    the norms were known."""
    known: list[bool] = []
    x = sides.student.to(DEVICE, copy=True).requires_grad_()
    output = x * 1
    output.register_hook(lambda gradient: known.append(known_norms(gradient) is not None))
    spared = torch.zeros(output.shape[:2], dtype=torch.bool, device=DEVICE)
    clip_output(output, spared, 2.0, triton)
    compared, loss = compare_activations(
        output, sides.target.to(DEVICE), None, 11, True, triton=triton
    )
    rest = (compared * sides.gradient.to(DEVICE)).sum()
    for _ in range(1, consumers):
        rest = rest + output.square().sum()
    (rest + loss).backward()
    assert x.grad is not None
    return x.grad, known


@pytest.mark.parametrize("consumers", [1, 2, 3])
def test_clipping_uses_the_norms_of_the_clone_term(consumers: int) -> None:
    """But not if another gradient was added since."""
    sides = Sides((2, 9, 40), torch.float32)
    sides.gradient[1, 3] *= 50
    expected, _ = clipped_gradient(sides, triton=False, consumers=consumers)
    found, known = clipped_gradient(sides, triton=True, consumers=consumers)
    assert known == [consumers == 1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    norms = found.norm(dim=-1)
    assert norms.max() <= norms.median() * 2.001


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 20),
    width=st.integers(1, 70),
    block=st.sampled_from([16, 64, 256]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    known=st.booleans(),
    broken=st.sampled_from([None, torch.inf, torch.nan]),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_gradients_of_any_shape_are_clipped(
    tokens: int,
    width: int,
    block: int,
    dtype: str,
    known: bool,
    broken: float | None,
    zeros: float,
    seed: int,
) -> None:
    """As the torch code clips them: the median is exact, tokens without a gradient do not count,
    and what is not finite stays so."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(1, tokens, width, generator=generator).to(DTYPES[dtype])
    gradient *= 10 ** torch.randn(1, tokens, 1, generator=generator)
    gradient[torch.rand(1, tokens, generator=generator) < zeros] = 0
    if broken is not None:
        gradient[0, seed % tokens, 0] = broken
    spared = torch.rand(1, tokens, generator=generator) < 0.2
    expected = clip_tokens(gradient.float(), spared, 2.0)
    ours = gradient.to(DEVICE, copy=True)
    if known:
        remember_norms(ours, ours.float().norm(dim=-1))
    with blocks_of(block):
        clipped = clip_tokens(ours, spared.to(DEVICE), 2.0, triton=True)
    assert (clipped is ours) == known
    rounding = 1e-5 if dtype == "float32" else 2 * ONE_ROUNDING
    torch.testing.assert_close(
        clipped.cpu().float(), expected, rtol=rounding, atol=0, equal_nan=True
    )
    if not known:
        torch.testing.assert_close(ours.cpu(), gradient, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_with_other_strides_is_clipped() -> None:
    gradient = torch.randn(2, 3, 5, device=DEVICE)
    gradient[:, 0] *= 30
    spared = torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
    found = clip_tokens(gradient.mT, spared, 1.1, triton=True)
    torch.testing.assert_close(found, clip_tokens(gradient.mT, spared, 1.1))


def test_masked_tokens_do_not_count_for_the_median() -> None:
    """With more tokens than a program holds at once, and a size that is not finite."""
    sides = Sides((3, 11, 8), torch.float32)
    sides.target[sides.mask.logical_not()] *= 1000
    with blocks_of(16):
        ours = sides.ours(masked=True, relative=True)
    for mine, reference in zip(ours, sides.reference(masked=True, relative=True), strict=True):
        assert error(mine, reference) < 1e-5


@interpreted
def test_bytes_of_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and clipping of a token in ten."""
    sides = Sides((2, 10, 64), torch.bfloat16)
    elements, tokens = 2 * 10 * 64, 2 * 10
    with counted(monkeypatch) as found:
        sides.ours(masked=False, relative=True)
    # By token: both sizes, squares and weight; for all tokens: the gradient of the loss.
    assert found == {"load": 8 * elements + 20 * tokens, "store": 4 * elements + 20 * tokens + 4}
    assert sum(found.values()) <= 14 * elements
    spared = torch.zeros(2, 10, dtype=torch.bool)
    sides.gradient[0, 3] = sides.gradient[1, 8] = 9.0
    clipped, one = sides.gradient.clone(), 2 * 64  # a token's bytes
    remember_norms(clipped, clipped.float().norm(dim=-1))
    with counted(monkeypatch) as found:
        clip_tokens(clipped, spared, 2.0, triton=True)
    assert found == {"load": 2 * one + 13 * tokens, "store": 2 * one + 4 * tokens}
    with counted(monkeypatch) as found:
        clip_tokens(sides.gradient, spared, 2.0, triton=True)
    assert found == {"load": 4 * elements + 13 * tokens, "store": 2 * elements + 8 * tokens}


# ------------------------------------------------------------------------------------------------


def test_where_the_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [use_triton("auto", device) for device in (cpu, cuda)] == [False, True]
    assert [use_triton("torch", device) for device in (cpu, cuda)] == [False, False]
    monkeypatch.setattr("lrc.cloning.kernels._interprets", lambda: False)
    assert use_triton("triton", cuda)
    with pytest.raises(UserError, match="needs a CUDA device instead of cpu"):
        use_triton("triton", cpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not use_triton("auto", cuda)
    with pytest.raises(UserError, match=r"low-rank-clone\[cuda\]"):
        use_triton("triton", cuda)


COMPILE = """
import sys, warnings
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lrc.cloning.kernels import clipping, clone, vocabulary

warnings.simplefilter("ignore")
wide, scalar = "*bf16", "fp32"
options = ("HAS_KL", "HAS_MASK", "HAS_CAP")
logits = dict(
    logits=wide, teacher=wide, labels="*i64", mask="*i1", kl="*fp32", lm="*fp32", stride="i32",
    teacher_stride="i32", vocab="i32", inverse_t=scalar, kl_factor=scalar, lm_factor=scalar,
    cap=scalar,
)
sums = dict(squares="*fp32", sizes="*fp32", larger="*fp32", width="i32")
sides = dict(student=wide, target=wide, difference=wide)
gradients = dict(received=wide, difference=wide, gradient=wide)
scaled = dict(gradient=wide, out=wide, factors="*fp32", width="i32")
norms = dict(weight="*fp32", grad_loss="*fp32", norms="*fp32", width="i32", scale=scalar)
tokens = dict(norms="*fp32", spared="*i1", factors="*fp32", tokens="i32", limit=scalar)
weights = dict(
    squares="*fp32", sizes="*fp32", larger="*fp32", mask="*i1", weight="*fp32", loss="*fp32",
    tokens="i32", width=scalar, scale=scalar,
)
cases = [
    (vocabulary._kl_lm_kernel, logits, dict(zip(options, values), BLOCK=4096))
    for values in ((True, False, False), (True, True, True), (False, False, False))
]
cases += [
    (clone._clone_forward, {**sides, **sums}, dict(BLOCK=2048)),
    (clone._clone_backward, {**gradients, **norms}, dict(BLOCK=2048)),
    (clone._weights_and_loss, weights, dict(RELATIVE=True, MASKED=True, BLOCK=8192)),
    (clipping._token_norms, dict(gradient=wide, norms="*fp32", width="i32"), dict(BLOCK=2048)),
    (clipping._clip_factors, tokens, dict(BLOCK=8192)),
    (clipping._scale_tokens, scaled, dict(IN_PLACE=True, BLOCK=2048)),
    (clipping._scale_tokens, scaled, dict(IN_PLACE=False, BLOCK=2048)),
]
for kernel, signature, constants in cases:
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(types) if types[name][0] == "*" or types[name] == "i32"
    }
    source = ASTSource(kernel, types, constants, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    assert "ld.global.v4.b32" in ptx, kernel  # 16 bytes a thread at once
"""


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Not everything that the interpreter runs does. This needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
