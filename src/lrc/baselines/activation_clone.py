"""LRC without its projections: a random student that clones the teacher's activations.

Source: the ablation of Low-Rank Clone (arXiv 2505.12781) that keeps the clone loss and drops the
low-rank projection. All linear maps of the student are free parameters and start from transformers'
initialization. Pre-activations of q, k, v, gate and up already have the teacher's width. The
outputs of attention and FFN need learned alignment matrices [d_S, d_T], one each, to reach that
width, since there is no projection to reuse. Losses and weights are LRC's.
"""

from torch import Tensor, nn

from lrc.baselines.plain import PLAIN_SETTINGS, RandomStudent, SamePasses
from lrc.cloning.alignment import align, writer_alignment
from lrc.cloning.distill_pass import ClonePair
from lrc.model.layout import LinearSite
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import LLAMA_TERMS


class ActivationClone(SamePasses, RandomStudent):
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
        seed = recipe.initialize.seed
        self.alignment = writer_alignment(teacher, self.model, self.distill.sites, seed)

    def loss_weights(self) -> list[float]:
        clones = self.objective.clones_at(1)
        clones = clones and not self.objective.clone.off().issuperset(LLAMA_TERMS)
        return [*super().loss_weights(), float(clones)]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**super().parameters(), **self.alignment}

    def begin_step(self, step: int) -> None:
        self.distill.set_alpha(step / self.recipe.steps())

    def step_flops(self, step: int, tokens: int, sequence: int) -> None:
        """Not counted: the formula does not cover the alignment."""

    def pair(self, site: LinearSite, _inputs: Tensor, output: Tensor, target: Tensor) -> ClonePair:
        """Align the student's outputs of attention and FFN to the teacher's width."""
        if self.teacher.layout.writes(site):
            output = align(output, self.alignment, site)
        return ClonePair(output, target)
