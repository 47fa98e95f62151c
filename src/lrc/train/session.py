"""Run a recipe from setup to the closing table."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lrc.cloning.activations import last_hidden
from lrc.data import Batch, Reader, open_text
from lrc.data.sources import STDLIB_DOCS, expand_sources, left_out
from lrc.evaluation.along import Benchmarks
from lrc.model.teacher import Teacher
from lrc.model.tokenizer import answer_mark
from lrc.preflight import check_installed, need_whole_teacher
from lrc.recipe import Recipe
from lrc.run import Run
from lrc.system.errors import UserError, reason
from lrc.train.closing import close_run
from lrc.train.compiling import check_compiler, compile_small_modules
from lrc.train.inputs import check_inputs
from lrc.train.loop import Loop, OnStep
from lrc.train.progress import phase
from lrc.train.setup import Setup, calibration_sequences, find_device, set_up
from lrc.train.starts import Starts

NAMED_FILES = 5
"""Largest number of text files to list by name."""

CHAT_SEQUENCES = 256
"""Number of training sequences in which a conversation is looked for."""

NO_BATCH = Batch(torch.empty(0, 0, dtype=torch.int64))
"""An empty calibration batch."""


def start(setup: Setup, recipe: Recipe, text: Reader, console: Console) -> tuple[float, float]:
    """Initialize the method from the beginning of the training stream.

    Returns:
        The seconds that it took, and the seconds of the teacher's layers alone on the same tokens
        (0 if not known).
    """
    sequences = calibration_sequences(setup.method, recipe, text)
    calibration = text.training_batch(0, sequences).to(setup.device) if sequences else NO_BATCH
    tokens, wanted = calibration.input_ids.numel(), setup.method.calibration_tokens()
    if tokens + recipe.data.sequence_length <= wanted:
        console.print(
            f"The training text is short: the student is initialized from {tokens:,} tokens "
            f"instead of {wanted:,}.",
            style="yellow",
        )
    if sequences and not setup.teacher.on_disk:
        refuse_dead_teacher(setup.teacher, calibration.rows(slice(1)))
    started = time.perf_counter()
    with phase(console, "Initializing the student") as detail:
        try:
            report = setup.method.initialize(
                calibration,
                lambda done, parts: detail(f"part {done} of {parts}, {tokens:,} tokens"),
            )
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise UserError(
                f"The start cannot be solved because the activations of {setup.teacher.name} on "
                f"this text are degenerate ({reason(error)}). Check the teacher's weights, or set "
                "initialize.method to random."
            ) from error
    return time.perf_counter() - started, report.forward_seconds


@torch.no_grad()
def refuse_dead_teacher(teacher: Teacher, batch: Batch) -> None:
    """Refuse a teacher whose last hidden states are not finite, or the same for every token: a
    student can neither be solved nor trained from them.

    Raises:
        UserError: if the hidden states are not finite or constant.
    """
    hidden = last_hidden(teacher.model, batch).float()
    if not torch.isfinite(hidden).all():
        what = "are not finite"
    elif hidden.std(dim=(0, 1)).max() == 0:
        what = "are the same for every token"
    else:
        return
    raise UserError(
        f"The last hidden states of the teacher {teacher.name} {what} on this text. Its weights "
        "are damaged or too large for teacher.dtype; download it again, or use another teacher."
    )


class Interrupted(Exception):
    """A signal stopped the run after it wrote a checkpoint."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    run: Run,
    console: Console,
    teacher: Teacher | None = None,
    report: bool = True,
    starts: Starts | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train a run to its last step, from its newest checkpoint or from the beginning.

    Args:
        run: a new run, or one to continue.
        console: where progress and the closing table are shown.
        teacher: a teacher that is already loaded; None: the recipe's.
        report: whether to print the closing table and samples.
        starts: starts to share with other runs; None: share none.
        on_step: called with the metrics of every step.

    Returns:
        The closing table, as in summary.json.

    Raises:
        UserError: if the recipe, the data or the machine does not allow it.
        DivergedError: if the loss or its gradient is not finite.
        Interrupted: if SIGINT or SIGTERM stops the run; `lrc resume` continues it.
    """
    need_whole_teacher(run.recipe)
    with run.hold():
        if has_ended(run):
            console.print(f"{run.folder} has ended; its student is in {run.student_folder}.")
            return run.summary()
        loop = open_loop(run, console, teacher, starts)
        loop.on_step = on_step
        stop = loop.go(run.recipe.steps())
        if stop.signal is not None and loop.setup.state.step < run.recipe.steps():
            raise Interrupted(
                stop.signal,
                f"Stopped after step {loop.setup.state.step}; "
                f"continue with `lrc resume {run.folder}`.",
            )
        return close_run(loop, console, report)


def has_ended(run: Run) -> bool:
    """Whether a run is trained to its last step and has all its output."""
    if not (run.summary_file.is_file() and run.student_folder.is_dir()):
        return False
    try:
        return int(run.summary()["tokens"]) >= run.recipe.steps() * run.recipe.step_tokens()
    except (UserError, KeyError, TypeError, ValueError):
        return False  # a damaged table is written again


def initialize_only(run: Run, console: Console, teacher: Teacher | None = None) -> dict[str, Any]:
    """Initialize a new run's student and export it, without any training.

    `train` can continue the run. Arguments, return value and errors are those of `train`.
    """
    with run.hold():
        loop = open_loop(run, console, teacher)
        loop.go(0)
        return close_run(loop, console)


def text_notes(recipe: Recipe) -> list[str]:
    """Name the files that a recipe's folders and patterns stand for, and those left out."""
    sources = recipe.data.text
    if not sources or all(source == STDLIB_DOCS or Path(source).is_file() for source in sources):
        return []
    notes = [f"Reading {_listed(str(source.path) for source in expand_sources(sources))}."]
    if skipped := left_out(sources):
        notes.append(
            f"Left out, because they are test or validation splits or not training text: "
            f"{_listed(map(str, skipped))}. To read one anyway, name it in data.text."
        )
    return notes


