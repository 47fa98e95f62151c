"""Send metrics to TensorBoard, Weights & Biases or trackio, if the recipe asks for it.

`train.report_to` follows transformers' convention. By default nothing is sent. metrics.jsonl is
always written. A resumed run continues in the same log. Each service's own environment variables
(WANDB_PROJECT, WANDB_MODE, TRACKIO_PROJECT, ...) decide where it sends data.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from lrc.cloning.method import CLONE_LAYERS
from lrc.run import Run
from lrc.system.distributed import ALONE, World
from lrc.system.errors import UserError
from lrc.system.files import read_json, write_text

PROJECT = "low-rank-clone"
"""Default project of the runs; an environment variable may name another."""


class Tracker(Protocol):
    """A destination for metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one step."""

    def close(self) -> None:
        """Send what is pending."""


@contextmanager
def open_trackers(run: Run, step: int, world: World = ALONE) -> Iterator[list[Tracker]]:
    """Open the trackers that a run's recipe names, at the step that the run continues from. Of
    several processes, only the first one has any.

    Raises:
        UserError: if one does not start.
    """
    trackers: list[Tracker] = []
    try:
        for name in run.recipe.train.report_to if world.leads else ():
            trackers.append(OPENERS[name](run, step))
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


def tracked_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The values to send of a line of metrics.jsonl: its numbers in groups, named as in
    transformers, one number per source, and the clone loss by term."""
    values: dict[str, float] = {}
    for name, value in line.items():
        if name in ("step", CLONE_LAYERS) or isinstance(value, str):
            continue
        key = f"{'eval' if 'held_out' in name or 'accuracy' in name else 'train'}/{name}"
        if isinstance(value, dict):
            values |= {f"{key}/{source}": number for source, number in value.items()}
        else:
            values[key] = value
    for name, layers in line.get(CLONE_LAYERS, {}).items():
        values[f"clone/{name}"] = sum(value for value in layers if value is not None)
    return values


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # An interrupted process logged steps beyond the checkpoint. They are logged again.
        purge = step + 1 if step else None
        self._writer: Any = SummaryWriter(run.folder / "tensorboard", purge_step=purge)
        if not step:
            self._writer.add_text("recipe", f"```yaml\n{run.recipe.to_yaml()}```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, run: Run, step: int) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.folder.name,
                id=tracker_id(run),
                resume="allow",
                dir=os.environ.get("WANDB_DIR", str(run.folder)),
                config=run.recipe.model_dump(mode="json"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases did not start ({error}). Run `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio."""

    def __init__(self, run: Run, step: int) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.folder.name}-{tracker_id(run)}",  # trackio resumes by name
            resume="allow",
            config=run.recipe.model_dump(mode="json"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


OPENERS: dict[str, Callable[[Run, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
"""Trackers by their names in recipes."""


def tracker_id(run: Run) -> str:
    """The run's ID at a tracking service: drawn once and kept in the run's folder."""
    path = run.folder / "trackers.json"
    if not path.is_file():
        write_text(path, json.dumps({"id": secrets.token_hex(4)}))
    return str(read_json(path, "remove it to start a new log").get("id"))
