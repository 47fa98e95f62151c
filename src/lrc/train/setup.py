"""Build everything that training needs from a run's recipe."""

import bisect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lrc.cloning.method import Method, stages_of
from lrc.data import Reader
from lrc.methods import METHODS, unused_settings
from lrc.model.precision import forward_dtype
from lrc.model.shapes import parameters_of
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe import Recipe
from lrc.recipe.learning_rate import learning_rate
from lrc.recipe.sections import TrainSection
from lrc.run import Run
from lrc.system.distributed import ALONE, World, join, local_rank
from lrc.system.errors import UserError
from lrc.train.checkpoint import (
    State,
    Tensors,
    fill_state,
    list_checkpoints,
    read_checkpoint,
    using,
)
from lrc.train.muon import Muon, orthogonal_parameters

logger = logging.getLogger(__name__)

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


def set_up(run: Run, teacher: Teacher | None = None, world: World = ALONE) -> Setup:
    """Load the teacher, build the method, and restore the newest intact checkpoint.

    Args:
        run: the run; without checkpoints, its method is not initialized yet.
        teacher: a teacher that is already loaded, which is moved to the run's device; None: the
            recipe's.
        world: the processes that train the run together.

    Raises:
        UserError: if the recipe does not fit the teacher or the machine, or no checkpoint of the
            run can be used.
    """
    recipe = run.recipe
    device = find_device(recipe.train.device)
    torch.manual_seed(recipe.train.seed)
    kind = METHODS[recipe.method.name]
    if recipe.teacher.shard and world.size > 1:
        from lrc.model.sharding import load_sharded  # FSDP is imported where it is used

        check_sharding(recipe, kind, teacher)
        teacher = load_sharded(recipe.teacher, device, world)
        check_passes(recipe, teacher)
    if teacher is None:
        teacher = load_teacher(recipe.teacher, device)
    elif not (teacher.on_disk or teacher.sharded):
        teacher.model.to(device)
    _warn(teacher.notes)
    if unused := unused_settings(recipe):
        _warn([f"No effect with method {recipe.method.name}: {', '.join(unused)}."])
    method = kind.build(teacher, recipe)
    _warn([*context_notes(teacher, recipe), *method.notes()])
    state = restore(run, method, world)
    restored = state is not None
    return Setup(teacher, method, state or new_state(method, recipe, world=world), device, restored)


def check_sharding(recipe: Recipe, kind: type[Method], loaded: Teacher | None) -> None:
    """Refuse to divide a teacher where that is not possible.

    Args:
        recipe: the recipe.
        kind: its method.
        loaded: a teacher that was passed in.

    Raises:
        UserError: if it is not possible.
    """
    if kind.cuts_teacher:
        raise UserError(
            f"Method {recipe.method.name} takes weights from the whole teacher: set teacher.shard "
            "to false."
        )
    if loaded is not None:
        raise UserError(
            "teacher.shard divides a teacher while it is read from its files, but this one is "
            "loaded: give its name, or set teacher.shard to false."
        )


def check_passes(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse text that processes would run a divided teacher on unequally often.

    Raises:
        UserError: if the recipe has such text.
    """
    if recipe.data.document_mask and not teacher.family.keeps_documents_apart:
        raise UserError(
            f"{teacher.family.model_type} models get every document as a sequence of its own, and "
            "processes would have unequal numbers of batches: set data.document_mask or "
            "teacher.shard to false."
        )


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        logger.warning(note)


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


def new_state(
    method: Method, recipe: Recipe, step: int = 0, world: World = ALONE, share: float = 1.0
) -> State:
    """The optimizer and its schedule for a method's current stage. The optimizer has the parameters
    that this process owns.

    Args:
        method: the method.
        recipe: its recipe.
        step: number of finished steps; the schedule begins at the beginning of their stage.
        world: the processes that train the method together.
        share: the share that the run takes of the rate of `auto` (`share_of_rate`).
    """
    train, stages = recipe.train, stages_of(method)
    method.share_work(world)
    parameters, decayed, own = method.parameters(), method.decayed(), stages.own_learning_rates()
    owned = {name: value for name, value in parameters.items() if method.owners.has(name)}
    shared = {name: value for name, value in owned.items() if name not in own}
    orthogonal = orthogonal_parameters(method) if train.optimizer == "muon" else {}
    groups: list[dict[str, Any]] = [
        {
            "params": [p for n, p in shared.items() if n in decayed - orthogonal.keys()],
            "weight_decay": train.weight_decay,
        },
        {
            "params": [p for n, p in shared.items() if n not in decayed],
            "weight_decay": 0.0,
        },
    ]
    if orthogonal:
        matrices = [p for n, p in shared.items() if n in orthogonal]
        groups.append({"params": matrices, "weight_decay": train.weight_decay, "orthogonal": True})
    for rate in sorted(set(own.values())):
        named = [p for name, p in owned.items() if own.get(name) == rate]
        groups.append({"params": named, "lr": rate, "weight_decay": 0.0})
    peak = getattr(train, stages.rate_setting())
    if peak in (None, "auto"):
        peak = share * learning_rate(recipe, parameters_of(method.model))
    kind = Muon if train.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(groups, lr=peak, betas=train.betas, eps=train.eps, fused=True)
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


def restore(run: Run, method: Method, world: World = ALONE) -> State | None:
    """Restore the newest intact checkpoint; None if the run has no checkpoint.

    Raises:
        UserError: if there are checkpoints but none can be used.
    """
    refused = []
    for path in list_checkpoints(run.checkpoints):
        try:
            header, tensors = read_checkpoint(path, run.recipe.fingerprint())
            return fill_method(method, run.recipe, path, header, tensors, world)
        except UserError as error:
            logger.warning(str(error))
            refused.append(str(error))
    if refused:
        raise UserError(f"No checkpoint of {run.folder} can be used: {refused[0]}")
    return None


def fill_method(
    method: Method,
    recipe: Recipe,
    path: Path,
    header: dict[str, Any],
    tensors: Tensors,
    world: World = ALONE,
) -> State:
    """Bring a method to a checkpoint, given its content.

    Raises:
        UserError: if it does not fit the recipe or this version of lrc.
    """
    with using(path):
        stages_of(method).load_state(header.get("method", {}))
        state = new_state(method, recipe, int(header["step"]), world)
        fill_state(state, path, header, tensors)
    return state


def find_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is cuda if available, else the CPU.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and join().size > 1:  # each process has a GPU of its machine
        return torch.device("cuda", local_rank() % max(1, torch.cuda.device_count()))
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # some kernels are launched on the current one
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"The device '{name}' is not on this machine; use auto or cpu.") from error
    return device


def describe_compute(train: TrainSection, device: torch.device) -> str:
    """Where and how precisely a run computes, for people."""
    precision = str(forward_dtype(train.precision, device))[6:]
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"the CPU with {threads} thread{'s' * (threads > 1)}, in {precision}"
    if device.type != "cuda":
        return f"{device}, in {precision}"
    name = torch.cuda.get_device_name(device)
    return f"{name}, in {precision}, projections in {'TF32' if train.tf32 else 'float32'}"


def autocast(train: TrainSection, device: torch.device) -> torch.autocast:
    """The autocast context for the forward passes, by the recipe's precision."""
    low = forward_dtype(train.precision, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=low is torch.bfloat16)
