"""The results of an evaluation, and the folder that stores them task by task.

Each finished task is one JSON file, written atomically. Its name holds the task and a digest of
everything that determines the numbers. If an evaluation was killed, or is repeated with more tasks,
the finished tasks are read from there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from lrc.recipe.sections import Section
from lrc.system.files import write_text

HELD_OUT = "heldout"
"""The task of `lrc.evaluation.agreement`; all others are the harness's."""


class Score(Section):
    """One metric of one task."""

    value: float
    stderr: float | None = None
    """Standard error of the value; None if there is none."""


class TaskResult(Section):
    """One model on one task."""

    task: str
    metrics: dict[str, Score]
    """By the harness's names: acc, acc_norm, ...; for held-out text see
    `lrc.evaluation.agreement`."""
    rows: int
    """Number of evaluated rows, or of sequences of held-out text."""
    rows_in_all: int
    """Number of rows in the data."""
    members: dict[str, dict[str, Score]] = Field({})
    """Metrics of each member, if the task is a group."""
    version: str = ""
    """The harness's version of the task."""
    shots: int | None = 0
    """Solved examples before each question; None: not the same for all members."""
    truncated: int = 0
    """Number of requests that were longer than the model's context and lost their beginning."""
    seconds: float = 0.0
    """Wall-clock time."""


class ModelResult(Section):
    """One model on all tasks."""

    model: str
    """The name that the user gave."""
    label: str
    """Its name in tables."""
    teacher: str | None = None
    """The teacher, if the model is a run's student."""
    tokens: int | None = None
    """Training tokens, if the model is the student of a run that has ended."""
    fingerprint: str | None = None
    """`lrc.evaluation.subject.fingerprint_of` its files."""
    tasks: dict[str, TaskResult]


class Evaluation(Section):
    """Several models on the same tasks with the same settings: the content of results.json."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    models: tuple[ModelResult, ...]

    def task_names(self) -> list[str]:
        """All tasks, in the requested order."""
        return list(self.models[0].tasks)


class KeptResults:
    """The finished tasks of a folder.

    Args:
        folder: the folder of the files; it may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: dict[str, Any]) -> TaskResult | None:
        """The stored result for these settings; None if there is no intact one."""
        try:
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            same = content["key"] == json.loads(json.dumps(key))
            return TaskResult.model_validate(content["result"]) if same else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def save(self, key: dict[str, Any], result: TaskResult) -> None:
        """Store a result.

        Raises:
            UserError: if the disk is full or the folder cannot be written.
        """
        content = {"key": key, "result": result.model_dump()}
        write_text(self._path(key), json.dumps(content, indent=2) + "\n")

    def _path(self, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{key['task']}-{digest[:16]}.json"
