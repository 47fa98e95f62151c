"""The picture and the tables of held-out losses in README.md and benchmarks/comparisons/README.md.

python scripts/readme.py                    draw docs/loss.png, and write the tables
python scripts/readme.py --check            exit with 1 if a table differs from the data
python scripts/readme.py --take proof-cpu comparison.json
                                            first take the entries of `lrc compare proof-cpu`

The data is benchmarks/comparisons/readme.json, small enough to be kept here. It was taken from the
comparisons `shapes` and `proof-cpu` (benchmarks/comparisons/README.md).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrc.report.charts import Chart, Line, Series, save_charts

ROOT = Path(__file__).parents[1]
COMPARISONS = ROOT / "benchmarks" / "comparisons"
DATA, PICTURE = COMPARISONS / "readme.json", ROOT / "docs" / "loss.png"

TITLE = "A Llama of 260 k parameters to half of them"
SHAPES = {
    "heads-neurons": "fewer heads and neurons",
    "layers-heads-neurons": "fewer layers, heads and neurons",
    "hidden-neurons": "smaller hidden size, fewer neurons",
    "hidden-heads-neurons": "smaller hidden size, fewer heads and neurons",
    "layers-neurons": "fewer layers and neurons",
    "heads": "one key/value head, fewer neurons",
    "neurons": "fewer neurons",
    "hidden": "smaller hidden size, as in the paper",
}
"""Entries of lrc by name, with what is smaller than in the teacher."""
RIVALS = {
    "minitron-heads-neurons": "Minitron, fewer heads and neurons",
    "llm-pruner": "LLM-Pruner",
    "minitron-hidden-neurons": "Minitron, smaller hidden size, fewer neurons",
    "sheared-llama-heads-neurons": "Sheared LLaMA, fewer heads and neurons",
    "slicegpt": "SliceGPT",
    "minitron": "Minitron, smaller hidden size",
    "sheared-llama": "Sheared LLaMA, smaller hidden size",
    "scratch": "from scratch, with KL",
}
PAPER = {"paper": "the paper's start and losses"}
NAMES = {name: f"lrc, {smaller}" for name, smaller in SHAPES.items()} | RIVALS | PAPER
"""Names of the entries, and those that people read."""

SHOWN = ("heads-neurons", "hidden", "minitron-heads-neurons", "llm-pruner", "slicegpt", "paper")
"""The entries of the picture, and of the README's first table."""

BUDGETS = (0, 40_960, 122_880, 204_800, 409_600, 614_400, 819_200)
"""Training tokens of the other tables."""

LONG = (0, 122_880, 409_600, 819_200, 1_228_800, 1_843_200, 2_457_600)
"""Training tokens of the table of `proof-cpu`."""

SAME = {"lrc": "hidden"}
"""Entries that comparisons name differently."""


