"""The result of a start."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """A student's projections and gains."""

    projections: dict[str, Tensor]
    """The projections [d_T, d_S] by their keys."""

    final_gain: Tensor | None
    """The gain [d_S] of the final norm; the gains inside the layers are 1. None: it is 1, too."""

    forward_seconds: float = 0.0
    """Seconds that the teacher's layers alone take to run once over the calibration tokens; 0 if
    there are none."""

    folded: bool = True
    """Whether the projections were solved for folded gains."""
