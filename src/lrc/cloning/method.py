"""What the training loop knows of a method.

A new method is a file in `lrc.baselines` with a subclass, its settings in
`lrc.recipe.method_sections`, and its line in `METHODS` (`lrc.methods`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.data.batch import Batch
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.system.clock import Clock

Progress = Callable[[int, int], None]
"""Called with the parts of a long computation that are done and their number."""


@dataclass(frozen=True)
class Counts:
    """What the losses of one optimizer step are averaged over, all micro-batches together."""

    tokens: int
    """Tokens that are not padding."""

    labels: int
    """Tokens that have a next token to learn."""


@dataclass(frozen=True)
class StepLosses:
    """The losses of a micro-batch. Those of a step's micro-batches add up to the step's."""

    loss: Tensor
    """The weighted sum, a scalar, with gradients."""

    terms: dict[str, Tensor]
    """Its parts and other scalars to log, by name, without weights and gradients."""

    clone_layers: Tensor | None = None
    """The clone terms, [layers, enabled terms], without gradients."""

    token_lm: Tensor | None = None
    """The cross-entropy of each token, [batch, sequence], 0 without a label; only where the batch
    knows its sources."""

    def logged(self) -> dict[str, Tensor]:
        """What the metrics hold, by name, without gradients."""
        found = {"loss": self.loss.detach(), **self.terms}
        return found if self.clone_layers is None else {**found, CLONE_LAYERS: self.clone_layers}


CLONE_LAYERS = "clone_layers"
"""Key of `StepLosses.clone_layers` in the metrics."""


class Method(ABC):
    """A way to get a small model out of a teacher.

    A new run calls `initialize` once. Per optimizer step the loop calls `begin_step`, then
    `losses` and `backward` on their `loss` for every micro-batch, then `end_step`; after that
    the gradients of `parameters` are complete. A method with several stages names the steps that
    they end at, and may have other parameters in each.
    """

    title: ClassVar[str]
    """What the method is, with its source, as a noun phrase for model cards."""

    used_settings: ClassVar[frozenset[str] | None] = None
    """Settings of `student`, `initialize` and `objective`, and of the release in `train`, that the
    method uses, by dotted key (`objective.clone` stands for all below it); None: all. Others are
    warned of where they are set."""

    one_schedule: ClassVar[bool] = False
    """Whether the schedule of the learning rate spans all stages, a later one beginning with a
    warm-up of its own; else each stage has a schedule of its own."""

    clock: Clock
    """Methods count the time of their parts here."""

    model: PreTrainedModel
    """What runs as the student in training."""

    @classmethod
    @abstractmethod
    def build(cls, teacher: Teacher, recipe: Recipe) -> "Method":
        """The method that a recipe asks for, before `initialize`.

        Raises:
            UserError: the recipe does not fit the teacher.
        """

    def notes(self) -> list[str]:
        """Sentences that the user is told when a run is set up."""
        return []

    def calibration_tokens(self) -> int:
        """Training tokens that `initialize` asks for; it gets whole sequences, at least two."""
        return 0

    def initialize(self, calibration: Batch, progress: Progress) -> float:
        """Set the start of a new run, in place.

        Args:
            calibration: the first training sequences of the run; none where
                `calibration_tokens` is 0.
            progress: to be told how far it is.

        Returns:
            Seconds in which the teacher's layers alone ran once over the calibration; 0 where that
            is not known.
        """
        return 0.0

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: what the optimizer and the checkpoints hold."""

    def decayed(self) -> set[str]:
        """Names of the parameters that weight decay applies to; default: all matrices."""
        return {name for name, value in self.parameters().items() if value.ndim > 1}

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rates of the parameters that do not take the recipe's, by name; they have
        no weight decay."""
        return {}

    def rate_setting(self) -> str:
        """Name of the recipe's setting, in `train`, that is the peak learning rate of the present
        stage; where it is empty, `learning_rate` is."""
        return "learning_rate"

    def stage_ends(self) -> tuple[int, ...]:
        """Steps after which another stage begins, ascending: `next_stage` is called, and the
        optimizer begins anew with the parameters of then. Default: one stage."""
        return ()

    def next_stage(self) -> dict[str, Any]:
        """Go on to the next stage.

        Returns:
            Entries for the metrics of the step that ended the last one; "stage" says in a word
            what has happened.
        """
        raise NotImplementedError(f"{type(self).__name__} has one stage")

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside the parameters, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - optional
        """Go to the stage and place that `state` was taken in; `parameters` and `buffers` then
        have the names and shapes of then, and are filled from the checkpoint."""

    def buffers(self) -> dict[str, Tensor]:
        """Tensors by name that are not trained but that a checkpoint has to hold, too."""
        return {}

    def begin_step(self, step: int) -> None:  # noqa: B027 - optional
        """Prepare the forward passes of one optimizer step.

        Args:
            step: the optimizer steps of the run that are done.
        """

    @abstractmethod
    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        """Losses of a micro-batch."""

    def end_step(self) -> None:  # noqa: B027 - optional
        """Complete the gradients after the last micro-batch."""

    def weighs_sources(self) -> bool:
        """Whether the method decides how much of the text each of its sources gives."""
        return False

    def source_shares(
        self,
        shares: Mapping[str, float],
        student: Mapping[str, float],
        teacher: Mapping[str, float],
    ) -> dict[str, float]:
        """The sources' shares of the training sequences from now on, after a held-out measurement.

        Args:
            shares: those of before, together 1.
            student: held-out LM loss by source; sources without held-out tokens are left out.
            teacher: the teacher's on the same tokens.
        """
        return dict(shares)

    @abstractmethod
    def student(self) -> PreTrainedModel:
        """The student with the parameters of now: a plain model of the teacher's class."""

    def step_flops(self, step: int, tokens: int, sequence: int) -> float | None:
        """Floating-point operations of the matrix products of an optimizer step; None where they
        are not known.

        Args:
            step: the steps done before it.
            tokens: tokens of the step, all micro-batches together.
            sequence: tokens of a sequence.
        """
        return None
