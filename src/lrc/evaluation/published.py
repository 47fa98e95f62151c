"""The paper's results, which ship as data to compare a student with."""

from collections.abc import Iterable
from importlib import resources

import yaml

from lrc.recipe.sections import Section


class Benchmark(Section):
    """One of the paper's tasks."""

    label: str
    """Its column in the paper."""
    rows: int
    """Number of rows that the harness evaluates in the full data set."""


class PublishedModel(Section):
    """A row of the paper's tables."""

    model: str
    teacher: str | None
    """The model that it was derived from; None: trained from scratch."""
    tokens: str
    """Training tokens."""
    accuracy: tuple[float, ...]
    """Percent, in the order of the tasks."""
    average: float
    """Average over all tasks, as published."""


class Published(Section):
    """The paper's tables."""

    source: str
    tasks: dict[str, Benchmark]
    """Keyed by the harness's task name, in the paper's order."""
    models: tuple[PublishedModel, ...]


PAPER = "paper"
"""Stands for the paper's nine tasks."""


def task_names(asked: Iterable[str]) -> list[str]:
    """The names of tasks without duplicates, with the paper's in place of `paper`."""
    ours = list(published().tasks)
    found = [name for one in asked for name in (ours if one == PAPER else [one])]
    return list(dict.fromkeys(found))


def published() -> Published:
    """The published results."""
    text = (resources.files("lrc.evaluation") / "published.yaml").read_text(encoding="utf-8")
    return Published.model_validate(yaml.safe_load(text))