def chat_note(teacher: Teacher, text: Reader) -> str | None:
    """A warning if the teacher is a chat model and the first part of its text holds no
    conversation in its chat template; None if there is nothing to say, or no way to tell."""
    if not teacher.tokenizer.chat_template:
        return None
    mark = torch.tensor(answer_mark(teacher.tokenizer))
    looked = min(CHAT_SEQUENCES, text.training_sequences or CHAT_SEQUENCES)
    seen = text.training_batch(0, looked).input_ids
    if not 0 < len(mark) <= seen.shape[1]:
        return None
    if (seen.unfold(1, len(mark), 1) == mark).all(-1).any():
        return None
    return (
        f"{teacher.name} is a chat model, but the first {seen.numel():,} training tokens hold no "
        "conversation in its chat template, so the student will not learn to answer from this "
        "text: mix conversations into it (docs/chat.md says how, and what it costs not to)."
    )


def _listed(names: Iterable[str]) -> str:
    """The first few names, and the number of the others."""
    every = list(names)
    more = len(every) - NAMED_FILES
    return ", ".join(every[:NAMED_FILES]) + (f" and {more} more" if more > 0 else "")


def open_loop(
    run: Run, console: Console, teacher: Teacher | None, starts: Starts | None = None
) -> Loop:
    """Load teacher and text, and bring the method to the run's newest checkpoint or its start.

    A new run's folder is written after all checks that can fail, and before anything slow.
    """
    check_installed(run.recipe.train.report_to)
    evaluate = run.recipe.train.evaluate
    benchmarks = None if evaluate is None else Benchmarks(evaluate)
    if run.recipe.train.compile:
        check_compiler(find_device(run.recipe.train.device))
    loading = "Preparing the student" if teacher else f"Loading {run.recipe.teacher.model}"
    with phase(console, loading):
        setup = set_up(run, console, teacher)
    with phase(console, f"Reading the text {run.recipe.data.origin()}") as detail:
        text = open_text(
            run.recipe,
            setup.teacher.tokenizer,
            lambda _, tokens: detail(f"{tokens:,} tokens"),
            setup.teacher.first_token,
        )
    for note in text_notes(run.recipe):
        console.print(note)
    new = run.begin()
    with phase(console, "Checking the inputs"):
        check_inputs(run, setup.teacher, text)
    if not (new or setup.restored):
        console.print(f"{run.folder} has no checkpoint yet: it starts over.", style="yellow")
    if new and (missing := chat_note(setup.teacher, text)):
        console.print(missing, style="yellow")
    calibration = 0.0, 0.0
    if setup.restored:
        text.load_state(setup.state.text)
    elif kept := starts and starts.fill(setup, run.recipe):
        calibration = kept
    else:
        calibration = start(setup, run.recipe, text, console)
        if starts:
            starts.keep(setup, run.recipe, calibration)
    if run.recipe.train.compile:
        for model in (setup.teacher.model, setup.method.model):
            compile_small_modules(model)
    return Loop(run, setup, text, console, *calibration, benchmarks=benchmarks)
