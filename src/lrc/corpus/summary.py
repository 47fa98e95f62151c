"""The reports of a build for the user: summary.json, summary.png and decontamination.jsonl."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrc.corpus import filters
from lrc.corpus.mix import Mix, Source
from lrc.corpus.rejects import Rejects
from lrc.corpus.selection import HISTOGRAM_BITS, Tally
from lrc.corpus.unit import Count
from lrc.corpus.workspace import Workspace
from lrc.report.pictures import as_label, save_picture
from lrc.system.files import new_file, write_text
from lrc.system.tables import Table

SUMMARY = "summary.json"
PICTURE = "summary.png"
OVERLAPS = "decontamination.jsonl"


def summarize(
    mix: Mix, tallies: dict[str, Tally], rejects: Rejects, found: dict[str, Any], mistakes: float
) -> dict[str, Any]:
    """The summary as JSON values.

    Args:
        mix: the mix.
        tallies: what happened to every source's documents.
        rejects: malformed rows and overlapping documents.
        found: contents of the evaluation set index (empty if there is none).
        mistakes: expected number of documents classified as duplicates by accident.
    """
    budgets = mix.budgets()
    whole = sum(tally.train.tokens for tally in tallies.values())
    asked = sum(budget or tallies[name].train.tokens for name, budget in budgets.items())
    sources = {}
    for name, tally in tallies.items():
        wanted = budgets[name] or tally.train.tokens
        sources[name] = {
            "budget": budgets[name],
            "ran_dry": tally.train.tokens < (budgets[name] or 0),
            "train": _plain(tally.train),
            "held_out": _plain(tally.held_out),
            "repeated": _plain(tally.repeated),
            "share_asked": round(wanted / asked, 6) if asked else 0.0,
            "share": round(tally.train.tokens / whole, 6) if whole else 0.0,
            "steps": _steps(mix, mix.sources[name], tally),
            "malformed_rows": rejects.shown.get(name, []),
        }
    sets = {n: one | {"documents_dropped": rejects.overlaps[n]} for n, one in found.items()}
    return {
        "tokens": {
            "train": whole,
            "held_out": sum(tally.held_out.tokens for tally in tallies.values()),
        },
        "documents": {
            "train": sum(tally.train.documents for tally in tallies.values()),
            "held_out": sum(tally.held_out.documents for tally in tallies.values()),
        },
        "sources": sources,
        "length_histogram": {
            "from_tokens": [1 << bit for bit in range(HISTOGRAM_BITS)],
            "documents": {name: tally.histogram.tolist() for name, tally in tallies.items()},
        },
        "evaluation_sets": sets,
        "duplicates_by_accident": round(mistakes, 3),
    }


def warnings_of(summary: dict[str, Any]) -> list[str]:
    """What the user should know about a build, in sentences."""
    found = []
    for name, source in summary["sources"].items():
        if source["ran_dry"]:
            found.append(
                f"'{name}' ran dry: it has {source['train']['tokens']:,} of the "
                f"{source['budget']:,} tokens in its budget ({source['share']:.1%} of the mix "
                f"instead of {source['share_asked']:.1%}); add text, or set its `repeat`."
            )
        for row in source["malformed_rows"]:
            found.append(f"'{name}': {row}; skipped.")
    if not summary["tokens"]["held_out"]:
        found.append(
            "No document was held out, and `lrc train` needs some: raise held_out_fraction."
        )
    mistakes, kept = summary["duplicates_by_accident"], sum(summary["documents"].values())
    if mistakes > 0.01 * kept:
        found.append(
            f"About {mistakes:,.0f} documents were dropped as near-duplicates by accident: raise "
            "deduplicate.memory_mib."
        )
    return found


def write_summary(space: Workspace, out: Path, summary: dict[str, Any]) -> None:
    """Write the summary and its picture into the shards folder.

    Raises:
        UserError: if the disk is full.
    """
    write_text(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if summary["evaluation_sets"]:
        with new_file(out / OVERLAPS) as temporary:
            temporary.write_bytes(space.overlaps.read_bytes())
    figure = draw(summary)
    # Without the matplotlib version in the file, the same summary gives the same file.
    save_picture(figure, out / PICTURE, metadata={"Software": None})


def tables(summary: dict[str, Any]) -> list[Table]:
    """The summary as tables for a terminal."""
    columns = ["source", "documents", "train tokens", "share", "asked", "held-out tokens"]
    mix = Table(columns, right=range(1, 6))
    for name, source in summary["sources"].items():
        mix.add_row(
            name,
            f"{source['train']['documents']:,}",
            f"{source['train']['tokens']:,}",
            f"{source['share']:.1%}",
            f"{source['share_asked']:.1%}",
            f"{source['held_out']['tokens']:,}",
        )
    columns = ["source", "step", "documents in", "out", "tokens in", "out"]
    steps = Table(columns, right=range(2, 6))
    for name, source in summary["sources"].items():
        for step in source["steps"]:
            about = "≈ " if step["tokens_estimated"] else ""
            steps.add_row(
                name,
                step["step"],
                *(f"{step[key]:,}" for key in ("documents_in", "documents_out")),
                *(f"{about}{step[key]:,}" for key in ("tokens_in", "tokens_out")),
            )
            name = ""
    found = [mix, steps]
    if summary["evaluation_sets"]:
        columns = ["evaluation set", "items", "too short to find", "documents dropped"]
        sets = Table(columns, right=range(1, 4))
        for name, one in summary["evaluation_sets"].items():
            numbers = (one["items"], one["too_short"], one["documents_dropped"])
            sets.add_row(name, *(f"{number:,}" for number in numbers))
        found.append(sets)
    return found


def draw(summary: dict[str, Any]) -> Figure:
    """The summary as a picture: shares, documents left after each step, lengths."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    _draw_shares(figure.add_subplot(grid[0, 0]), summary)
    _draw_lengths(figure.add_subplot(grid[0, 1]), summary)
    _draw_steps(figure.add_subplot(grid[1, :]), summary)
    return figure


