"""One pass of teacher and student over a micro-batch, with every loss of the objective.

What is compared at a site is up to the method: LRC carries the teacher's activations to the
student's space with its projections; methods without projections align the student's.

The hooks on both models are installed once, by `DistillPass._install`, and do nothing outside of a
pass. Their order on a student's linear map matters:

1. Clip (`token_clipping`). A gradient reaches it last, so it bounds what the loss of the
   predictions and the clone terms send back together.
2. Recompute (`recomputing`). It keeps the map's own output for the backward pass.
3. Compare. It returns the output that the model continues with, so that the gradients of the clone
   term and of the model are added up in one place.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lrc.cloning.activations import Output, activation_of, last_hidden
from lrc.cloning.method import Counts, StepLosses
from lrc.cloning.objective import (
    VocabularyWeights,
    compare_activations,
    vocabulary_losses,
)
from lrc.cloning.recomputing import recompute_ffns, recompute_layers
from lrc.cloning.token_clipping import clip_output
from lrc.data.batch import Batch
from lrc.model.layout import LinearSite, layout_of
from lrc.model.teacher import Teacher
from lrc.recipe.sections import ObjectiveSection
from lrc.system.clock import Clock
from lrc.system.errors import UserError


class ClonePair(NamedTuple):
    """The two activations that are compared at a site, each [batch, sequence, width]."""

    student: Tensor
    teacher: Tensor
    factors: tuple[Tensor, Tensor] | None = None
    """The factors of the teacher's side where it is a product (`clone_term`)."""


MakePair = Callable[[LinearSite, Tensor, Tensor, Tensor], ClonePair]
"""Returns what is compared at a site, given the input and the output of the student's linear map
and the output of the teacher's."""


@dataclass
class _MicroBatch:
    """What the hooks of a pass need to know, and what they find."""

    spared: Tensor | None
    """Tokens whose gradients are not clipped, bool [batch, sequence]; None: nothing is clipped."""
    mask: Tensor | None
    counts: Counts
    compares: bool
    targets: dict[LinearSite, Tensor] = field(default_factory=dict)
    """The teacher's outputs."""
    terms: dict[LinearSite, Tensor] = field(default_factory=dict)
    """The clone terms."""


