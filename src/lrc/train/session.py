"""A run from its recipe to its closing table."""

from typing import Any

from rich.console import Console

from lrc.data import TrainingText, prepare
from lrc.initialise import initialise
from lrc.recipe import Recipe
from lrc.run import Run
from lrc.teacher import Teacher
from lrc.train.closing import close_run
from lrc.train.loop import Loop
from lrc.train.progress import phase
from lrc.train.setup import Setup, set_up
from lrc.train.trackers import check_installed


def start(setup: Setup, recipe: Recipe, text: TrainingText, console: Console) -> None:
    """Initialise the projections as the recipe says, from the head of the training stream."""
    section = recipe.initialise
    sequences = max(2, section.calibration_tokens // recipe.data.sequence_length)
    ids = text.training_batch(0, sequences).input_ids.to(setup.device)
    name = f"Initialising the projections ({section.method})"
    with phase(console, name) as detail:
        initialise(
            setup.method,
            section,
            ids,
            lambda done, layers: detail(f"layer {done} of {layers}, {ids.numel():,} tokens"),
        )


class Interrupted(Exception):
    """The run was asked to end by a signal, and has written a checkpoint."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def train(run: Run, console: Console, teacher: Teacher | None = None) -> dict[str, Any]:
    """Train a run to its end, from its newest checkpoint or from the start.

    Args:
        run: a new run, or one to continue.
        console: where progress and the closing table are shown.
        teacher: a teacher that is loaded already; None: the one that the recipe names.

    Returns:
        The closing table, as in summary.json.

    Raises:
        UserError: the recipe, the data or the machine do not allow it, or the loss is not finite.
        Interrupted: SIGINT or SIGTERM asked to stop; `lrc resume` goes on from there.
    """
    loop = open_loop(run, console, teacher)
    stop = loop.go(run.recipe.steps())
    if stop.signal is not None and loop.setup.state.step < run.recipe.steps():
        raise Interrupted(
            stop.signal,
            f"Stopped after step {loop.setup.state.step}; go on with `lrc resume {run.folder}`.",
        )
    return close_run(loop, console)


def initialise_only(run: Run, console: Console, teacher: Teacher | None = None) -> dict[str, Any]:
    """Initialise a new run's student and export it, without any training.

    The run can be continued by `train`. Arguments, return value and errors are those of `train`.
    """
    loop = open_loop(run, console, teacher)
    loop.go(0)
    return close_run(loop, console)


def open_loop(run: Run, console: Console, teacher: Teacher | None) -> Loop:
    """Load teacher and text, and bring the method to the run's newest checkpoint or its start."""
    check_installed(run.recipe.train.report_to)
    with phase(console, f"Loading the teacher {run.recipe.teacher.model}"):
        setup = set_up(run, console, teacher)
    data = run.recipe.data
    with phase(console, f"Reading the text {', '.join(data.text)}") as detail:
        packed = prepare(
            data, setup.teacher.tokenizer, lambda _, tokens: detail(f"{tokens:,} tokens")
        )
    text = TrainingText(packed, data, run.recipe.train.seed)
    if not setup.restored:
        start(setup, run.recipe, text, console)
    return Loop(run, setup, text, console)
