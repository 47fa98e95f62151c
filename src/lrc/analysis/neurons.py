"""Factual accuracy when the FFN neurons that are most active on factual questions are masked.

This is the FFN experiment of arXiv 2505.12781 (Table 5). The teacher's neurons that are most active
on factual questions are masked in the teacher and, by the same indices, in its student. If the
student's accuracy falls too, but does not fall with the same number of random neurons masked, the
student keeps its teacher's knowledge in the same neurons.

The paper masks 50 neurons. It does not say which tokens it takes "high activations" over, whether
the 50 are of the whole model or of each layer, or where the random ones lie. Here the neurons are
those of the whole model with the largest mean absolute value over all tokens of the prompts. The
random ones are other neurons of the same layers. The neurons are selected on a random half of the
questions, drawn with the seed. Accuracies are reported for this half and for the held-out half.
"""

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.analysis.masking import Positions, activity, draw_others, masked, most_active
from lrc.analysis.questions import Questions, questions_of_file, questions_of_task
from lrc.data.batch import Batch
from lrc.evaluation.harness import evaluate_rows, harness_model, harness_version, prompts
from lrc.evaluation.subject import RUNS_TEACHER, Subject, find_subjects
from lrc.model.layout import LinearSite, layout_of
from lrc.model.teacher import load_model, load_skeleton
from lrc.recipe.sections import Section
from lrc.system.environment import describe_environment
from lrc.system.errors import UserError
from lrc.system.files import write_text
from lrc.system.progress import Task, task

logger = logging.getLogger(__name__)

PUBLISHED_COUNT = 50
"""Number of neurons that the paper masks."""


@dataclass(frozen=True)
class NeuronSettings:
    """The settings of the experiment, except the models."""

    task: str = "sciq"
    """The harness task that supplies the questions."""
    questions: Path | None = None
    """A question file that replaces the task."""
    data: Path | None = None
    """Folder of the task's rows; None: from the hub."""
    limit: int | None = None
    """Number of questions, from the start; None: all."""
    neurons: int | None = None
    """Number of neurons to mask. None: `share`, or as many as the paper masks."""
    share: float | None = None
    """Share of all neurons to mask, instead of a number."""
    per_layer: bool = False
    """Whether the number or share applies to each layer, not to the whole model."""
    positions: Positions = "all"
    """Which tokens of a prompt the activity is averaged over."""
    random_draws: int = 3
    """Number of draws of random neurons to mask."""
    seed: int = 0
    """Seed of the halves and of the draws."""
    batch_size: int = 16
    """Sequences per forward pass."""
    dtype: str = "auto"
    """Element type of the models; `auto`: as stored."""
    device: str = "cpu"
    """Device name, as in torch."""


class Accuracy(Section):
    """Accuracy on some questions."""

    value: float
    stderr: float
    """Standard error of the value."""
    questions: int


class Halves(Section):
    """Accuracies on the two halves of the questions."""

    apart: Accuracy
    """On the held-out questions, which do not affect the selection of neurons."""
    selection: Accuracy
    """On the questions used to select the neurons."""


class ModelAnswers(Section):
    """A model's accuracies, unmasked and masked."""

    name: str
    unmasked: Halves
    important: Halves
    random: tuple[Halves, ...]
    """One per draw."""


class NeuronResult(Section):
    """The experiment's result: the content of neurons.json."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    questions: str
    """The task, or the question file."""
    layers: int
    width: int
    """FFN width: neurons per layer."""
    important: tuple[tuple[int, int], ...]
    """The masked neurons, each as layer and index."""
    by_layer: tuple[int, ...]
    """Number of masked neurons in each layer."""
    student_by_layer: tuple[int, ...]
    """The same for neurons selected by the student's own activity."""
    shared: int
    """Number of neurons in both selections."""
    teacher: ModelAnswers
    student: ModelAnswers


