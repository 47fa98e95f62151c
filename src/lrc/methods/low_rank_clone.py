"""Low-Rank Clone (arXiv 2505.12781): low-rank projection and activation clone.

The student's weights are the teacher's, projected (`lrc.projection`). It learns from the teacher's
logits, from the next token, and from the teacher's activations (`lrc.objective`). The projections
that write to the residual stream also carry the teacher's attention and FFN outputs to the
student's space, so nothing has to be aligned by extra matrices (paper section 3.2).
"""

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lrc.activations import Observer, Place, last_hidden, observe
from lrc.clock import Clock
from lrc.data.batch import Batch
from lrc.families import WRITERS
from lrc.methods.base import TOKEN_LM, Counts, Method
from lrc.objective import VocabularyWeights, clone_term, relative_weight, vocabulary_losses
from lrc.projection import Projections, projection_key
from lrc.sections import ObjectiveSection, StudentSection
from lrc.student import build_student
from lrc.teacher import Teacher

LAYERWISE = "clone_layers"
"""Key of the clone terms by layer in what `losses` gives: [layers, enabled terms]."""


class LowRankClone(Method):
    """The paper's method.

    Trainable are the projections, each [d_T, d_S], and the student's RMSNorm weights, each [d_S].
    """

    def __init__(
        self,
        teacher: Teacher,
        student: StudentSection,
        objective: ObjectiveSection,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.teacher = teacher
        self.objective = objective
        self.clock = Clock()
        self.projections = Projections(teacher, student)
        self.model = build_student(teacher, student)
        self.terms = objective.clone.enabled() if objective.alpha else ()
        self.places: list[Place] = [
            (layer, name) for layer in range(teacher.num_layers) for name in self.terms
        ]
        self.recomputes = gradient_checkpointing
        self._observing = ExitStack()
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            self.model.train()  # transformers recomputes in training mode only

    def parameters(self) -> dict[str, nn.Parameter]:
        named = {f"projections.{key}": value for key, value in self.projections.values.items()}
        for path in self.teacher.family.stream_norms(self.teacher.num_layers):
            named[f"{path}.weight"] = self.model.get_submodule(path).get_parameter("weight")
        return named

    def begin_step(self) -> None:
        with self.clock.part("projection"):
            self.projections.write_into(self.model)

    def end_step(self) -> None:
        self._observing.close()
        with self.clock.part("projection"):
            self.projections.backward()

    def student(self) -> PreTrainedModel:
        with torch.no_grad():
            self.projections.write_into(self.model)
        return self.model

    def losses(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        mask = batch.token_mask()
        with self.clock.part("teacher"):
            teacher_hidden, targets = self._teacher_pass(batch)
        with self.clock.part("student"):
            student_hidden, terms = self._student_pass(batch, targets, mask, counts)
        token_lm = None
        if batch.source_ids is not None:
            token_lm = torch.empty_like(batch.input_ids, dtype=torch.float32).flatten()
        with self.clock.part("loss"):
            vocabulary = vocabulary_losses(
                student_hidden.flatten(0, 1),
                self.model.get_output_embeddings().weight,
                teacher_hidden.flatten(0, 1),
                self.teacher.model.get_output_embeddings().weight,
                batch.labels().flatten(),
                None if mask is None else mask.flatten(),
                self._vocabulary_weights(counts),
                token_lm,
            )
        losses = {"kl": vocabulary.kl, "lm": vocabulary.lm}
        if token_lm is not None:
            losses[TOKEN_LM] = token_lm.view_as(batch.input_ids)
        loss = vocabulary.weighted
        if self.places:
            by_place = torch.stack([terms[place] for place in self.places])
            clone = by_place.sum()
            loss = loss + self.objective.alpha * clone
            losses["clone"] = clone.detach()
            losses[LAYERWISE] = by_place.detach().view(-1, len(self.terms))
        return {"loss": loss, **losses}

    def _vocabulary_weights(self, counts: Counts) -> VocabularyWeights:
        loss = self.objective
        return VocabularyWeights(
            loss.kl_weight,
            loss.lm_weight,
            loss.temperature,
            counts.tokens,
            counts.labels,
            self.teacher.vocab_size,
            loss.chunk_tokens,
        )

    def _teacher_pass(self, batch: Batch) -> tuple[Tensor, dict[Place, Tensor]]:
        """The teacher's last hidden state [b, s, d_T] and its activations at all places."""
        targets: dict[Place, Tensor] = {}

        def keep(place: Place, _input: Tensor, output: Tensor) -> Tensor:
            targets[place] = output
            return output

        with torch.no_grad(), self._observe(self.teacher.model, keep):
            hidden = last_hidden(self.teacher.model, batch)
        return hidden, targets

    def _student_pass(
        self, batch: Batch, targets: dict[Place, Tensor], mask: Tensor | None, counts: Counts
    ) -> tuple[Tensor, dict[Place, Tensor]]:
        """The student's last hidden state [b, s, d_S] and its clone term at every place.

        Each of the teacher's activations is let go as soon as it is compared, unless the layer is
        to be recomputed in the backward pass.
        """
        terms: dict[Place, Tensor] = {}

        def compare(place: Place, inputs: Tensor, output: Tensor) -> Tensor:
            with self.clock.part("loss"):
                target = targets[place] if self.recomputes else targets.pop(place)
                if place[1] == "o" and self.objective.attn_out == "teacher":
                    full = self._teacher_output(place, inputs)
                    weight = self._token_weight(target, mask)
                    _, terms[place] = clone_term(full, target, weight, counts.tokens)
                    return output
                target = self._in_student_space(place, target)
                weight = self._token_weight(target, mask)
                output, terms[place] = clone_term(output, target, weight, counts.tokens)
                return output

        # Recomputed layers call the observer again in the backward pass, so it stays until then.
        self._observing.close()
        self._observing.enter_context(self._observe(self.model, compare))
        hidden = last_hidden(self.model, batch)
        if not self.recomputes:
            self._observing.close()
        return hidden, terms

    def _token_weight(self, target: Tensor, mask: Tensor | None) -> Tensor | None:
        """What each token weighs in a clone term, [b, s]; None where all weigh 1."""
        return relative_weight(target, mask) if self.objective.clone_scale == "relative" else mask

    def _in_student_space(self, place: Place, target: Tensor) -> Tensor:
        """The teacher's activation, projected where it is written to the residual stream."""
        layer, name = place
        if name not in WRITERS:
            return target
        projection = self.projections.values[projection_key(layer, name)]
        return target.to(projection.dtype) @ projection

    def _teacher_output(self, place: Place, inputs: Tensor) -> Tensor:
        """The teacher's own linear map at a place, applied to the student's input of it."""
        module = self.teacher.model.get_submodule(self.teacher.family.linear(*place))
        bias = None if module.bias is None else module.bias.to(inputs.dtype)
        return functional.linear(inputs, module.get_parameter("weight").to(inputs.dtype), bias)

    def _observe(self, model: nn.Module, observer: Observer) -> AbstractContextManager[None]:
        return observe(model, self.teacher.family, self.places, observer)
