"""Add finished runs to the table of measured shapes, and print how well the fit predicts.

    python scripts/measured_shapes.py --source "benchmarks/comparisons/shapes.md" RUN [RUN ...]

Runs that differ only in their seeds become one row, with the mean of their losses.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lrc.model.pruned_shape import PrunedShape
from lrc.model.teacher import short_name
from lrc.planning.expected import Expected, MeasuredRun
from lrc.run import Run
from lrc.system.files import write_text

TABLE = Path(__file__).parents[1] / "src/lrc/planning/measured.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--source", required=True, help="where the numbers are published")
    parser.add_argument("--table", type=Path, default=TABLE)
    given = parser.parse_args()
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for folder in given.runs:
        run = Run.open(folder)
        summary = run.summary()
        whole, own = (summary["shapes"][name] for name in ("teacher", "student"))
        teacher = short_name(run.recipe.teacher.model)
        size = int(str(own["parameters"]).replace(",", ""))
        key = teacher, whole["vocabulary"], shape(whole), shape(own), size, summary["tokens"]
        found[key].append(summary)
    table = json.loads(given.table.read_text("utf-8"))
    for (teacher, vocabulary, whole, own, size, tokens), summaries in found.items():
        row = {
            "teacher": teacher,
            "vocabulary": vocabulary,
            "teacher_shape": asdict(whole),
            "shape": asdict(own),
            "parameters": size,
            "tokens": tokens,
            "loss": round(fmean(one["student_held_out_lm"] for one in summaries), 4),
            "teacher_loss": round(fmean(one["teacher_held_out_lm"] for one in summaries), 4),
            "seeds": len(summaries),
            "source": given.source,
        }
        same = ("vocabulary", "teacher_shape", "shape", "tokens")
        others = [old for old in table["runs"] if any(old[name] != row[name] for name in same)]
        table["runs"] = [*others, row]
    write_text(given.table, json.dumps(table, indent=2) + "\n")
    for teacher in sorted({row["teacher"] for row in table["runs"]}):
        rows = [row for row in table["runs"] if row["teacher"] == teacher]
        print(f"{teacher}: {len(rows)} runs{error(rows)}")


def shape(row: dict[str, Any]) -> PrunedShape:
    """A shape of a run's summary."""
    names = ("layers", "hidden size", "key/value heads", "FFN width")
    return PrunedShape(*(int(row[name]) for name in names))


def error(rows: list[dict[str, Any]]) -> str:
    """The error of the fit to the runs of a teacher, where there are enough of them."""
    if len(rows) < 3:
        return ""
    names = ("parameters", "tokens", "loss", "teacher_loss", "source")
    runs = [
        MeasuredRun(PrunedShape(**row["shape"]), **{name: row[name] for name in names})
        for row in rows
    ]
    return f", the fit misses runs left out by {Expected(runs).error:.3f} nats"


if __name__ == "__main__":
    main()
