"""The results of a comparison so far, read from its run folders."""

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from lrc.comparison.folders import Folders, held_out_of, is_over
from lrc.comparison.plan import Rate
from lrc.recipe.learning_rate import learning_rate, share_of_rate
from lrc.report.curves import ACCURACY, TEACHER_ACCURACY
from lrc.run import Run

CLOSE = 0.03
"""Largest relative difference of parameter counts that counts as the same size."""

RISE = 0.05
"""Largest rise of a held-out loss above its best so far that is not reported, in nats."""

SAME_LOSS = 3e-3
"""Largest relative difference of the teacher's held-out loss between runs on the same text: devices
and precisions round differently."""


@dataclass(frozen=True)
class Point:
    """A held-out measurement of a run."""

    tokens: int
    """Training tokens plus calibration tokens."""
    seconds: float
    """Seconds of the optimizer steps and of the initialization."""
    loss: float
    """Held-out LM loss in nats."""


@dataclass(frozen=True)
class MeanCurve:
    """The measurements of an entry, each averaged over its runs."""

    tokens: list[float]
    seconds: list[float]
    loss: list[float]
    low: list[float]
    """The lowest loss of any run."""
    high: list[float]
    """The highest loss of any run."""


@dataclass(frozen=True)
class RunResult:
    """A run that has ended."""

    seed: int
    folder: str
    curve: list[Point]
    """Every measurement. The fields below are None if the loss did not stay finite."""
    held_out_lm: float | None
    kl: float | None
    top1_agreement: float | None
    tokens_to_reach: list[float | None]
    """By threshold; None if it was not reached."""
    others: dict[str, float] = field(default_factory=dict)
    """More figures of the student by name: its losses on `data.also_held_out`, and its accuracies
    by `train.evaluate`."""
    calibration_tokens: int | None = None
    teacher_held_out_lm: float | None = None
    """The teacher's loss on the run's held-out text."""
    code: str = ""
    """The version of the code that began the run; empty if unknown."""
    computed_on: str = ""
    """Device and precision; empty if unknown."""
    auto_rate: float | None = None
    """What the learning rate `auto` stood for; None for another rate."""


@dataclass(frozen=True)
class EntryResult:
    """An entry with its ended runs."""

    name: str
    method: str
    settings: dict[str, Any]
    """The settings that it changes in the base recipe."""
    learning_rate: Rate | None
    tries: dict[Rate, float | None]
    """Held-out loss by rate on the grid's budget; None if the loss did not stay finite."""
    at_the_edge: bool
    """Whether the chosen rate is the smallest or the largest of the grid's numbers."""
    parameters: int | None
    tokens: int
    calibration_tokens: int | None
    runs: list[RunResult]
    seeds: list[int] = field(default_factory=list)
    """The seeds of all its runs, ended or not."""

    def values(self, figure: str) -> list[float]:
        """A field of all runs that stayed finite."""
        found = [getattr(run, figure) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, figure: str) -> float | None:
        """Mean of a field over the runs; None if there are no values."""
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def spread(self, figure: str) -> float | None:
        """Standard deviation of a field over the runs; None for fewer than two values."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def other(self, name: str) -> float | None:
        """Mean of one of `others` over the runs that have it."""
        values = [run.others[name] for run in self.runs if name in run.others]
        return statistics.fmean(values) if values else None

    def seconds(self) -> float | None:
        """Mean seconds of a run's steps and initialization."""
        ends = [run.curve[-1].seconds for run in self.runs if run.held_out_lm is not None]
        return statistics.fmean(ends) if ends else None

    def reach(self, threshold: int) -> tuple[float | None, int]:
        """Mean tokens to reach the threshold with this index, and how many runs reached it."""
        found = [run.tokens_to_reach[threshold] for run in self.runs]
        reached = [tokens for tokens in found if tokens is not None]
        return (statistics.fmean(reached) if reached else None), len(reached)

    def largest_rise(self) -> float:
        """Largest rise of any run's held-out loss above its best so far, in nats."""
        rises = [0.0]
        for run in self.runs:
            best = math.inf
            for point in run.curve:
                best = min(best, point.loss)
                rises.append(point.loss - best)
        return max(rises)

    def curve(self) -> MeanCurve | None:
        """The mean curve over the runs; None if there are no curves."""
        curves = [run.curve for run in self.runs if run.curve]
        if not curves:
            return None
        # A run whose loss was not finite ends early.
        longest = max(map(len, curves))
        steps = [[c[place] for c in curves if place < len(c)] for place in range(longest)]
        losses = [[point.loss for point in points] for points in steps]
        return MeanCurve(
            [statistics.fmean(point.tokens for point in points) for points in steps],
            [statistics.fmean(point.seconds for point in points) for points in steps],
            [statistics.fmean(values) for values in losses],
            [min(values) for values in losses],
            [max(values) for values in losses],
        )


