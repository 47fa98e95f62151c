"""A run's folder: what it holds, and how to open it again.

    recipe.yaml        the resolved recipe, with every default
    environment.json   versions, commit, machine
    metrics.jsonl      one line per logged step
    curves.png         the losses against tokens
    summary.json       the closing table
    checkpoints/       to resume from
    student/           the exported student, a plain transformers model

Resuming and exporting need this folder only (and the teacher that the recipe names).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.environment import describe_environment
from lrc.errors import UserError
from lrc.files import is_taken, new_file, write_text
from lrc.recipe import Recipe, load_recorded_recipe


@dataclass(frozen=True)
class Run:
    """A run and its folder."""

    folder: Path
    recipe: Recipe

    @classmethod
    def create(cls, folder: Path, recipe: Recipe) -> "Run":
        """Start a run in a new folder.

        Raises:
            UserError: the folder already holds something.
        """
        if is_taken(folder):
            raise UserError(
                f"{folder} already exists: choose another folder for the new run, or continue an "
                f"old one with `lrc resume {folder}`."
            )
        run = cls(folder, recipe)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        write_text(folder / "environment.json", json.dumps(describe_environment(), indent=2))
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open the folder of an earlier run.

        Raises:
            UserError: it is not a run's folder, or its recipe is not valid.
        """
        if not is_run(folder):
            raise UserError(f"{folder} is not a run's folder: it has no recipe.yaml.")
        return cls(folder, load_recorded_recipe(folder / "recipe.yaml"))

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
        """File of the metrics, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """File of the closing table; it is there once the run has ended."""
        return self.folder / "summary.json"

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps, oldest first; a line cut short by a crash is left out."""
        return list(_whole_lines(self.metrics_file))

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines after a step, which a resumed run will write again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        with new_file(self.metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def summary(self) -> dict[str, Any]:
        """The closing table.

        Raises:
            UserError: the run has not ended yet.
        """
        if not self.summary_file.is_file():
            raise UserError(f"{self.folder} has not ended; continue it with `lrc resume`.")
        return json.loads(self.summary_file.read_text())

    def student(self) -> PreTrainedModel:
        """The exported student.

        Raises:
            UserError: the run has not ended yet.
        """
        return AutoModelForCausalLM.from_pretrained(self.need_student())

    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer, which is the teacher's.

        Raises:
            UserError: the run has not ended yet.
        """
        return AutoTokenizer.from_pretrained(self.need_student())

    def need_student(self) -> Path:
        """Folder of the exported student.

        Raises:
            UserError: the run has not ended yet.
        """
        if not self.student_folder.is_dir():
            raise UserError(
                f"{self.folder} has no student yet: continue the run with `lrc resume`, or write "
                "one from its last checkpoint with `lrc export`."
            )
        return self.student_folder


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "recipe.yaml").is_file()


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
