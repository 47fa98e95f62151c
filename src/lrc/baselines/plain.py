"""Base class of the methods that train a student's own weights, whatever their initialization."""

from abc import abstractmethod
from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lrc.cloning.cost import step_flops
from lrc.cloning.distill_pass import DistillPass, MakePair
from lrc.cloning.kernels import use_triton
from lrc.cloning.method import Counts, Method, Replay, StepLosses
from lrc.data.batch import Batch
from lrc.model.student import empty_student, plain_view, student_config
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.system.clock import Clock
from lrc.system.errors import UserError

PLAIN_SETTINGS = frozenset(
    {
        "student.hidden_size",
        "student.tie_projections",
        "initialize.seed",
        "objective.divergence",
        "objective.jsd_beta",
        "objective.kl_weight",
        "objective.temperature",
        "objective.lm_weight",
        "objective.chunk_tokens",
    }
)
"""Recipe settings that every plain student uses."""

SHAPE_SETTINGS = frozenset({"student.intermediate_size", "student.kv_heads", "student.layers"})
"""Settings of the student's shape besides its hidden size."""


class PlainStudent(Method):
    """A student whose own weights train on KL + LM, in the same way as LRC's.

    Subclasses provide the initial student, and may add losses and parameters.
    """

    used_settings: ClassVar[frozenset[str]] = PLAIN_SETTINGS

    pair: MakePair | None = None
    """Function that gives what to clone at an activation site; None for no cloning."""

    def __init__(self, teacher: Teacher, recipe: Recipe) -> None:
        """Arguments and errors are those of `build`."""
        self.teacher, self.recipe = teacher, recipe
        self.objective = recipe.objective
        if not any(self.loss_weights()):
            raise UserError(f"Every loss of method {recipe.method.name} is off; give one a weight.")
        self.clock = Clock()
        self.train_model(self.make_student())

    @classmethod
    def build(cls, teacher: Teacher, recipe: Recipe) -> "PlainStudent":
        return cls(teacher, recipe)

    def loss_weights(self) -> list[float]:
        """Weights of all losses, at least one of which must be positive."""
        return [self.objective.kl_weight, self.objective.lm_weight]

    @abstractmethod
    def make_student(self) -> PreTrainedModel:
        """The student in its shape, on the teacher's device, in float32 at least. Its weights may
        be set here or in `initialize`."""

    def train_model(self, model: PreTrainedModel) -> None:
        """Set the model to train."""
        train = self.recipe.train
        self.model = model
        self.distill = DistillPass(
            self.teacher,
            model,
            self.objective,
            self.clock,
            self.pair,
            train.token_grad_clip,
            train.gradient_checkpointing,
            use_triton(train.kernels, self.teacher.model.device),
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def student(self) -> PreTrainedModel:
        return plain_view(self.model)

    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        losses: StepLosses = self.distill(batch, counts)
        return losses

    def end_step(self) -> None:
        self.distill.end_step()

    def step_flops(self, step: int, tokens: int, sequence: int) -> float | None:
        """Operations of the student and the heads, plus the teacher's if there is a KL."""
        parts = step_flops(
            self.teacher.model,
            self.model,
            tokens,
            sequence,
            self.objective,
            vocab=self.teacher.vocab_size,
            released=True,
        )
        return sum(parts.values())


class SamePasses:
    """A plain student whose passes do the same in every step, so that a CUDA graph can record them
    (`lrc.cloning.method.Capturable`)."""

    distill: DistillPass

    def prepare_capture(self, replay: Replay) -> None:
        self.distill.keep_alpha_on_device()

    def capture_key(self) -> Hashable:
        return bool(self.distill.alpha)


class RandomStudent(PlainStudent):
    """A student of LRC's shape with transformers' own random initialization."""

    def make_student(self) -> PreTrainedModel:
        student = self.recipe.student
        if not self.used_settings.issuperset(SHAPE_SETTINGS):
            student = student.hidden_size_alone()
        config = student_config(self.teacher, student)
        return random_student(self.teacher, config, self.recipe.initialize.seed)


def random_student(teacher: Teacher, config: object, seed: int) -> PreTrainedModel:
    """A model of the teacher's class with random weights, the same on every device.

    Args:
        teacher: the teacher, which provides the device and the attention implementation.
        config: the student's configuration.
        seed: seed of the weights; the state of torch's generator does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return empty_student(teacher.model, config)
