"""Low-Rank Clone (arXiv 2505.12781): low-rank projection and activation clone.

The student's weights are the teacher's, projected (`lrc.cloning.projection`). It learns from the
teacher's logits, from the next token, and from the teacher's activations (`lrc.cloning.objective`).
The projections that write to the residual stream also carry the teacher's attention and FFN outputs
to the student's space, so nothing has to be aligned by extra matrices (paper section 3.2).

The release, our addition, is a second stage. From a step that the recipe sets, the projected
weights are the student's own parameters. The student can then reach weights that no projection
gives, and a step needs no projection. The readers' activations are cloned as before. Those of the
writers are cloned through the projections of the release, which stay frozen.
"""

import gc
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lrc.cloning.alignment import align, writer_alignment
from lrc.cloning.cost import step_flops
from lrc.cloning.distill_pass import ClonePair, DistillPass
from lrc.cloning.kernels import use_triton
from lrc.cloning.method import Counts, Leaf, Method, Replay, Staged, StartReport, StepLosses
from lrc.cloning.projection import Projections, projection_key
from lrc.cloning.shape.prune import prune
from lrc.cloning.shape.pruned_teacher import (
    PrunedTeacher,
    asked_shape,
    first_units,
    pruned_teacher,
    prunes,
)
from lrc.cloning.start import STARTS, initialize
from lrc.data.batch import Batch
from lrc.model.kept_units import KeptUnits
from lrc.model.layout import LinearSite
from lrc.model.precision import forward_dtype, product_dtype, store_parameters_as
from lrc.model.student import build_student, plain_view, student_config
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import InitializeSection, Kernels, ObjectiveSection, StudentSection
from lrc.system.clock import Clock
from lrc.system.distributed import Owners, World
from lrc.system.errors import UserError
from lrc.system.progress import Progress


