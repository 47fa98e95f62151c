"""MiniLM: the relations between tokens in the last layer's attention, and LM.

Source: Wang et al., MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
Pre-Trained Transformers (arXiv 2002.10957). The student learns, by KL(teacher || student),

* the last layer's attention distributions softmax(Q K^T / sqrt(head_dim)), and
* its value relations softmax(V V^T / sqrt(head_dim)).

Each is a mean over heads and tokens; the loss is their sum. No alignment is needed: the size of the
relations is the sequence length, and student and teacher have the same number of heads.

Deviations: MiniLM was made for encoders. Here both relations are over the keys that the causal (and
document) mask shows to a token. Queries and keys are those after rotary embedding, and values have
the family's key/value heads. The loss includes next-token cross-entropy, as in the comparison of
LRC's paper (arXiv 2505.12781). As in MiniLM there is no KL over the vocabulary.
"""

from dataclasses import replace

import torch

from lrc.baselines.attention import (
    Heads,
    check_observable,
    observe_attention,
    relation_divergence,
)
from lrc.baselines.plain import PLAIN_SETTINGS, RandomStudent
from lrc.cloning.activations import last_hidden
from lrc.cloning.method import Counts, StepLosses
from lrc.data.batch import Batch
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.method_sections import MiniLmSection


class MiniLm(RandomStudent):
    """LM + relations of the last layer, from random weights."""

    title = "MiniLM's self-attention distillation (arXiv 2002.10957)"
    used_settings = PLAIN_SETTINGS - {
        "objective.divergence",
        "objective.jsd_beta",
        "objective.kl_weight",
        "objective.temperature",
    }

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        super().__init__(teacher, recipe)
        check_observable(teacher.model, [teacher.num_layers - 1])

    def loss_weights(self) -> list[float]:
        return [self.objective.lm_weight, self.section.relation_weight]

    @property
    def section(self) -> MiniLmSection:
        """The method's own settings."""
        assert isinstance(self.recipe.method, MiniLmSection)
        return self.recipe.method

    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        self.distill.begin(batch, counts)
        seen: list[Heads] = []

        def keep(_layer: int, heads: Heads) -> None:
            seen.append(heads)

        last = [self.teacher.num_layers - 1]
        teacher = self.teacher.model
        with (
            self.clock.part("teacher"),
            torch.no_grad(),
            observe_attention(teacher, last, keep),
        ):
            last_hidden(teacher, batch)
        with self.clock.part("student"), observe_attention(self.model, last, keep):
            hidden = last_hidden(self.model, batch)
        losses = self.distill.kl_and_lm_losses(None, hidden, batch, counts)
        with self.clock.part("loss"):
            theirs, ours = seen
            common = theirs.visible, batch.token_mask(), counts.tokens
            attention = relation_divergence(ours.scores(), theirs.scores(), *common)
            values = relation_divergence(ours.value_scores(), theirs.value_scores(), *common)
            loss = losses.loss + self.section.relation_weight * (attention + values)
        terms = {"attention_relation": attention.detach(), "value_relation": values.detach()}
        return replace(losses, loss=loss, terms={**losses.terms, **terms})

    def step_flops(self, step: int, tokens: int, sequence: int) -> None:
        """Not counted: the formula does not cover the products of the relations."""
