"""LLM-Pruner: remove the least important heads and FFN neurons, then recover by training.

Source: Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models (arXiv
2305.11627). Importance comes from a Taylor expansion of the LM loss on calibration text
(`lrc.baselines.pruning.taylor`). The hidden size does not change: this is the paper's block-wise
strategy, which it found far better than pruning channels. The defaults are those of the official
code: first order per weight, summed over a group.

Deviations:

* Every layer loses the same number of key/value heads (with their query heads) and of neurons,
  since the plain class allows nothing else. The paper leaves the first and the last layers unpruned
  and prunes the others more.
* Calibration is on training text, by default on more of it than the official code's ten sequences.
* Recovery is on KL + LM with the recipe's weights, of all model weights or by LoRA. The paper's
  recovery is by LoRA, on instructions and LM alone, with a dropout of 0.05 that is omitted here.

Without a ratio the student has as many parameters as LRC's with the same `student.hidden_size`.
Some families (Llama) need a hidden size that is a multiple of the number of heads, so only some
numbers of heads are possible; the number of neurons makes up the difference.
"""

import copy
import math

from torch import Tensor
from transformers import PreTrainedModel

from lrc.baselines.lora import add_adapters, write_base, write_merged
from lrc.baselines.plain import random_student
from lrc.baselines.pruned import PrunedStudent
from lrc.baselines.pruning.budget import Budget
from lrc.baselines.pruning.importance import largest
from lrc.baselines.pruning.shape import teacher_shape
from lrc.baselines.pruning.size import parameter_count
from lrc.baselines.pruning.taylor import taylor_importance
from lrc.cloning.method import StartReport
from lrc.data.batch import Batch
from lrc.model.kept_units import KeptUnits, keep_all, write_kept
from lrc.model.pruned_shape import PrunedShape, pruned_config
from lrc.model.student import check_hidden_size, derive_config, plain_view, ties_weights
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.method_sections import LlmPrunerSection
from lrc.system.errors import UserError
from lrc.system.progress import Progress


class LlmPruner(PrunedStudent):
    """Groups of least Taylor importance pruned, then trained on KL + LM, in full or by LoRA."""

    title = "LLM-Pruner's gradient-based structured pruning (arXiv 2305.11627)"

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        super().__init__(teacher, recipe)
        self.plain = self.model
        """The student without adapters, for `student`; with LoRA, one more copy of its weights."""
        if self.adapts:
            self.distill.remove_hooks()
            adapted = add_adapters(
                copy.deepcopy(self.plain),
                self.pruner.lora_rank,
                self.pruner.lora_alpha,
                recipe.initialize.seed,
            )
            self.train_model(adapted)

    @property
    def pruner(self) -> LlmPrunerSection:
        """The method's own settings."""
        assert isinstance(self.recipe.method, LlmPrunerSection)
        return self.recipe.method

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained and the weights are frozen. The frozen weights are among
        `parameters`, without gradients, since a checkpoint must contain them."""
        return self.pruner.recovery == "lora"

    def make_student(self) -> PreTrainedModel:
        teacher, student = self.teacher, self.recipe.student
        tied = ties_weights(teacher, student)
        budget = Budget(teacher, tied)
        shape = self._by_ratio(budget) if self.pruner.ratio else self._beside_clone(budget)
        return random_student(teacher, pruned_config(teacher, shape, tied=tied), seed=0)

    def _by_ratio(self, budget: Budget) -> PrunedShape:
        ratio, teacher = self.pruner.ratio, self.teacher
        assert ratio is not None
        if self.recipe.student.hidden_size not in (None, teacher.hidden_size):
            raise UserError(
                "method.ratio sets how much to remove, and llm-pruner keeps the hidden size: set "
                f"student.hidden_size to the teacher's {teacher.hidden_size}, or omit the ratio "
                "to match LRC's size."
            )
        total = budget.count(teacher_shape(teacher))
        shape = budget.widths(round((1 - ratio) * total))
        if shape is None:
            least = budget.count(budget.smallest)
            limit = math.floor(100 * (1 - least / total)) / 100
            raise UserError(
                f"method.ratio is {ratio}, but llm-pruner keeps the embedding and all layers, at "
                f"least {least:,} of {total:,} parameters: choose a ratio of at most {limit}."
            )
        return shape

    def _beside_clone(self, budget: Budget) -> PrunedShape:
        teacher, student = self.teacher, self.recipe.student
        check_hidden_size(teacher, student.hidden_size or teacher.hidden_size)
        clone = parameter_count(teacher, derive_config(teacher, student))
        shape = budget.widths(clone)
        if shape is None:
            raise UserError(
                f"LRC's student of hidden size {student.hidden_size} has {clone:,} parameters, but "
                "llm-pruner keeps the embedding and all layers, at least "
                f"{budget.count(budget.smallest):,}: choose a larger student.hidden_size."
            )
        return shape

    def notes(self) -> list[str]:
        return [] if self.pruner.ratio else super().notes()

    def initialize(self, calibration: Batch, progress: Progress) -> StartReport:
        kept = self.choose(calibration, progress)
        write_kept(self.plain, self.teacher.model, kept)
        if self.adapts:
            write_base(self.model, self.plain)
        return StartReport()

    def choose(self, calibration: Batch, progress: Progress) -> KeptUnits:
        pruner, shape, whole = self.pruner, self.shape, keep_all(self.teacher.model)
        found = taylor_importance(
            self.teacher, calibration, pruner.importance, pruner.grouping, progress
        )
        groups = most_important(found.groups, shape.kv_heads)
        neurons = most_important(found.neurons, shape.neurons)
        return KeptUnits(whole.layers, whole.hidden, groups, neurons)

    def student(self) -> PreTrainedModel:
        if self.adapts:
            write_merged(self.plain, self.model)
        return plain_view(self.plain)

    def step_flops(self, step: int, tokens: int, sequence: int) -> float | None:
        """As for every plain student; not counted with adapters, whose backward pass differs."""
        return None if self.adapts else super().step_flops(step, tokens, sequence)


def most_important(importance: Tensor, count: int) -> list[Tensor]:
    """Indices of the most important parts of every layer, ascending.

    Args:
        importance: [layers, parts].
        count: number of parts to keep per layer.
    """
    return [largest(row, count) for row in importance]
