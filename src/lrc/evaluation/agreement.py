"""The task `heldout`: perplexity on held-out text and agreement with a teacher."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.data import open_text, read_documents, source_files
from lrc.data.batch import Batch, separated
from lrc.data.opening import identity_of, shards_of
from lrc.data.packing import encode
from lrc.evaluation.held_out import measure_agreement, perplexity
from lrc.evaluation.results import HELD_OUT, Score, TaskResult
from lrc.evaluation.subject import Subject, fingerprint_of
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import DataSection, TeacherSection, TrainSection
from lrc.system.errors import UserError
from lrc.system.progress import Progress


@dataclass(frozen=True)
class HeldOut:
    """A teacher and the text on which models are compared with it."""

    teacher: TeacherSection
    data: DataSection
    recipe: Recipe | None
    """The recipe that defines the held-out text; None if all of `data.text` is held out."""
    sequences: int
    batch_size: int

    def key(self) -> dict[str, Any]:
        """Everything that determines the numbers, except the measured model."""
        return {
            "teacher": fingerprint_of(self.teacher.model, self.teacher.revision),
            "teacher_settings": self.teacher.model_dump(exclude={"model", "license"}),
            "files": [list(file) for file in source_files(self._sources(), held_out=True)],
            **({"shards": identity_of(shards_of(self.data))} if self.data.shards else {}),
            "data": self.data.model_dump(exclude={"text", "held_out", "cache"}),
            "whole": self.recipe is None,
            "sequences": self.sequences,
        }

    def _sources(self) -> list[str]:
        return self.data.text + self.data.held_out

    def batches(self, tokenizer: Tokenizer, first_token: int | None = None) -> list[Batch]:
        """The sequences, packed as for training.

        Args:
            tokenizer: the teacher's tokenizer.
            first_token: token that takes the place of every sequence's first; None: it stays.

        Raises:
            UserError: if the text cannot be read or is too short.
        """
        if self.recipe is not None:
            text = open_text(self.recipe, tokenizer, first_token=first_token)
            return list(text.held_out_batches(self.sequences, self.batch_size))
        rows = list(islice(pack(self.data, tokenizer), self.sequences))
        if not rows:
            raise UserError(
                f"{', '.join(self.data.text)} has less than one sequence of "
                f"{self.data.sequence_length} tokens; give --text more text."
            )
        ids = torch.tensor(rows)
        if first_token is not None:
            ids[:, 0] = first_token
        return [Batch(part) for part in torch.split(ids, self.batch_size)]


def held_out_of(
    subject: Subject, teacher: str | None, text: list[str], limit: int | None
) -> HeldOut:
    """Teacher and text: the run's own, unless others are given.

    Args:
        subject: the first evaluated model.
        teacher: a teacher to use instead of the run's; required if the model is not a run.
        text: text to use instead of the run's held-out text, all of it held out; required if the
            model is not a run.
        limit: number of sequences; None: as many as the run measures.

    Raises:
        UserError: if the model is not a run, and teacher or text is missing.
    """
    recipe = subject.run.recipe if subject.run else None
    if recipe is None and not (teacher and text):
        raise UserError(
            f"{subject.name} is not a run, so `{HELD_OUT}` needs a teacher to compare with and "
            "held-out text: give --teacher and --text."
        )
    section = TeacherSection(model=teacher) if teacher or not recipe else recipe.teacher
    data = recipe.data if recipe else DataSection(text=text)
    train = recipe.train if recipe else TrainSection()
    if text:
        only: dict[str, Any] = {
            "held_out": [],
            "shards": [],
            "stream": None,
            "document_mask": False,
        }
        data, recipe = data.model_copy(update={"text": text, **only}), None
    return HeldOut(section, data, recipe, limit or train.eval_sequences, train.micro_batch)


def pack(data: DataSection, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Sequences of token ids from concatenated documents, each framed by bos and eos."""
    rest: list[int] = []
    for document in read_documents(data.text, data.text_field, held_out=True):
        rest += encode(tokenizer, [document], data.parse_special_tokens)[0]
        while len(rest) >= data.sequence_length:
            yield rest[: data.sequence_length]
            rest = rest[data.sequence_length :]


def measure(
    held_out: HeldOut,
    teacher: Teacher,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    progress: Progress,
) -> TaskResult:
    """Compare a model with the teacher.

    Metrics: `lm_loss` and `perplexity` of the model, `teacher_lm_loss`, `kl` (mean
    KL(teacher || model) at temperature 1, nats) and `top1` (share of tokens where both predict the
    same next token).

    Raises:
        UserError: if the two have different vocabularies.
    """
    start = time.perf_counter()
    if tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UserError(
            f"The model and the teacher {teacher.name} have different vocabularies, so their "
            "predictions cannot be compared; give --teacher a model with the same tokenizer."
        )
    sequences = held_out.batches(teacher.tokenizer, teacher.first_token)
    batches = list(separated(sequences, teacher.family.keeps_documents_apart))

    def counted() -> Iterator[Batch]:
        for done, batch in enumerate(batches):
            progress(done, len(batches))
            yield batch.to(teacher.model.device)
        progress(len(batches), len(batches))

    model.eval()
    found = measure_agreement(teacher, model, counted())
    metrics = {
        "lm_loss": found.student_loss,
        "perplexity": perplexity(found.student_loss),
        "teacher_lm_loss": found.teacher_loss,
        "kl": found.kl,
        "top1": found.top1,
    }
    rows = sum(len(batch.input_ids) for batch in sequences)
    return TaskResult(
        task=HELD_OUT,
        metrics={metric: Score(value=value) for metric, value in metrics.items()},
        rows=rows,
        rows_in_all=rows,
        seconds=round(time.perf_counter() - start, 1),
    )