def analyze_neurons(
    model: str, teacher: str | None, settings: NeuronSettings, out: Path
) -> NeuronResult:
    """Run the experiment; neurons.json is written at the end.

    Args:
        model: the student: a run's folder or anything that `lrc.model.teacher.load_model` takes.
        teacher: its teacher, in the same form; None: the run's.
        settings: all other settings.
        out: folder for the results.

    Raises:
        UserError: if the models do not match, or a model or the questions are not usable.
    """
    student_subject, teacher_subject = _pair(model, teacher)
    layers, width = _shared_shape(student_subject, teacher_subject)
    count = _count(settings, layers, width)
    with tempfile.TemporaryDirectory(prefix="lrc-analyze-") as scratch:
        questions = _questions(settings, Path(scratch))
        selection = _half(questions.rows(settings.limit), settings.seed)
        passes = _Passes(2 * (3 + settings.random_draws))
        bench = _Bench(teacher_subject, "teacher", questions, settings, passes)
        important = most_active(bench.activity(selection), count, settings.per_layer)
        generator = torch.Generator().manual_seed(settings.seed)
        draws = [draw_others(important, generator) for _ in range(settings.random_draws)]
        of_teacher = bench.answers(important, draws, selection)
        del bench  # one model in memory at a time
        bench = _Bench(student_subject, "student", questions, settings, passes)
        own = most_active(bench.activity(selection), count, settings.per_layer)
        of_student = bench.answers(important, draws, selection)
        source = questions.source if settings.questions else questions.name
    result = NeuronResult(
        settings=_told(settings, count, questions),
        environment=describe_environment(),
        questions=source,
        layers=layers,
        width=width,
        important=tuple((layer, index) for layer, index in important.nonzero().tolist()),
        by_layer=tuple(important.sum(1).tolist()),
        student_by_layer=tuple(own.sum(1).tolist()),
        shared=int((own & important).sum()),
        teacher=of_teacher,
        student=of_student,
    )
    write_text(out / "neurons.json", json.dumps(result.model_dump(), indent=1) + "\n")
    return result


class _Bench:
    """A loaded model that answers the questions."""

    def __init__(
        self,
        subject: Subject,
        role: str,
        questions: Questions,
        settings: NeuronSettings,
        passes: "_Passes",
    ) -> None:
        self._role, self._questions, self._settings, self._passes = (
            role,
            questions,
            settings,
            passes,
        )
        self._name = subject.name
        logger.info("Loading %s", subject.name)
        self._model, tokenizer = load_model(subject.source, settings.dtype, subject.revision)
        self._model.to(settings.device).eval()
        self._layout = layout_of(self._model)
        self._lm = harness_model(self._model, tokenizer, settings.batch_size)

    def activity(self, selection: Sequence[int]) -> Tensor:
        """Mean activity of every neuron on some questions."""
        rows = prompts(self._lm, self._questions.task, self._settings.limit)
        batches = list(_batches([ids for row in selection for ids in rows[row]], self._settings))
        with self._passes.next(f"{self._role}: activity") as shown:

            def counted() -> Iterator[Batch]:
                for done, batch in enumerate(batches):
                    shown.update(done, len(batches))
                    yield batch
                shown.update(len(batches), len(batches))

            return activity(self._model, self._layout, counted(), self._settings.positions)

    def answers(
        self, important: Tensor, draws: Sequence[Tensor], selection: Sequence[int]
    ) -> ModelAnswers:
        """Accuracies without a mask, with the important neurons masked, and with each draw."""
        nothing = torch.zeros_like(important)
        return ModelAnswers(
            name=self._name,
            unmasked=self._masked("unmasked", nothing, selection),
            important=self._masked("important neurons masked", important, selection),
            random=tuple(
                self._masked(f"random neurons masked, draw {number}", draw, selection)
                for number, draw in enumerate(draws, 1)
            ),
        )

    def _masked(self, what: str, neurons: Tensor, selection: Sequence[int]) -> Halves:
        questions, chosen = self._questions, set(selection)
        with (
            self._passes.next(f"{self._role}: {what}") as shown,
            masked(self._model, self._layout, neurons),
        ):
            task, limit = questions.task, self._settings.limit
            right = evaluate_rows(self._lm, questions.manager, task, limit, shown.update)
        halves = Halves(
            apart=_accuracy([v for row, v in enumerate(right) if row not in chosen]),
            selection=_accuracy([v for row, v in enumerate(right) if row in chosen]),
        )
        logger.info(
            f"{self._role}, {what}: accuracy {halves.apart.value:.3f} on the held-out questions, "
            f"{halves.selection.value:.3f} on the others"
        )
        return halves


class _Passes:
    """Numbered progress of the passes over the questions."""

    def __init__(self, passes: int) -> None:
        self._passes, self._begun = passes, 0

    def next(self, text: str) -> AbstractContextManager[Task]:
        """Show the progress of the next pass."""
        self._begun += 1
        return task(f"{text} ({self._begun} of {self._passes})", unit="answers")


