"""Minitron: prune by activations, then distil from the logits.

Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation (arXiv
2407.14679), and Sreenivas et al., LLM Pruning and Distillation in Practice (arXiv 2408.11796). A
calibration pass scores the teacher's channels, key/value heads, FFN neurons and layers
(`lrc.baselines.pruning.importance`), the highest scores of each fill the student's shape at once,
and the student learns from the teacher's logits.

The loss is the paper's where the recipe says nothing: with this method `objective` is by default
KL alone, at weight 1 and temperature 1. A recipe that gives these weights is followed; comparisons
should, so that all entries learn from the same losses.

Deviations: a key/value head goes with all its query heads, scored together; the outputs of pruned
heads are not added to kept ones; there is no search among shapes; and no loss on hidden states,
which the paper uses where many layers go.
"""

from lrc.baselines.pruned import PrunedStudent
from lrc.baselines.pruning.cut import KeptUnits
from lrc.baselines.pruning.importance import measure_importance
from lrc.cloning.method import Progress
from lrc.data.batch import Batch
from lrc.recipe.method_sections import MinitronSection


class Minitron(PrunedStudent):
    """The parts of the teacher with the largest activations, trained on KL."""

    title = "Minitron's activation-based pruning and distillation (arXiv 2407.14679)"

    def choose(self, calibration: Batch, progress: Progress) -> KeptUnits:
        section = self.recipe.method
        assert isinstance(section, MinitronSection)
        importance = measure_importance(
            self.teacher, calibration, section.over_tokens, section.over_sequences, progress
        )
        return importance.most_important(self.shape)
