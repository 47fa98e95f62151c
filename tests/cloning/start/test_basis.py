"""The basis of the student's stream: Fisher information by hand, and how much is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lrc.cloning.start import basis
from lrc.cloning.start.basis import (
    StreamStatistics,
    gradients,
    predictive_basis,
    principal_basis,
    stream_statistics,
)
from lrc.cloning.start.calibration import Calibration
from tiny import HIDDEN, STUDENT_HIDDEN, TINY_CASES, Case, tiny_teacher, tiny_tokens

NORMS = ("input_layernorm", "post_attention_layernorm")
NORMS_INSIDE = 2


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moments(seed: int, count: int, width: int) -> Tensor:
    """Second moments of trace 1, [count, width, width]."""
    rows = drawn(seed, count, 3 * width, width) * torch.linspace(0.3, 2, width)
    moments = rows.mT @ rows
    return moments / moments.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def statistics(seed: int, width: int) -> StreamStatistics:
    moments, fisher = second_moments(seed, 2, width), width * second_moments(seed + 1, 2, width)
    return StreamStatistics(moments, fisher, NORMS_INSIDE)


@pytest.mark.parametrize("case", TINY_CASES)
def test_the_gradients_are_those_of_the_whole_model(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis, "GRADIENT_TOKENS", 40)  # three sequences of twelve
    family, tied, changes = case
    teacher, ids = tiny_teacher(family, tied, **changes), tiny_tokens(8)
    with Calibration(teacher, ids, STUDENT_HIDDEN) as calibration:
        found = list(gradients(calibration))

    paths = [
        f"{teacher.family.layers}.{layer}.{norm}"
        for layer in range(teacher.num_layers)
        for norm in NORMS
    ]
    read: list[Tensor] = []
    for path in (*paths, teacher.family.final_norm):
        teacher.model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0])
        )
    embedded = teacher.model.get_input_embeddings()(ids[:3]).detach().requires_grad_()
    logits = teacher.model(inputs_embeds=embedded).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(basis.SEED)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    expected = torch.autograd.grad(loss, read)
    assert len(found) == 2 * teacher.num_layers + 1
    for ours, x, theirs in zip(reversed(found), read, expected, strict=True):
        rms = (x.square().mean(-1, keepdim=True) + teacher.config.rms_norm_eps).sqrt()
        wanted = (rms * theirs).detach().flatten(0, 1)
        # transformers computes RMSNorm in float32, whatever the model's dtype.
        assert (ours - wanted).norm() < 1e-5 * wanted.norm()


def test_statistics_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "LARGEST_TOKEN_WEIGHT", 1e9)
    teacher, ids = tiny_teacher("llama"), tiny_tokens(24)
    with Calibration(teacher, ids, STUDENT_HIDDEN) as calibration:
        found = stream_statistics(calibration)
        by_site = list(reversed([g.T @ g for g in gradients(calibration)]))
    read: list[Tensor] = []
    layers = range(teacher.num_layers)
    inside = [f"{teacher.family.layers}.{i}.{norm}" for i in layers for norm in NORMS]
    for path in (*inside, teacher.family.final_norm):
        norm = teacher.model.get_submodule(path)
        norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        teacher.model(ids)
    eps = teacher.config.rms_norm_eps
    normed = [x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in read]
    for group, sites in enumerate((range(len(inside)), [len(inside)])):
        moments = [normed[i].T @ normed[i] for i in sites]
        expected = torch.stack([m / m.trace() for m in moments]).mean(0)
        torch.testing.assert_close(found.moments[group], expected, rtol=0, atol=1e-6)
        shares = torch.stack([HIDDEN * by_site[i] / by_site[i].trace() for i in sites]).mean(0)
        expected = basis.FISHER_SHARE * shares + (1 - basis.FISHER_SHARE) * torch.eye(HIDDEN)
        torch.testing.assert_close(found.fisher[group], expected)
    span = torch.linalg.qr(drawn(1, HIDDEN, STUDENT_HIDDEN)).Q
    assert found.norms == len(inside)
    after = found.fisher_after_layers(span, teacher.num_layers)
    assert len(after) == teacher.num_layers
    for layer, metric in enumerate(after):  # which the norm of the next layer reads, or the last
        final = layer == teacher.num_layers - 1
        torch.testing.assert_close(metric, span.T @ found.fisher[int(final)] @ span)


def test_no_token_dominates_the_fisher_information(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn(0, 50, HIDDEN)
    rows[7] *= 1e4
    teacher = tiny_teacher("llama")
    sites = 2 * teacher.num_layers + 1
    monkeypatch.setattr(basis, "gradients", lambda _: iter([rows] * sites))
    with Calibration(teacher, tiny_tokens(24), STUDENT_HIDDEN) as calibration:
        fisher = stream_statistics(calibration).fisher[0]
    along = rows[7] / rows[7].norm()
    assert along @ fisher @ along < 0.3 * HIDDEN  # without the cap it has FISHER_SHARE of the trace


@settings(deadline=None, max_examples=25)
@given(width=st.integers(2, 9), kept=st.integers(1, 8), seed=st.integers(0, 99))
def test_the_loss_is_the_residual_of_least_squares(width: int, kept: int, seed: int) -> None:
    kept = min(kept, width)
    h = drawn(seed, 40, width)
    root = drawn(seed + 1, width, width)
    span = torch.linalg.qr(drawn(seed + 2, width, kept)).Q
    predicted = h @ span @ torch.linalg.lstsq(h @ span, h).solution
    expected = ((h - predicted) @ root).square().sum() / 40
    found = basis._lost(span, h.T @ h / 40, root @ root.T)
    whole = float((h @ root).square().sum() / 40)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * whole)


@settings(deadline=None, max_examples=25)
@given(width=st.integers(2, 6), kept=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_loss_of_a_tied_head_is_the_least_possible(width: int, kept: int, seed: int) -> None:
    kept = min(kept, width)
    h, gain = drawn(seed, 40, width), drawn(seed + 3, width).abs() + 0.5
    root = drawn(seed + 1, width, width)  # of the metric for u = diag(gain) h
    span = torch.linalg.qr(drawn(seed + 2, width, kept)).Q
    weighed = root.T @ span
    columns = torch.einsum("ai,tj->taij", weighed, h @ span).reshape(-1, kept * kept)
    targets = (h * gain @ root).flatten()
    best = torch.linalg.lstsq(columns, targets[:, None], driver="gelsd").solution
    expected = (columns @ best - targets[:, None]).square().sum() / 40
    metric = root @ root.T
    found = basis._lost_by_a_tied_head(span, h.T @ h / 40, gain[:, None] * metric * gain, gain)
    whole = float(targets.square().sum() / 40)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * whole)


def lost(value: StreamStatistics, span: Tensor) -> float:
    sites = zip(value.moments, value.fisher, strict=True)
    inside, final = (float(basis._lost(span, moment, fisher)) for moment, fisher in sites)
    return value.norms * inside + final


@pytest.mark.parametrize("seed", range(4))
def test_the_basis_loses_less_than_principal_directions(seed: int) -> None:
    value = statistics(seed, 24)
    best = predictive_basis(value, 12)
    torch.testing.assert_close(best.T @ best, torch.eye(12, dtype=torch.float64))
    weights = value.norms, 1.0
    mean = basis._best_for_the_mean(value, weights, 12)
    moment = torch.einsum("s,sij->ij", torch.tensor(weights).double(), value.moments)
    principal = torch.linalg.eigh(moment).eigenvectors[:, -12:]
    assert lost(value, best) < lost(value, mean) < lost(value, principal)


def test_the_best_basis_of_equal_norms_is_known() -> None:
    value, weights = statistics(0, 24), (NORMS_INSIDE, 1.0)
    moments, fisher = (each[:1].expand(2, -1, -1) for each in (value.moments, value.fisher))
    alike = StreamStatistics(moments, fisher, NORMS_INSIDE)
    known = basis._best_for_the_mean(alike, weights, 12)
    least, _ = torch.linalg.eigh(_product(alike.moments[0], alike.fisher[0]))
    assert lost(alike, known) == pytest.approx(3 * float(least[:12].sum()), rel=1e-4)
    assert lost(alike, predictive_basis(alike, 12)) == pytest.approx(lost(alike, known), rel=1e-3)
    blind = StreamStatistics(moments, torch.eye(24).double().expand(2, -1, -1), NORMS_INSIDE)
    known = basis._best_for_the_mean(blind, weights, 12)
    principal = torch.linalg.eigh(value.moments[0]).eigenvectors[:, -12:]
    torch.testing.assert_close(known @ known.T, principal @ principal.T, rtol=0, atol=1e-9)


def _product(moment: Tensor, fisher: Tensor) -> Tensor:
    """F^1/2 C F^1/2."""
    values, vectors = torch.linalg.eigh(fisher)
    root = (vectors * values.sqrt()) @ vectors.T
    return root @ moment @ root


def test_a_tied_head_has_its_share() -> None:
    value, gain = statistics(5, 24), drawn(9, 24).abs() + 0.5

    def by_the_head(span: Tensor) -> float:
        return float(basis._lost_by_a_tied_head(span, value.moments[-1], value.fisher[-1], gain))

    assert by_the_head(predictive_basis(value, 12, gain)) < by_the_head(predictive_basis(value, 12))


def test_the_principal_basis_is_of_all_norms() -> None:
    teacher = tiny_teacher("llama")
    with Calibration(teacher, tiny_tokens(24), STUDENT_HIDDEN) as calibration:
        found = principal_basis(calibration)
        moments = stream_statistics(calibration)
    mean = moments.norms * moments.moments[0] + moments.moments[1]
    expected = torch.linalg.eigh(mean).eigenvectors[:, -STUDENT_HIDDEN:]
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-3)


def test_massive_activations_dominate_no_solve() -> None:
    teacher = tiny_teacher("llama")
    with Calibration(teacher, tiny_tokens(24), STUDENT_HIDDEN) as calibration:
        theirs, ours = drawn(0, 3, HIDDEN), drawn(1, 3, STUDENT_HIDDEN)
        ours *= 0.1  # as large as the teacher's, or smaller
        theirs[1] *= 1e3  # in the teacher
        ours[2] *= 1e4  # only in the student
        weights = calibration.weights(theirs, ours)[:, 0]
        rms = theirs.square().mean(-1).sqrt()
    torch.testing.assert_close(weights[:2], 1 / rms[:2], rtol=1e-3, atol=0)
    torch.testing.assert_close(weights[2], (ours[2].norm() / HIDDEN**0.5).reciprocal())
