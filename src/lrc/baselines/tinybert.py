"""TinyBERT for decoders: hidden states through learned alignment, attention maps, KL and LM.

Source: Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding (arXiv
1909.10351), in the form that LRC's paper (arXiv 2505.12781) compares with. The student learns

* hidden states: MSE(h_S W, h_T) of the embedding's output and of every layer's output. Each has its
  own learned alignment matrix W [d_S, d_T], which trains with the student and is then discarded.
* attention maps: MSE of every layer's attention scores before the softmax, as in TinyBERT. TinyBERT
  found that scores converge faster than probabilities. With probabilities the loss would also be
  close to zero here, since a probability is about 1 / sequence length. The mean is over the keys
  that a token sees.
* KL over the vocabulary and next-token cross-entropy, with LRC's weights and temperature.

Deviations: TinyBERT shares one alignment matrix among all layers, and distills in two stages with
data augmentation. Its student is shallower, so it maps layers; here every layer has a counterpart.
As in LRC, hidden states contain massive activations that dominate a plain mean of squares:
`objective.clone_scale: relative` applies to the hidden states too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.baselines.attention import (
    Heads,
    check_observable,
    observe_attention,
    score_difference,
)
from lrc.baselines.plain import PLAIN_SETTINGS, RandomStudent
from lrc.cloning.activations import last_hidden
from lrc.cloning.alignment import new_alignment
from lrc.cloning.method import Counts, StepLosses
from lrc.cloning.objective import clone_term, relative_weight
from lrc.data.batch import Batch
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.method_sections import TinyBertSection


class TinyBert(RandomStudent):
    """Hidden states, attention maps, KL and LM, starting from random weights."""

    title = "TinyBERT's layer-wise distillation (arXiv 1909.10351), adapted to decoders"
    used_settings = PLAIN_SETTINGS | {"objective.clone_scale"}

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        super().__init__(teacher, recipe)
        check_observable(teacher.model, self._observed())
        states = range(teacher.num_layers + 1) if self.section.hidden_weight else range(0)
        names = [f"alignment.{state}" for state in states]
        self.alignment = new_alignment(teacher, self.model, names, recipe.initialize.seed)

    @property
    def section(self) -> TinyBertSection:
        """The method's own settings."""
        assert isinstance(self.recipe.method, TinyBertSection)
        return self.recipe.method

    def loss_weights(self) -> list[float]:
        return [
            *super().loss_weights(),
            self.section.hidden_weight,
            self.section.attention_weight,
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**super().parameters(), **self.alignment}

    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        self.distill.begin(batch, counts)
        with self.clock.part("teacher"), torch.no_grad():
            theirs, their_last = self._pass(self.teacher.model, batch)
        with self.clock.part("student"):
            ours, our_last = self._pass(self.model, batch)
        their_last_or_none = their_last if self.objective.kl_weight else None
        losses = self.distill.kl_and_lm_losses(their_last_or_none, our_last, batch, counts)
        with self.clock.part("loss"):
            mask, loss, terms = batch.token_mask(), losses.loss, dict(losses.terms)
            if self.section.hidden_weight:
                hidden = self._hidden(ours, theirs, mask, counts.tokens)
                loss = loss + self.section.hidden_weight * hidden
                terms["hidden"] = hidden.detach()
            if self.section.attention_weight:
                attention = self._attention(ours, theirs, mask, counts.tokens)
                loss = loss + self.section.attention_weight * attention
                terms["attention"] = attention.detach()
        return replace(losses, loss=loss, terms=terms)

    def step_flops(self, step: int, tokens: int, sequence: int) -> None:
        """Not counted: the formula does not cover the products of the attention maps."""

    def _observed(self) -> range:
        """The layers whose attention is compared."""
        return range(self.teacher.num_layers if self.section.attention_weight else 0)

    def _pass(self, model: PreTrainedModel, batch: Batch) -> tuple["_Seen", Tensor]:
        """Run a forward pass and return what it records, with its last hidden state."""
        seen = _Seen()
        family = self.teacher.family
        layers = self._observed()
        with (
            observe_attention(model, layers, seen.keep_heads),
            seen.streams(model, family.embedding, family.layers),
        ):
            return seen, last_hidden(model, batch)

    def _hidden(self, ours: "_Seen", theirs: "_Seen", mask: Tensor | None, tokens: int) -> Tensor:
        total = torch.zeros((), device=self.model.device)
        matrices = self.alignment.values()
        for student, teacher, matrix in zip(ours.hidden, theirs.hidden, matrices, strict=True):
            relative = self.objective.clone_scale == "relative"
            aligned = student @ matrix.to(student.dtype)
            weight = relative_weight(aligned, teacher, mask) if relative else mask
            _, term = clone_term(aligned, teacher, weight, tokens)
            total = total + term
        return total

    def _attention(
        self, ours: "_Seen", theirs: "_Seen", mask: Tensor | None, tokens: int
    ) -> Tensor:
        total = torch.zeros((), device=self.model.device)
        for student, teacher in zip(ours.heads, theirs.heads, strict=True):
            scores = student.scores(), teacher.scores()
            total = total + score_difference(*scores, teacher.visible, mask, tokens)
        return total


class _Seen:
    """What a forward pass records, in layer order."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        """The residual stream after the embedding and after every layer, [b, s, d]."""
        self.heads: list[Heads] = []

    def keep_heads(self, _layer: int, heads: Heads) -> None:
        """Record an attention block."""
        self.heads.append(heads)

    @contextmanager
    def streams(self, model: nn.Module, embedding: str, layers: str) -> Iterator[None]:
        """Record the residual stream of a forward pass while the context is open."""

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.hidden.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            modules = [model.get_submodule(embedding), *model.get_submodule(layers).children()]
            for module in modules:
                hooks.callback(module.register_forward_hook(keep).remove)
            yield
