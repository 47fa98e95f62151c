"""The closed-form start: exact at full width, least squares below, better than a random start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.start import calibration
from lrc.cloning.start.basis import predictive_basis, stream_statistics
from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form import least_squares, predictions, refine, solve
from lrc.cloning.start.closed_form.head import TiedHead
from lrc.cloning.start.closed_form.least_squares import moments, regress, second_moment
from lrc.cloning.start.closed_form.refine import RIDGE, square_roots
from lrc.cloning.start.closed_form.solve import cut_sequences, solve_projections
from lrc.cloning.start.pca import pca_projections
from lrc.cloning.start.streams import ActivationStore
from lrc.data.batch import Batch
from lrc.evaluation.held_out import held_out_loss
from lrc.model.teacher import load_teacher
from lrc.recipe.sections import ObjectiveSection, StudentSection, TeacherSection
from stories import sample
from tiny import (
    HIDDEN,
    LLAMAS,
    READERS,
    STUDENT_HIDDEN,
    TINY_CASES,
    Case,
    initialize_from_text,
    initialize_random,
    tiny_teacher,
    tiny_tokens,
)


def closed_form(
    case: Case, hidden_size: int, ids: Tensor, epochs: int = 0, **student: bool
) -> LowRankClone:
    family, tied, changes = case
    teacher = tiny_teacher(family, tied, **changes)
    section = StudentSection(hidden_size=hidden_size, **student)
    method = LowRankClone(teacher, section, ObjectiveSection())
    initialize_from_text(method, "closed-form", ids, refine_epochs=epochs)
    return method


@pytest.mark.parametrize("case", TINY_CASES)
@pytest.mark.parametrize(
    ("fold", "epochs"), [(False, 0), (True, 0), (True, 1)], ids=["plain", "folded", "refined"]
)
def test_the_full_hidden_size_reproduces_the_teacher(case: Case, fold: bool, epochs: int) -> None:
    method = closed_form(case, HIDDEN, tiny_tokens(24), epochs, fold_gains=fold)
    ids = tiny_tokens(3)
    with torch.no_grad():
        theirs = method.teacher.model(ids).logits
        ours = method.student()(ids).logits
    # transformers computes RMSNorm in float32, whatever the model's dtype.
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("case", TINY_CASES)
def test_the_student_has_the_stream_that_was_solved(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the rotation of a tied student. At d_S = d_T an error of scale would not show."""
    solved: list[Tensor] = []
    head = solve._solved_head

    def kept(calibration: Calibration, basis: Tensor, stream: ActivationStore, *rest: Any) -> Any:
        solved.append(torch.cat([stream[part].clone() for part in calibration.batches()]))
        found = head(calibration, basis, stream, *rest)
        if isinstance(found[0], TiedHead):
            solved.append(found[0].rotation)
        return found

    monkeypatch.setattr(solve, "_solved_head", kept)
    ids = tiny_tokens(24)
    method = closed_form(case, STUDENT_HIDDEN, ids)
    read: list[Tensor] = []
    student = method.student()
    norm = student.get_submodule(method.teacher.family.final_norm)
    norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        student(ids, use_cache=False)
    stream, *rotation = solved
    expected = stream @ rotation[0] if rotation else stream
    # transformers computes RMSNorm in float32, whatever the model's dtype.
    assert (read[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", TINY_CASES)
def test_folding_changes_no_student(case: Case) -> None:
    plain, folded = (
        closed_form(case, STUDENT_HIDDEN, tiny_tokens(24), fold_gains=fold).student()
        for fold in (False, True)
    )
    for (name, a), b in zip(plain.state_dict().items(), folded.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", TINY_CASES)
def test_it_imitates_the_teacher_better_than_a_random_start(case: Case) -> None:
    method = closed_form(case, STUDENT_HIDDEN, tiny_tokens(48))
    ids = tiny_tokens(4)

    def error() -> float:
        with torch.no_grad():
            ours, theirs = method.student()(ids).logits, method.teacher.model(ids).logits
        return float((ours - theirs).var(dim=-1).mean())  # a shift of all logits changes nothing

    solved = error()
    initialize_random(method.projections, 0.02, seed=0)
    assert solved < error()


def test_readers_are_least_squares_of_the_students_own_stream() -> None:
    teacher = tiny_teacher("llama")
    solved = solve_projections(
        teacher, tiny_tokens(24), STUDENT_HIDDEN, shared_head=False
    ).projections
    ids = tiny_tokens(24)
    x = teacher.model.get_input_embeddings()(ids).flatten(0, 1)
    h = x / (x.pow(2).mean(-1, keepdim=True) + teacher.config.rms_norm_eps).sqrt()
    y = x @ solved["embedding"]
    z = y / (y.pow(2).mean(-1, keepdim=True) + teacher.config.rms_norm_eps).sqrt()
    best = torch.linalg.lstsq(z, h).solution
    least = (z @ best - h).square().sum()
    ours = (z @ solved["layers.0.q"].T - h).square().sum()
    assert least < ours < 1.1 * least


@pytest.mark.parametrize("family", LLAMAS)
def test_the_last_tokens_of_a_sequence_are_a_separate_sequence(family: str) -> None:
    """For the teacher and the student."""
    teacher, ids, restart = tiny_teacher(family), tiny_tokens(6), 4
    long, short = slice(0, ids.shape[1] - restart), slice(ids.shape[1] - restart, None)
    with torch.no_grad(), Calibration(teacher, ids, STUDENT_HIDDEN, restart) as calibration:
        *_, last = calibration.teacher_layers()
        found = last.after[slice(0, 6)]
    for part in (long, short):
        with torch.no_grad(), Calibration(teacher, ids[:, part], STUDENT_HIDDEN) as calibration:
            *_, last = calibration.teacher_layers()
            torch.testing.assert_close(found[:, part], last.after[slice(0, 6)])


def test_long_sequences_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("llama")
    whole = tiny_tokens(24)
    length = whole.shape[1] // 2
    before = solve_projections(teacher, whole, STUDENT_HIDDEN, shared_head=False).projections
    monkeypatch.setattr("lrc.cloning.start.closed_form.solve.LENGTH", length)
    monkeypatch.setattr("lrc.cloning.start.closed_form.solve.RESTART", 2)
    halves = whole.reshape(-1, length)
    starts = [
        solve_projections(teacher, ids, STUDENT_HIDDEN, shared_head=False).projections
        for ids in (whole, halves)
    ]
    for key, value in starts[0].items():
        assert torch.equal(value, starts[1][key])
    assert not torch.equal(starts[0]["layers.1.q"], before["layers.1.q"])
    sequences, restart = cut_sequences(torch.arange(3 * 7).view(3, 7), teacher)
    assert (sequences.tolist(), restart) == (torch.arange(3 * length).view(3, -1).tolist(), 2)


def test_the_basis_is_orthonormal_and_a_tied_head_only_rotates_it() -> None:
    teacher, ids = tiny_teacher("llama", tied=True), tiny_tokens(24)
    one = torch.eye(STUDENT_HIDDEN, dtype=torch.float64)
    for shared in (False, True):
        basis = solve_projections(teacher, ids, STUDENT_HIDDEN, shared).projections["embedding"]
        torch.testing.assert_close(basis.T @ basis, one)
        with Calibration(teacher, ids, STUDENT_HIDDEN) as calibration:
            gain = calibration.gain(teacher.family.final_norm) if shared else None
            expected = predictive_basis(stream_statistics(calibration), STUDENT_HIDDEN, gain)
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-9)


def test_the_principal_start_keeps_most_of_the_stream() -> None:
    """More than another subspace of its size. All projections share it."""
    teacher = tiny_teacher("llama", tied=True)
    start = pca_projections(teacher, tiny_tokens(24), STUDENT_HIDDEN, shared_head=True)
    solved, gains = start.projections, start.final_gain
    basis = solved["embedding"]
    scale = (HIDDEN / STUDENT_HIDDEN) ** 0.5  # the mean square is taken over fewer numbers
    for key, value in solved.items():
        reads = key.rpartition(".")[2] in READERS
        torch.testing.assert_close(value, scale * basis if reads else basis)
    with torch.no_grad():
        states = teacher.model(tiny_tokens(24), output_hidden_states=True).hidden_states
    x = torch.cat([state.flatten(0, 1) for state in states[:-1]])  # the last state is normalized
    h = x / (x.square().mean(-1, keepdim=True) + teacher.config.rms_norm_eps).sqrt()
    kept = (h @ basis).square().sum() / h.square().sum()
    other = torch.linalg.qr(torch.randn(HIDDEN, STUDENT_HIDDEN, dtype=h.dtype)).Q
    assert kept > (h @ other).square().sum() / h.square().sum()
    final = teacher.model.get_submodule(teacher.family.final_norm).weight
    expected = scale * torch.diag(basis.T @ torch.diag(final) @ basis)
    torch.testing.assert_close(gains, expected)


@pytest.mark.parametrize("case", TINY_CASES)
def test_the_principal_start_at_the_full_hidden_size_is_the_teacher(case: Case) -> None:
    family, tied, changes = case
    teacher = tiny_teacher(family, tied, **changes)
    student = StudentSection(hidden_size=HIDDEN, tie_projections=False)  # keeps all gains
    method = LowRankClone(teacher, student, ObjectiveSection())
    initialize_from_text(method, "pca", tiny_tokens(24))
    with torch.no_grad():
        theirs, ours = teacher.model(tiny_tokens(3)).logits, method.student()(tiny_tokens(3)).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@settings(deadline=None, max_examples=25)
@given(p=st.integers(1, 9), q=st.integers(1, 7), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_regress_is_weighted_ridge_regression(p: int, q: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v, prior = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((n, p), (n, q), (p, q))
    )
    w = torch.rand(n, 1, dtype=torch.float64, generator=generator) + 0.1
    rows = [(u[: n // 2], v[: n // 2], w[: n // 2]), (u[n // 2 :], v[n // 2 :], w[n // 2 :])]
    found = regress(rows, rows, prior)  # held out on the same rows, nothing is shrunk
    ridge = least_squares.RIDGE * (w * u * u).sum().item() / p
    stacked = np.vstack([(w.sqrt() * u).numpy(), ridge**0.5 * np.eye(p)])
    targets = np.vstack([(w.sqrt() * v).numpy(), ridge**0.5 * prior.numpy()])
    expected = np.linalg.lstsq(stacked, targets, rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_noise_is_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(2, 40, 8, dtype=torch.float64, generator=generator)
    fresh, other = torch.randn(2, 4000, 8, dtype=torch.float64, generator=generator)
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    fit, held_out = [(u, noise, None)], [(fresh, other, None)]
    assert regress(fit, fit, nothing).norm() > 0.5
    assert regress(fit, held_out, nothing).norm() < 0.1


def test_held_out_rows_scale_every_direction() -> None:
    """But never beyond the solution on the fitted rows."""
    generator = torch.Generator().manual_seed(0)

    def orthogonal(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
        return torch.linalg.qr(drawn).Q

    u, fresh = orthogonal(30, 5), orthogonal(50, 5)  # so that the directions do not mix
    left, right = orthogonal(5, 3), orthogonal(4, 3)
    solved, seen = torch.tensor([3.0, 2.0, 1.0]).double(), torch.tensor([0.6, 5.0, -1.0]).double()
    prior = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    found = regress(
        [(u, u @ (prior + left * solved @ right.T), None)],
        [(fresh, fresh @ (prior + left * seen @ right.T), None)],
        prior,
    )
    expected = torch.tensor([0.6, 2 / (1 + least_squares.RIDGE), 0.0]).double()
    torch.testing.assert_close(found, prior + left * expected @ right.T)


def test_the_prior_is_scaled_on_request() -> None:
    u, prior = torch.randn(30, 5).double(), torch.randn(5, 4).double()
    rows = [(u, 2 * u @ prior, None)]
    torch.testing.assert_close(regress(rows, rows, prior, scale_prior=True), 2 * prior)


@pytest.mark.parametrize("shared", [True, False])
def test_the_scale_of_the_logits_is_the_best_on_the_unseen_tokens(
    stories_folder: Path, shared: bool
) -> None:
    teacher = load_teacher(TeacherSection(model=str(stories_folder)))
    text = sample(teacher, 32, 128)
    section = StudentSection(hidden_size=32, tie_projections=shared)
    method = LowRankClone(teacher, section, ObjectiveSection())
    initialize_from_text(method, "closed-form", text)
    unseen = text[-round(len(text) * calibration.HELD_OUT) :]
    with torch.no_grad():
        theirs = torch.log_softmax(teacher.model(unseen).logits, -1)
        logits = method.student()(unseen).logits

    def divergence(scale: float) -> float:
        ours = torch.log_softmax(scale * logits, -1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    assert divergence(1.0) < min(divergence(scale) for scale in (0.5, 0.8, 1.25, 2.0))


def test_square_roots_whiten() -> None:
    rows = torch.randn(50, 6).double() @ torch.randn(6, 6).double() + 3
    moment = second_moment(rows)
    whiten, color = square_roots(moment)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(whiten @ color, eye)
    torch.testing.assert_close(color @ color, 6 * moment / moment.trace() + RIDGE * eye)


def test_refinement_improves_the_start(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it makes the loss on unseen tokens worse, the solved values stay."""
    teacher = load_teacher(TeacherSection(model=str(stories_folder)))
    text = sample(teacher, 64, 128)
    method = LowRankClone(teacher, StudentSection(hidden_size=32), ObjectiveSection())

    def start(epochs: int) -> tuple[float, dict[str, Tensor]]:
        initialize_from_text(method, "closed-form", text[:48], refine_epochs=epochs)
        values = {key: value.detach().clone() for key, value in method.projections.values.items()}
        return held_out_loss(method.student(), [Batch(text[48:])], teacher.vocab_size), values

    (solved, solved_values), (refined, _) = start(0), start(4)
    assert refined < solved - 0.05
    monkeypatch.setattr(refine, "LEARNING_RATE", 1e3)
    last, _ = start(2)
    assert last < solved - 0.05  # only the last layers and the head improve
    monkeypatch.setattr(predictions, "LEARNING_RATE", 1e4)
    diverged, values = start(1)
    assert diverged == solved
    assert all(torch.equal(value, solved_values[key]) for key, value in values.items())


def test_moments_do_not_depend_on_the_batches() -> None:
    u, v = torch.randn(30, 4).double(), torch.randn(30, 3).double()
    whole = moments([(u, v, None)])
    parts = moments([(u[i : i + 7], v[i : i + 7], None) for i in range(0, 30, 7)])
    torch.testing.assert_close(whole, parts)


def test_a_trained_teacher_is_imitated_without_training(stories_folder: Path) -> None:
    teacher = load_teacher(TeacherSection(model=str(stories_folder)))
    section = StudentSection(hidden_size=48, fold_gains=True)
    method = LowRankClone(teacher, section, ObjectiveSection())
    text = sample(teacher, 64, 128)
    held_out = [Batch(text[48:])]

    def loss() -> float:
        return held_out_loss(method.student(), held_out, teacher.vocab_size)

    initialize_random(method.projections, 0.02, seed=0)
    random = loss()
    initialize_from_text(method, "closed-form", text[:48])
    floor = held_out_loss(teacher.model, held_out, teacher.vocab_size)
    assert loss() < floor + 0.5 * (random - floor)
