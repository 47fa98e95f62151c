"""Forward passes of teacher and student that clone activations, with KL and LM.

What is compared at a place is the method's to say: LRC carries the teacher's side to the student's
space by its projections; methods without projections align the student's side.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.activations import LinearSite, last_hidden, observe
from lrc.cloning.method import Counts
from lrc.cloning.objective import clone_term, relative_weight
from lrc.cloning.recomputing import recompute_inside_ffns
from lrc.cloning.vocabulary import kl_and_lm_losses
from lrc.data.batch import Batch
from lrc.model.teacher import Teacher
from lrc.recipe.sections import ObjectiveSection
from lrc.system.clock import Clock

LAYERWISE = "clone_layers"
"""Key of the clone terms by layer in what `losses` gives: [layers, enabled terms]."""


class ClonePair(NamedTuple):
    """What is compared at a place, each [batch, sequence, width]."""

    student: Tensor
    teacher: Tensor
    factors: tuple[Tensor, Tensor] | None = None
    """What the teacher's side is the product of, where it is projected (`clone_term`)."""


MakePair = Callable[[LinearSite, Tensor, Tensor, Tensor], ClonePair]
"""Given a place, the student's input and output of its linear map, and the teacher's output, what
is to be compared there."""


class ClonePass:
    """One pass of both models over a micro-batch, with every loss of LRC's objective.

    Args:
        teacher: the teacher.
        model: the student.
        objective: the losses and their weights.
        clock: counts the time of teacher, student and losses.
        sides: what is compared at a place.
        recomputes: whether the student's layers run again in the backward pass.
    """

    def __init__(
        self,
        teacher: Teacher,
        model: PreTrainedModel,
        objective: ObjectiveSection,
        clock: Clock,
        sides: MakePair,
        recomputes: bool,
    ) -> None:
        self.teacher, self.model, self.objective = teacher, model, objective
        self.clock, self.sides, self.recomputes = clock, sides, recomputes
        self.alpha = objective.alpha
        """Weight of the clone terms in the present step; 0: nothing is cloned."""
        self.terms = objective.clone.enabled() if objective.alpha else ()
        self.places: list[LinearSite] = [
            (layer, name) for layer in range(teacher.num_layers) for name in self.terms
        ]
        self._observing = ExitStack()

    def end_step(self) -> None:
        """Nothing of the last micro-batch is to be recomputed any more."""
        self._observing.close()

    def losses(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Losses of a micro-batch, as `Method.losses` gives them."""
        self.end_step()  # lets go of the activations of the micro-batch before
        mask = batch.token_mask()
        places = self.places if self.alpha else []
        teacher_hidden: Tensor | None = None
        targets: dict[LinearSite, Tensor] = {}
        if places or self.objective.kl_weight:
            with self.clock.part("teacher"):
                teacher_hidden, targets = self._teacher_pass(batch, places)
        with self.clock.part("student"):
            student_hidden, terms = self._student_pass(batch, targets, mask, counts, places)
        with self.clock.part("loss"):
            losses = kl_and_lm_losses(
                self.teacher,
                self.model,
                teacher_hidden,
                student_hidden,
                batch,
                counts,
                self.objective,
            )
        if places:
            by_place = torch.stack([terms[place] for place in places])
            clone = by_place.sum()
            losses["loss"] = losses["loss"] + self.alpha * clone
            losses["clone"] = clone.detach()
            losses[LAYERWISE] = by_place.detach().view(-1, len(self.terms))
        return losses

    def _teacher_pass(
        self, batch: Batch, places: list[LinearSite]
    ) -> tuple[Tensor, dict[LinearSite, Tensor]]:
        """The teacher's last hidden state [b, s, d_T] and its activations at some places."""
        targets: dict[LinearSite, Tensor] = {}

        def keep(place: LinearSite, _input: Tensor, output: Tensor) -> Tensor:
            targets[place] = output
            return output

        with torch.no_grad(), observe(self.teacher.model, self.teacher.family, places, keep):
            hidden = last_hidden(self.teacher.model, batch)
        return hidden, targets

    def _student_pass(
        self,
        batch: Batch,
        targets: dict[LinearSite, Tensor],
        mask: Tensor | None,
        counts: Counts,
        places: list[LinearSite],
    ) -> tuple[Tensor, dict[LinearSite, Tensor]]:
        """The student's last hidden state [b, s, d_S] and its clone term at every place.

        Each of the teacher's activations is let go as soon as it is compared, unless the layer is
        to be recomputed in the backward pass.
        """
        terms: dict[LinearSite, Tensor] = {}

        def compare(place: LinearSite, inputs: Tensor, output: Tensor) -> Tensor:
            with self.clock.part("loss"):
                target = targets[place] if self.recomputes else targets.pop(place)
                sides = self.sides(place, inputs, output, target)
                weight = self._token_weight(sides.teacher, mask)
                compared, terms[place] = clone_term(
                    sides.student,
                    sides.teacher,
                    weight,
                    counts.tokens,
                    sides.factors,
                    reuse_target_buffer=not self.recomputes,
                )
            return compared if sides.student is output else output

        if not self.recomputes:
            self._observing.enter_context(recompute_inside_ffns(self.model, self.teacher.family))
        # Recomputed layers call the observer again in the backward pass, so it stays until then.
        self._observing.enter_context(observe(self.model, self.teacher.family, places, compare))
        hidden = last_hidden(self.model, batch)
        if not self.recomputes:
            self._observing.close()
        return hidden, terms

    def _token_weight(self, target: Tensor, mask: Tensor | None) -> Tensor | None:
        """What each token weighs in a clone term, [b, s]; None where all weigh 1."""
        return relative_weight(target, mask) if self.objective.clone_scale == "relative" else mask
