"""The table of a comparison, for Markdown and for the terminal."""

from collections.abc import Iterable

from lrc.comparison.plan import HELD_OUT, Rate, sorted_rates, written_rate
from lrc.comparison.results import CLOSE, RISE, EntryResult, Results
from lrc.system.tables import Table

MISSING = "-"

SHARES = 0, 0.05, 0.15, 0.25, 0.5, 0.75, 1
"""Shares of the training tokens after which the table of losses shows the held-out loss."""


def header(results: Results) -> list[str]:
    """Names of the columns."""
    reach = [f"tokens to {threshold:g}" for threshold in results.thresholds]
    return [
        "",
        "learning rate",
        f"{HELD_OUT} LM loss",
        "KL",
        "same top-1",
        "parameters",
        "tokens",
        "seconds",
        *reach,
        *results.teacher_others,
    ]


def rows(results: Results) -> list[list[str]]:
    """The teacher, once its loss is known, and all entries."""
    found = [_row(results, entry) for entry in results.entries]
    if results.teacher_held_out_lm is None:
        return found
    parameters = _number(results.teacher_parameters, ",")
    teacher = ["teacher", "", f"{results.teacher_held_out_lm:.4f}", "", "", parameters, "", ""]
    teacher += [""] * len(results.thresholds)
    teacher += [f"{value:.4f}" for value in results.teacher_others.values()]
    return [teacher, *found]


def rate_grid(results: Results) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """The tried learning rates, and one row for every entry that tried some.

    A row holds the held-out loss at each rate, and whether that rate was chosen.
    """
    searched = [entry for entry in results.entries if entry.tries]
    rates = sorted_rates(rate for entry in searched for rate in entry.tries)
    found = [
        (entry.name, [(_try(entry, rate), rate == entry.learning_rate) for rate in rates])
        for entry in searched
    ]
    return [written_rate(rate) for rate in rates], found


def loss_by_tokens(results: Results) -> tuple[list[str], list[list[str]]]:
    """Numbers of training tokens, and a row for every entry: its name, and its mean held-out loss
    at the measurement that is closest to each number, if it is close.

    The numbers are measured ones, those closest to `SHARES` of the budget.
    """
    total = max((entry.tokens for entry in results.entries), default=0)
    curves = {}
    for entry in results.entries:
        if (curve := entry.curve()) is not None:
            calibration = entry.calibration_tokens or 0
            curves[entry.name] = {
                tokens - calibration: loss
                for tokens, loss in zip(curve.tokens, curve.loss, strict=True)
            }
    measured = sorted({tokens for losses in curves.values() for tokens in losses})
    wanted = [share * total for share in SHARES]
    if measured:
        wanted = list(dict.fromkeys(_nearest(measured, tokens) for tokens in wanted))
    found = []
    for entry in results.entries:
        losses, cells = curves.get(entry.name), [MISSING] * len(wanted)
        if losses is not None:
            for number, tokens in enumerate(wanted):
                nearest = _nearest(losses, tokens)
                if abs(nearest - tokens) <= total / 40:
                    cells[number] = f"{losses[nearest]:.3f}"
        found.append([entry.name, *cells])
    return [f"{tokens:,.0f}" for tokens in wanted], found


def _nearest(numbers: Iterable[float], wanted: float) -> float:
    return min(numbers, key=lambda number: abs(number - wanted))


def _row(results: Results, entry: EntryResult) -> list[str]:
    top1, seconds = entry.mean("top1_agreement"), entry.seconds()
    return [
        entry.name,
        _rate(entry),
        _loss(results, entry),
        _number(entry.mean("kl"), ".3f"),
        _number(top1, ".1%"),
        _parameters(results, entry),
        _tokens(entry),
        _number(seconds, ",.0f" if seconds is None or seconds >= 10 else ".1f"),
        *(_reach(entry, number) for number in range(len(results.thresholds))),
        *(_number(entry.other(name), ".4f") for name in results.teacher_others),
    ]


def notes(results: Results) -> list[str]:
    """Notes that a reader of the table needs."""
    found = [
        *_about_held_out(results),
        *_about_rates(results),
        about_seeds(results),
        "Tokens to reach a loss include the calibration tokens of entries that use any.",
        *_about_versions(results),
    ]
    for entry in results.entries:
        difference = results.size_difference(entry)
        if difference is not None and abs(difference) > CLOSE:
            found.append(
                f"Not the same size: {entry.name} has {difference:+.1%} parameters compared with "
                f"{results.reference}."
            )
        rise = entry.largest_rise()
        if rise > RISE:
            found.append(
                f"{entry.name}: the held-out loss rose up to {rise:.2f} above its best so far."
            )
        diverged = sum(run.held_out_lm is None for run in entry.runs)
        if diverged:
            found.append(f"{entry.name}: {diverged} of {len(entry.runs)} runs did not stay finite.")
        failed = [written_rate(rate) for rate, loss in entry.tries.items() if loss is None]
        if failed:
            found.append(f"{entry.name}: not finite at the rate {', '.join(failed)}.")
    return found


