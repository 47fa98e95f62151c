"""A narrow interface to lm-evaluation-harness: tasks by name, and its model class on our models.

Prompts, targets, metrics and their aggregation are the harness's own. We add only two things to its
model class: it computes logits only at the scored positions, and it reports each answer.
"""

import difflib
import inspect
import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.evaluation.published import published
from lrc.evaluation.results import Score, TaskResult
from lrc.system.errors import UserError, reason
from lrc.system.hub import cache_alone_if_unreachable, no_way
from lrc.system.progress import Progress

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager


PAPER_FOLDERS = (
    "arc",
    "commonsense_qa",
    "logiqa",
    "mmlu/default",
    "piqa",
    "sciq",
    "super_glue/boolq",
    "winogrande",
)
"""Folders where the harness defines the paper's tasks. Reading only these saves the many seconds
that its other 14,000 tasks take."""


def harness_version() -> str:
    """Version of the installed lm-evaluation-harness.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "Benchmarks need lm-evaluation-harness; run `pip install 'low-rank-clone[eval]'`."
        ) from error


def open_tasks(names: list[str]) -> "TaskManager":
    """The harness's task index: only the paper's tasks if no others are requested, else all.

    Raises:
        UserError: if the harness is not installed.
    """
    harness_version()
    import lm_eval.tasks

    if set(names) <= published().tasks.keys():
        folder = Path(lm_eval.tasks.__file__).parent
        paths: list[str | Path] = [folder / name for name in PAPER_FOLDERS]
        few = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)
        if all(name in few.task_index for name in names):
            return few
    return lm_eval.tasks.TaskManager()


def find_tasks(manager: "TaskManager", names: list[str]) -> list[str]:
    """The tasks and groups that match names, tags or patterns such as `mmlu_*`.

    Raises:
        UserError: if the harness has no task of that name.
    """
    found: list[str] = []
    for name in names:
        matches = sorted(manager.match_tasks([name])) if "*" in name else [name]
        if not matches or matches[0] not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise UserError(
                f"There is no task '{name}'{hint}; give names of lm-evaluation-harness, paper or "
                "heldout."
            )
        for match in matches:
            tag = match in manager.all_tags
            found.extend(sorted(manager.task_index[match].tags) if tag else [match])
    return list(dict.fromkeys(found))


def harness_model(model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int) -> "TemplateLM":
    """Wrap a loaded model in the harness's model class for transformers.

    It computes logits only at the end of each sequence, where the harness scores. The other logits
    would cost a fifth of the time and most of the memory, and would be thrown away.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        batch_size: sequences per forward pass.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class EndLogits(HFLM):  # type: ignore[misc]
        """The harness's model, with logits only at the last positions."""

        progress: Progress | None = None
        truncated = 0
        _ends_texts = bool(tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id)

        def get_model_info(self) -> dict[str, Any]:
            return {}  # for a local model, the harness would ask the hub for its commit

        def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
            ids = super().tok_encode(string, *args, **options)
            # With an end of text after the prompt, the answer would start a new text.
            return ids[:-1] if self._ends_texts and ids[-1:] == [self.eot_token_id] else ids

        def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, **options)
            # Padding is on the left, so every prompt ends in the last column.
            if self._ends_texts and ids.shape[1] > 1 and (ids[:, -1] == self.eot_token_id).all():
                return ids[:, :-1], mask[:, :-1]
            return ids, mask

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            for request in requests:
                length = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
                if length >= self.max_length:
                    raise UserError(
                        f"'{request.task_name}' lets a model write {length:,} tokens, which the "
                        f"context of {self.max_length:,} tokens does not hold: leave it out."
                    )
                room = self.max_length - length
                self.truncated += len(self.tok_encode(request.args[0])) > room
            self.cache_hook = _Counter(self.progress, len(requests))
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            self._longest = max(len(continuation) for _, _, continuation in requests)
            lengths = (len(context) + len(cont) for _, context, cont in requests)
            self.truncated += sum(length > self.max_length + 1 for length in lengths)
            self.cache_hook = _Counter(self.progress, len(requests))
            return super()._loglikelihood_tokens(requests, True, override_bs)

        def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:
            if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
                return super()._model_call(inps, *args, **options)
            # The harness scores the last tokens before the padding (zeros on the right) and counts
            # them from the end of the returned logits. Real tokens may be 0 too. Then we keep more
            # logits than needed, which is harmless.
            positions = torch.arange(1, inps.shape[1] + 1, device=inps.device)
            shortest = int(((inps != 0) * positions).amax(1).min())
            kept = min(inps.shape[1] - shortest + self._longest, inps.shape[1])
            with torch.no_grad():
                return self.model(inps, logits_to_keep=kept, use_cache=False).logits

    with quiet_harness():
        return EndLogits(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"
        )


