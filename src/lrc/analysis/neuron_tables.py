"""Tables of the neuron experiment with the published results, and a picture."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrc.analysis.neurons import Accuracy, Halves, ModelAnswers, NeuronResult
from lrc.report.pictures import save_picture
from lrc.system.tables import Table

SOURCE = "arXiv 2505.12781, Table 5"

PUBLISHED = {
    "unmasked": ("0.85", "0.48"),
    "important": ("0.62 (-27%)", "0.33 (-31%)"),
    "random": ("0.85", "0.49"),
}
"""The paper's scores of teacher and student, with 50 neurons and its own factual questions."""

HALVES: tuple[tuple[str, Callable[[Halves], Accuracy]], ...] = (
    ("held out", lambda halves: halves.apart),
    ("selection", lambda halves: halves.selection),
)
"""The two halves of the questions: held out, and used to select the neurons."""


def header() -> list[str]:
    """Names of the columns."""
    ours = [f"{model}, {half}" for half, _ in HALVES for model in ("teacher", "student")]
    return ["neurons masked", *ours, "published teacher", "published student"]


def rows(result: NeuronResult) -> list[list[str]]:
    """Accuracies without a mask, with the important neurons masked, and with random ones masked."""
    models = (result.teacher, result.student)
    cells: dict[str, list[str]] = {"unmasked": [], "important": [], "random": []}
    for _, half in HALVES:
        for model in models:
            before = half(model.unmasked).value
            cells["unmasked"].append(f"{before:.3f}")
            cells["important"].append(_changed(half(model.important).value, before))
            cells["random"].append(_spread([half(draw).value for draw in model.random]))
    names = {
        "unmasked": "none",
        "important": f"most active in the teacher ({len(result.important):,})",
        "random": f"random ({len(result.important):,})",
    }
    return [
        [names[key], *found, *PUBLISHED[key]]
        for key, found in cells.items()
        if key != "random" or result.teacher.random
    ]


def notes(result: NeuronResult) -> list[str]:
    """Notes that a reader of the table needs."""
    masked, whole = len(result.important), result.layers * result.width
    halves = result.student.unmasked
    found = [
        f"Accuracy on {result.questions}: {halves.apart.questions:,} questions held out and "
        f"{halves.selection.questions:,} used to select the neurons; standard error at most "
        f"{_largest_error(result):.3f}.",
        f"Masked: {masked:,} of {whole:,} FFN neurons ({masked / whole:.2%}), by mean absolute "
        f"activation in the teacher. The same number selected by the student's own activation has "
        f"{result.shared:,} in common with them; chance would give {masked * masked / whole:.1f}.",
    ]
    if draws := len(result.teacher.random):
        several = f"mean of {draws} draws, with the lowest and the highest in brackets"
        found.append(
            "Random: other neurons, the same number in each layer; "
            f"{several if draws > 1 else 'one draw'}."
        )
    found.append(
        f"Published ({SOURCE}): other models and questions, 50 neurons; compare only the pattern."
    )
    return found


def table(result: NeuronResult) -> Table:
    """The table for the terminal."""
    shown = Table(header(), caption="\n".join(notes(result)))
    for row in rows(result):
        shown.add_row(*row)
    return shown


def markdown(result: NeuronResult) -> str:
    """The whole result in Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    parts = [
        "# Masked FFN neurons",
        f"Teacher {result.teacher.name}, student {result.student.name}.",
        "\n".join(_line(row) for row in (header(), ["---"] * len(header()), *rows(result))),
        "\n".join(f"* {note}" for note in notes(result)),
        f"Settings: {settings}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw_layers(result: NeuronResult, path: Path) -> None:
    """Draw a PNG of each layer's share of masked neurons.

    It also shows the share that the student's own activation would select.

    Raises:
        UserError: if the disk is full.
    """
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    places = range(result.layers)
    for offset, counts, name, color in (
        (-0.2, result.by_layer, "most active in the teacher (masked)", "tab:blue"),
        (0.2, result.student_by_layer, "most active in the student", "tab:orange"),
    ):
        shares = [100 * count / result.width for count in counts]
        axes.bar([place + offset for place in places], shares, 0.4, label=name, color=color)
    axes.set_xlabel("layer")
    axes.set_ylabel("percent of the layer's neurons")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    save_picture(figure, path)


def _changed(value: float, before: float) -> str:
    return f"{value:.3f} ({value / before - 1:+.0%})" if before else f"{value:.3f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def _largest_error(result: NeuronResult) -> float:
    measured = [
        half(halves)
        for model in (result.teacher, result.student)
        for halves in _all_halves(model)
        for _, half in HALVES
    ]
    return max(accuracy.stderr for accuracy in measured)


def _all_halves(model: ModelAnswers) -> list[Halves]:
    return [model.unmasked, model.important, *model.random]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
