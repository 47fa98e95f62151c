"""What the training loop knows of a method."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.clock import Clock
from lrc.data.batch import Batch

TOKEN_LM = "token_lm"
"""Key of the LM loss by token in what `losses` may give: [batch, sequence], 0 without a label."""


@dataclass(frozen=True)
class Counts:
    """What the losses of one optimiser step are averaged over, all micro-batches together."""

    tokens: int
    """Tokens that are not padding."""

    labels: int
    """Tokens that have a next token to learn."""


class Method(ABC):
    """A way to get a small model out of a teacher.

    Per optimiser step the loop calls `begin_step`, then `losses` and `backward` on the entry
    "loss" for every micro-batch, then `end_step`; after that the gradients of `parameters` are
    complete.
    """

    clock: Clock
    """Methods count the time of their parts here."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: what the optimiser and the checkpoints hold."""

    def decayed(self) -> set[str]:
        """Names of the parameters that weight decay applies to; default: all matrices."""
        return {name for name, value in self.parameters().items() if value.ndim > 1}

    def begin_step(self) -> None:  # noqa: B027 - optional
        """Prepare the forward passes of one optimiser step."""

    @abstractmethod
    def losses(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Losses of a micro-batch, all scalars; "loss" is the one to differentiate.

        The losses of a step's micro-batches add up to those of the step. An entry TOKEN_LM lets the
        loop report the LM loss by source.
        """

    def end_step(self) -> None:  # noqa: B027 - optional
        """Complete the gradients after the last micro-batch."""

    @abstractmethod
    def student(self) -> PreTrainedModel:
        """The student with the parameters of now: a plain model of the teacher's class."""
