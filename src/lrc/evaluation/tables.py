"""Tables of an evaluation: for the terminal, and in Markdown beside the published results."""

from collections.abc import Iterator, Sequence

from lrc.evaluation.published import published
from lrc.evaluation.results import HELD_OUT, Evaluation, ModelResult, Score, TaskResult
from lrc.system.tables import Table

PERCENT = ("acc", "acc_norm")
"""Metrics that are fractions, shown in percent."""

METRIC_NOTE = (
    "acc picks the most likely answer; acc_norm picks the most likely answer for its length. The "
    "paper does not say which of the two its columns hold, so the table shows both."
)


def result_tables(evaluation: Evaluation) -> list[Table]:
    """Tables for the terminal: benchmarks, and held-out text."""
    tables = []
    models = evaluation.models
    first, *others = (model.label for model in models)
    benchmarks = list(_benchmark_rows(evaluation))
    if benchmarks:
        versus = [f"{first} - {other}" for other in others]
        table = Table(["task", "metric", *(model.label for model in models), *versus, "rows"])
        for row in benchmarks:
            table.add_row(*row)
        tables.append(table)
    if HELD_OUT in evaluation.task_names():
        table = Table(list(HELD_OUT_COLUMNS))
        for row in _held_out_rows(evaluation):
            table.add_row(*row)
        tables.append(table)
    return tables


def published_table() -> Table:
    """The published results."""
    tables = published()
    labels = [benchmark.label for benchmark in tables.tasks.values()]
    header = ["model", "teacher", "tokens", *labels, "avg"]
    table = Table(header, title=f"{tables.source} (percent)")
    for row in _published_rows():
        table.add_row(*row)
    return table


def limited(rows: int) -> str:
    """The note below accuracies on a part of each task."""
    return (
        f"Limited to the first {rows:,} rows of each task (of each member of a group): not "
        "comparable with results on all rows, nor with the published ones."
    )


def notes(evaluation: Evaluation) -> list[str]:
    """Notes that a reader needs before comparing the numbers."""
    found = []
    first = evaluation.models[0]
    if any(result.rows < result.rows_in_all for result in first.tasks.values()):
        found.append(limited(evaluation.settings["limit"]))
    else:
        for name, whole in _incomplete(first):
            rows = first.tasks[name].rows
            found.append(
                f"{name}: {rows:,} of its {whole:,} rows: not comparable with results on all rows, "
                "nor with the published ones."
            )
    if any(key.get("apply_chat_template") for key in evaluation.settings.get("keys", {}).values()):
        found.append("The questions were asked in each model's chat template.")
    for model in evaluation.models:
        cut = {name: result.truncated for name, result in model.tasks.items() if result.truncated}
        if cut:
            counts = ", ".join(f"{name} {count:,}" for name, count in cut.items())
            found.append(f"{model.label}: prompts longer than its context were cut: {counts}.")
    return found


