"""The result of a start from calibration tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """A student's projections and gains, solved for folded gains."""

    projections: dict[str, Tensor]
    """The projections [d_T, d_S] by their keys."""

    final_gain: Tensor
    """The gain [d_S] of the final norm; the gains inside the layers are 1."""

    forward_seconds: float
    """Seconds that the teacher's layers alone take to run once over the calibration tokens."""
