"""The losses over the vocabulary, KL + LM, as the methods share them."""

from torch import Tensor
from transformers import PreTrainedModel

from lrc.data.batch import Batch
from lrc.methods.base import Counts
from lrc.objective import VocabularyLosses, VocabularyWeights, vocabulary_losses
from lrc.sections import ObjectiveSection
from lrc.teacher import Teacher


def learn_vocabulary(
    teacher: Teacher,
    student: PreTrainedModel,
    teacher_hidden: Tensor | None,
    student_hidden: Tensor,
    batch: Batch,
    counts: Counts,
    objective: ObjectiveSection,
) -> VocabularyLosses:
    """KL and LM losses of a micro-batch, weighted as the recipe says.

    Args:
        teacher: the teacher.
        student: the student.
        teacher_hidden: the teacher's last hidden state [b, s, d_T]; None where the KL has no
            weight.
        student_hidden: the student's, [b, s, d_S].
        batch: the tokens.
        counts: what the losses are averaged over.
        objective: weights, temperature and chunk size.
    """
    mask = batch.token_mask()
    student_rows = student_hidden.flatten(0, 1)
    if teacher_hidden is None:
        teacher_hidden = student_hidden.new_empty(0, 0, teacher.hidden_size)
        objective = objective.model_copy(update={"kl_weight": 0.0})
    return vocabulary_losses(
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
        ),
    )
