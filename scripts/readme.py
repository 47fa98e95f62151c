"""The README's picture and table: held-out loss of lrc, its rivals and the paper's start.

python scripts/readme.py                          draw docs/loss.png, and write the README's table
python scripts/readme.py --check                  exit with 1 if the table differs from the data
python scripts/readme.py --take comparison.json   first take entries that are new from a folder of
                                                  `lrc compare`

The data is benchmarks/comparisons/readme.json, small enough to be kept here. It was taken from the
comparisons `release` and `shapes` (benchmarks/comparisons/README.md).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from lrc.report.charts import Chart, Line, Series, save_charts

ROOT = Path(__file__).parents[1]
DATA = ROOT / "benchmarks" / "comparisons" / "readme.json"
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "loss.png"

TITLE = "A Llama of 260 k parameters to half of them"
ENTRIES = {
    "heads-neurons": "lrc, fewer heads and neurons",
    "release-0-clone-first": "lrc, smaller hidden size",
    "llm-pruner": "LLM-Pruner",
    "slicegpt": "SliceGPT",
    "random-release-0.3": "the paper's start and losses",
}
"""Names of the comparison's entries, and those of the picture."""

BEGIN, END = "<!-- scripts/readme.py -->", "<!-- end -->"


def taken(comparison: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Entries by name: known ones, and the others of a comparison.json, with the losses of their
    runs at every measurement."""
    found: dict[str, Any] = {"teacher": comparison["teacher_held_out_lm"], "entries": dict(known)}
    for entry in comparison["entries"]:
        if entry["name"] in ENTRIES and entry["name"] not in known:
            steps = list(zip(*(run["curve"] for run in entry["runs"]), strict=True))
            losses = [[round(point["loss"], 7) for point in points] for points in steps]
            found["entries"][entry["name"]] = {
                "parameters": entry["parameters"],
                "tokens": [points[0]["tokens"] for points in steps],
                "losses": losses,  # of every seed
            }
    return found


def draw(data: dict[str, Any]) -> None:
    """Draw the means over the seeds, with their range."""
    lines = []
    for number, (key, name) in enumerate(ENTRIES.items()):
        entry = data["entries"][key]
        lines.append(
            Line(
                Series(name, number),
                entry["tokens"],
                [statistics.fmean(losses) for losses in entry["losses"]],
                data["teacher"],
                marked=True,
                band=([min(one) for one in entry["losses"]], [max(one) for one in entry["losses"]]),
            )
        )
    chart = Chart("held-out LM loss (nats)", lines, "tokens, calibration included", True, top=5)
    save_charts(TITLE, [chart], PICTURE)


def table(data: dict[str, Any]) -> str:
    """The final losses, and the tokens to what the last entry reaches in the end."""
    means = {
        key: [statistics.fmean(losses) for losses in data["entries"][key]["losses"]]
        for key in ENTRIES
    }
    goal = list(means.values())[-1][-1]
    first, *_, last = data["entries"][next(iter(ENTRIES))]["tokens"]
    lines = [
        f"| after {last - first:,} training tokens | held-out LM loss (teacher "
        f"{data['teacher']:.3f}) | parameters | tokens to {goal:.2f} |",
        "|---|---|---|---|",
    ]
    for key, name in ENTRIES.items():
        entry = data["entries"][key]
        loss = f"{means[key][-1]:.3f} ± {statistics.stdev(entry['losses'][-1]):.3f}"
        points = zip(entry["tokens"], means[key], strict=True)
        reached = next(tokens for tokens, mean in points if mean <= goal)
        lines.append(f"| {name} | {loss} | {entry['parameters']:,} | {reached:,} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--take", type=Path)
    options.add_argument("--check", action="store_true")
    given = options.parse_args()
    if given.take:
        known = json.loads(DATA.read_text())["entries"] if DATA.exists() else {}
        found = json.dumps(taken(json.loads(given.take.read_text()), known))
        DATA.write_text(found.replace('], "', '],\n"').replace('{"', '{\n"') + "\n")
    data, text = json.loads(DATA.read_text()), README.read_text()
    before, _, rest = text.partition(BEGIN)
    written = f"{before}{BEGIN}\n\n{table(data)}\n\n{END}{rest.partition(END)[2]}"
    if given.check:
        sys.exit(written != text)
    README.write_text(written)
    draw(data)


if __name__ == "__main__":
    main()