@dataclass(frozen=True)
class Results:
    """A comparison's results."""

    thresholds: list[float]
    grid_tokens: int | None
    """Training tokens of a try; None without a grid."""
    reference: str
    teacher_held_out_lm: float | None
    teacher_parameters: int | None
    entries: list[EntryResult]
    teacher_others: dict[str, float] = field(default_factory=dict)
    """The teacher's values of what runs measure beside the held-out loss."""

    def size_difference(self, entry: EntryResult) -> float | None:
        """Relative difference of the parameter count from the reference entry."""
        reference = next(e.parameters for e in self.entries if e.name == self.reference)
        if entry.parameters is None or reference is None:
            return None
        return entry.parameters / reference - 1

    def teacher_losses(self) -> tuple[RunResult, RunResult] | None:
        """The runs with the teacher's lowest and highest held-out loss, if these differ by more
        than devices do: they were measured on other text, or with another teacher."""
        known = [
            (run.teacher_held_out_lm, run)
            for entry in self.entries
            for run in entry.runs
            if run.teacher_held_out_lm is not None
        ]
        if not known:
            return None
        (low, first), (high, last) = (best(known, key=itemgetter(0)) for best in (min, max))
        return (first, last) if high - low > SAME_LOSS * low else None

    def highest_start(self) -> float | None:
        """The highest loss before training; higher values would flatten a picture."""
        starts = [run.curve[0].loss for entry in self.entries for run in entry.runs if run.curve]
        return max(starts, default=None)

    def as_json(self) -> dict[str, Any]:
        """All results, for comparison.json."""
        data = asdict(self)
        for entry, written in zip(self.entries, data["entries"], strict=True):
            written["mean_held_out_lm"] = entry.mean("held_out_lm")
            written["spread_held_out_lm"] = entry.spread("held_out_lm")
            written["seconds"] = entry.seconds()
            written["size_difference"] = self.size_difference(entry)
        return data


def collect(folders: Folders) -> Results:
    """Read the results of all runs that have ended."""
    comparison = folders.comparison
    entries: list[EntryResult] = []
    teacher: dict[str, Any] = {}
    others: dict[str, float] = {}
    for entry in comparison.entries:
        rate, tries = folders.chosen(entry), folders.tries(entry)
        numbers = [tried for tried in tries if tried != "auto"]
        seeds = comparison.seeds_of(entry)
        places = {seed: folders.of_run(entry, seed) for seed in seeds}
        ended = {
            seed: folder
            for seed, folder in places.items()
            if is_over(folder) and not folders.is_outdated(entry, folder)
        }
        summary: dict[str, Any] = {}
        for folder in ended.values():
            if held_out_of(folder) is not None:
                run = Run.open(folder)
                teacher = summary = run.summary()
                others |= others_of(run, "teacher")
        recipe = comparison.grid_recipe(entry, rate or 1.0)
        runs = [
            read_run(seed, folder, comparison.thresholds, folders.out)
            for seed, folder in ended.items()
        ]
        entries.append(
            EntryResult(
                entry.name,
                recipe.method.name,
                entry.settings,
                rate,
                tries,
                bool(numbers) and rate in (min(numbers), max(numbers)),
                summary.get("student_parameters"),
                comparison.tokens,
                max((run.calibration_tokens or 0 for run in runs), default=None),
                runs,
                seeds,
            )
        )
    return Results(
        comparison.thresholds,
        comparison.grid.tokens if comparison.grid else None,
        comparison.reference_name(),
        teacher.get("teacher_held_out_lm"),
        teacher.get("teacher_parameters"),
        entries,
        others,
    )


