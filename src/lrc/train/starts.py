"""Starts that runs share, so that a comparison solves each start once.

A start depends on the teacher, the student, the method, `initialize`, the text, the seed and the
code, but not on the training after it. So trials of several learning rates share one start, which
is solved again after a change of the code.

    FOLDER/KEY/step-00000000/   the start, as a checkpoint
    FOLDER/KEY/seconds.json     the time to solve it
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lrc.cloning.method import stages_of
from lrc.run import Run
from lrc.system.checksums import source_sha256
from lrc.system.errors import UserError
from lrc.system.files import write_text
from lrc.train.checkpoint import (
    checkpoint_folder,
    fill_parameters,
    read_checkpoint,
    save_checkpoint,
)
from lrc.train.setup import Setup, new_state

SECONDS = "seconds.json"


@dataclass(frozen=True)
class Starts:
    """A folder of starts from calibration tokens."""

    folder: Path

    like: Run | None = None
    """An earlier run of the same teacher and text, whose inputs a new one must have; None: any."""

    def keep(self, setup: Setup, run: Run, seconds: tuple[float, float]) -> None:
        """Save the start of a method that was just initialized.

        Args:
            setup: the run before its first step.
            run: the run.
            seconds: the seconds of the start, and of the teacher's layers alone.
        """
        if not setup.method.calibration_tokens():
            return  # such a start takes no time
        key = start_key(setup, run)
        setup.state.method = stages_of(setup.method).state()
        with suppress(UserError):  # another process saves the same start, or the disk is full
            write_text(self.folder / key / SECONDS, json.dumps(seconds))
            save_checkpoint(self.folder / key, setup.state, key, keep=1)

    def fill(self, setup: Setup, run: Run) -> tuple[float, float] | None:
        """Bring a new run to the start that was saved for runs like it.

        Returns:
            The seconds that were saved with it; None if there is no start or it is damaged.
        """
        key = start_key(setup, run)
        path = checkpoint_folder(self.folder / key, 0)
        if not path.exists():
            return None
        try:
            header, tensors = read_checkpoint(path, key)
            solving, forward = json.loads((self.folder / key / SECONDS).read_text())
            stages_of(setup.method).load_state(header.get("method", {}))
            setup.state = new_state(setup.method, run.recipe)
            fill_parameters(setup.state, path, tensors)
        except Exception:  # a damaged start can cause any error; it is solved again
            return None
        return solving, forward


def start_key(setup: Setup, run: Run) -> str:
    """A checksum of everything that the start of a run that has begun depends on."""
    recipe = run.recipe
    names = {"teacher", "student", "method", "initialize", "data"}
    sections = recipe.model_dump(mode="json", include=names, exclude_none=True)
    shapes = {name: list(p.shape) for name, p in setup.method.parameters().items()}
    inputs = run.inputs_file.read_text(encoding="utf-8")
    parts = [sections, recipe.train.seed, str(setup.device), shapes, inputs, source_sha256()]
    if recipe.data.stream:  # they decide which process reads which part of it
        parts += [recipe.train.micro_batch, recipe.train.accumulate]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