def taken(comparison: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Entries by name: known ones, and those of a comparison.json, with the losses of their runs at
    every measurement."""
    found: dict[str, Any] = {"teacher": comparison["teacher_held_out_lm"], "entries": dict(known)}
    for entry in comparison["entries"]:
        name = SAME.get(entry["name"], entry["name"])
        if name in NAMES and entry["runs"]:
            steps = list(zip(*(run["curve"] for run in entry["runs"]), strict=True))
            found["entries"][name] = {
                "parameters": entry["parameters"],
                "calibration": entry["calibration_tokens"] or 0,
                "tokens": [points[0]["tokens"] for points in steps],
                "losses": [[round(point["loss"], 7) for point in points] for points in steps],
            }
    return found


def at(entry: dict[str, Any], budget: int) -> list[float]:
    """The losses of every seed after a number of training tokens."""
    losses: list[float] = entry["losses"][entry["tokens"].index(budget + entry["calibration"])]
    return losses


def spread(losses: list[float]) -> str:
    """Mean and standard deviation; one seed is marked by *."""
    mean = f"{statistics.fmean(losses):.3f}"
    return f"{mean} ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else f"{mean}*"


def draw(data: dict[str, Any]) -> None:
    """Draw the means over the seeds of `shapes`, with their range."""
    data, lines = data["shapes"], []
    for number, key in enumerate(SHOWN):
        entry = data["entries"][key]
        lines.append(
            Line(
                Series(NAMES[key], number),
                entry["tokens"],
                [statistics.fmean(losses) for losses in entry["losses"]],
                data["teacher"],
                marked=True,
                band=([min(one) for one in entry["losses"]], [max(one) for one in entry["losses"]]),
            )
        )
    chart = Chart("held-out LM loss (nats)", lines, "tokens, calibration included", True, top=5)
    save_charts(TITLE, [chart], PICTURE)


def final(data: dict[str, Any]) -> list[str]:
    """The final losses, and the tokens to what the last entry reaches in the end."""
    data = data["shapes"]
    entries = {key: data["entries"][key] for key in SHOWN}
    means = {key: list(map(statistics.fmean, entry["losses"])) for key, entry in entries.items()}
    goal = means[SHOWN[-1]][-1]
    lines = [
        f"| after {BUDGETS[-1]:,} training tokens | held-out LM loss (teacher "
        f"{data['teacher']:.3f}) | parameters | tokens to {goal:.2f} |",
        "|---|---|---|---|",
    ]
    for key, entry in entries.items():
        points = zip(entry["tokens"], means[key], strict=True)
        reached = next(tokens for tokens, mean in points if mean <= goal)
        loss = spread(at(entry, BUDGETS[-1]))
        lines.append(f"| {NAMES[key]} | {loss} | {entry['parameters']:,} | {reached:,} |")
    return lines


def recommended(data: dict[str, Any]) -> list[str]:
    """The best shape and the best rival for every budget, and the paper's shape."""
    data = data["shapes"]
    lines = [
        "| training tokens | best shape | loss | best rival | loss | the paper's shape |",
        "|---|---|---|---|---|---|",
    ]
    for budget in BUDGETS:
        losses = {key: at(entry, budget) for key, entry in data["entries"].items()}
        cells = [f"{budget:,}"]
        for names in (SHAPES, RIVALS):
            best = min(names.keys() & losses, key=lambda key: statistics.fmean(losses[key]))
            cells += [names[best], spread(losses[best])]
        lines.append(f"| {' | '.join([*cells, spread(losses['hidden'])])} |")
    return lines


def by_budget(data: dict[str, Any]) -> list[str]:
    """All shapes and rivals of `shapes` at every budget, in the order of their last losses."""
    entries = {key: one for key, one in data["shapes"]["entries"].items() if key not in PAPER}
    return all_at(entries, BUDGETS)


def to_convergence(data: dict[str, Any]) -> list[str]:
    """The same for `proof-cpu`, with the paper's start and losses."""
    return all_at(data["proof-cpu"]["entries"], LONG)


def all_at(entries: dict[str, Any], budgets: Sequence[int]) -> list[str]:
    """Entries at every budget, in the order of their last losses."""
    ordered = sorted(entries, key=lambda key: statistics.fmean(at(entries[key], budgets[-1])))
    lines = ["| training tokens | " + " | ".join(f"{budget:,}" for budget in budgets) + " |"]
    lines.append("|---" * (len(budgets) + 1) + "|")
    best = [min(statistics.fmean(at(entry, b)) for entry in entries.values()) for b in budgets]
    for key in ordered:
        cells = []
        for budget, least in zip(budgets, best, strict=True):
            losses = at(entries[key], budget)
            mean = f"{statistics.fmean(losses):.3f}"
            text = spread(losses) if budget == budgets[-1] else mean
            cells.append(f"**{text}**" if mean == f"{least:.3f}" else text)
        lines.append(f"| {NAMES[key]} | {' | '.join(cells)} |")
    return lines


PAGES = {
    ROOT / "README.md": {"final": final, "recommended": recommended},
    COMPARISONS / "README.md": {"by-budget": by_budget, "to-convergence": to_convergence},
}
"""Where the tables stand: between `<!-- scripts/readme.py NAME -->` and `<!-- end -->`."""


def written(text: str, tables: dict[str, Any], data: dict[str, Any]) -> str:
    """A page with its tables made again."""
    for name, table in tables.items():
        begin = f"<!-- scripts/readme.py {name} -->"
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition("<!-- end -->")
        lines = "\n".join(table(data))
        text = f"{before}{begin}\n\n{lines}\n\n{end}{after}"
    return text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--take", nargs=2, metavar=("NAME", "FILE"))
    options.add_argument("--check", action="store_true")
    given = options.parse_args()
    data = json.loads(DATA.read_text())
    if given.take:
        name, path = given.take
        known = data.get(name, {}).get("entries", {})
        data[name] = taken(json.loads(Path(path).read_text()), known)
        text = json.dumps(data).replace('], "', '],\n"').replace('{"', '{\n"')
        DATA.write_text(text + "\n")
    pages = {page: written(page.read_text(), tables, data) for page, tables in PAGES.items()}
    if given.check:
        sys.exit(any(page.read_text() != text for page, text in pages.items()))
    for page, text in pages.items():
        page.write_text(text)
    draw(data)


if __name__ == "__main__":
    main()
