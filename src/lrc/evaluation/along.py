"""Accuracy on benchmarks during a run: of the student of that moment, beside the teacher's."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.evaluation.harness import evaluate_task, find_tasks, harness_model, open_tasks
from lrc.evaluation.local_data import use_folder
from lrc.evaluation.published import task_names
from lrc.recipe.sections import EvaluateSection
from lrc.system.distributed import ALONE, World
from lrc.system.random_state import same_random_state

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class Benchmarks:
    """The tasks of a recipe's `train.evaluate`, found once."""

    def __init__(self, section: EvaluateSection) -> None:
        """Raises UserError if the harness is not installed, or has no such task or data."""
        self.section = section
        names = task_names(section.tasks)
        self._manager: TaskManager = open_tasks(names)
        self._names = find_tasks(self._manager, names)
        self._scratch = tempfile.TemporaryDirectory(prefix="lrc-eval-")
        if section.data is not None:
            limited, scratch = section.limit is not None, Path(self._scratch.name)
            use_folder(self._manager, self._names, Path(section.data), limited, scratch)

    def due(self, before: int, now: int) -> bool:
        """Whether to measure after a step, by the training tokens before and after it."""
        every = self.section.every_tokens
        return before // every < now // every

    def accuracy(
        self, model: PreTrainedModel, tokenizer: Tokenizer, world: World = ALONE
    ) -> dict[str, float]:
        """Every metric by `task/metric`. The state of all random generators stays as it is.

        Args:
            model: the model, the same in all processes.
            tokenizer: its tokenizer.
            world: the processes to share the tasks among; all get the result.
        """
        mine: dict[str, dict[str, float]] = {}
        with same_random_state(), torch.no_grad():
            lm = harness_model(model, tokenizer, self.section.batch_size)
            for name in self._names[world.rank :: world.size]:
                local = self.section.data is not None
                result = evaluate_task(lm, self._manager, name, self.section.limit, None, local)
                mine[name] = {f"{name}/{key}": one.value for key, one in result.metrics.items()}
        of_all = {name: found for part in world.gather(mine) for name, found in part.items()}
        return {key: value for name in self._names for key, value in of_all[name].items()}
