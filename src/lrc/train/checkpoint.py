"""Checkpoints: the trainable parameters, the optimizer's state and the position of a run.

A checkpoint is a folder `step-00000100` with `state.safetensors` and `checkpoint.json`. The JSON
file holds the step, the recipe's fingerprint, and checksums of the tensors and of itself. The
teacher is never in a checkpoint. Folders are written atomically. The checksums detect a checkpoint
that is damaged later, and the run continues from the one before.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrc.system.checksums import file_sha256, json_sha256
from lrc.system.errors import UserError, reason
from lrc.system.files import new_folder, write_text

FORMAT = "lrc-checkpoint-3"
TENSORS = "state.safetensors"
HEADER = "checkpoint.json"
NAME = re.compile(r"step-[0-9]{8,}")


@dataclass
class State:
    """What a run needs to continue as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    """The optimizer of `parameters`."""
    scheduler: torch.optim.lr_scheduler.LRScheduler
    text: dict[str, Any] = field(default_factory=dict)
    """The state of the text's reader (`lrc.data.Reader.state`)."""
    method: dict[str, Any] = field(default_factory=dict)
    """The method's own state (`lrc.methods.Method.state`)."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """The method's tensors that are not trained (`lrc.methods.Method.buffers`)."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def save_checkpoint(folder: Path, state: State, fingerprint: str, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises:
        UserError: if the disk is full; older checkpoints are then unchanged.
    """
    target = checkpoint_folder(folder, state.step)
    with new_folder(target) as temporary:
        save_file(_tensors(state), temporary / TENSORS)
        header = {
            "format": FORMAT,
            "step": state.step,
            "fingerprint": fingerprint,
            "sha256": file_sha256(temporary / TENSORS),
            "scheduler": state.scheduler.state_dict(),
            "text": state.text,
        }
        if state.method:
            header["method"] = state.method
        header["checksum"] = json_sha256(header)
        write_text(temporary / HEADER, json.dumps(header, indent=2))
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def fill_state(
    state: State, path: Path, header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
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


def fill_parameters(state: State, path: Path, tensors: dict[str, Tensor]) -> None:
    """Restore the parameters and buffers of `state`, in place, and torch's random state from the
    content of a checkpoint.

    Raises:
        UserError: if the checkpoint has other parameters; `state` is then unchanged.
    """
    filled = _filled(state)
    expected = {name: value.shape for name, value in filled.items()}
    found = {n: t.shape for n, t in tensors.items() if n.startswith(("parameter.", "buffer."))}
    if expected != found:
        raise UserError(f"The checkpoint {path} has other parameters than this recipe trains.")
    with torch.no_grad():
        for name, value in filled.items():
            value.copy_(tensors[name])
    torch.set_rng_state(tensors["rng"])


def read_checkpoint(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a checkpoint, and check that it is intact and of this run.

    Raises:
        UserError: if it is damaged or belongs to another run.
    """
    damaged = UserError(
        f"The checkpoint {path} is damaged; remove it to continue from the one before."
    )
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise UserError(f"The checkpoint {path} was written by another version of lrc.")
        if header.pop("checksum") != json_sha256(header):
            raise damaged
        if header["fingerprint"] != fingerprint:
            raise UserError(f"The checkpoint {path} belongs to a run with another recipe.")
        if header["sha256"] != file_sha256(path / TENSORS):
            raise damaged
        return header, load_file(path / TENSORS)
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


def _tensors(state: State) -> dict[str, Tensor]:
    tensors = {"rng": torch.get_rng_state(), **_filled(state)}
    for name, parameter in state.parameters.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def _filled(state: State) -> dict[str, Tensor]:
    """Parameters and buffers by name in a checkpoint."""
    named = {f"parameter.{name}": value.detach() for name, value in state.parameters.items()}
    return named | {f"buffer.{name}": value for name, value in state.buffers.items()}


def _optimizer_state(state: State, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The saved optimizer state, numbered as in `Optimizer.state_dict`."""
    names = {parameter: name for name, parameter in state.parameters.items()}
    slots: dict[int, dict[str, Tensor]] = {}
    current = state.optimizer.state_dict()
    groups = zip(state.optimizer.param_groups, current["param_groups"], strict=True)
    for group, numbered in groups:
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            prefix = f"optimizer.{names[parameter]}."
            slots[number] = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
    return {"state": slots, "param_groups": current["param_groups"]}
