"""Factual questions: a task of lm-evaluation-harness, or a question file turned into one.

A question file is JSONL, one question per line:

    {"question": "Who was the first emperor of Rome?", "choices": ["Nero", "Augustus"], "answer": 1}
    {"question": "Who was the first emperor of Rome?", "answer": "Augustus"}

`answer` is the right choice, as its number from 0 or as its text. Without `choices`, the answer is
right if it is the model's greedy continuation. An optional `context` comes before the question. All
lines have the same fields. The prompt is that of the harness's SciQ.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lrc.evaluation.harness import (
    find_tasks,
    harness_version,
    load_task,
    open_tasks,
    quiet_harness,
)
from lrc.evaluation.local_data import read_rows, use_folder
from lrc.system.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OWN = "questions"
"""Task name of a question file."""

FIELDS = ("context", "question", "choices", "answer")

PROMPT = "{{context}}\nQuestion: {{question}}\nAnswer:"

CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
}
"""The harness's settings for questions with choices."""

OPEN: dict[str, Any] = {"output_type": "loglikelihood", "doc_to_target": " {{answer}}"}
"""The harness's settings for questions without choices."""

ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


@dataclass(frozen=True)
class Questions:
    """A harness task that asks questions."""

    name: str
    source: str
    """Source of the rows."""
    manager: "TaskManager"
    task: Any
    """The task, as `lrc.evaluation.harness.load_task` returns it."""

    def rows(self, limit: int | None) -> int:
        """Number of questions asked."""
        whole = len(self.task.eval_docs)
        return whole if limit is None else min(limit, whole)


def questions_of_task(name: str, data: Path | None, limited: bool, scratch: Path) -> Questions:
    """The questions of a task of the harness.

    Args:
        name: the task, which must measure accuracy.
        data: folder of its rows, as for `lrc eval --data`; None: from the hub.
        limited: whether a sample of the task is enough.
        scratch: an empty folder; it must exist as long as the questions are in use.

    Raises:
        UserError: if there is no such task, it is a group or does not measure accuracy, or its data
            is not found.
    """
    manager = open_tasks([name])
    (name, *more) = find_tasks(manager, [name])
    if more or name in manager.all_groups:
        raise UserError(f"'{name}' is a group of tasks; give --task one task, such as sciq.")
    if data is not None:
        use_folder(manager, [name], data, limited, scratch)
    with quiet_harness():
        task = load_task(manager, name, data is not None)
    if "acc" not in task.aggregation():
        raise UserError(f"The task '{name}' does not measure accuracy (acc); choose another task.")
    return Questions(name, "hub" if data is None else str(data), manager, task)


def questions_of_file(path: Path, scratch: Path) -> Questions:
    """The questions of a file.

    Args:
        path: a JSONL file; see the module's docstring.
        scratch: an empty folder; it must exist as long as the questions are in use.

    Raises:
        UserError: if the file is not found, a line is not a question, or the harness is not
            installed.
    """
    harness_version()
    import lm_eval.tasks

    if not path.is_file():
        raise UserError(f"There is no file '{path}'; give --questions a JSONL file.")
    rows = read_rows(path)
    whole = list(_checked(rows, path))
    file = scratch / f"{OWN}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
    definition = {
        "task": OWN,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file.resolve())},
            "cache_dir": str(scratch / "cache"),
        },
        "test_split": "test",
        "doc_to_text": PROMPT,
        "metric_list": ACCURACY,
        "num_fewshot": 0,
        **(CHOICE if "choices" in rows[0] else OPEN),
    }
    (scratch / f"{OWN}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[scratch])
    with quiet_harness():
        return Questions(OWN, str(path), manager, load_task(manager, OWN, local=True))


def _checked(rows: list[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """The rows, with the number of the right choice as the answer and with a context."""
    for number, row in enumerate(rows, 1):
        where = f"Line {number} of {path}"
        if unknown := row.keys() - set(FIELDS):
            raise UserError(
                f"{where} has the unknown field '{min(unknown)}'; a question has "
                f"{', '.join(FIELDS)}."
            )
        for field in ("context", "question"):
            if not isinstance(row.get(field, ""), str):
                raise UserError(f"{where} has a {field} that is not a string; give a string.")
        if not row.get("question") or row.get("answer") in (None, ""):
            raise UserError(f"{where} lacks a question or an answer; give both.")
        yield {"context": "", **row, "answer": _answer(row, where)}


def _answer(row: dict[str, Any], where: str) -> int | str:
    """The number of the right choice; the answer itself if there are no choices."""
    answer, choices = row["answer"], row.get("choices")
    if "choices" not in row:
        if not isinstance(answer, str):
            raise UserError(f"{where} has no choices, so its answer must be a string.")
        return answer.strip()
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise UserError(f"{where} needs two or more non-empty strings as choices.")
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    raise UserError(
        f"{where} has an answer that is not one of its choices; give its number from 0 or its text."
    )
