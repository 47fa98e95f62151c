"""Runs of a few steps on a tiny random teacher."""

import json
from pathlib import Path
from typing import Any

from lrc.recipe import make_recipe
from lrc.run import Run
from lrc.train import train
from tiny import tiny_teacher

SETTINGS = {
    "student": {"hidden_size": 8},
    "objective": {"alpha_schedule": "constant"},
    "data": {"held_out_fraction": 0.2, "sequence_length": 16},
    "train": {"tokens": 320, "micro_batch": 2, "eval_every": 4, "checkpoint_every": 3},
}


def new_run(folder: Path, *trackers: str, name: str = "run", **changes: Any) -> Run:
    """A run of ten steps on a tiny teacher; `changes` go to its training."""
    text = folder / "text.jsonl"
    words = [" ".join(f"w{3 + (7 * d + i * i) % 30}" for i in range(60)) for d in range(40)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in words))
    overrides = {
        "teacher.model": "tiny",
        "data.text": [str(text)],
        "data.cache": str(folder / "cache"),
        "train.report_to": list(trackers),
        **{f"train.{key}": value for key, value in changes.items()},
    }
    return Run.create(folder / name, make_recipe(SETTINGS, overrides))


def go(run: Run, family: str = "llama") -> None:
    """Train a run to its end."""
    train(run, tiny_teacher(family))
