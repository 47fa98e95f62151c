"""The result of a start."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """A student's projections and gains."""

    projections: dict[str, Tensor]
    """The projections [d_T, d_S] by their keys."""

    final_gain: Tensor | None
    """The gain [d_S] of the final norm; None: it is 1."""

    forward_seconds: float = 0.0
    """Seconds that the teacher's layers alone take to run once over the calibration tokens; 0 if
    there are none."""

    gains: Mapping[str, Tensor] = field(default_factory=dict)
    """The gains [d_S] of norms after blocks, by module path; all others in the layers are 1."""

    folded: bool = True
    """Whether the projections were solved for folded gains."""
