"""Held-out loss of a model, and agreement of a student with its teacher."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lrc.cloning.activations import last_hidden
from lrc.cloning.objective import cap_logits
from lrc.data.batch import Batch
from lrc.data.by_source import SourceLosses
from lrc.model.families import family_of
from lrc.model.precision import upcast
from lrc.model.teacher import Teacher
from lrc.system.distributed import ALONE, World

CHUNK = 128
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class Agreement:
    """A student compared with its teacher on the same tokens."""

    teacher_loss: float
    """The teacher's mean next-token cross-entropy, in nats."""
    student_loss: float
    """The student's mean next-token cross-entropy, in nats."""
    kl: float
    """Mean over tokens of KL(teacher || student) at temperature 1, in nats."""
    top1: float
    """Share of tokens where both predict the same next token."""
    tokens: int
    """Number of labels measured."""
    by_source: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    """If the text has several sources, for each one: the teacher's loss, the student's loss, and
    the number of labels that they are means over."""


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    vocab: int,
    by_source: SourceLosses | None = None,
    world: World = ALONE,
) -> float:
    """Mean next-token cross-entropy in nats over the first `vocab` token ids.

    Args:
        model: the model.
        batches: the text, the same in all processes.
        vocab: number of token ids.
        by_source: the losses of tokens with a known source are added to it.
        world: the processes to share the batches among; all get the result.
    """
    measured: list[tuple[float, int, dict[str, Tensor]]] = []
    every = list(batches)
    for batch in every[world.rank :: world.size]:
        hidden, labels = _labeled(last_hidden(model, batch), batch)
        losses = [
            functional.cross_entropy(logits, target, reduction="none")
            for logits, target in _chunks(model, hidden, labels, vocab)
        ]
        of_batch = SourceLosses(by_source.names if by_source else ())
        _add(of_batch, losses, batch)
        totals = {name: value.cpu() for name, value in of_batch.totals.items()}
        measured.append((sum(chunk.sum().item() for chunk in losses), len(labels), totals))
    if len(measured) < math.ceil(len(every) / world.size):
        last_hidden(model, every[0])  # all processes must run a sharded model equally often
    total, count = 0.0, 0
    for of_all in zip_longest(*world.gather(measured)):  # in the order of the batches
        for loss, labeled, totals in filter(None, of_all):
            total += loss
            count += labeled
            if by_source is not None:
                by_source.merge(totals)
    return total / count


@torch.no_grad()
def measure_agreement(
    teacher: Teacher,
    student: PreTrainedModel,
    batches: Iterable[Batch],
    sources: Sequence[str] = (),
) -> Agreement:
    """Losses of both models, their KL divergence and top-1 agreement on the same tokens.

    Args:
        teacher: the teacher.
        student: the student.
        batches: the text.
        sources: names of the sources; the batches hold their numbers.
    """
    teacher_loss = student_loss = kl = same = 0.0
    count = 0
    by_source = [SourceLosses(sources) for _ in range(2)]
    for batch in batches:
        losses: list[list[Tensor]] = [[], []]
        theirs, labels = _labeled(last_hidden(teacher.model, batch), batch)
        ours, _ = _labeled(last_hidden(student, batch), batch)
        pairs = zip(
            _chunks(teacher.model, theirs, labels, teacher.vocab_size),
            _chunks(student, ours, labels, teacher.vocab_size),
            strict=True,
        )
        for (teacher_logits, target), (student_logits, _) in pairs:
            t, s = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
            for log_probabilities, of_model in zip((t, s), losses, strict=True):
                of_model.append(functional.nll_loss(log_probabilities, target, reduction="none"))
            teacher_loss += losses[0][-1].sum().item()
            student_loss += losses[1][-1].sum().item()
            kl += functional.kl_div(s, t, reduction="sum", log_target=True).item()
            same += (t.argmax(-1) == s.argmax(-1)).sum().item()
        count += len(labels)
        for sums, of_model in zip(by_source, losses, strict=True):
            _add(sums, of_model, batch)
    means, labels_of = [sums.means() for sums in by_source], by_source[0].labels()
    return Agreement(
        teacher_loss / count,
        student_loss / count,
        kl / count,
        same / count,
        count,
        {name: (means[0][name], means[1][name], n) for name, n in labels_of.items()},
    )


def _add(by_source: SourceLosses | None, losses: Sequence[Tensor], batch: Batch) -> None:
    """Add the losses of a batch's labeled tokens, given as chunks, to those of their sources."""
    sources = batch.label_sources()
    if by_source is not None and sources is not None:
        by_source.add(torch.cat(list(losses)), sources[sources >= 0])


def _labeled(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states [n, d] and the labels [n] of the tokens that have a label."""
    labels = batch.labels()
    kept = labels >= 0
    return hidden[kept], labels[kept]


def _chunks(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, vocab: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [chunk, vocab], in at least float32, with their labels [chunk]."""
    head = model.get_output_embeddings().weight[:vocab]
    softcap = family_of(model.config.model_type).logit_softcap(model.config)
    for states, target in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True):
        logits = upcast(states.to(head.dtype) @ head.T)
        cap_logits(logits, softcap)
        yield logits, target
