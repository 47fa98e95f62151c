"""Evaluate models task by task and store each finished task."""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.evaluation.agreement import HeldOut, held_out_of, measure
from lrc.evaluation.harness import (
    evaluate_task,
    find_tasks,
    harness_model,
    harness_version,
    open_tasks,
)
from lrc.evaluation.local_data import use_folder
from lrc.evaluation.published import PAPER, task_names
from lrc.evaluation.results import HELD_OUT, Evaluation, KeptResults, ModelResult, TaskResult
from lrc.evaluation.subject import Subject, find_subjects
from lrc.evaluation.tables import markdown
from lrc.model.teacher import load_model, load_teacher
from lrc.model.tokenizer import need_template
from lrc.run import is_run
from lrc.system.environment import describe_environment
from lrc.system.errors import UserError
from lrc.system.files import is_left_over, is_taken, write_text
from lrc.system.progress import Progress, task

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

FORMAT = 2
"""Version of the stored results. Increase it whenever the same settings give different results;
older stored results are then ignored."""


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings shared by all models of an evaluation."""

    tasks: tuple[str, ...] = (PAPER,)
    """Names, tags and patterns of the harness, `paper` and `heldout`."""
    limit: int | None = None
    """Rows of each task (each member of a group) or sequences of held-out text; None: all."""
    data: Path | None = None
    """Folder of JSONL files that replace the harness's data sets."""
    teacher: str | None = None
    """For `heldout`: replaces the run's teacher."""
    text: tuple[str, ...] = ()
    """For `heldout`: replaces the run's held-out text."""
    batch_size: int = 16
    """Sequences per forward pass; affects speed, not results."""
    dtype: str = "auto"
    """Element type of the models; `auto`: as stored."""
    device: str = "cpu"
    """Device name, as in torch."""
    apply_chat_template: bool = False
    """Whether the harness asks in each model's chat template."""

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or self.batch_size < 1:
            raise UserError(
                f"The limit is {self.limit} and the batch size {self.batch_size}: give at least 1."
            )
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, 0), torch.dtype):
            raise UserError(f"'{self.dtype}' is not an element type: give one such as bfloat16.")


@dataclass(frozen=True)
class _Plan:
    """The tasks and everything needed to evaluate them."""

    names: list[str]
    manager: "TaskManager | None"
    held_out: HeldOut | None
    keys: dict[str, dict[str, Any]]
    """By task: everything that determines its numbers, except the model."""


def evaluate(model: str, others: list[str], settings: EvaluationSettings, out: Path) -> Evaluation:
    """Evaluate a model, and others with the same settings.

    Tasks already in `out` for the same model and settings are not evaluated again. All results go
    to `out`: each task to `tasks/` when it finishes, `results.json` and `results.md` at the end.

    Args:
        model: a run's folder or anything that `lrc.model.teacher.load_model` takes.
        others: more models, or `teacher` for the run's teacher.
        settings: tasks and all other settings.
        out: the folder for the results.

    Raises:
        UserError: if a model, a task or its data is not found or not usable.
    """
    refuse_other_folder(out)
    subjects = find_subjects(model, others)
    with tempfile.TemporaryDirectory(prefix="lrc-eval-") as scratch:
        plan = _plan(subjects[0], settings, Path(scratch))
        kept = KeptResults(out / "tasks")
        results = [_evaluate(subject, plan, settings, kept) for subject in subjects]
    evaluation = Evaluation(
        settings={
            "tasks": plan.names,
            "limit": settings.limit,
            "dtype": settings.dtype,
            "device": torch.device(settings.device).type,
            "batch_size": settings.batch_size,
            "keys": plan.keys,
        },
        environment=describe_environment(),
        models=tuple(results),
    )
    write_text(out / "results.json", json.dumps(evaluation.model_dump(), indent=2) + "\n")
    write_text(out / "results.md", markdown(evaluation))
    return evaluation


def refuse_other_folder(out: Path) -> None:
    """Refuse a folder with other content than an evaluation, before anything in it is replaced.

    Raises:
        UserError: if the folder holds anything else.
    """
    ours = {"results.json", "results.md", "tasks"}
    if is_taken(out, lambda name: name in ours or is_left_over(name)):
        raise UserError(
            f"{out} holds something other than an evaluation: choose another folder with --out."
        )


