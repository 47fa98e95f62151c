"""Sheared LLaMA: structured pruning to a given shape with learned masks, then continued training.

Source: Xia et al., Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning
(arXiv 2310.06694).

Stage one trains a copy of the teacher together with hard-concrete masks over layers, hidden
dimensions, heads and FFN neurons. A Lagrangian holds the expected number of open units to the
target's; gradient ascent trains its multipliers (`lrc.baselines.pruning.learned`). Masks and
multipliers have their own learning rates. The target moves from the teacher's shape to the
student's over the first fifth of the stage. At the end of the stage, the units that are most likely
open are cut out (`lrc.model.kept_units`). Stage two trains the result, a plain model, with a
new optimizer and a new schedule. In both stages every held-out measurement updates the weights of
the text sources (dynamic batch loading): w' is proportional to w * exp(max(loss - reference, 0)).

Deviations:

* The paper prunes on 0.4 of 50.4 billion tokens, in 3,200 steps. At the budgets of a comparison
  that share would be less than one step, so `pruning_share` is larger. With the authors' rate of 1
  for masks and multipliers, prices rise too slowly for tens of steps: on stories260K, 45 steps left
  nearly all masks open. A rate of 5 for the multipliers met the constraint.
* The masks start open with probability `open_at_first`. The authors' code starts at log alpha = 5,
  a probability of 0.999, and bounds log alpha by 4.6 on both sides. Here it is unbounded.
* Heads and neurons have one pair of multipliers per layer. The authors' code has one pair for the
  mean over layers and constrains single layers only by the square.
* Heads are pruned in groups that share a key-value head, so that grouped queries stay intact. A
  kind of unit that loses no units has no masks: with LRC's shape, only hidden dimensions have
  masks.
* A kept unit is copied unchanged: a mask value below 1 is not multiplied into the weights. Where
  masks have not settled, the rank of their probabilities decides, so the shape is always exact. The
  metrics report how many units this concerns (`hidden_by_rank` and so on).
* The reference losses are the teacher's own, measured on the run's held-out text before the first
  step. The paper predicts the losses of a model of the student's size with a scaling law, and names
  the source model's losses as the alternative. The held-out text is the same as the reported one.
* The loss has KL to the teacher in addition to LM, weighted by `objective.kl_weight`, as in all
  methods of a comparison. The paper has LM alone (`objective.kl_weight: 0`).

In the metrics of stage one, "loss" includes the Lagrangian, which is also reported as "lagrangian".
`hidden_gap` and so on are the expected share of open units minus the share wanted at that step.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lrc.baselines.plain import PlainStudent
from lrc.baselines.pruning.learned import LearnedMasks
from lrc.baselines.pruning.masked import MaskHooks
from lrc.baselines.pruning.shape import target_shape, teacher_shape
from lrc.baselines.pruning.size import size_notes
from lrc.cloning.method import Counts, Staged, StepLosses
from lrc.data.batch import Batch
from lrc.model.kept_units import KeptUnits, cut
from lrc.model.pruned_shape import pruned_config
from lrc.model.student import ties_weights
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.method_sections import ShearedLlamaSection

CONSTRAINT_WARMUP = 0.2
"""Share of stage one in which the target moves from the teacher's shape to the student's."""


class ShearedLlama(PlainStudent, Staged):
    """Masked teacher in stage one, pruned student in stage two."""

    title = "targeted structured pruning with learned masks (Sheared LLaMA, arXiv 2310.06694)"
    cuts_teacher = True
    then_trained = "the pruned student"

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        self.step = 0
        """Steps completed before the current one."""
        self.kept_layers: list[int] | None = None
        """Layers of the teacher that the student of stage two has; None in stage one."""
        super().__init__(teacher, recipe)
        self._mask()

    @property
    def section(self) -> ShearedLlamaSection:
        """The method's own settings."""
        assert isinstance(self.recipe.method, ShearedLlamaSection)
        return self.recipe.method

    # Interface to the training loop.

    def notes(self) -> list[str]:
        config = pruned_config(self.teacher, self.target, tied=self._tied())
        return size_notes(self.teacher, self.recipe.student, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        masks = self.masks.parameters() if self.kept_layers is None else {}
        return {**super().parameters(), **masks}

    def decayed(self) -> set[str]:
        """The student's matrices."""
        return {name for name, value in super().parameters().items() if value.ndim > 1}

    def own_learning_rates(self) -> dict[str, float]:
        """Masks and multipliers have their own learning rates."""
        if self.kept_layers is not None:
            return {}
        section = self.section
        return {
            name: section.mask_learning_rate
            if name.endswith("log_alpha")
            else section.multiplier_learning_rate
            for name in self.masks.parameters()
        }

    def stage_ends(self) -> tuple[int, ...]:
        return (max(1, round(self.section.pruning_share * self.recipe.steps())),)

    def next_stage(self) -> dict[str, Any]:
        entries: dict[str, Any] = {"stage": "pruned"}
        for kind, (by_rank, units) in self.masks.undecided().items():
            entries |= {f"{kind}_by_rank": by_rank, f"{kind}_units": units}
        self._prune(self.masks.kept())
        return entries

    def state(self) -> dict[str, Any]:
        return {"kept_layers": self.kept_layers}

    def load_state(self, state: dict[str, Any]) -> None:
        layers = state["kept_layers"]
        if layers is None and self.kept_layers is not None:
            self.kept_layers = None
            self.train_model(self.make_student())
            self._mask()
        if layers is not None and self.kept_layers is None:
            # The choice of units no longer matters: the checkpoint already has their weights.
            sizes = self.target.kv_heads, self.target.neurons
            groups, neurons = ([torch.arange(size)] * len(layers) for size in sizes)
            self._prune(KeptUnits(layers, torch.arange(self.target.hidden), groups, neurons))

    def begin_step(self, step: int) -> None:
        self.step = step
        if self.kept_layers is None:
            # The seed depends only on the step, so a resumed run draws the same noise.
            seed = (self.recipe.initialize.seed << 32) + step
            self.noise = self.masks.draw(torch.Generator().manual_seed(seed % (1 << 63)))

    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        if self.kept_layers is not None:
            return super().losses(batch, counts)
        self.hooks.values = self.masks.values(self.noise)
        losses = super().losses(batch, counts)
        mask, progress = batch.token_mask(), self._target_progress()
        tokens = batch.input_ids.numel() if mask is None else mask.sum()
        share = tokens / counts.tokens
        lagrangian = share * self.masks.lagrangian(progress)
        terms = {**losses.terms, "lagrangian": lagrangian.detach()}
        for kind, gap in self.masks.gaps(progress).items():
            terms[f"{kind}_gap"] = share * gap.detach().mean()
        return replace(losses, loss=losses.loss + lagrangian, terms=terms)

    def end_step(self) -> None:
        super().end_step()
        if self.kept_layers is None:
            for multiplier in self.masks.multipliers():
                if multiplier.grad is not None:  # else another process owns it
                    multiplier.grad.neg_()  # ascent

    def student(self) -> PreTrainedModel:
        """In stage one, the model cut to the units that are currently most likely open."""
        if self.kept_layers is not None:
            return super().student()
        return self._cut(self.masks.kept())

    def step_flops(self, step: int, tokens: int, sequence: int) -> None:
        """Not counted: the steps of the two stages differ."""

    def weighs_sources(self) -> bool:
        return self.section.dynamic_loading

    def source_shares(
        self,
        shares: Mapping[str, float],
        student: Mapping[str, float],
        teacher: Mapping[str, float],
    ) -> dict[str, float]:
        excess = {name: max(student[name] - teacher[name], 0.0) for name in student}
        grown = {name: share * math.exp(excess.get(name, 0.0)) for name, share in shares.items()}
        return {name: value / sum(grown.values()) for name, value in grown.items()}

    # The stages.

    def make_student(self) -> PreTrainedModel:
        """The unmodified teacher, which is trained and then pruned."""
        self.target = target_shape(self.teacher, self.recipe.student, self.section)
        model = copy.deepcopy(self.teacher.model)
        model = model.to(dtype=torch.promote_types(model.dtype, torch.float32))
        model.get_input_embeddings().padding_idx = None  # it would get no gradient
        return model.requires_grad_(True)

    def _mask(self) -> None:
        """Start stage one."""
        self.hooks = MaskHooks(self.model)
        weight = next(iter(super().parameters().values()))
        self.masks = LearnedMasks(
            teacher_shape(self.teacher),
            self.target,
            self.section.open_at_first,
            weight.device,
            weight.dtype,
        )

    def _cut(self, kept: KeptUnits) -> PreTrainedModel:
        return cut(self.model, kept, self._tied())

    def _tied(self) -> bool:
        """Whether the student's LM head is its embedding."""
        return ties_weights(self.teacher, self.recipe.student)

    def _prune(self, kept: KeptUnits) -> None:
        """Start stage two."""
        self.hooks.remove()
        self.train_model(self._cut(kept))
        self.kept_layers = list(kept.layers)
        del self.masks, self.hooks

    def _target_progress(self) -> float:
        """How far the target has moved, in [0, 1]."""
        warmup = CONSTRAINT_WARMUP * self.stage_ends()[0]
        return min(1.0, (self.step + 1) / max(warmup, 1.0))