def markdown(evaluation: Evaluation) -> str:
    """The whole evaluation in Markdown: beside the published results, in detail, held-out text."""
    parts = ["# Evaluation"]
    parts.extend(f"**{note}**" for note in notes(evaluation))
    if any(name in published().tasks for name in evaluation.task_names()):
        labels = [benchmark.label for benchmark in published().tasks.values()]
        rows = [*_published_rows(), *_paper_rows(evaluation)]
        parts.append(f"## Beside the published results (percent, zero-shot, {published().source})")
        parts.append(_markdown(["model", "teacher", "tokens", *labels, "avg"], rows))
        parts.append(METRIC_NOTE)
    benchmarks = list(_benchmark_rows(evaluation))
    if benchmarks:
        labels = [model.label for model in evaluation.models]
        versus = [f"{labels[0]} - {other}" for other in labels[1:]]
        parts.append("## Benchmarks")
        parts.append("± standard error; acc and acc_norm in percent, other metrics as they are.")
        parts.append(_markdown(["task", "metric", *labels, *versus, "rows"], benchmarks))
    if HELD_OUT in evaluation.task_names():
        parts.append("## Held-out text")
        parts.append(_markdown(HELD_OUT_COLUMNS, list(_held_out_rows(evaluation))))
    packages = evaluation.environment["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    parts.append(f"{versions}; {evaluation.settings['dtype']} on {evaluation.settings['device']}.")
    return "\n\n".join(parts) + "\n"


def average(model: ModelResult, norm: bool) -> float | None:
    """Mean in percent over the paper's nine tasks; None unless all were evaluated.

    Args:
        model: a model's results.
        norm: use acc_norm for tasks that have it.
    """
    if any(name not in model.tasks for name in published().tasks):
        return None
    values = [_accuracy(model.tasks[name], norm) for name in published().tasks]
    return 100 * sum(values) / len(values)


def _benchmark_rows(evaluation: Evaluation) -> Iterator[list[str]]:
    """Task, metric, each model, the first model minus each other one, rows."""
    models = evaluation.models
    for name in evaluation.task_names():
        if name == HELD_OUT:
            continue
        results = [model.tasks[name] for model in models]
        rows = _rows(results[0])
        for label, metrics in _parts(results[0]).items():
            for metric in metrics:
                scores = [_parts(result)[label][metric] for result in results]
                cells = [_cell(metric, score) for score in scores]
                differences = [_difference(metric, scores[0], other) for other in scores[1:]]
                yield [label, metric, *cells, *differences, rows]
    for norm, metric in ((False, "acc"), (True, "acc_norm, else acc")):
        found = [average(model, norm) for model in models]
        means = [mean for mean in found if mean is not None]
        if not means:
            continue
        cells = [f"{mean:.2f}" for mean in means]
        differences = [f"{means[0] - other:+.2f}" for other in means[1:]]
        yield ["average of the nine", metric, *cells, *differences, ""]


HELD_OUT_COLUMNS = [
    "held-out text",
    "LM loss",
    "teacher's LM loss",
    "perplexity",
    "KL(teacher, model)",
    "same top-1 prediction",
    "sequences",
]


def _parts(result: TaskResult) -> dict[str, dict[str, Score]]:
    """The task's metrics, or those of its members if it is a group without a mean."""
    return {result.task: result.metrics} if result.metrics else result.members


def _rows(result: TaskResult) -> str:
    whole = result.rows_in_all
    if result.task in published().tasks:
        whole = max(whole, published().tasks[result.task].rows)
    return f"{result.rows:,} of {whole:,}" if result.rows < whole else f"{result.rows:,}"


def _held_out_rows(evaluation: Evaluation) -> Iterator[list[str]]:
    for model in evaluation.models:
        result = model.tasks[HELD_OUT]
        value = {metric: score.value for metric, score in result.metrics.items()}
        yield [
            model.label,
            f"{value['lm_loss']:.4f}",
            f"{value['teacher_lm_loss']:.4f}",
            f"{value['perplexity']:,.2f}",
            f"{value['kl']:.4f}",
            f"{value['top1']:.1%}",
            f"{result.rows:,}",
        ]


def _published_rows() -> list[list[str]]:
    return [
        [
            row.model,
            row.teacher or "",
            row.tokens,
            *(f"{value:.2f}" for value in row.accuracy),
            f"{row.average:.2f}",
        ]
        for row in published().models
    ]


def _paper_rows(evaluation: Evaluation) -> Iterator[list[str]]:
    """Our models as rows of the published table, by acc and by acc_norm."""
    for model in evaluation.models:
        for norm, metric in ((False, "acc"), (True, "acc_norm, else acc")):
            cells = []
            for name in published().tasks:
                result = model.tasks.get(name)
                cells.append(f"{100 * _accuracy(result, norm):.2f}" if result else "")
            mean = average(model, norm)
            tokens = "" if model.tokens is None else short_count(model.tokens)
            label = f"**{model.label}** ({metric})"
            yield [
                label,
                model.teacher or "",
                tokens,
                *cells,
                "" if mean is None else f"{mean:.2f}",
            ]


def short_count(count: int) -> str:
    """A number of tokens as the paper writes it: 10B, 82K."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= 0.9995 * size:  # rounded to three digits, 999,600 are 1M
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return str(count)


def _accuracy(result: TaskResult, norm: bool) -> float:
    metrics = result.metrics
    return (metrics["acc_norm"] if norm and "acc_norm" in metrics else metrics["acc"]).value


def _incomplete(model: ModelResult) -> Iterator[tuple[str, int]]:
    """The paper's tasks that were not evaluated on all rows, with the full number of rows."""
    for name, benchmark in published().tasks.items():
        if name in model.tasks and model.tasks[name].rows < benchmark.rows:
            yield name, benchmark.rows


def _cell(metric: str, score: Score) -> str:
    if metric not in PERCENT:
        error = "" if score.stderr is None else f" ± {score.stderr:.4g}"
        return f"{score.value:.4g}{error}"
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.2f}"
    return f"{100 * score.value:.2f}{error}"


def _difference(metric: str, ours: Score, other: Score) -> str:
    difference = ours.value - other.value
    return f"{100 * difference:+.2f}" if metric in PERCENT else f"{difference:+.4g}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