def _pair(model: str, teacher: str | None) -> tuple[Subject, Subject]:
    """The student and its teacher.

    Raises:
        UserError: if the teacher is not known or is the model itself.
    """
    if teacher is None and find_subjects(model, [])[0].run is None:
        raise UserError(f"{model} is not a run, so name its teacher with --teacher.")
    subjects = find_subjects(model, [teacher or RUNS_TEACHER])
    if len(subjects) < 2:
        raise UserError("Model and teacher are the same; give --teacher another model.")
    return subjects[0], subjects[1]


def _shared_shape(student: Subject, teacher: Subject) -> tuple[int, int]:
    """Layers and FFN width of both models, found before their weights are read.

    Raises:
        UserError: if they differ, or a family is not known.
    """
    shapes = []
    for subject in (student, teacher):
        skeleton = load_skeleton(subject.source, subject.revision)
        layout = layout_of(skeleton)
        if layout.has_experts:
            raise UserError(
                f"{subject.name} has experts, whose neurons see only some tokens: give a dense "
                "model."
            )
        downs = {LinearSite(layer, "down") for layer in range(layout.num_layers)}
        if not downs.issubset(layout.sites()):
            raise UserError(
                f"{subject.name} has layers without an FFN: give a model with one in every layer."
            )
        down = skeleton.get_submodule(layout.linear(LinearSite(0, "down")))
        shapes.append((layout.num_layers, int(down.get_parameter("weight").shape[1])))
    if shapes[0] != shapes[1]:
        ours, theirs = (f"{layers} layers of FFN width {width}" for layers, width in shapes)
        raise UserError(
            f"{student.name} has {ours} and {teacher.name} {theirs}, so their neurons do not "
            "correspond; give a student that keeps its teacher's layers and FFN width."
        )
    return shapes[0]


def _count(settings: NeuronSettings, layers: int, width: int) -> int:
    """Number of neurons to mask, in the model or in each layer.

    Raises:
        UserError: if number and share are both given, or there are too few neurons.
    """
    whole = width if settings.per_layer else layers * width
    if settings.share is not None:
        if settings.neurons is not None:
            raise UserError("Give --neurons or --share, not both.")
        count = max(1, round(settings.share * whole))
    else:
        count = PUBLISHED_COUNT if settings.neurons is None else settings.neurons
    if 2 * count > whole:
        where = "a layer" if settings.per_layer else "the model"
        raise UserError(
            f"{count:,} neurons are more than half of the {whole:,} of {where}, which leaves too "
            "few others to compare with: give a smaller --neurons or --share."
        )
    return count


def _questions(settings: NeuronSettings, scratch: Path) -> Questions:
    if settings.questions is None:
        limited = settings.limit is not None
        return questions_of_task(settings.task, settings.data, limited, scratch)
    if settings.data is not None:
        raise UserError("--data holds rows of a task; give --data or --questions, not both.")
    return questions_of_file(settings.questions, scratch)


def _half(rows: int, seed: int) -> list[int]:
    """Numbers of the questions in a random half, which selects the neurons.

    Raises:
        UserError: if there are too few questions.
    """
    if rows < 2:
        raise UserError("Half of the questions select the neurons: give two or more questions.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: rows // 2].tolist())


def _batches(rows: Sequence[list[int]], settings: NeuronSettings) -> Iterator[Batch]:
    """Prompts padded on the right, in batches of similar length."""
    ordered = sorted(rows, key=len)
    for first in range(0, len(ordered), settings.batch_size):
        part = [torch.tensor(ids) for ids in ordered[first : first + settings.batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        lengths = torch.tensor([len(row) for row in part])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        yield Batch(ids, attention_mask=mask)


def _accuracy(right: Sequence[float]) -> Accuracy:
    """Share of right answers, with the standard error of the mean as the harness computes it."""
    mean = sum(right) / len(right)
    squares = sum((value - mean) ** 2 for value in right)
    error = math.sqrt(squares / max(len(right) - 1, 1) / len(right))
    return Accuracy(value=mean, stderr=error, questions=len(right))


def _told(settings: NeuronSettings, count: int, questions: Questions) -> dict[str, Any]:
    """The settings that determine the numbers."""
    return {
        "questions": questions.source,
        "limit": settings.limit,
        "count": count,
        "per_layer": settings.per_layer,
        "positions": settings.positions,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "device": torch.device(settings.device).type,
        "lm_eval": harness_version(),
    }
