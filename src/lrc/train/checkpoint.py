"""Checkpoints: the trainable parameters, the optimizer's state and the position of a run.

A checkpoint is a folder `step-00000100` with `state.safetensors` and `checkpoint.json`. The JSON
file holds the step, the recipe's fingerprint, and checksums of the tensors and of itself. The
teacher is never in a checkpoint. Folders are written atomically. The checksums detect a checkpoint
that is damaged later, and the run continues from the one before.

If several processes train a run, each writes the parameters that it owns, whole, to a file of its
own: `state-0-of-2.safetensors`. Any number of processes can continue from any number of files.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrc.system.checksums import file_sha256, json_sha256
from lrc.system.distributed import ALONE, World
from lrc.system.errors import UserError, reason
from lrc.system.files import disk_errors, new_folder, write_text

FORMAT = "lrc-checkpoint-4"
HEADER = "checkpoint.json"
NAME = re.compile(r"step-[0-9]{8,}")


@dataclass
class State:
    """What a run needs to continue as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    parameters: dict[str, nn.Parameter]
    """All parameters; each has the same value in all processes or is needed only by its owner."""
    optimizer: torch.optim.Optimizer
    """The optimizer of the parameters that this process owns."""
    scheduler: torch.optim.lr_scheduler.LRScheduler
    text: dict[str, Any] = field(default_factory=dict)
    """The state of the text's reader (`lrc.data.Reader.state`)."""
    method: dict[str, Any] = field(default_factory=dict)
    """The method's own state (`lrc.cloning.method.Staged.state`)."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """The method's tensors that are not trained (`lrc.cloning.method.Staged.buffers`)."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def save_checkpoint(
    folder: Path, state: State, fingerprint: str, keep: int, world: World = ALONE
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. All processes call this together.

    Raises:
        UserError: if the disk is full; older checkpoints are then unchanged.
        PeerError: if another process has ended; the same holds.
    """
    target = checkpoint_folder(folder, state.step)
    if not world.leads:
        _save_tensors(Path(world.from_first("")), state, world)
        world.wait()
        return target
    with new_folder(target) as temporary:
        world.from_first(str(temporary))
        header = {
            "format": FORMAT,
            "step": state.step,
            "fingerprint": fingerprint,
            "sha256": _save_tensors(temporary, state, world),
            "scheduler": state.scheduler.state_dict(),
            "text": state.text,
        }
        if state.method:
            header["method"] = state.method
        header["checksum"] = json_sha256(header)
        write_text(temporary / HEADER, json.dumps(header, indent=2))
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    world.wait()
    return target


def _save_tensors(folder: Path, state: State, world: World) -> dict[str, str]:
    """Write what this process owns.

    Returns:
        The checksums of all processes' files, by name.
    """
    parts = f"-{world.rank}-of-{world.size}" if world.size > 1 else ""
    path = folder / f"state{parts}.safetensors"
    with disk_errors(path):
        save_file(_tensors(state, world.leads), path)
    return dict(world.gather((path.name, file_sha256(path))))


def fill_state(state: State, path: Path, header: dict[str, Any], tensors: "Tensors") -> None:
    """Restore `state`, in place, from the content of a checkpoint.

    Raises:
        UserError: if the checkpoint has other parameters; `state` is then unchanged.
    """
    fill_parameters(state, path, tensors)
    state.optimizer.load_state_dict(_optimizer_state(state, tensors))
    state.scheduler.load_state_dict(header["scheduler"])
    rates = state.scheduler.get_last_lr()  # loading a scheduler does not set the optimizer's rates
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state.step = int(header["step"])
    state.text = header.get("text", {})


def fill_parameters(state: State, path: Path, tensors: "Tensors") -> None:
    """Restore the parameters and buffers of `state`, in place, and torch's random state from the
    content of a checkpoint.

    Raises:
        UserError: if the checkpoint has other parameters; `state` is then unchanged.
    """
    filled = _filled(state)
    expected = {name: list(value.shape) for name, value in filled.items()}
    if expected != tensors.shapes(("parameter.", "buffer.")):
        raise UserError(f"The checkpoint {path} has other parameters than this recipe trains.")
    with torch.no_grad():
        for name, value in filled.items():
            value.copy_(tensors[name])
    torch.set_rng_state(tensors["rng"])


class Tensors:
    """The tensors in the files of a checkpoint, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        opened: list[Any] = [safe_open(path, "pt") for path in files]
        self._places = {name: file for file in opened for name in list(file.keys())}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def names(self, prefix: str) -> list[str]:
        """The names that begin with a prefix."""
        return [name for name in self._places if name.startswith(prefix)]

    def shapes(self, prefixes: tuple[str, ...]) -> dict[str, list[int]]:
        """The shapes of the tensors whose names begin with one of the prefixes."""
        found = [name for name in self._places if name.startswith(prefixes)]
        return {name: self._places[name].get_slice(name).get_shape() for name in found}


def read_checkpoint(path: Path, fingerprint: str) -> tuple[dict[str, Any], Tensors]:
    """Read the header and the tensors of a checkpoint, and check that it is intact and of this run.

    Raises:
        UserError: if it is damaged or belongs to another run.
    """
    damaged = UserError(
        f"The checkpoint {path} is damaged; remove it to continue from the one before, or start a "
        "new run if there is none."
    )
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise UserError(f"The checkpoint {path} was written by another version of lrc.")
        if header.pop("checksum") != json_sha256(header):
            raise damaged
        if header["fingerprint"] != fingerprint:
            raise UserError(
                f"The checkpoint {path} belongs to a run with another recipe: restore the run's "
                "recipe.yaml, or start a new run."
            )
        files = [path / name for name in header["sha256"]]
        if header["sha256"] != {file.name: file_sha256(file) for file in files}:
            raise damaged
        return header, Tensors(files)
    except UserError:
        raise
    except Exception as error:  # a damaged file can cause any error
        raise damaged from error


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Refuse a checkpoint that is intact but does not fit this version of lrc.

    Raises:
        UserError: if the block raises anything.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The checkpoint {path} cannot be used ({reason(error)}).") from error


def _tensors(state: State, leads: bool) -> dict[str, Tensor]:
    """The owned parameters with their optimizer's state; from the first process also the rest."""
    tensors = {"rng": torch.get_rng_state(), **_buffers(state)} if leads else {}
    owned = {id(value) for group in state.optimizer.param_groups for value in group["params"]}
    for name, parameter in state.parameters.items():
        if id(parameter) in owned:
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in state.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def _buffers(state: State) -> dict[str, Tensor]:
    return {f"buffer.{name}": value for name, value in state.buffers.items()}


def _filled(state: State) -> dict[str, Tensor]:
    """Parameters and buffers by name in a checkpoint."""
    named = {f"parameter.{name}": value.detach() for name, value in state.parameters.items()}
    return named | _buffers(state)


def _optimizer_state(state: State, tensors: Tensors) -> dict[str, Any]:
    """The saved optimizer state, numbered as in `Optimizer.state_dict`."""
    names = {parameter: name for name, parameter in state.parameters.items()}
    slots: dict[int, dict[str, Tensor]] = {}
    current = state.optimizer.state_dict()
    groups = zip(state.optimizer.param_groups, current["param_groups"], strict=True)
    for group, numbered in groups:
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            prefix = f"optimizer.{names[parameter]}."
            slots[number] = {
                name.removeprefix(prefix): tensors[name] for name in tensors.names(prefix)
            }
    return {"state": slots, "param_groups": current["param_groups"]}
