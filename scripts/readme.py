"""The README's picture and table: held-out loss of lrc, its rivals and the paper's start.

python scripts/readme.py                          draw docs/loss.png, and write the README's table
python scripts/readme.py --check                  exit with 1 if the table differs from the data
python scripts/readme.py --take comparison.json   take the data from a folder of `lrc compare` first

The data is benchmarks/comparisons/readme.json, small enough to be kept here. The comparison that it
was taken from is described in benchmarks/comparisons/README.md.
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

TITLE = "A Llama of 260 k parameters to half its hidden size, 3 seeds"
ENTRIES = {
    "release-0-clone-first": "lrc",
    "llm-pruner": "LLM-Pruner (keeps the hidden size)",
    "slicegpt": "SliceGPT",
    "random-release-0.3": "the paper's random start and clone loss",
}
"""Names of the comparison's entries, and those of the picture."""

BEGIN, END = "<!-- scripts/readme.py -->", "<!-- end -->"


def taken(comparison: dict[str, Any]) -> dict[str, Any]:
    """The entries of a comparison.json, with the mean over their runs at every measurement."""
    found: dict[str, Any] = {"teacher": comparison["teacher_held_out_lm"], "entries": {}}
    for entry in comparison["entries"]:
        if entry["name"] in ENTRIES:
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
        found = json.dumps(taken(json.loads(given.take.read_text())))
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