def _plan(first: Subject, settings: EvaluationSettings, scratch: Path) -> _Plan:
    """Find tasks and data before any model is loaded."""
    names = task_names(settings.tasks)
    if not names:
        raise UserError(f"Give --tasks some tasks: {PAPER}, {HELD_OUT}, or names from the harness.")
    of_harness = [name for name in names if name != HELD_OUT]
    common = {
        "format": FORMAT,
        "dtype": settings.dtype,
        "device": torch.device(settings.device).type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    keys: dict[str, dict[str, Any]] = {}
    held_out = manager = None
    if HELD_OUT in names:
        held_out = held_out_of(first, settings.teacher, list(settings.text), settings.limit)
        keys[HELD_OUT] = {"task": HELD_OUT, **common, **held_out.key()}
    elif settings.teacher or settings.text:
        raise UserError(f"--teacher and --text belong to the task {HELD_OUT}; add it to --tasks.")
    if of_harness:
        version = harness_version()
        manager = open_tasks(of_harness)
        found = find_tasks(manager, of_harness)
        data: dict[str, Any] = dict.fromkeys(found, "hub")
        if settings.data:
            limited = settings.limit is not None
            data = use_folder(manager, found, settings.data, limited, scratch)
        for name in found:
            keys[name] = {
                "task": name,
                **common,
                "lm_eval": version,
                "limit": settings.limit,
                "data": data[name],
            }
            if settings.apply_chat_template:
                keys[name]["apply_chat_template"] = True
    elif settings.data:
        raise UserError("--data applies only to benchmarks; add some to --tasks, or leave it out.")
    return _Plan(list(keys), manager, held_out, keys)


def _evaluate(
    subject: Subject, plan: _Plan, settings: EvaluationSettings, kept: KeptResults
) -> ModelResult:
    """Evaluate one model on all tasks; load it only if a task is not finished yet."""
    fingerprint = subject.fingerprint()
    keys = {name: {**key, "model": fingerprint} for name, key in plan.keys.items()}
    tasks = {name: result for name, key in keys.items() if (result := kept.load(key))}
    if tasks:
        logger.info(
            "%s: %d of %d tasks are already finished.", subject.label, len(tasks), len(keys)
        )
    pending = [name for name in keys if name not in tasks]
    if pending:
        logger.info("Loading %s", subject.name)
        model, tokenizer = load_model(subject.source, settings.dtype, subject.revision)
        if settings.apply_chat_template:
            need_template(tokenizer)
        model.to(settings.device)
        worker = _Worker(plan, settings, model, tokenizer)
        for number, name in enumerate(pending, 1):
            text = f"{subject.label}: {name} ({number} of {len(pending)})"
            with task(text, unit="answers") as shown:
                tasks[name] = worker.result(name, shown.update)
            kept.save(keys[name], tasks[name])
            logger.info(_said(text, tasks[name]))
    run = subject.run
    return ModelResult(
        model=subject.name,
        label=subject.label,
        teacher=run.recipe.teacher.model if run else None,
        tokens=subject.training_tokens(),
        fingerprint=fingerprint,
        tasks={name: tasks[name] for name in plan.names},
    )


class _Worker:
    """A loaded model that runs one task after another."""

    def __init__(
        self,
        plan: _Plan,
        settings: EvaluationSettings,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
    ) -> None:
        self._plan, self._settings = plan, settings
        self._model, self._tokenizer = model, tokenizer
        if plan.manager:
            self._lm = harness_model(model, tokenizer, settings.batch_size)

    def result(self, name: str, progress: Progress) -> TaskResult:
        """Evaluate one task."""
        plan, settings = self._plan, self._settings
        if name == HELD_OUT:
            assert plan.held_out is not None
            teacher = load_teacher(plan.held_out.teacher, settings.device)
            return measure(plan.held_out, teacher, self._model, self._tokenizer, progress)
        assert plan.manager is not None
        local = settings.data is not None
        chat = settings.apply_chat_template
        return evaluate_task(self._lm, plan.manager, name, settings.limit, progress, local, chat)


def _said(text: str, result: TaskResult) -> str:
    """A finished task as one line of text."""
    scores = ", ".join(f"{name} {score.value:.4g}" for name, score in result.metrics.items())
    line = f"{text}: {scores}; {result.rows:,} rows in {result.seconds:,.0f} s"
    if result.truncated:
        line += f"; {result.truncated:,} prompts were cut to the model's context"
    return line


def results_folder(model: str, in_run: str, elsewhere: str) -> Path:
    """Choose the folder for a model's results: in the folder of its run or chat tuning, or below
    `elsewhere`, under its last name, or more of its path if another model's results are there.

    Args:
        model: the user's name for the model.
        in_run: name of the results folder inside a run's folder.
        elsewhere: parent of the results folders of all other models.
    """
    path = Path(model)
    if path.name == "student" and is_run(path.parent):
        path = path.parent
    if is_run(path) or (path / "student").is_dir():
        return path / in_run
    name = str(path.resolve()) if path.exists() else model.removeprefix("package:")
    parts = name.strip("/").split("/")
    names = ["-".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    folders = [Path(elsewhere) / name for name in names]
    return next((f for f in folders if not _is_of_another(f, model)), folders[-1])


def _is_of_another(folder: Path, model: str) -> bool:
    """Whether a folder holds the results of another model."""
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        other = str(content["models"][0]["model"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return False
    return other != model and Path(other).resolve() != Path(model).resolve()
