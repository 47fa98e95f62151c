"""From a run's recipe to everything that its training needs."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lrc.cloning.method import Method
from lrc.data import Reader
from lrc.methods import METHODS, unused_settings
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import TrainSection
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train.checkpoint import State, fill_state, list_checkpoints, read_checkpoint, using

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""transformers' names of our schedules."""


@dataclass
class Setup:
    """A method on its device, with its optimizer, at some step of its run."""

    teacher: Teacher
    method: Method
    state: State
    device: torch.device
    restored: bool
    """Whether the state is a checkpoint's; else the method is still to be initialized."""


def set_up(run: Run, console: Console, teacher: Teacher | None = None) -> Setup:
    """Load the teacher, build the method, and go to the last checkpoint that is whole.

    Args:
        run: the run; without checkpoints its method is still to be initialized.
        console: where a damaged checkpoint is told.
        teacher: a teacher that is loaded already; None: the one that the recipe names.

    Raises:
        UserError: the recipe does not fit the teacher or the machine, or a checkpoint is not this
            run's.
    """
    recipe = run.recipe
    device = find_device(recipe.train.device)
    torch.manual_seed(recipe.train.seed)
    teacher = teacher or load_teacher(recipe.teacher, device)
    _note(console, teacher.notes)
    kind = METHODS[recipe.method.name]
    if unused := unused_settings(recipe):
        _note(console, [f"No effect with method {recipe.method.name}: {', '.join(unused)}."])
    method = kind.build(teacher, recipe)
    _note(console, [*context_notes(teacher, recipe), *method.notes()])
    state = restore(run, method, console)
    return Setup(teacher, method, state or new_state(method, recipe), device, state is not None)


def _note(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(note, style="yellow")


def context_notes(teacher: Teacher, recipe: Recipe) -> list[str]:
    """What to know of a sequence length that the teacher was not made for."""
    length = recipe.data.sequence_length
    longest = getattr(teacher.config, "max_position_embeddings", None)
    if not longest or length <= longest:
        return []
    return [
        f"data.sequence_length is {length}, but the teacher's max_position_embeddings is "
        f"{longest}: what it says of later positions may be worthless, and the student learns it."
    ]


def calibration_sequences(method: Method, recipe: Recipe, text: Reader) -> int:
    """Training sequences that a new run of the method is initialized from: none twice, since some
    check what others were solved on, but for a text of a single one."""
    tokens = method.calibration_tokens()
    if not tokens:
        return 0
    wanted = tokens // recipe.data.sequence_length
    return max(2, min(wanted, text.training_sequences or wanted))


def new_state(method: Method, recipe: Recipe, step: int = 0) -> State:
    """AdamW and its schedule for the stage that a method is in.

    Args:
        method: the method.
        recipe: its recipe.
        step: the steps done; the schedule is to begin at the beginning of their stage.
    """
    train = recipe.train
    parameters, decayed, own = method.parameters(), method.decayed(), method.learning_rates()
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
    peak = getattr(train, method.rate_setting()) or train.learning_rate
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=train.betas, eps=train.eps, fused=True)
    bounds = 0, *method.stage_ends(), recipe.steps()
    stage = bisect.bisect_right(bounds[:-1], step) - 1
    begin, end = bounds[stage], bounds[stage + 1]
    if method.one_schedule:
        factor = stretch(schedule(train, recipe.steps()), begin, warmup(train, recipe.steps()))
    else:
        factor = schedule(train, end - begin)
    scheduler = LambdaLR(optimizer, factor)
    return State(step, parameters, optimizer, scheduler, buffers=method.buffers())


def warmup(train: TrainSection, steps: int) -> int:
    """Steps that warm up, of all steps of a schedule."""
    return math.ceil(train.warmup_ratio * steps)


def schedule(train: TrainSection, steps: int) -> Callable[[int], float]:
    """The learning rate after a number of steps, as a share of the peak: the recipe's schedule."""
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
    """A schedule from one of its steps on, with another warm-up where that is not its first.

    Args:
        whole: the schedule.
        begin: the step.
        warming: steps of the warm-up.
    """

    def factor(done: int) -> float:
        warmed = min(1.0, done / warming) if begin and warming else 1.0
        return warmed * whole(begin + done)

    return factor


def restore(run: Run, method: Method, console: Console) -> State | None:
    """Go to the newest checkpoint that is whole; None where there is none.

    Raises:
        UserError: there are checkpoints, but none can be used.
    """
    refused = []
    for path in list_checkpoints(run.checkpoints):
        try:
            header, tensors = read_checkpoint(path, run.recipe.fingerprint())
            with using(path):
                method.load_state(header.get("method", {}))
                state = new_state(method, run.recipe, int(header["step"]))
                fill_state(state, path, header, tensors)
            return state
        except UserError as error:
            console.print(str(error), style="yellow")
            refused.append(str(error))
    if refused:
        raise UserError(f"No checkpoint of {run.folder} can be used: {refused[0]}")
    return None


def find_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is cuda where there is one.

    Raises:
        UserError: there is no such device.
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
    """The arithmetic of the forward passes that a recipe asks for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16")
