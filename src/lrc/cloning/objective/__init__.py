"""The objective of Low-Rank Clone (paper section 3.2), one file a term.

    L = kl_weight * T^2 * D_T(teacher, student) + lm_weight * LM + alpha * sum of clone terms

* D_T (`kl`, `reverse_kl`, `jsd`): the divergence of softmax(logits / T), a mean over tokens. The
  paper's is KL(teacher || student). The official code sums over positions, divides by the batch
  size only and applies no T^2: with sequences of 2,048 tokens and T = 40 that equals 2048 / 1600 =
  1.28 times T^2 times the token mean. Ours does not depend on the shape of the batch.
* LM (`lm`): the mean next-token cross-entropy over the tokens that have a label.
* Clone terms (`clone`): mean squared differences of activations.

All are pure functions of tensors. The caller gives the counts that means are taken over, so that
the losses of a step's micro-batches add up to the loss of the step. Every fast path has a naive
reference in its file, which the tests compare it with.

To add a divergence, write a file here with `divergence` and `reference`, as in `reverse_kl.py`, and
add its name to `Divergence` in `lrc.recipe.sections`.
"""

from lrc.cloning.objective.clone import clone_term, relative_weight
from lrc.cloning.objective.vocabulary import (
    VocabularyLosses,
    VocabularyWeights,
    vocabulary_losses,
)

__all__ = [
    "VocabularyLosses",
    "VocabularyWeights",
    "clone_term",
    "relative_weight",
    "vocabulary_losses",
]
