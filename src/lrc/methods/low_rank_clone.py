"""Low-Rank Clone (arXiv 2505.12781): low-rank projection and activation clone.

The student's weights are the teacher's, projected (`lrc.projection`). It learns from the teacher's
logits, from the next token, and from the teacher's activations (`lrc.objective`). The projections
that write to the residual stream also carry the teacher's attention and FFN outputs to the
student's space, so nothing has to be aligned by extra matrices (paper section 3.2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lrc.activations import Place
from lrc.clock import Clock
from lrc.cost import step_flops, widths_of
from lrc.data.batch import Batch
from lrc.families import WRITERS
from lrc.initialise import initialise
from lrc.methods.alignment import align, writer_alignment
from lrc.methods.base import Counts, Method, Progress
from lrc.methods.clone_pass import ClonePass, Sides
from lrc.methods.recomputing import recompute
from lrc.projection import Projections, projection_key
from lrc.recipe import Recipe
from lrc.sections import Checkpointing, InitialiseSection, ObjectiveSection, StudentSection
from lrc.student import build_student, student_config
from lrc.teacher import Teacher


class LowRankClone(Method):
    """The paper's method.

    Trainable are the projections, each [d_T, d_S], and the student's RMSNorm weights, each [d_S].
    The ablation `objective.alignment: explicit` adds a matrix [d_S, d_T] for every cloned output of
    attention and FFN, which carries it to the teacher's width in place of the projections.
    """

    title = "Low-Rank Clone (arXiv 2505.12781)"

    def __init__(
        self,
        teacher: Teacher,
        student: StudentSection,
        objective: ObjectiveSection,
        gradient_checkpointing: Checkpointing = False,
        start: InitialiseSection = InitialiseSection(),  # noqa: B008 - immutable
    ) -> None:
        self.teacher = teacher
        self.objective = objective
        self.start = start
        self.clock = Clock()
        self.projections = Projections(teacher, student)
        self.model = build_student(teacher, student)
        self.clone = ClonePass(
            teacher, self.model, objective, self.clock, self._sides, bool(gradient_checkpointing)
        )
        self.alignment: dict[str, nn.Parameter] = {}
        if objective.alignment == "explicit":
            self.alignment = writer_alignment(teacher, self.model, self.clone.places, start.seed)
        recompute(self.model, gradient_checkpointing)

    @classmethod
    def build(cls, teacher: Teacher, recipe: Recipe) -> "LowRankClone":
        student_config(teacher, recipe.student)  # refuses an unfit hidden size
        return cls(
            teacher,
            recipe.student,
            recipe.objective,
            recipe.train.gradient_checkpointing,
            recipe.initialise,
        )

    def calibration_tokens(self) -> int:
        return 0 if self.start.method == "random" else self.start.calibration_tokens

    def initialise(self, calibration: Batch, progress: Progress) -> float:
        return initialise(self, self.start, calibration.input_ids, progress)

    def parameters(self) -> dict[str, nn.Parameter]:
        named = {f"projections.{key}": value for key, value in self.projections.values.items()}
        for path in self.teacher.family.stream_norms(self.teacher.num_layers):
            named[f"{path}.weight"] = self.model.get_submodule(path).get_parameter("weight")
        return named | self.alignment

    def begin_step(self) -> None:
        with self.clock.part("projection"):
            self.projections.write_into(self.model)
            self.projections.forget_gradients(self.model)

    def end_step(self) -> None:
        self.clone.end_step()
        with self.clock.part("projection"):
            self.projections.backward(self.model)

    def student(self) -> PreTrainedModel:
        self.projections.write_into(self.model)
        return self.model

    def losses(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        return self.clone.losses(batch, counts)

    def step_flops(self, tokens: int, sequence: int) -> float | None:
        if self.alignment:
            return None  # not in the formula
        parts = step_flops(
            widths_of(self.teacher.model),
            widths_of(self.model),
            self.model.config.tie_word_embeddings,
            tokens,
            sequence,
            self.objective,
            self.teacher.vocab_size,
        )
        return sum(parts.values())

    def _sides(self, place: Place, inputs: Tensor, output: Tensor, target: Tensor) -> Sides:
        """What is compared at a place: the teacher's writers are projected as the student's are,
        or the student's are aligned to the teacher's width."""
        layer, name = place
        if name not in WRITERS:
            return Sides(output, target)
        if name == "o" and self.objective.attn_out == "teacher":
            return Sides(self._teacher_output(place, inputs), target)
        if self.alignment:
            return Sides(align(output, self.alignment, place), target)
        projection = self.projections.values[projection_key(layer, name)]
        factors = target.to(projection.dtype), projection
        with torch.no_grad():
            projected = factors[0] @ factors[1]
        return Sides(output, projected, factors)

    def _teacher_output(self, place: Place, inputs: Tensor) -> Tensor:
        """The teacher's own linear map at a place, applied to the student's input of it."""
        module = self.teacher.model.get_submodule(self.teacher.family.linear(*place))
        bias = None if module.bias is None else module.bias.to(inputs.dtype)
        return functional.linear(inputs, module.get_parameter("weight").to(inputs.dtype), bias)
