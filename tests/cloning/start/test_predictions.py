"""Refinement of the last layers and the head on the teacher's predictions."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.projection import projection_key
from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form import predictions
from lrc.cloning.start.closed_form import solve as closed_form
from lrc.data.batch import Batch
from lrc.evaluation.held_out import measure_agreement
from lrc.model.teacher import Teacher
from lrc.recipe.sections import ObjectiveSection, StudentSection
from tiny import (
    LLAMAS,
    STUDENT_HIDDEN,
    TOKENS,
    in_turn,
    initialize_from_text,
    tiny_teacher,
    tiny_tokens,
)

LAYERS = 4
REFINED = 2
"""The last two of four layers are refined."""


def leave_ffns_alone(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Refine only the last layers and the head. The list gets one item per FFN that would have been
    refined."""
    asked: list[None] = []

    def solved(*arguments: Any) -> dict[str, Tensor]:
        asked.append(None)
        start: Mapping[str, Tensor] = arguments[5]
        return {name: start[name] for name in ("gate", "up")}

    monkeypatch.setattr(closed_form, "refine_ffn", solved)
    return asked


def start(teacher: Teacher, ids: Tensor, tied: bool, epochs: int) -> LowRankClone:
    section = StudentSection(hidden_size=STUDENT_HIDDEN, tie_projections=tied)
    method = LowRankClone(teacher, section, ObjectiveSection())
    initialize_from_text(method, "closed-form", ids, refine_epochs=epochs)
    return method


@pytest.mark.parametrize(("family", "tied"), in_turn(LLAMAS, [False, True]))
def test_refinement_improves_predictions(
    family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the exported student, on unseen tokens. Nothing before the last layers changes."""
    ffns = leave_ffns_alone(monkeypatch)
    monkeypatch.setattr(predictions, "STEP_TOKENS", 120)
    teacher = tiny_teacher(family, tied=tied, num_hidden_layers=LAYERS)
    ids = tiny_tokens(400, seed=3)
    solved, refined = (start(teacher, ids, tied, epochs) for epochs in (0, 3))
    assert len(ffns) == LAYERS - REFINED
    unseen = [Batch(ids[350:])]
    before, after = (measure_agreement(teacher, m.student(), unseen).kl for m in (solved, refined))
    assert after < 0.985 * before
    for site in teacher.layout.sites() if not tied else ():  # a tied student is rotated again
        key = projection_key(site)
        same = torch.equal(solved.projections.values[key], refined.projections.values[key])
        assert same == (site.layer < LAYERS - REFINED)


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("biases", [False, True])
def test_the_refined_layers_compute_what_the_student_computes(family: str, biases: bool) -> None:
    """The last hidden states equal those of the student with the same projections."""
    changes = {"attention_bias": True, "mlp_bias": True} if biases and family == "llama" else {}
    teacher = tiny_teacher(family, num_hidden_layers=LAYERS, **changes)
    ids = tiny_tokens(8, seed=3)
    method = start(teacher, ids, False, 0)
    student = method.student()
    with torch.no_grad():
        states = student.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        final: list[Tensor] = []
        hook = student.model.norm.register_forward_pre_hook(lambda _, x: final.append(x[0]))
        student.model(ids, use_cache=False)
        hook.remove()
    with torch.no_grad(), Calibration(teacher, ids, STUDENT_HIDDEN) as calibration:
        last = predictions.LastLayers(calibration)
        assert last.first == LAYERS - REFINED
        stream = calibration.stream(STUDENT_HIDDEN)
        stream[slice(0, len(ids))] = states[last.first]
        last.begin(stream)
        last.write(stream, method.projections.values)
        torch.testing.assert_close(stream[slice(0, len(ids))], final[0], rtol=1e-5, atol=1e-6)


def test_the_lm_loss_has_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """On text that the teacher does not expect, more weight for the LM loss lowers that loss and
    increases the KL divergence."""
    leave_ffns_alone(monkeypatch)
    monkeypatch.setattr(predictions, "STEP_TOKENS", 120)
    teacher = tiny_teacher("llama", tied=False, num_hidden_layers=LAYERS)
    ids = (
        tiny_tokens(400, seed=3)[:, :1] + torch.arange(12)
    ) % TOKENS  # every token is the last one plus one
    found = []
    for weight in (0.0, 0.2):
        monkeypatch.setattr(predictions, "LM_WEIGHT", weight)
        student = start(teacher, ids, False, 3).student()
        found.append(measure_agreement(teacher, student, [Batch(ids[350:])]))
    without, with_lm = found
    assert with_lm.student_loss < without.student_loss - 0.2
    assert with_lm.kl > without.kl


def test_every_token_counts_once_in_two_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_ffns_alone(monkeypatch)
    monkeypatch.setattr(predictions, "STEP_TOKENS", 36)
    ids = tiny_tokens(40, seed=3)
    learnt: list[Tensor] = []
    plain = predictions.vocabulary_losses

    def seen(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            learnt.append(arguments[4])
        return plain(*arguments)

    monkeypatch.setattr(predictions, "vocabulary_losses", seen)
    start(tiny_teacher("llama", num_hidden_layers=LAYERS), ids, False, 2)
    first, second = learnt[: len(learnt) // 2], learnt[len(learnt) // 2 :]
    both = [torch.stack(pair, 1).flatten() for pair in zip(first, second, strict=True)]
    torch.testing.assert_close(torch.cat(both), Batch(ids[:35]).labels().flatten())