def _draw_shares(axes: Axes, summary: dict[str, Any]) -> None:
    names = list(summary["sources"])
    places = np.arange(len(names))
    for shift, key, label in ((-0.2, "share_asked", "asked"), (0.2, "share", "got")):
        shares = [100 * summary["sources"][name][key] for name in names]
        axes.barh(places + shift, shares, height=0.4, label=label)
    axes.set_yticks(places, [as_label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("% of the training tokens")
    axes.set_title(f"mix: {summary['tokens']['train']:,} training tokens")
    axes.legend()


def _draw_lengths(axes: Axes, summary: dict[str, Any]) -> None:
    edges = summary["length_histogram"]["from_tokens"]
    for name, counts in summary["length_histogram"]["documents"].items():
        axes.stairs(counts, [*edges, 2 * edges[-1]], label=as_label(name))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.set_title("lengths")
    axes.legend()


def _draw_steps(axes: Axes, summary: dict[str, Any]) -> None:
    rows = [
        (f"{name}: {step['step']}", step["documents_out"], step["documents_in"])
        for name, source in summary["sources"].items()
        for step in source["steps"]
        if step["documents_in"] != step["documents_out"]
    ]
    places = np.arange(len(rows))
    axes.barh(places, [row[2] for row in rows], color="lightgray", label="in")
    axes.barh(places, [row[1] for row in rows], label="out")
    axes.set_yticks(places, [as_label(row[0]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("documents")
    axes.set_title("steps that dropped documents")
    axes.legend()


def _steps(mix: Mix, source: Source, tally: Tally) -> list[dict[str, Any]]:
    """Documents and tokens before and after every step that can drop them.

    For documents dropped before tokenizing (the point of most filters), the number of tokens is
    unknown. It is estimated from their characters and marked as estimated.
    """
    ratio = tally.tokenized.tokens / max(1, tally.tokenized.characters)
    names = filters.steps_of(source, mix.decontaminate is not None, mix.deduplicate is not None)
    exact = names.index(filters.NO_TOKENS)
    dropped = [tally.dropped.get(name, Count()) for name in names]
    gone = [
        count.tokens if i >= exact else round(count.characters * ratio)
        for i, count in enumerate(dropped)
    ]
    documents = tally.read.documents
    tokens = tally.train.tokens - tally.repeated.tokens + tally.held_out.tokens + sum(gone)
    steps: list[dict[str, Any]] = []
    for i, (name, count) in enumerate(zip(names, dropped, strict=True)):
        added = tally.divided if name == filters.DIVIDED else 0
        left = documents - count.documents + added
        step = {
            "step": name,
            "documents_in": documents,
            "documents_out": left,
            "tokens_in": tokens,
            "tokens_out": tokens - gone[i],
            "tokens_estimated": i < exact,
        }
        documents, tokens = left, tokens - gone[i]
        if name != filters.DIVIDED or added:
            steps.append(step)
    return steps


def _plain(count: Count) -> dict[str, int]:
    return {"documents": count.documents, "tokens": count.tokens}
