"""Build everything that training needs from a run's recipe."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lrc.cloning.method import Method, stages_of
from lrc.data import Reader
from lrc.methods import METHODS, unused_settings
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import TrainSection
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train.checkpoint import State, fill_state, list_checkpoints, read_checkpoint, using

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""The names of our schedules in transformers."""


@dataclass
class Setup:
    """A method on its device, with its optimizer, at a step of its run."""

    teacher: Teacher
    method: Method
    state: State
    device: torch.device
    restored: bool
    """Whether the state comes from a checkpoint. If not, the method is not initialized yet."""


def set_up(run: Run, console: Console, teacher: Teacher | None = None) -> Setup:
    """Load the teacher, build the method, and restore the newest intact checkpoint.

    Args:
        run: the run; without checkpoints, its method is not initialized yet.
        console: where warnings are shown.
        teacher: a teacher that is already loaded; None: the recipe's.

    Raises:
        UserError: if the recipe does not fit the teacher or the machine, or no checkpoint of the
            run can be used.
    """
    recipe = run.recipe
    device = find_device(recipe.train.device)
    torch.manual_seed(recipe.train.seed)
    teacher = teacher or load_teacher(recipe.teacher, device)
    _note(console, teacher.notes)
    kind = METHODS[recipe.method.name]
    if unused := unused_settings(recipe):
        _note(console, [f"No effect with method {recipe.method.name}: {', '.join(unused)}."])
    if recipe.data.document_mask and not teacher.family.keeps_documents_apart:
        raise UserError(
            f"data.document_mask is set, but {teacher.family.model_type} models cannot keep the "
            "documents of a sequence apart: set it to false."
        )
    method = kind.build(teacher, recipe)
    _note(console, [*context_notes(teacher, recipe), *method.notes()])
    state = restore(run, method, console)
    return Setup(teacher, method, state or new_state(method, recipe), device, state is not None)


def _note(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(note, style="yellow")


def context_notes(teacher: Teacher, recipe: Recipe) -> list[str]:
    """A warning if the sequences are longer than the teacher supports."""
    length = recipe.data.sequence_length
    longest = getattr(teacher.config, "max_position_embeddings", None)
    if not longest or length <= longest:
        return []
    return [
        f"data.sequence_length is {length}, but the teacher's max_position_embeddings is "
        f"{longest}. Its output at later positions may be useless, and the student learns from it."
    ]


def calibration_sequences(method: Method, recipe: Recipe, text: Reader) -> int:
    """Number of training sequences that initialize a new run of the method.

    No sequence is used twice, since some check what is solved from the others. The exception is a
    text of a single sequence."""
    tokens = method.calibration_tokens()
    if not tokens:
        return 0
    wanted = tokens // recipe.data.sequence_length
    return max(2, min(wanted, text.training_sequences or wanted))


def new_state(method: Method, recipe: Recipe, step: int = 0) -> State:
    """AdamW and its schedule for a method's current stage.

    Args:
        method: the method.
        recipe: its recipe.
        step: number of finished steps; the schedule begins at the beginning of their stage.
    """
    train, stages = recipe.train, stages_of(method)
    parameters, decayed, own = method.parameters(), method.decayed(), stages.own_learning_rates()
    groups = [
        {
            "params": [p for n, p in parameters.items() if n in decayed and n not in own],
            "weight_decay": train.weight_decay,
        },
        {
            "params": [p for n, p in parameters.items() if n not in decayed and n not in own],
            "weight_decay": 0.0,
        },
    ]
    for rate in sorted(set(own.values())):
        named = [p for name, p in parameters.items() if own.get(name) == rate]
        groups.append({"params": named, "lr": rate, "weight_decay": 0.0})
    peak = getattr(train, stages.rate_setting()) or train.learning_rate
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=train.betas, eps=train.eps, fused=True)
    bounds = 0, *stages.stage_ends(), recipe.steps()
    stage = bisect.bisect_right(bounds[:-1], step) - 1
    begin, end = bounds[stage], bounds[stage + 1]
    if stages.one_schedule:
        factor = stretch(schedule(train, recipe.steps()), begin, warmup(train, recipe.steps()))
    else:
        factor = schedule(train, end - begin)
    scheduler = LambdaLR(optimizer, factor)
    return State(step, parameters, optimizer, scheduler, buffers=stages.buffers())


def warmup(train: TrainSection, steps: int) -> int:
    """Number of warm-up steps of a schedule."""
    return math.ceil(train.warmup_ratio * steps)


def schedule(train: TrainSection, steps: int) -> Callable[[int], float]:
    """The recipe's schedule: the learning rate as a share of its peak, by number of steps."""
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        SCHEDULES[train.schedule],
        nothing,
        num_warmup_steps=warmup(train, steps),
        num_training_steps=steps,
    )
    assert isinstance(scheduler, LambdaLR)
    return scheduler.lr_lambdas[0]


def stretch(whole: Callable[[int], float], begin: int, warming: int) -> Callable[[int], float]:
    """The rest of a schedule from a step on, with a new warm-up unless it is the first step.

    Args:
        whole: the schedule.
        begin: the step.
        warming: number of warm-up steps.
    """

    def factor(done: int) -> float:
        warmed = min(1.0, done / warming) if begin and warming else 1.0
        return warmed * whole(begin + done)

    return factor


def restore(run: Run, method: Method, console: Console) -> State | None:
    """Restore the newest intact checkpoint; None if the run has no checkpoint.

    Raises:
        UserError: if there are checkpoints but none can be used.
    """
    refused = []
    for path in list_checkpoints(run.checkpoints):
        try:
            header, tensors = read_checkpoint(path, run.recipe.fingerprint())
            return fill_method(method, run.recipe, path, header, tensors)
        except UserError as error:
            console.print(str(error), style="yellow")
            refused.append(str(error))
    if refused:
        raise UserError(f"No checkpoint of {run.folder} can be used: {refused[0]}")
    return None


def fill_method(
    method: Method, recipe: Recipe, path: Path, header: dict[str, Any], tensors: dict[str, Tensor]
) -> State:
    """Bring a method to a checkpoint, given its content.

    Raises:
        UserError: if it does not fit the recipe or this version of lrc.
    """
    with using(path):
        stages_of(method).load_state(header.get("method", {}))
        state = new_state(method, recipe, int(header["step"]))
        fill_state(state, path, header, tensors)
    return state


def find_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is cuda if available, else the CPU.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device '{name}' is not on this machine; use auto or cpu.") from error
    return device


def autocast(train: TrainSection, device: torch.device) -> torch.autocast:
    """The autocast context for the forward passes, by the recipe's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16")