class LowRankClone(Method, Staged):
    """The paper's method.

    It trains the projections, each [d_T, d_S], and the student's RMSNorm weights, each [d_S]. After
    the release it trains all weights of the student. The ablation `objective.alignment: explicit`
    adds a matrix [d_S, d_T] for every cloned output of attention and FFN, which carries the output
    to the teacher's width instead of the projections.
    """

    title = "Low-Rank Clone (arXiv 2505.12781)"
    one_schedule = True
    then_trained = "the student's own weights"
    solves_alone = True

    def __init__(
        self,
        teacher: Teacher,
        student: StudentSection,
        objective: ObjectiveSection,
        gradient_checkpointing: bool = False,
        start: InitializeSection = InitializeSection(),  # noqa: B008 - immutable
        steps: int = 1,
        release_at: float = 1.0,
        token_grad_clip: float = 0.0,
        weight_dtype: torch.dtype | None = None,
        tf32: bool = False,
        kernels: Kernels = "torch",
    ) -> None:
        """
        Args:
            teacher: the teacher.
            student: the student's shape and parametrization.
            objective: the losses.
            gradient_checkpointing: as in the recipe's `train`, as the last two.
            start: how the projections start.
            steps: optimizer steps of the whole run, which alpha's schedule and the release go by.
            release_at: share of them after which the projections are released.
            token_grad_clip: largest gradient of a token, in medians.
            weight_dtype: element type of the student's projected weights during training; None:
                that of the projections.
            tf32: as in the recipe's `train`.
            kernels: as in the recipe's `train`.

        Raises:
            UserError: if the kernels cannot run.
        """
        self.teacher, self.section = teacher, student
        self.objective = objective
        self.gradient_checkpointing = gradient_checkpointing
        self.token_grad_clip = token_grad_clip
        self.triton = use_triton(kernels, teacher.model.device)
        self.start = start
        self.steps, self.release_at = steps, release_at
        self.weight_dtype, self.tf32 = weight_dtype, tf32
        self.clock = Clock()
        self._replay: Replay = lambda _name, work: work()
        self._begin()

    @classmethod
    def build(cls, teacher: Teacher, recipe: Recipe) -> "LowRankClone":
        asked_shape(teacher, recipe.student)  # refuse sizes that do not fit
        student_config(teacher, recipe.student)
        if prunes(teacher, recipe.student) and recipe.objective.attn_out == "teacher":
            raise UserError(
                "objective.attn_out: teacher needs all layers and heads of the teacher: set it to "
                "student, or leave student.kv_heads and student.layers empty."
            )
        device, low = teacher.model.device, None
        if device.type == "cuda" and hasattr(torch.Tensor, "grad_dtype"):  # since torch 2.10
            low = forward_dtype(recipe.train.precision, device)
        return cls(
            teacher,
            recipe.student,
            recipe.objective,
            recipe.train.gradient_checkpointing,
            recipe.initialize,
            recipe.steps(),
            recipe.train.release_at,
            recipe.train.token_grad_clip,
            low,
            recipe.train.tf32,
            recipe.train.kernels,
        )

    def _begin(self, kept: KeptUnits | None = None) -> None:
        """Go to the first stage, with nothing initialized.

        Args:
            kept: what the student keeps of the teacher; None: what the recipe names, until
                `initialize` chooses.
        """
        self._forget()
        self.released = False
        self.source = self.teacher
        """The teacher whose weights are projected: pruned, if the student has fewer units."""
        if prunes(self.teacher, self.section):
            chosen = kept or first_units(self.teacher, self.section)
            self.source = pruned_teacher(self.teacher, chosen)
        self.projections = Projections(self.source, self.section, self.tf32)
        self.model = build_student(self.source, self.section)
        if self.weight_dtype:
            self.projections.store_as(self.model, self.weight_dtype)
        self.distill = DistillPass(
            self.source,
            self.model,
            self.objective,
            self.clock,
            self._pair,
            self.token_grad_clip,
            self.gradient_checkpointing,
            self.triton,
        )
        self.model.base_model.register_forward_pre_hook(partial(_arrive, self.projections))
        self.alignment: dict[str, nn.Parameter] = {}
        if self.objective.alignment == "explicit":
            self.alignment = writer_alignment(
                self.source, self.model, self.distill.sites, self.start.seed
            )

    def _forget(self) -> None:
        """Release an earlier student and its projections. Hooks refer to what has them, so nothing
        else would for a while."""
        if hasattr(self, "distill"):
            self.distill.remove_hooks()
            del self.distill, self.model, self.projections, self.source
            gc.collect()

    def calibration_tokens(self) -> int:
        reads_text = STARTS[self.start.method].reads_text or self.source is not self.teacher
        return self.start.calibration_tokens if reads_text else 0

    def initialize(self, calibration: Batch, progress: Progress) -> StartReport:
        ids, statistics = calibration.input_ids, None
        if isinstance(self.source, PrunedTeacher):
            pruned, statistics = prune(self.source, self.section, ids, progress)
            self._begin(pruned.kept)
            with torch.no_grad():
                for name, writer in self.source.writers.items():
                    writer.copy_(pruned.writers[name])
        return initialize(self, self.start, ids, progress, statistics)

    def parameters(self) -> dict[str, nn.Parameter]:
        if self.released:
            return dict(self.model.named_parameters()) | self.alignment
        named = {f"projections.{key}": value for key, value in self.projections.values.items()}
        named |= {f"writers.{name}": value for name, value in self.source.writers.items()}
        for path in self.source.layout.stream_norms():
            named[f"{path}.weight"] = self.model.get_submodule(path).get_parameter("weight")
        return named | self.alignment

    def share_work(self, world: World) -> None:
        super().share_work(world)
        needed = self._applied()
        if not self.released:
            keys = self.projections.values
            ranks = {key: self.owners[f"projections.{key}"] for key in keys}
            self.projections.owners = Owners(world, ranks)
            if self.source.writers:  # the owner of a projection also has its writer
                of = {weight.name: ranks[weight.projection] for weight in self.projections.weights}
                writers = {f"writers.{name}": of[name] for name in self.source.writers}
                self.owners = Owners(world, {**self.owners.ranks, **writers})
            needed |= self.projections.needed()
        self.source.keep(needed)

    def leaves(self) -> dict[str, Leaf]:
        if self.released:
            return super().leaves()
        projections, cloned = self.projections, set(self._cloned())
        keys = {weight.name: weight.projection for weight in projections.weights}
        leaves = {name: Leaf(value, self.owners[name]) for name, value in self.alignment.items()}
        for name, value in self.model.named_parameters():
            if (key := keys.get(name)) is not None:
                owner = projections.owners[key]
                leaves[name] = Leaf(value, owner)
                if key in cloned:
                    leaves[f"projections.{key}"] = Leaf(projections.values[key], owner)
            elif value.requires_grad:
                leaves[name] = Leaf(value, self.owners[name])
        return leaves

    def costs(self) -> dict[str, float]:
        if self.released:
            return super().costs()
        projected = self.projections.costs()
        return super().costs() | {f"projections.{key}": cost for key, cost in projected.items()}

    def projected(self) -> set[str]:
        if self.released:
            return set()
        writers = {f"writers.{name}" for name in self.source.writers}
        return writers | {f"projections.{key}" for key in self.projections.values}

    def rate_setting(self) -> str:
        return "release_learning_rate" if self.released else "learning_rate"

    def stage_ends(self) -> tuple[int, ...]:
        release = round(self.release_at * self.steps)
        return (release,) if release < self.steps else ()

    def next_stage(self) -> dict[str, Any]:
        self.projections.store_as(self.model, self.projections.dtype)
        self.projections.write_into(self.model)
        self.projections.send(self._cloned())
        self.projections.wait()
        self._release()
        return {"stage": "released"}

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"released": True} if self.released else {}
        if isinstance(self.source, PrunedTeacher):
            state["kept"] = self.source.kept.lists()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        released, kept = state.get("released", False), state.get("kept")
        if (self.released and not released) or kept != self.state().get("kept"):
            self._begin(kept and KeptUnits.from_lists(kept, self.teacher.hidden_size))
        if released and not self.released:
            self._release()

    def buffers(self) -> dict[str, Tensor]:
        """The projections that still carry the teacher's outputs, after the release."""
        values = self.projections.values if self.released else {}
        return {f"projections.{key}": value.detach() for key, value in values.items()}

    def _release(self) -> None:
        """Turn the student's weights into parameters. Keep only the projections that activations
        are still cloned through."""
        self.released = True
        self.projections.store_as(self.model, self.projections.dtype)
        self.model.requires_grad_(True)
        self.model.zero_grad()
        first = self.stage_ends()[0] if self.stage_ends() else self.steps
        clones = self.objective.clones_at(first / self.steps)
        self.projections.freeze(self._cloned() if clones else [])
        self.source.writers.clear()

    def begin_step(self, step: int) -> None:
        self.distill.set_alpha(step / self.steps)
        if self.released:
            return
        with self.clock.part("projection"):
            self.projections.send(self._cloned() if self.distill.alpha else [])
            self._replay("write", lambda: self.projections.write_into(self.model))
            self.projections.forget_gradients(self.model)

    def end_step(self) -> None:
        self.distill.end_step()
        if self.released:
            return
        with self.clock.part("projection"):
            self._replay("backward", lambda: self.projections.backward(self.model))

    def student(self) -> PreTrainedModel:
        if not self.released:
            self.projections.write_into(self.model)
            self.projections.wait()
        view = plain_view(self.model)
        if self.weight_dtype and not self.released:
            store_parameters_as(view, self.weight_dtype)
        return view

    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        losses: StepLosses = self.distill(batch, counts)
        return losses

    def prepare_capture(self, replay: Replay) -> None:
        self._replay = replay
        self.distill.keep_alpha_on_device()

    def capture_key(self) -> Hashable:
        return self.released, bool(self.distill.alpha)

    def step_flops(self, step: int, tokens: int, sequence: int) -> float | None:
        if self.alignment:
            return None  # not in the formula
        clones = self.objective.clones_at(step / self.steps)
        parts = step_flops(
            self.teacher.model,
            self.model,
            tokens,
            sequence,
            self.objective,
            self.distill.sites if clones else (),
            self.teacher.vocab_size,
            any(end <= step for end in self.stage_ends()),
            self.source.model,
        )
        return sum(parts.values())

    def _pair(self, site: LinearSite, inputs: Tensor, output: Tensor, target: Tensor) -> ClonePair:
        """What is compared at a site: the teacher's writers are projected as the student's are,
        or the student's are aligned to the teacher's width."""
        if (kept := self.source.kept_outputs(site)) is not None:
            target = target[..., kept]
        if not self._projects(site):
            if site.name == "o" and self.objective.attn_out == "teacher":
                output = self._teacher_output(site, inputs)
            elif self.source.layout.writes(site):
                output = align(output, self.alignment, site)
            return ClonePair(output, target)
        projection = self.projections.values[projection_key(site)]
        factors = target.to(product_dtype(projection)), projection
        with torch.no_grad():
            projected = factors[0] @ factors[1]
        return ClonePair(output, projected, factors)

    def _cloned(self) -> list[str]:
        """Keys of the projections that carry the teacher's outputs to the student's space."""
        return [projection_key(site) for site in self.distill.sites if self._projects(site)]

    def _projects(self, site: LinearSite) -> bool:
        """Whether the teacher's side of a site is compared through the student's projection."""
        in_teachers_space = site.name == "o" and self.objective.attn_out == "teacher"
        writes = self.source.layout.writes(site)
        return writes and not (in_teachers_space or self.alignment)

    def _applied(self) -> set[str]:
        """Names of the teacher's parameters in `_teacher_output`."""
        if self.objective.attn_out == "student":
            return set()
        model, layout = self.teacher.model, self.teacher.layout
        paths = [layout.linear(site) for site in self.distill.sites if site.name == "o"]
        return {n for path in paths for n, _ in model.get_submodule(path).named_parameters(path)}

    def _teacher_output(self, site: LinearSite, inputs: Tensor) -> Tensor:
        """The teacher's own linear map at a site, applied to the student's input of it."""
        path = self.teacher.layout.linear(site)
        weight, bias = self.teacher.parameter(f"{path}.weight").to(inputs.dtype), None
        if self.teacher.model.get_submodule(path).bias is not None:
            bias = self.teacher.parameter(f"{path}.bias").to(inputs.dtype)
        return functional.linear(inputs, weight, bias)


def _arrive(projections: Projections, *_: Any) -> None:
    """Wait for the student's weights before it runs. The teacher has run in the meantime."""
    projections.wait()
