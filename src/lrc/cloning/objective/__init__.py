"""The objective of Low-Rank Clone (paper section 3.2), one file per term.

    L = kl_weight * T^2 * D_T(teacher, student) + lm_weight * LM + alpha * sum of clone terms

* D_T (`kl`, `reverse_kl`, `jsd`): the divergence of softmax(logits / T), a mean over tokens. The
  paper uses KL(teacher || student). The official code sums over positions, divides only by the
  batch size and applies no T^2. With sequences of 2,048 tokens and T = 40, this equals 2048 / 1600
  = 1.28 times T^2 times the token mean. Our loss does not depend on the shape of the batch.
* LM (`lm`): the mean next-token cross-entropy over the tokens that have a label.
* Clone terms (`clone`): mean squared differences of activations.

All are pure functions of tensors. The caller passes the counts to average over, so the losses of a
step's micro-batches add up to the loss of the step. Every fast path has a naive reference in the
same file, and the tests compare the two.

To add a divergence, add a file with `divergence` and `reference` here, like `reverse_kl.py`, and
add its name to `Divergence` in `lrc.recipe.sections`.
"""

from lrc.cloning.objective.clone import clone_term, compare_activations, relative_weight
from lrc.cloning.objective.vocabulary import (
    VocabularyLosses,
    VocabularyWeights,
    cap_logits,
    vocabulary_losses,
)

__all__ = [
    "VocabularyLosses",
    "VocabularyWeights",
    "cap_logits",
    "clone_term",
    "compare_activations",
    "relative_weight",
    "vocabulary_losses",
]
