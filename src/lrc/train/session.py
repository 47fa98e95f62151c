"""Run a recipe from setup to the closing table."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lrc.cloning.activations import last_hidden
from lrc.cloning.kernels import use_triton
from lrc.cloning.kernels.liger import apply_liger
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import stages_of
from lrc.data import Batch, Reader, open_text
from lrc.data.sources import STDLIB_DOCS, expand_sources, left_out_note, listed
from lrc.evaluation.along import Benchmarks
from lrc.model.shapes import parameters_of
from lrc.model.teacher import Teacher
from lrc.model.tokenizer import answer_mark
from lrc.preflight import check_installed, need_whole_teacher
from lrc.recipe import Recipe
from lrc.recipe.choices import choices
from lrc.run import Run
from lrc.system.checksums import source_sha256
from lrc.system.distributed import ALONE, World, join, lost_peers
from lrc.system.errors import UserError, reason
from lrc.system.progress import task
from lrc.train.closing import close_run
from lrc.train.compiling import check_compiler, compile_small_modules
from lrc.train.cuda_graph import uses_graph
from lrc.train.inputs import check_inputs, describe_inputs
from lrc.train.loop import Loop, OnStep
from lrc.train.setup import (
    Setup,
    calibration_sequences,
    find_device,
    new_state,
    set_up,
)
from lrc.train.signals import StopRequest
from lrc.train.starts import Starts

logger = logging.getLogger(__name__)

CHAT_SEQUENCES = 256
"""Number of training sequences in which a conversation is looked for."""

NO_BATCH = Batch(torch.empty(0, 0, dtype=torch.int64))
"""An empty calibration batch."""


def start(setup: Setup, recipe: Recipe, text: Reader, world: World = ALONE) -> tuple[float, float]:
    """Initialize the method from the beginning of the training stream, in one process or in all.

    Returns:
        The seconds that it took, and the seconds of the teacher's layers alone on the same tokens
        (0 if not known).
    """
    if setup.method.solves_alone and not world.leads:
        return take_start(setup, recipe, world, (0.0, 0.0))
    sequences = calibration_sequences(setup.method, recipe, text)
    calibration = text.training_batch(0, sequences).to(setup.device) if sequences else NO_BATCH
    tokens, wanted = calibration.input_ids.numel(), setup.method.calibration_tokens()
    if tokens + recipe.data.sequence_length <= wanted:
        logger.warning(
            f"The training text is short: the student is initialized from {tokens:,} tokens "
            f"instead of {wanted:,}."
        )
    if sequences and not (setup.teacher.on_disk or setup.teacher.sharded):
        refuse_dead_teacher(setup.teacher, calibration.rows(slice(1)))
    started = time.perf_counter()
    what = "Initializing the student" + (f" from {tokens:,} tokens" if tokens else "")
    with task(what) as shown:
        try:
            report = setup.method.initialize(calibration, shown.update)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise UserError(
                f"The start cannot be solved because the activations of {setup.teacher.name} on "
                f"this text are degenerate ({reason(error)}). Check the teacher's weights, or set "
                "initialize.method to random."
            ) from error
    seconds = time.perf_counter() - started, report.forward_seconds
    setup.state = new_state(setup.method, recipe, world=world)
    return take_start(setup, recipe, world, seconds)


def take_start(
    setup: Setup, recipe: Recipe, world: World, seconds: tuple[float, float]
) -> tuple[float, float]:
    """Take the state and the parameters of the first process, and its seconds."""
    stages = stages_of(setup.method)
    found, state = world.from_first((seconds, stages.state()))
    if not world.leads and state != stages.state():
        stages.load_state(state)
        setup.state = new_state(setup.method, recipe, world=world)
    for parameter in setup.state.parameters.values():
        world.send(parameter.data, 0)()
    return found


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


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after it wrote a checkpoint."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    run: Run,
    teacher: Teacher | None = None,
    starts: Starts | None = None,
    on_step: OnStep | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train a run to its last step, from its newest checkpoint or from the beginning.

    If a launcher started several processes, all of them call this and train the run together.

    Args:
        run: a new run, or one to continue.
        teacher: a teacher that is already loaded; None: the recipe's.
        starts: starts to share with other runs; None: share none.
        on_step: called with the metrics of every step.
        stop: where to note a signal, also one in the last step, after which the run ends as usual.

    Returns:
        The closing table, as in summary.json.

    Raises:
        UserError: if the recipe, the data or the machine does not allow it.
        DivergedError: if the loss or its gradient is not finite.
        Interrupted: if SIGINT or SIGTERM stops the run; `lrc resume` continues it.
    """
    need_whole_teacher(run.recipe)
    world = join()
    with hold_together(run, world):
        if world.from_first(has_ended(run)):
            logger.info("%s has ended.", run.folder)
            return run.summary()
        loop = open_loop(run, teacher, starts, world)
        loop.on_step = on_step
        stop = loop.go(run.recipe.steps(), stop)
        if stop.signal is not None and loop.setup.state.step < run.recipe.steps():
            raise Interrupted(
                stop.signal,
                f"Stopped after step {loop.setup.state.step}; "
                f"continue with `lrc resume {run.folder}`.",
            )
        return close_run(loop)


