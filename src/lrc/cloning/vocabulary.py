"""The losses over the vocabulary, KL + LM, which the methods share."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.method import Counts, StepLosses
from lrc.cloning.objective import VocabularyWeights, vocabulary_losses
from lrc.data.batch import Batch
from lrc.model.teacher import Teacher
from lrc.recipe.sections import ObjectiveSection


def kl_and_lm_losses(
    teacher: Teacher,
    student: PreTrainedModel,
    teacher_hidden: Tensor | None,
    student_hidden: Tensor,
    batch: Batch,
    counts: Counts,
    objective: ObjectiveSection,
) -> StepLosses:
    """The divergence and LM losses of a micro-batch. Without the teacher, there is no divergence.

    Args:
        teacher: the teacher.
        student: the student.
        teacher_hidden: the teacher's last hidden state [b, s, d_T]; None if the KL has no weight.
        student_hidden: the student's, [b, s, d_S].
        batch: the tokens.
        counts: the numbers of tokens and labels to average over.
        objective: weights, temperature and chunk size.
    """
    mask = batch.token_mask()
    student_rows = student_hidden.flatten(0, 1)
    without_teacher = teacher_hidden is None
    if teacher_hidden is None:
        teacher_hidden = student_hidden.new_empty(0, 0, teacher.hidden_size)
        objective = objective.model_copy(update={"kl_weight": 0.0})
    token_lm = None
    if batch.source_ids is not None:
        token_lm = torch.empty_like(batch.input_ids, dtype=torch.float32)
    losses = vocabulary_losses(
        student_rows,
        student.get_output_embeddings().weight,
        teacher_hidden.flatten(0, 1),
        teacher.model.get_output_embeddings().weight,
        batch.labels().flatten(),
        None if mask is None else mask.flatten(),
        VocabularyWeights(
            objective.kl_weight,
            objective.lm_weight,
            objective.temperature,
            counts.tokens,
            counts.labels,
            teacher.vocab_size,
            objective.chunk_tokens,
            objective.divergence,
            objective.jsd_beta,
        ),
        None if token_lm is None else token_lm.view(-1),
    )
    terms: dict[str, Tensor] = {}
    if not without_teacher:
        terms[objective.divergence] = losses.divergence
    terms["lm"] = losses.lm
    return StepLosses(losses.weighted, terms, token_lm=token_lm)
