"""What the training loop knows of a method.

A new method is a file in `lrc.baselines` with a subclass, its settings in
`lrc.recipe.method_sections`, and its line in `METHODS` (`lrc.methods`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.data.batch import Batch
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.system.clock import Clock
from lrc.system.distributed import Owners, World, assign
from lrc.system.progress import Progress

Replay = Callable[[str, Callable[[], object]], object]
"""Does a part of a step, which has a name."""


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

    clone_layers: dict[str, Tensor] | None = None
    """The clone terms [layers] by name, without gradients; NaN in layers that lack the term."""

    token_lm: Tensor | None = None
    """The cross-entropy of each token, [batch, sequence], 0 without a label; only where the batch
    knows its sources."""

    def scalars(self) -> dict[str, Tensor]:
        """The loss and its parts by name, without gradients."""
        return {"loss": self.loss.detach(), **self.terms}


CLONE_LAYERS = "clone_layers"
"""Key of `StepLosses.clone_layers` in the metrics."""


class Leaf(NamedTuple):
    """A tensor that backward passes give a gradient."""

    value: nn.Parameter
    owner: int
    """The process that needs the gradient."""


@dataclass(frozen=True)
class StartReport:
    """What it took to initialize a method."""

    forward_seconds: float = 0.0
    """Seconds that the teacher's layers alone take to run once over the calibration tokens; 0 if
    that is not known."""


class Method(ABC):
    """A way to get a small model from a teacher.

    A new run calls `initialize` once. For every optimizer step the loop calls `begin_step`, then
    `losses` and the backward pass of their `loss` for every micro-batch, then `end_step`. After
    that the gradients of `parameters` are complete.

    Methods that need more implement `Staged`, `WeighsSources` or `CountsFlops`.
    """

    title: ClassVar[str]
    """What the method is, with its source, as a noun phrase for model cards."""

    used_settings: ClassVar[frozenset[str] | None] = None
    """Settings of `student`, `initialize` and `objective`, and of the release in `train`, that the
    method uses, by dotted key (`objective.clone` stands for all below it); None: all. Users get a
    warning if they set others."""

    clock: Clock
    """Counts the time of the method's parts."""

    model: PreTrainedModel
    """The student in training."""

    owners = Owners()
    """Which of the processes that train the method together owns a parameter, by name. The owner
    keeps its optimizer state and updates it."""

    solves_alone: ClassVar[bool] = False
    """Whether `initialize` runs in one process alone. If not, it runs in all of them. All take the
    parameters of the first one, because a GPU's rounding may choose others."""

    cuts_teacher: ClassVar[bool] = False
    """Whether it takes weights from the teacher's model itself, which must be whole for that."""

    @classmethod
    @abstractmethod
    def build(cls, teacher: Teacher, recipe: Recipe) -> "Method":
        """The method of a recipe, before `initialize`.

        Raises:
            UserError: if the recipe does not fit the teacher.
        """

    def notes(self) -> list[str]:
        """Warnings to show when a run is set up."""
        return []

    def calibration_tokens(self) -> int:
        """Training tokens that `initialize` asks for. It gets whole sequences, at least two."""
        return 0

    def initialize(self, calibration: Batch, progress: Progress) -> StartReport:
        """Initialize a new run's student, in place.

        Args:
            calibration: the first training sequences of the run; none if `calibration_tokens` is
                0.
            progress: gets the number of completed parts and their total.
        """
        return StartReport()

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, for the optimizer and the checkpoints."""

    def decayed(self) -> set[str]:
        """Names of the parameters with weight decay. Default: all matrices."""
        return {name for name, value in self.parameters().items() if value.ndim > 1}

    def share_work(self, world: World) -> None:
        """Choose the owners of the present stage's parameters."""
        self.owners = Owners(world, assign(self.costs(), world.size))

    def leaves(self) -> dict[str, Leaf]:
        """What backward passes give gradients that the owners of parameters need, by name. Those of
        the student are in the order of its forward pass, after all others. Default: the
        parameters that are not frozen."""
        named = {
            name: Leaf(value, self.owners[name])
            for name, value in self.parameters().items()
            if value.requires_grad
        }
        inside = {name for name, _ in self.model.named_parameters()}
        return dict(sorted(named.items(), key=lambda leaf: leaf[0] in inside))

    def costs(self) -> dict[str, float]:
        """What the owner of each parameter has to do in a step, by name, in any unit. Default: the
        number of its elements."""
        return {name: value.numel() for name, value in self.parameters().items()}

    def projected(self) -> set[str]:
        """Names of the parameters that the passes do not use themselves, but only weights computed
        from them, which are among the `leaves`. `begin_step` sends these weights to other
        processes, so that the loop has nothing to send for such a parameter."""
        return set()

    def begin_step(self, step: int) -> None:  # noqa: B027 - optional
        """Prepare the forward passes of an optimizer step. What other processes send may arrive
        until the student runs.

        Args:
            step: number of completed steps of the run.
        """

    @abstractmethod
    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        """The losses of a micro-batch."""

    def end_step(self) -> None:  # noqa: B027 - optional
        """Complete the gradients after the last micro-batch, from those of the `leaves`, which are
        added up over all processes in their owners. Other processes have none of parameters."""

    @abstractmethod
    def student(self) -> PreTrainedModel:
        """The present student as a plain model of the teacher's class. It may share its weights
        with the model in training."""


