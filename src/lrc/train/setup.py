"""From a run's recipe to everything that its training needs."""

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import get_scheduler

from lrc.errors import UserError
from lrc.methods import METHODS, Method
from lrc.methods.unused import unused_settings
from lrc.recipe import Recipe
from lrc.run import Run
from lrc.sections import TrainSection
from lrc.teacher import Teacher, load_teacher
from lrc.train.checkpoint import State, list_checkpoints, load_checkpoint

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""transformers' names of our schedules."""


@dataclass
class Setup:
    """A method on its device, with its optimiser, at some step of its run."""

    teacher: Teacher
    method: Method
    state: State
    device: torch.device
    restored: bool
    """Whether the state is a checkpoint's; else the method is still to be initialised."""


def set_up(run: Run, console: Console, teacher: Teacher | None = None) -> Setup:
    """Load the teacher, build the method, and go to the last checkpoint that is whole.

    Args:
        run: the run; without checkpoints its method is still to be initialised.
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
    kind = METHODS[recipe.method.name]
    if unused := unused_settings(kind, recipe):
        text = f"No effect with method {recipe.method.name}: {', '.join(unused)}."
        console.print(text, style="yellow", markup=False, soft_wrap=True)
    method = kind.build(teacher, recipe)
    for note in method.notes():
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    state = new_state(method, recipe)
    restored = restore(run, state, console)
    return Setup(teacher, method, state, device, restored)


def calibration_sequences(method: Method, recipe: Recipe) -> int:
    """Training sequences that a new run of the method is initialised from."""
    tokens = method.calibration_tokens()
    return max(2, tokens // recipe.data.sequence_length) if tokens else 0


def new_state(method: Method, recipe: Recipe) -> State:
    """AdamW and its schedule for a method, at step 0."""
    train = recipe.train
    parameters, decayed = method.parameters(), method.decayed()
    groups = [
        {
            "params": [p for name, p in parameters.items() if name in decayed],
            "weight_decay": train.weight_decay,
        },
        {
            "params": [p for name, p in parameters.items() if name not in decayed],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True
    )
    scheduler = get_scheduler(
        SCHEDULES[train.schedule],
        optimizer,
        num_warmup_steps=math.ceil(train.warmup_ratio * recipe.steps()),
        num_training_steps=recipe.steps(),
    )
    return State(0, parameters, optimizer, scheduler)


def restore(run: Run, state: State, console: Console) -> bool:
    """Go to the newest checkpoint that is whole; false where there is none.

    Raises:
        UserError: there are checkpoints, but none can be used.
    """
    refused = []
    for path in list_checkpoints(run.checkpoints):
        try:
            load_checkpoint(path, state, run.recipe.fingerprint())
            return True
        except UserError as error:
            console.print(str(error), style="yellow", markup=False, soft_wrap=True)
            refused.append(str(error))
    if refused:
        raise UserError(f"No checkpoint of {run.folder} can be used: {refused[0]}")
    return False


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
