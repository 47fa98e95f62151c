"""LRC without its projections: a random student that clones the teacher's activations.

Source: the ablation of Low-Rank Clone (arXiv 2505.12781) that keeps the clone loss and gives up
the low-rank projection. All linear maps of the student are free and start as transformers starts
them. Pre-activations of q, k, v, gate and up have the teacher's width already; outputs of attention
and FFN are carried to it by learned alignment matrices [d_S, d_T], one for each, since there is no
projection to reuse. Losses and weights are LRC's.
"""

from torch import Tensor, nn

from lrc.baselines.plain import PLAIN_SETTINGS, RandomStudent
from lrc.cloning.activations import LinearSite
from lrc.cloning.alignment import align, writer_alignment
from lrc.cloning.clone_pass import ClonePair, ClonePass
from lrc.cloning.method import Counts
from lrc.data.batch import Batch
from lrc.model.families import WRITERS
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe


class ActivationClone(RandomStudent):
    """Activation clone, KL and LM, from random weights."""

    title = "activation clone without projection, an ablation of LRC (arXiv 2505.12781)"
    used_settings = PLAIN_SETTINGS | {
        "objective.alpha",
        "objective.alpha_schedule",
        "objective.alpha_zero_at",
        "objective.clone",
        "objective.clone_scale",
    }

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        super().__init__(teacher, recipe)
        recomputes = bool(recipe.train.gradient_checkpointing)
        self.clone = ClonePass(
            teacher, self.model, self.objective, self.clock, self._sides, recomputes
        )
        seed = recipe.initialize.seed
        self.alignment = writer_alignment(teacher, self.model, self.clone.places, seed)

    def loss_weights(self) -> list[float]:
        clones = self.objective.alpha_at(1) if self.objective.clone.enabled() else 0.0
        return [*super().loss_weights(), clones]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**super().parameters(), **self.alignment}

    def begin_step(self, step: int) -> None:
        self.clone.alpha = self.objective.alpha_at(step / self.recipe.steps())

    def losses(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        return self.clone.losses(batch, counts)

    def end_step(self) -> None:
        self.clone.end_step()

    def step_flops(self, step: int, tokens: int, sequence: int) -> None:
        """Not counted: the alignment is not in the formula."""

    def _sides(
        self, place: LinearSite, _inputs: Tensor, output: Tensor, target: Tensor
    ) -> ClonePair:
        """The student's outputs of attention and FFN aligned to the teacher's width."""
        if place[1] in WRITERS:
            output = align(output, self.alignment, place)
        return ClonePair(output, target)