class Staged:
    """A method that trains in several stages, with other parameters in each. The defaults are those
    of a method with one stage."""

    one_schedule: ClassVar[bool] = False
    """Whether the learning rate's schedule spans all stages, and a later stage starts with a
    warm-up of its own. If not, each stage has a schedule of its own."""

    then_trained: ClassVar[str] = "the student"
    """What a later stage trains, for people."""

    def stage_ends(self) -> tuple[int, ...]:
        """Steps after which another stage starts, ascending. The loop then calls `next_stage`, and
        starts a new optimizer with the parameters of that stage."""
        return ()

    def next_stage(self) -> dict[str, Any]:
        """Start the next stage.

        Returns:
            Entries for the metrics of the last step; "stage" says in a word what has happened.
        """
        raise NotImplementedError(f"{type(self).__name__} has one stage")

    def rate_setting(self) -> str:
        """Name of the setting in the recipe's `train` that is the peak learning rate of the present
        stage. `learning_rate` replaces it if it is empty."""
        return "learning_rate"

    def own_learning_rates(self) -> dict[str, float]:
        """Peak learning rates of the parameters that do not use the recipe's, by name. They have
        no weight decay."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the parameters, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to the stage of a `state`. `parameters` and `buffers` then have its names and shapes;
        the checkpoint fills them."""

    def buffers(self) -> dict[str, Tensor]:
        """Tensors by name that a checkpoint must hold although they are not trained."""
        return {}


ONE_STAGE = Staged()


def stages_of(method: Method) -> Staged:
    """The stages of a method."""
    return method if isinstance(method, Staged) else ONE_STAGE


@runtime_checkable
class WeighsSources(Protocol):
    """A method that can set how much of the text comes from each source."""

    def weighs_sources(self) -> bool:
        """Whether it does."""

    def source_shares(
        self,
        shares: Mapping[str, float],
        student: Mapping[str, float],
        teacher: Mapping[str, float],
    ) -> dict[str, float]:
        """The sources' new shares of the training sequences after a held-out measurement.

        Args:
            shares: the present shares; they sum to 1.
            student: held-out LM loss by source, for sources with held-out tokens.
            teacher: the teacher's on the same tokens.
        """


@runtime_checkable
class Capturable(Protocol):
    """A method whose micro-batches a CUDA graph can record (`lrc.train.cuda_graph`)."""

    def prepare_capture(self, replay: Replay) -> None:
        """Keep the numbers that change from step to step in device memory from now on.

        Args:
            replay: does what a step computes around its micro-batches, from a graph where it can.
        """

    def capture_key(self) -> Hashable:
        """What the operations of a micro-batch depend on besides its shapes and counts."""


@runtime_checkable
class CountsFlops(Protocol):
    """A method that knows the cost of its steps."""

    def step_flops(self, step: int, tokens: int, sequence: int) -> float | None:
        """Floating-point operations of the matrix products of an optimizer step; None if unknown.

        Args:
            step: number of completed steps before it.
            tokens: tokens of the step, all micro-batches together.
            sequence: tokens of a sequence.
        """