class DistillPass(nn.Module):
    """Runs both models and computes the losses.

    Args:
        teacher: the teacher, or a pruned one whose layers are the student's: the whole one runs.
        student: the student; hooks are installed on it and on the teacher.
        objective: the losses and their weights.
        clock: counts the time of teacher, student and losses.
        pair: what is compared at a site; None: nothing is cloned.
        token_grad_clip: as in the recipe's `train`; 0: nothing is clipped.
        recomputes_layers: whether to run the student's layers again in the backward pass. If not,
            and if something is cloned, its FFNs recompute their activations.
        triton: whether to use the Triton kernels (`lrc.cloning.kernels`).
    """

    def __init__(
        self,
        teacher: Teacher,
        student: PreTrainedModel,
        objective: ObjectiveSection,
        clock: Clock,
        pair: MakePair | None = None,
        token_grad_clip: float = 0.0,
        recomputes_layers: bool = False,
        triton: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.teacher_model = student, teacher.whole.model
        self.teacher, self.objective, self.clock, self.pair = teacher, objective, clock, pair
        self.token_grad_clip, self.recomputes_layers = token_grad_clip, recomputes_layers
        self.triton = triton
        self.compare = compare_activations
        self._alpha_on_device: Tensor | None = None
        clones = pair is not None and objective.alpha != 0
        self.sites = [
            site
            for site in teacher.layout.observable()
            if clones and objective.clone.enables(site.name)
        ]
        """Where something is compared."""
        self.peak_alpha = objective.peak_alpha(len(self.sites)) if clones else 0.0
        self.alpha = self.peak_alpha
        """Weight of the clone terms in the present step. At 0 nothing is cloned."""
        names, family = teacher.layout.names(), teacher.family.model_type
        if unknown := sorted(objective.clone.off().difference(names)):
            raise UserError(
                f"objective.clone.{unknown[0]} is off, but {family} models have no such linear "
                f"map: choose from {', '.join(names)}."
            )
        self._places: Tensor | None = None
        """Row and column of each site in a table of terms by layers, int64 [2, sites]."""
        self._micro_batch: _MicroBatch | None = None
        self._hooks: list[RemovableHandle] = []
        if recomputes_layers:
            recompute_layers(student)
        self._install()

    def forward(self, batch: Batch, counts: Counts) -> StepLosses:
        """The losses of a micro-batch, as `Method.losses` returns them."""
        compares = bool(self.sites and self.alpha)
        self.begin(batch, counts, compares)
        teacher_hidden = None
        if compares or self.objective.kl_weight:
            with self.clock.part("teacher"), torch.no_grad():
                teacher_hidden = last_hidden(self.teacher_model, batch)
        with self.clock.part("student"):
            student_hidden = last_hidden(self.student, batch)
        losses = self.kl_and_lm_losses(teacher_hidden, student_hidden, batch, counts)
        terms = self._micro_batch.terms if self._micro_batch else {}
        if not self.recomputes_layers:
            self._micro_batch = None
        if not compares:
            return losses
        by_site = torch.stack([terms[site] for site in self.sites])
        clone = by_site.sum()
        return replace(
            losses,
            loss=losses.loss + self._factor(clone) * clone,
            terms={**losses.terms, "clone": clone.detach()},
            clone_layers=self._by_layer(by_site.detach()),
        )

    def set_alpha(self, share: float) -> None:
        """Set the weight of the clone terms after a share of the run's steps, in device memory too
        if it is there."""
        self.alpha = self.peak_alpha * self.objective.alpha_left(share)
        if self._alpha_on_device is not None:
            self._alpha_on_device.fill_(self.alpha)

    def keep_alpha_on_device(self) -> None:
        """Let passes read alpha from device memory, as a recorded one must."""
        device = self.student.device
        self._alpha_on_device = torch.full((), self.alpha, dtype=torch.float64, device=device)

    def _factor(self, clone: Tensor) -> float | Tensor:
        on_device = self._alpha_on_device
        return self.alpha if on_device is None else on_device.to(clone.dtype)

    def _by_layer(self, by_site: Tensor) -> dict[str, Tensor]:
        """The clone terms [layers] by name, NaN in layers without such a linear map."""
        names = list(dict.fromkeys(site.name for site in self.sites))
        if self._places is None:
            places = [(names.index(site.name), site.layer) for site in self.sites]
            self._places = torch.tensor(places, device=by_site.device).T
        table = by_site.new_full((len(names), self.teacher.num_layers), torch.nan)
        table[tuple(self._places)] = by_site
        return dict(zip(names, table, strict=True))

    def begin(self, batch: Batch, counts: Counts, compares: bool = False) -> None:
        """Let the hooks work on a micro-batch. The activations of the one before are released."""
        spared = batch.first_tokens() if self.token_grad_clip else None
        self._micro_batch = _MicroBatch(spared, batch.token_mask(), counts, compares)

    def kl_and_lm_losses(
        self,
        teacher_hidden: Tensor | None,
        student_hidden: Tensor,
        batch: Batch,
        counts: Counts,
    ) -> StepLosses:
        """The losses over the vocabulary.

        Args:
            teacher_hidden: the teacher's last hidden state [b, s, d_T]; None: there is no
                divergence.
            student_hidden: the student's, [b, s, d_S].
            batch: the tokens.
            counts: the numbers of tokens and labels to average over.
        """
        objective, mask = self.objective, batch.token_mask()
        learns_from_teacher = teacher_hidden is not None
        if teacher_hidden is None:
            teacher_hidden = student_hidden.new_empty(0, 0, self.teacher.hidden_size)
        token_lm = None
        if batch.source_ids is not None:
            token_lm = torch.empty_like(batch.input_ids, dtype=torch.float32)
        with self.clock.part("loss"):
            losses = vocabulary_losses(
                student_hidden.flatten(0, 1),
                self.student.get_output_embeddings().weight,
                teacher_hidden.flatten(0, 1),
                self.teacher_model.get_output_embeddings().weight,
                batch.labels().flatten(),
                None if mask is None else mask.flatten(),
                VocabularyWeights(
                    objective.kl_weight if learns_from_teacher else 0.0,
                    objective.lm_weight,
                    objective.temperature,
                    counts.tokens,
                    counts.labels,
                    self.teacher.vocab_size,
                    objective.chunk_tokens or chunk_tokens(student_hidden.device),
                    objective.divergence,
                    objective.jsd_beta,
                    self.teacher.logit_softcap,
                    self.triton,
                ),
                None if token_lm is None else token_lm.view(-1),
            )
        terms: dict[str, Tensor] = {}
        if learns_from_teacher:
            terms[objective.divergence] = losses.divergence
        terms["lm"] = losses.lm
        return StepLosses(losses.weighted, terms, token_lm=token_lm)

    def end_step(self) -> None:
        """Release what the backward passes of a step needed."""
        self._micro_batch = None

    def remove_hooks(self) -> None:
        """Leave both models without the hooks of this pass."""
        _remove(self._hooks)

    def _install(self) -> None:
        """Install all hooks, in the order that the module's docstring explains."""
        layout = layout_of(self.student)

        def at_linear(site: LinearSite, hook: Callable[..., object]) -> None:
            linear = self.student.get_submodule(layout.linear(site))
            self._hooks.append(linear.register_forward_hook(hook))

        if self.token_grad_clip:
            for site in layout.observable():
                at_linear(site, self._clip)
        if self.pair and not self.recomputes_layers:
            self._hooks += recompute_ffns(self.student, layout)
        for site in self.sites:
            at_linear(site, partial(self._compare, site))
            theirs = self.teacher.whole.layout.linear(self.teacher.whole_site(site))
            linear = self.teacher_model.get_submodule(theirs)
            keep = partial(_keep, weakref.ref(self), site)
            self._hooks.append(linear.register_forward_hook(keep))
        # Other passes may use the same teacher: its hooks end with this pass.
        weakref.finalize(self, _remove, self._hooks)

    def _clip(self, _linear: nn.Module, _inputs: tuple[Tensor], output: Output) -> None:
        batch = self._micro_batch
        if batch is not None and batch.spared is not None:
            activation = activation_of(output)
            spared = batch.spared.view(activation.shape[:-1])
            clip_output(activation, spared, self.token_grad_clip, self.triton)

    def _compare(
        self, site: LinearSite, _linear: nn.Module, inputs: tuple[Tensor], output: Output
    ) -> Output | None:
        """Compute a clone term. The teacher's activation is released at once, unless the layer runs
        again in the backward pass; then the term of the first run stays, because that of the second
        would keep what the layer computed."""
        batch = self._micro_batch
        if batch is None or not batch.compares:
            return None
        assert self.pair is not None
        with self.clock.part("loss"):
            last = not self.recomputes_layers or site in batch.terms
            target = batch.targets.pop(site) if last else batch.targets[site]
            pair = self.pair(site, inputs[0], activation_of(output), target)
            mask = None if batch.mask is None else batch.mask.view(target.shape[:-1])
            compared, term = self.compare(
                pair.student,
                pair.teacher,
                mask,
                batch.counts.tokens,
                self.objective.clone_scale == "relative",
                factors=pair.factors,
                reuse_target_buffer=not self.recomputes_layers,
                triton=self.triton,
            )
            batch.terms.setdefault(site, term)
        return compared if pair.student is output else output


def chunk_tokens(device: torch.device) -> int:
    """Tokens whose logits are in memory at once, if the recipe does not say. Larger products keep a
    GPU busy; a CPU's memory is no faster with them."""
    return 512 if device.type == "cpu" else 2048


def _keep(
    owner: "weakref.ref[DistillPass]",
    site: LinearSite,
    _linear: nn.Module,
    _inputs: tuple[Tensor],
    output: Output,
) -> None:
    """Keep the teacher's output for the comparison."""
    distill = owner()
    batch = distill._micro_batch if distill else None
    if batch is not None and batch.compares:
        batch.targets[site] = activation_of(output)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