def read_run(seed: int, folder: Path, thresholds: list[float], out: Path) -> RunResult:
    """Read a run that has ended."""
    run = Run.open(folder)
    metrics = run.metrics()
    curve, start = curve_of(metrics), metrics[0] if metrics else {}
    result = RunResult(
        seed,
        str(folder.relative_to(out)),
        curve,
        None,
        None,
        None,
        [None] * len(thresholds),
        calibration_tokens=start.get("calibration_tokens"),
        teacher_held_out_lm=start.get("teacher_held_out_lm"),
        code=code_of(run),
    )
    if held_out_of(folder) is None:
        return result
    summary = run.summary()
    auto = None
    if run.recipe.train.learning_rate == "auto":
        auto = learning_rate(run.recipe, summary["student_parameters"])
        auto *= share_of_rate(run.recipe, start)
    return replace(
        result,
        held_out_lm=summary["student_held_out_lm"],
        kl=summary["kl"],
        top1_agreement=summary["top1_agreement"],
        tokens_to_reach=[tokens_to_reach(curve, threshold) for threshold in thresholds],
        others=others_of(run, "student"),
        computed_on=summary.get("computed_on", ""),
        auto_rate=auto,
    )


def code_of(run: Run) -> str:
    """The version of the code that began a run, for people; empty if it is unknown.

    The checksum of the source names it best: other files of a commit change no result, and two
    changed checkouts may have the same commit.
    """
    found = run.environment()
    version, commit = found.get("packages", {}).get("low-rank-clone"), found.get("git_commit")
    source = found.get("source_sha256")
    parts = [f"lrc {version}" if version else "", f"commit {commit}" if commit else ""]
    parts = parts if source is None else [parts[0], f"source {source[:12]}"]
    return ", ".join(filter(None, parts))


def others_of(run: Run, who: Literal["teacher", "student"]) -> dict[str, float]:
    """What a run measured of its teacher or student beside the held-out loss, by name."""
    losses = run.summary().get("also_held_out", {})
    found = {f"{name} LM loss": loss[f"{who}_lm"] for name, loss in losses.items()}
    key = TEACHER_ACCURACY if who == "teacher" else ACCURACY
    measured = [line[key] for line in run.metrics() if key in line]
    accuracies = measured[-1] if measured else {}
    return found | {name: v for name, v in accuracies.items() if not name.endswith("/acc_norm")}


def curve_of(metrics: list[dict[str, Any]]) -> list[Point]:
    """The finite held-out measurements of a run; each one includes the cost of calibration."""
    if not metrics:
        return []
    tokens, seconds = metrics[0]["calibration_tokens"], metrics[0]["calibration_seconds"]
    return [
        Point(tokens + line["tokens"], seconds + line.get("step_seconds", 0.0), line["held_out_lm"])
        for line in metrics
        if math.isfinite(line.get("held_out_lm", math.nan))
    ]


def tokens_to_reach(curve: list[Point], loss: float) -> float | None:
    """Tokens at which a curve first reaches a loss; None if it never does.

    The curve is interpolated linearly between measurements.
    """
    before: Point | None = None
    for point in curve:
        if point.loss <= loss:
            if before is None or before.loss == point.loss:
                return float(point.tokens)
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.tokens + share * (point.tokens - before.tokens)
        before = point
    return None
