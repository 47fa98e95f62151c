"""Held-out loss of a model, and how far a student agrees with its teacher."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lrc.activations import last_hidden
from lrc.data.batch import Batch
from lrc.teacher import Teacher

CHUNK = 128
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Agreement:
    """A student beside its teacher on the same tokens."""

    teacher_loss: float
    """The teacher's mean next-token cross-entropy, in nats."""
    student_loss: float
    """The student's."""
    kl: float
    """Mean over tokens of KL(teacher || student) at temperature 1, in nats."""
    top1: float
    """Share of tokens where both predict the same next token."""
    tokens: int
    """Labels measured."""


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: Iterable[Batch], vocab: int) -> float:
    """Mean next-token cross-entropy in nats over the first `vocab` token ids."""
    total, count = 0.0, 0
    for batch in batches:
        hidden, labels = _labelled(last_hidden(model, batch), batch)
        for logits, target in _chunks(model, hidden, labels, vocab):
            total += functional.cross_entropy(logits, target, reduction="sum").item()
        count += len(labels)
    return total / count


@torch.no_grad()
def measure_agreement(
    teacher: Teacher, student: PreTrainedModel, batches: Iterable[Batch]
) -> Agreement:
    """Losses of both models, their KL divergence and top-1 agreement on the same tokens."""
    teacher_loss = student_loss = kl = same = 0.0
    count = 0
    for batch in batches:
        theirs, labels = _labelled(last_hidden(teacher.model, batch), batch)
        ours, _ = _labelled(last_hidden(student, batch), batch)
        pairs = zip(
            _chunks(teacher.model, theirs, labels, teacher.vocab_size),
            _chunks(student, ours, labels, teacher.vocab_size),
            strict=True,
        )
        for (teacher_logits, target), (student_logits, _) in pairs:
            t, s = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
            teacher_loss += functional.nll_loss(t, target, reduction="sum").item()
            student_loss += functional.nll_loss(s, target, reduction="sum").item()
            kl += functional.kl_div(s, t, reduction="sum", log_target=True).item()
            same += (t.argmax(-1) == s.argmax(-1)).sum().item()
        count += len(labels)
    return Agreement(teacher_loss / count, student_loss / count, kl / count, same / count, count)


def _labelled(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states [n, d] and the labels [n] of the tokens that have a label."""
    labels = batch.labels()
    kept = labels >= 0
    return hidden[kept], labels[kept]


def _chunks(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, vocab: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [chunk, vocab], in float32 at least, with their labels [chunk]."""
    head = model.get_output_embeddings().weight[:vocab]
    for states, target in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True):
        logits = states.to(head.dtype) @ head.T
        yield logits.to(torch.promote_types(logits.dtype, torch.float32)), target
