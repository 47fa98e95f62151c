"""Tiny teachers and texts on the disk, recipes for them, and runs of a few steps."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_helpers import write_jsonl
from lrc.recipe import Recipe, make_recipe
from lrc.run import Run
from lrc.train import train
from lrc.train.checkpoint import list_checkpoints
from lrc.train.loop import Loop
from tiny import STUDENT_HIDDEN, tiny_teacher

SETTINGS = {
    "student": {"hidden_size": STUDENT_HIDDEN},
    "initialize": {"calibration_tokens": 256},
    "objective": {"alpha_schedule": "constant"},
    "data": {"held_out_fraction": 0.2, "sequence_length": 16},
    "train": {"tokens": 320, "micro_batch": 2, "eval_every": 4, "checkpoint_every": 3},
}


def tiny_documents(number: int = 40) -> list[str]:
    """Documents of 60 words that `tiny_tokenizer` knows."""
    return [" ".join(f"w{3 + (7 * d + i * i) % 30}" for i in range(60)) for d in range(number)]


def tiny_recipe(changes: Mapping[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe whose teacher and text do not exist; `changes` have dotted keys."""
    base = {
        "teacher": {"model": "tiny"},
        "student": {"hidden_size": STUDENT_HIDDEN},
        "data": {"text": ["x"]},
    }
    return make_recipe(base | sections, changes or {})


def save_teacher(folder: Path, family: str = "qwen3", tied: bool = True, **changes: Any) -> Path:
    """A tiny teacher in float32 and its tokenizer, as transformers saves them."""
    teacher = tiny_teacher(family, tied, dtype=torch.float32, **changes)
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return folder


def file_settings(folder: Path, **sections: Any) -> dict[str, Any]:
    """Settings of a recipe whose teacher, text and cache are in a folder.

    The text is written. The teacher is what `save_teacher` saves as `teacher`. `sections` add to
    these settings.
    """
    base: dict[str, Any] = {
        "teacher": {"model": str(folder / "teacher")},
        "student": {"hidden_size": STUDENT_HIDDEN},
        "data": {
            "text": [str(write_jsonl(folder / "text.jsonl", tiny_documents()))],
            "held_out_fraction": 0.2,
            "sequence_length": 16,
            "cache": str(folder / "cache"),
        },
    }
    return base | {name: {**base.get(name, {}), **values} for name, values in sections.items()}


def new_run(folder: Path, *trackers: str, name: str = "run", **changes: Any) -> Run:
    """A run of ten steps on a tiny teacher; `changes` go to its training, if they have no dot."""
    overrides = {
        "teacher.model": "tiny",
        "data.text": [str(write_jsonl(folder / "text.jsonl", tiny_documents()))],
        "data.cache": str(folder / "cache"),
        "train.report_to": list(trackers),
        **{key if "." in key else f"train.{key}": value for key, value in changes.items()},
    }
    return Run.create(folder / name, make_recipe(SETTINGS, overrides))


def go(run: Run, family: str = "llama") -> None:
    """Train a run to its end."""
    train(run, tiny_teacher(family))


def diverge_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training fail in a step, with gradients that are not finite."""
    clip = Loop._clip

    def nan_at_step(self: Loop, missing: Collection[str]) -> Tensor:
        norm = clip(self, missing)
        return norm * torch.nan if self.setup.state.step == step - 1 else norm

    monkeypatch.setattr(Loop, "_clip", nan_at_step)


def copy_until(run: Run, folder: Path, step: int) -> Run:
    """A copy of a finished run, as if it had been killed after the checkpoint of a step."""
    shutil.copytree(run.folder, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "student")
    (folder / "summary.json").unlink()
    return Run.open(folder)


def assert_same_run(ours: Run, theirs: Run) -> None:
    """Two finished runs have the same metrics, apart from times, and bit for bit the same last
    checkpoint and student."""
    assert without_times(ours.metrics()) == without_times(theirs.metrics())
    newest = [list_checkpoints(run.checkpoints)[0] / "state.safetensors" for run in (ours, theirs)]
    students = [run.student_folder / "model.safetensors" for run in (ours, theirs)]
    for mine, reference in (newest, students):
        assert mine.read_bytes() == reference.read_bytes(), mine.name


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without times and rates."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]