@contextmanager
def hold_together(run: Run, world: World) -> Iterator[None]:
    """Keep processes of other launches from training a run, while the context is open."""
    check_division(run.recipe, world)
    with run.hold() if world.leads else nullcontext():
        world.wait()
        with lost_peers():
            yield
        world.wait()  # the first process may still write


def check_division(recipe: Recipe, world: World) -> None:
    """Refuse steps whose micro-batches cannot be divided among the processes: medians are over a
    micro-batch, so another division would be another run.

    Raises:
        UserError: if they cannot.
    """
    refuse_remainder("train.accumulate", recipe.train.accumulate, world)


def refuse_remainder(setting: str, accumulate: int, world: World) -> None:
    """Raises UserError if processes cannot divide the micro-batches of a step among them."""
    if accumulate % world.size:
        nearest = max(1, round(accumulate / world.size)) * world.size
        raise UserError(
            f"{setting} is {accumulate}, which {world.size} processes cannot divide: set it "
            f"to {nearest}."
        )


def check_agreement(run: Run, teacher: Teacher, text: Reader, world: World, step: int) -> None:
    """Refuse processes that would train different runs.

    Raises:
        UserError: if recipe, inputs or versions differ.
    """
    mine = {
        "recipe": run.recipe.fingerprint(),
        "folder": str(run.folder.resolve()),
        "inputs": world.first_then_others(lambda: describe_inputs(teacher, text)),
        "newest checkpoint": step,
    }
    refuse_differences(mine, world)


def refuse_differences(mine: dict[str, Any], world: World) -> None:
    """Refuse processes that have not the same of each named thing, or other versions of the code.

    Raises:
        UserError: if they differ.
    """
    if world.size == 1:
        return
    versions = {"version of lrc": source_sha256(), "version of torch": torch.__version__}
    mine = mine | versions
    for rank, other in enumerate(world.gather(mine)):
        if differing := [name for name in mine if mine[name] != other[name]]:
            raise UserError(
                f"Processes {world.rank} and {rank} differ in the {' and the '.join(differing)}: "
                "start all with the same recipe, files and versions."
            )


def has_ended(run: Run) -> bool:
    """Whether a run is trained to its last step and has all its output."""
    if not (run.summary_file.is_file() and run.student_folder.is_dir()):
        return False
    try:
        return int(run.summary()["tokens"]) >= run.recipe.steps() * run.recipe.step_tokens()
    except (UserError, KeyError, TypeError, ValueError):
        return False  # a damaged table is written again


def initialize_only(run: Run, teacher: Teacher | None = None) -> dict[str, Any]:
    """Initialize a new run's student and export it, without any training.

    `train` can continue the run. Arguments, return value and errors are those of `train`.
    """
    world = join()
    with hold_together(run, world):
        loop = open_loop(run, teacher, world=world)
        loop.go(0)
        return close_run(loop)


def text_notes(recipe: Recipe) -> list[str]:
    """Name the files that a recipe's folders and patterns stand for, and those left out."""
    sources = recipe.data.text
    if not sources or all(source == STDLIB_DOCS or Path(source).is_file() for source in sources):
        return []
    reading = f"Reading {listed(source.path for source in expand_sources(sources))}."
    skipped = left_out_note(sources, "data.text")
    return [reading] if skipped is None else [reading, skipped]


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


def open_loop(
    run: Run, teacher: Teacher | None, starts: Starts | None = None, world: World = ALONE
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
    with task(loading):
        setup = set_up(run, teacher, world)
    uses_graph(setup.method, run.recipe, setup.teacher, setup.device, world)  # before the start
    with task(f"Reading the text {run.recipe.data.origin()}", unit="tokens") as shown:
        text = world.first_then_others(
            lambda: open_text(
                run.recipe,
                setup.teacher.tokenizer,
                lambda _, tokens: shown.update(tokens),
                setup.teacher.first_token,
                setup.teacher.vocab_size,
            )
        )
    for note in text_notes(run.recipe):
        logger.info(note)
    with task("Checking the inputs"):
        check_agreement(run, setup.teacher, text, world, setup.state.step)
        new = world.from_first(run.begin() if world.leads else False)
        like = starts.like if starts else None
        world.first_then_others(lambda: check_inputs(run, setup.teacher, text, like))
    if not (new or setup.restored):
        logger.warning("%s has no checkpoint yet: it starts over.", run.folder)
    if new:
        terms = len(setup.method.distill.sites) if isinstance(setup.method, LowRankClone) else 0
        if chosen := choices(run.recipe, parameters_of(setup.method.model), terms):
            logger.info(chosen)
        if world.leads and (missing := chat_note(setup.teacher, text)):
            logger.warning(missing)
    calibration = 0.0, 0.0
    if setup.restored:
        text.load_state(setup.state.text)
    elif kept := starts and starts.fill(setup, run):
        calibration = kept
    else:
        calibration = start(setup, run.recipe, text, world)
        if starts:
            starts.keep(setup, run, calibration)
    models = setup.teacher.model, setup.method.model
    if use_triton(run.recipe.train.kernels, setup.device) and (unused := apply_liger(*models)):
        logger.warning(unused)
    if run.recipe.train.compile:
        for model in models:
            compile_small_modules(model)
    return Loop(run, setup, text, *calibration, world=world, benchmarks=benchmarks)
