"""Minitron: prune by activations, then distill from the logits.

Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation (arXiv
2407.14679), and Sreenivas et al., LLM Pruning and Distillation in Practice (arXiv 2408.11796). A
calibration pass scores the teacher's channels, key/value heads, FFN neurons and layers
(`lrc.baselines.pruning.importance`). The highest scores of each kind fill the student's shape in
one shot. The student then learns from the teacher's logits.

The default loss is the paper's: for this method `objective` defaults to KL alone, at weight 1 and
temperature 1. A recipe can set other weights. Comparisons should do so, so that all entries learn
from the same losses.

Deviations: a key/value head is removed with all its query heads, which are scored together. The
outputs of pruned heads are not added to kept ones. Layers are ranked one by one, not removed as one
block. There is no search among shapes. There is no loss on hidden states, which the paper uses when
it removes many layers.
"""

from lrc.baselines.pruned import PrunedStudent
from lrc.baselines.pruning.importance import measure_importance
from lrc.data.batch import Batch
from lrc.model.kept_units import KeptUnits
from lrc.recipe.method_sections import MinitronSection
from lrc.system.progress import Progress


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
