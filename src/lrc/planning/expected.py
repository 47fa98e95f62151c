"""What held-out loss to expect of a shape, from our own runs (`measured.json`).

A run that measured this shape of this teacher at this length is quoted. Otherwise a line is fitted
to all runs of this teacher. It is used only if it predicts runs well that are left out of the fit,
one at a time, and if no size lies outside of what was measured:

    log(loss - teacher's loss) = a + b log(tokens) + c log(parameters) + d log(hidden size) + ...

`scripts/measured_shapes.py` adds runs to the table.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np

from lrc.model.pruned_shape import PrunedShape, shape_of_config

Array = np.ndarray[Any, Any]

LARGEST_ERROR = 0.1
"""Mean absolute error of the runs left out, in nats, up to which a fit is used."""

RUNS_PER_TERM = 2
"""Runs that a fit needs for each of its terms."""

OUTSIDE = 1.05
"""How far a size or length may lie outside of the measured ones, as a factor."""

ALIKE = 0.05
"""Directions in which the runs vary less than this, in units of the most varied one, are left out
of the fit. Runs of one size lie on a surface, and say nothing about shapes off it."""

SAME_LENGTH = 1.1
"""Runs whose numbers of tokens differ by at most this factor are of one length."""


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run."""

    shape: PrunedShape
    parameters: int
    tokens: int
    loss: float
    """Held-out LM loss of the student."""
    teacher_loss: float
    """That of its teacher, on the same text."""
    source: str
    """Where the numbers are from."""

    @property
    def gap(self) -> float:
        """How far the student is above its teacher."""
        return max(self.loss - self.teacher_loss, 1e-4)


@dataclass(frozen=True)
class Expectation:
    """An expected held-out loss, or the reason why there is none."""

    loss: float | None
    reason: str
    """What the loss comes from, or why there is none."""


def measured_runs(config: Any, table: str | None = None) -> list[MeasuredRun]:
    """The measured runs of the teacher with a configuration.

    Args:
        config: transformers' configuration of the teacher, which its sizes and vocabulary identify.
        table: JSON text in place of `measured.json`.
    """
    text = table or resources.files("lrc.planning").joinpath("measured.json").read_text("utf-8")
    whole = shape_of_config(config)
    return [
        MeasuredRun(
            PrunedShape(**run["shape"]),
            run["parameters"],
            run["tokens"],
            run["loss"],
            run["teacher_loss"],
            run["source"],
        )
        for run in json.loads(text)["runs"]
        if PrunedShape(**run["teacher_shape"]) == whole and run["vocabulary"] == config.vocab_size
    ]


class Expected:
    """Expected losses of one teacher's students.

    Args:
        runs: the measured runs of this teacher.
    """

    def __init__(self, runs: Sequence[MeasuredRun]) -> None:
        self.runs = list(runs)

    def of(self, shape: PrunedShape, parameters: int, tokens: int) -> Expectation:
        """The expected loss of a student after a number of training tokens."""
        if not self.runs:
            return Expectation(None, "no run of this teacher was measured")
        for run in self.runs:
            if run.shape == shape and abs(math.log(run.tokens / tokens)) <= math.log(SAME_LENGTH):
                return Expectation(run.loss, f"measured: {run.source}")
        if len(self.runs) < RUNS_PER_TERM * (len(self._varying) + 1):
            return Expectation(
                None, f"{len(self.runs)} measured runs of this teacher are too few for a fit"
            )
        if self.error > LARGEST_ERROR:
            return Expectation(
                None,
                f"the fit to {len(self.runs)} runs misses runs left out by {self.error:.2f} nats",
            )
        asked = features(shape, parameters, tokens)
        low, high = self._features.min(0), self._features.max(0)
        slack = math.log(OUTSIDE)
        if ((asked < low - slack) | (asked > high + slack)).any():
            return Expectation(None, "outside of the sizes and lengths that were measured")
        loss = self.runs[0].teacher_loss + self._predict(self._features, self._gaps, asked)
        return Expectation(
            loss, f"a fit to {len(self.runs)} runs, which misses runs left out by {self.error:.2f}"
        )

    @cached_property
    def error(self) -> float:
        """Mean absolute error of the fit on runs left out, in nats."""
        every = np.arange(len(self.runs))
        misses = [
            abs(
                self._predict(self._features[every != one], self._gaps[every != one], row)
                - math.exp(self._gaps[one])
            )
            for one, row in enumerate(self._features)
        ]
        return float(np.mean(misses))

    @cached_property
    def _features(self) -> Array:
        return np.array([features(run.shape, run.parameters, run.tokens) for run in self.runs])

    @cached_property
    def _varying(self) -> Array:
        """The features in which the runs differ enough to measure their effect."""
        return np.flatnonzero(np.ptp(self._features, axis=0) > math.log(OUTSIDE))

    @cached_property
    def _gaps(self) -> Array:
        return np.log([run.gap for run in self.runs])

    def _predict(self, rows: Array, gaps: Array, asked: Array) -> float:
        """The gap of a student, by least squares on the logarithms of other gaps."""
        chosen = rows[:, self._varying]
        middle, spread = chosen.mean(0), chosen.std(0).clip(1e-9)
        design = (chosen - middle) / spread
        weights = np.linalg.lstsq(design, gaps - gaps.mean(), rcond=ALIKE)[0]
        moved = (asked[self._varying] - middle) / spread @ weights
        return float(np.exp(gaps.mean() + moved))


def features(shape: PrunedShape, parameters: int, tokens: int) -> Array:
    """The inputs of the fit: logarithms of its length and its sizes."""
    sizes = shape.hidden, shape.layers, shape.kv_heads, shape.neurons
    return np.log([tokens, parameters, *sizes])