class _Counter:
    """Counts the answers, in place of the harness's answer cache."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add_partial(self, *_: Any) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)


def evaluate_task(
    lm: "TemplateLM",
    manager: "TaskManager",
    name: str,
    limit: int | None,
    progress: Progress | None = None,
    local: bool = False,
    chat: bool = False,
) -> TaskResult:
    """Evaluate one task or group.

    Args:
        lm: a `harness_model`.
        manager: the harness's tasks.
        name: a name that the manager knows.
        limit: number of rows of the task, or of each member of a group; None: all.
        progress: called after every answer.
        local: whether the rows are on this machine.
        chat: whether to ask in the model's chat template.

    Raises:
        UserError: if the data cannot be loaded or lacks fields that the task reads.
    """
    start, before = time.perf_counter(), lm.truncated
    with quiet_harness():
        task = load_task(manager, name, local)
        found = _evaluate(lm, manager, task, limit, progress, chat=chat)
    counts = found["n-samples"]
    members = list(counts) if name in found["group_subtasks"] else []
    shots = {found["n-shot"].get(member, 0) for member in counts}
    return TaskResult(
        task=name,
        metrics=_metrics(found["results"][name]),
        rows=sum(count["effective"] for count in counts.values()),
        rows_in_all=sum(count["original"] for count in counts.values()),
        members={member: _metrics(found["results"][member]) for member in members},
        version=str(found["versions"].get(name)),
        shots=shots.pop() if len(shots) == 1 else None,
        truncated=lm.truncated - before,
        seconds=round(time.perf_counter() - start, 1),
    )


def load_task(manager: "TaskManager", name: str, local: bool = False) -> Any:
    """The harness's task or group of that name, with its data.

    Args:
        manager: the harness's tasks.
        name: a name that the manager knows.
        local: whether its rows are on this machine.

    Raises:
        UserError: if the data cannot be loaded or lacks fields that the task reads.
    """
    from jinja2 import UndefinedError

    problem = None if local else cache_alone_if_unreachable()
    try:
        loaded = manager.load([name])
    except (UndefinedError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"The data of '{name}' lacks a field that the task reads ({reason(error)}); give "
            "it the fields of the harness's own data set."
        ) from error
    except Exception as error:  # the harness and `datasets` may raise anything
        raise UserError(
            f"The data of '{name}' cannot be loaded ({no_way(problem, error)}); if the hub "
            "is not reachable, give a folder of JSONL files with --data."
        ) from error
    for task in loaded["tasks"].values():
        _refuse_missing_target(task)
    return loaded["groups"].get(name) or loaded["tasks"][name]


def evaluate_rows(
    lm: "TemplateLM",
    manager: "TaskManager",
    task: Any,
    limit: int | None,
    progress: Progress | None = None,
) -> list[float]:
    """Accuracy of every row of one task: the harness's `acc`, 1 if the answer is right.

    Args:
        lm: a `harness_model`.
        manager: the harness's tasks.
        task: a task from `load_task` that measures `acc`; not a group.
        limit: number of rows, from the start; None: all.
        progress: called after every answer.
    """
    with quiet_harness():
        found = _evaluate(lm, manager, task, limit, progress, rows=True)
    (rows,) = found["samples"].values()
    right = {row["doc_id"]: float(row["acc"]) for row in rows}
    return [right[number] for number in sorted(right)]


def prompts(lm: "TemplateLM", task: Any, limit: int | None) -> list[list[list[int]]]:
    """Token ids of every row's prompts, without the answers, as the harness builds them.

    Args:
        lm: a `harness_model`, whose tokenizer is used.
        task: a task from `load_task`; not a group.
        limit: number of rows, from the start; None: all.
    """
    with quiet_harness():
        _without_shots(task)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    texts: dict[int, dict[str, None]] = {}
    for request in task.instances:
        texts.setdefault(request.doc_id, {})[request.args[0]] = None
    longest = lm.max_length
    return [[lm.tok_encode(text)[-longest:] for text in texts[row]] for row in sorted(texts)]


def _evaluate(
    lm: "TemplateLM",
    manager: "TaskManager",
    task: Any,
    limit: int | None,
    progress: Progress | None,
    rows: bool = False,
    chat: bool = False,
) -> Any:
    """The harness's `simple_evaluate` without its log details.

    These are the git commit of the current folder, where git prints an error outside a repository,
    and the details of the machine, which take a second.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    lm.progress = progress
    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = manager.load([task])
    for member in loaded["tasks"].values():
        _without_shots(member)
        member.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    found = evaluate(lm, loaded, limit=limit, log_samples=rows, apply_chat_template=chat)
    assert found is not None  # None only in secondary processes
    return found


def _without_shots(task: Any) -> None:
    """Show no solved examples unless the task sets their number."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's notices out of our own output."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_missing_target(task: Any) -> None:
    """Refuse data without the target field; the harness would use the field's name as the target.

    Raises:
        UserError: if the data lacks the field.
    """
    target = task.config.doc_to_target
    features = getattr(task, "features", None)
    if features and isinstance(target, str) and target.isidentifier() and target not in features:
        raise UserError(
            f"The data of '{task.config.task}' lacks the field '{target}' that holds the answer; "
            "give it the fields of the harness's own data set."
        )


def _metrics(found: Mapping[str, Any]) -> dict[str, Score]:
    """The metrics of one entry of the harness's results, where keys are `metric,filter`."""
    metrics: dict[str, Score] = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = found.get(f"{metric}_stderr,{chosen}")
        name = metric if chosen == "none" else key
        stderr = float(error) if isinstance(error, int | float) else None
        metrics[name] = Score(value=float(value), stderr=stderr)
    return metrics