def _about_held_out(results: Results) -> list[str]:
    if (runs := results.teacher_losses()) is None:
        return []
    low, high = (f"{run.teacher_held_out_lm:.4f} in {run.folder}" for run in runs)
    return [
        f"NOT COMPARABLE: the teacher's held-out LM loss is {low}, but {high}, so the runs were "
        "measured on other text or with another teacher: remove those that are out of date to run "
        "them again."
    ]


def _about_versions(results: Results) -> list[str]:
    """Notes on runs that differ in the code, or in what they were computed on."""
    runs = [run for entry in results.entries for run in entry.runs]
    found = []
    for what, effect, values in (
        ("of the same version of the code", "results", {r.folder: r.code for r in runs}),
        (
            "computed alike",
            "seconds, and losses a little,",
            {r.folder: r.computed_on for r in runs},
        ),
    ):
        names: dict[str, list[str]] = {}
        for folder, value in values.items():
            if value:
                names.setdefault(value, []).append(folder.rpartition("/")[2])
        if len(names) > 1:
            *few, (most, _) = sorted(names.items(), key=lambda group: len(group[1]))
            parts = [f"{value} ({', '.join(of)})" for value, of in few]
            found.append(
                f"Not all runs are {what}, so {effect} may differ for that reason alone: "
                f"{'; '.join([*parts, f'{most} (the others)'])}."
            )
    return found


def about_seeds(results: Results) -> str:
    """How many seeds each entry has."""
    same = "the same held-out tokens for all"
    alike = results.teacher_losses() is None
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for entry in results.entries:
        by_seeds.setdefault(tuple(entry.seeds), []).append(entry.name)
    groups = sorted(by_seeds.items(), key=lambda group: len(group[1]))
    if len(groups) == 1:
        (seeds, _), *_ = groups
        if len(seeds) == 1:
            return f"One seed ({seeds[0]}){f', {same}' * alike}."
        which = f"seeds {', '.join(map(str, seeds))}"
    else:
        named = [*(", ".join(names) for _, names in groups[:-1]), "the others"]
        which = "; ".join(
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} for {name}"
            for (seeds, _), name in zip(groups, named, strict=True)
        )
        which = f"each entry's seeds ({which})"
    return f"Loss: mean and standard deviation over {which}{f', on {same}' * alike}."


def _about_rates(results: Results) -> list[str]:
    if not any(entry.tries for entry in results.entries):
        return []
    return [
        f"Learning rates: the best of a grid after {results.grid_tokens:,} tokens, if there is a "
        "grid; * marks the grid's smallest or largest rate."
    ]


def comparison_table(results: Results) -> Table:
    """The table for the terminal."""
    table = Table(header(results), caption="\n".join(notes(results)))
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(results: Results) -> str:
    """The table, its notes, and every try of the grid, in Markdown."""
    lines = [_line(header(results)), _line(["---"] * len(header(results)))]
    lines += [_line(row) for row in rows(results)]
    lines += ["", *(f"* {note}" for note in notes(results))]
    tokens, losses = loss_by_tokens(results)
    lines += ["", "Held-out LM loss by training tokens, without those of calibration:", ""]
    lines += [_line(["", *tokens]), _line(["---"] * (len(tokens) + 1))]
    lines += [_line(row) for row in losses]
    rates, tries = rate_grid(results)
    if tries:
        lines += [
            "",
            f"Held-out LM loss by learning rate after {results.grid_tokens:,} tokens:",
            "",
            _line(["", *rates]),
            _line(["---"] * (len(rates) + 1)),
        ]
    for name, row in tries:
        cells = [f"**{cell}**" if chosen else cell for cell, chosen in row]
        lines.append(_line([name, *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str, missing: str = MISSING) -> str:
    return missing if value is None else format(value, form)


def _rate(entry: EntryResult) -> str:
    if entry.learning_rate is None:
        return MISSING
    if entry.learning_rate == "auto" and (rate := entry.mean("auto_rate")) is not None:
        return f"auto ({rate:.3g})"
    return f"{written_rate(entry.learning_rate)}{'*' if entry.at_the_edge else ''}"


def _loss(results: Results, entry: EntryResult) -> str:
    mean, spread = entry.mean("held_out_lm"), entry.spread("held_out_lm")
    text = _number(mean, ".4f")
    if spread is not None:
        text += f" ± {spread:.4f}"
    if mean is not None and len(entry.values("held_out_lm")) < len(entry.seeds):
        text += f" ({len(entry.values('held_out_lm'))} of {len(entry.seeds)})"
    return text


def _parameters(results: Results, entry: EntryResult) -> str:
    difference = results.size_difference(entry)
    if entry.parameters is None:
        return MISSING
    if not difference:
        return f"{entry.parameters:,}"
    return f"{entry.parameters:,} ({difference:+.1%})"


def _tokens(entry: EntryResult) -> str:
    if not entry.calibration_tokens:
        return f"{entry.tokens:,}"
    return f"{entry.tokens:,} + {entry.calibration_tokens:,}"


def _reach(entry: EntryResult, number: int) -> str:
    tokens, reached = entry.reach(number)
    if tokens is None:
        return MISSING
    some = f" ({reached} of {len(entry.runs)})" if reached < len(entry.runs) else ""
    return f"{tokens:,.0f}{some}"


def _try(entry: EntryResult, rate: Rate) -> str:
    if rate not in entry.tries:
        return MISSING
    return _number(entry.tries[rate], ".4f", "not finite")
