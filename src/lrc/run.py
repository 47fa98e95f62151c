"""A run's folder: what it holds, and how to open it again.

    recipe.yaml        the resolved recipe, with every default
    environment.json   versions, commit, machine
    inputs.json        checksums of teacher, tokenizer and text; a resumed run must find the same
    metrics.jsonl      one line per logged step
    curves.png         the losses over tokens
    summary.json       the final table
    checkpoints/       to resume from
    student/           the exported student, a plain transformers model

Resuming and exporting need only this folder, and the teacher and text that the recipe names. Their
relative paths are relative to the folder in which the run began.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc.model.locate import short_name
from lrc.recipe import Recipe, load_recipe
from lrc.system.distributed import ALONE, World, restarts
from lrc.system.errors import UserError
from lrc.system.files import (
    LOCK,
    hold,
    is_left_over,
    is_taken,
    read_json,
    remove_left_overs,
    write_text,
)
from lrc.system.metrics import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"


@dataclass(frozen=True)
class Run:
    """A run and its folder."""

    folder: Path
    recipe: Recipe

    @classmethod
    def create(cls, folder: str | os.PathLike[str], recipe: Recipe, world: World = ALONE) -> "Run":
        """Return a new run, without creating its folder; `begin` does that.

        Args:
            folder: the run's folder. All processes take the first one's.
            recipe: the recipe.
            world: the processes that will train it together. If their launcher restarts them, the
                run is the one that they have begun.

        Raises:
            UserError: if the folder already holds something.
        """
        run = cls(Path(world.from_first(os.fspath(folder))), recipe)
        if not world.leads or (restarts() and is_run(run.folder)):
            return run
        if is_taken(run.folder, _is_no_runs):
            raise run._taken()
        return run

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Run":
        """Open the folder of an earlier run.

        Raises:
            UserError: if it is not a run's folder, or its recipe is not valid.
        """
        folder = Path(folder)
        if not is_run(folder):
            raise UserError(f"{folder} is not a run's folder: it has no {RECIPE}.")
        return cls(folder, load_recipe(folder / RECIPE))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes from training this run, and remove what killed ones left.

        If the run does not begin, its new folder is removed again.

        Raises:
            UserError: if another process is training it, or another run has begun in its folder.
        """
        new = not self.folder.exists()
        held = f"Another process is working on {self.folder}: wait for it, or stop it first."
        with hold(self.folder, held):
            try:
                if is_run(self.folder) and load_recipe(self.folder / RECIPE) != self.recipe:
                    raise self._taken()
                for folder in (self.folder, self.checkpoints):
                    remove_left_overs(folder)
                yield
            finally:
                if new and [file.name for file in self.folder.iterdir()] == [LOCK]:
                    (self.folder / LOCK).unlink()
                    self.folder.rmdir()

    def begin(self) -> bool:
        """Write the first files of a new run.

        Call this while the run is held.

        Returns:
            Whether the run is new.

        Raises:
            UserError: if the disk is full.
        """
        if is_run(self.folder):
            return False
        from lrc.system.environment import describe_environment

        write_text(self.folder / ENVIRONMENT, json.dumps(describe_environment(), indent=2))
        write_text(self.folder / RECIPE, self.recipe.to_yaml())
        return True

    def _taken(self) -> UserError:
        return UserError(
            f"{self.folder} already exists: choose another folder for the new run, or continue an "
            f"old one with `lrc resume {self.folder}`."
        )

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def student_folder(self) -> Path:
        """Folder of the exported student."""
        return self.folder / "student"

    @property
    def metrics_file(self) -> Path:
        """File of the metrics, one JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """File of the final table; it exists once the run has ended."""
        return self.folder / "summary.json"

    @property
    def inputs_file(self) -> Path:
        """File of the checksums of the run's inputs."""
        return self.folder / "inputs.json"

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged steps, oldest first, without damaged lines.

        Raises:
            UserError: if the file cannot be read.
        """
        return read_metrics(self.metrics_file)

    def environment(self) -> dict[str, Any]:
        """Versions, commit and machine; empty if they were not recorded.

        Raises:
            UserError: if the file is damaged.
        """
        path = self.folder / ENVIRONMENT
        return read_json(path, "remove it to go on without it") if path.is_file() else {}

    def summary(self) -> dict[str, Any]:
        """Read the final table.

        Raises:
            UserError: if the run has not ended yet, or the table is damaged.
        """
        if not self.summary_file.is_file():
            raise UserError(f"{self.folder} has not ended; continue it with `lrc resume`.")
        return read_json(
            self.summary_file, f"remove it and write it again with `lrc resume {self.folder}`"
        )

    def student(self) -> "PreTrainedModel":
        """Load the exported student.

        Raises:
            UserError: if the run has not ended yet, or the student's files are damaged.
        """
        from lrc.model.teacher import load_model

        return load_model(str(self.need_student()))[0]

    def tokenizer(self) -> "Tokenizer":
        """Load the student's tokenizer, which is the teacher's.

        Raises:
            UserError: if the run has not ended yet, or its files are damaged.
        """
        from lrc.model.teacher import load_tokenizer

        return load_tokenizer(str(self.need_student()))

    def need_student(self) -> Path:
        """Return the folder of the exported student.

        Raises:
            UserError: if the run has not ended yet.
        """
        if not self.student_folder.is_dir():
            raise UserError(
                f"{self.folder} has no student yet: continue the run with `lrc resume`, or write "
                "one from its last checkpoint with `lrc export`."
            )
        return self.student_folder


def default_folder(recipe: Recipe, name: str | None = None) -> Path:
    """Choose a new folder below `runs/`, named after the recipe or teacher, and the time."""
    name = name or short_name(recipe.teacher.model)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"{name}-{recipe.student.hidden_size or 'shape'}-{stamp}"
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000))
    return folder if not folder.exists() else next(p for p in numbered if not p.exists())


def student_of(name: str) -> str:
    """The student of a run, if a name is that of a run's folder; else the name.

    Raises:
        UserError: if the run has no student yet.
    """
    return str(Run.open(Path(name)).need_student()) if is_run(Path(name)) else name


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / RECIPE).is_file()


def _is_no_runs(name: str) -> bool:
    """Whether a file in the folder of a run that never began may be overwritten."""
    return name == ENVIRONMENT or is_left_over(name)
