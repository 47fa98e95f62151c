"""How close `train.learning_rate: auto` and `objective.alpha: auto` come to the best of a grid.

One comparison for each number of steps: the rate of `auto` times 1/4, 1/2, 1, 2 and 4, and other
values of alpha at the rate of `auto`. All start from the same closed-form start.

    python benchmarks/learning_rate.py shapes OUT --steps 20 50 200 800
    python benchmarks/learning_rate.py shapes-smollm2 OUT --steps 10 30 --factors 0.5 2 \\
        --alphas 0 --set student.hidden_size=432 --set student.intermediate_size=672

The first name is a shipped comparison, whose recipe, teacher and text are used (it says how to
prepare them). What OUT holds already is not run again. The table goes to OUT/README.md
(benchmarks/learning_rate.md has ours).
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

import lrc
from lrc.comparison import load_comparison
from lrc.model.shapes import parameters_of
from lrc.recipe import make_recipe, parse_override
from lrc.recipe.learning_rate import learning_rate
from lrc.recipe.recipe import apply_overrides
from lrc.train.sizes import planned_models

RULE = "rate-x1"
"""Name of the entry with the defaults."""


def comparison(settings: dict[str, Any], steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """The comparison for a number of steps."""
    tokens = steps * make_recipe(settings).step_tokens()
    recipe = make_recipe(settings, {"train.tokens": tokens})
    student = planned_models(recipe).student
    rate = learning_rate(recipe, parameters_of(student))
    rates = {factor: float(f"{factor * rate:.3g}") for factor in [1, *options.factors]}
    entries = [
        {"name": f"rate-x{factor:g}", "learning_rates": [value]} for factor, value in rates.items()
    ]
    entries += [
        {"name": f"alpha-{alpha:g}", "rate_of": RULE, "set": {"objective.alpha": alpha}}
        for alpha in options.alphas
    ]
    return {
        "recipe": settings,
        "tokens": tokens,
        "seeds": options.seeds,
        "grid": {"learning_rates": [rates[1]], "tokens": tokens},
        "entries": entries,
    }


def row(steps: int, results: Any, columns: list[str]) -> list[str]:
    """What one comparison found: the rule's rate, and the loss of every entry."""
    losses = {entry.name: entry.mean("held_out_lm") for entry in results.entries}
    [rate] = [entry.learning_rate for entry in results.entries if entry.name == RULE]
    return [f"{steps:,}", f"{rate:.2g}", *(f"{losses[name]:.3f}" for name in columns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comparison")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    parser.add_argument("--factors", type=float, nargs="*", default=[0.25, 0.5, 2, 4])
    parser.add_argument("--alphas", type=float, nargs="*", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    shipped = load_comparison(options.comparison).recipe
    assert isinstance(shipped, dict)
    settings = apply_overrides(shipped, dict(map(parse_override, options.set)))
    columns = [f"rate-x{factor:g}" for factor in sorted([1, *options.factors])]
    columns += [f"alpha-{alpha:g}" for alpha in options.alphas]
    lines = [["steps", "rate of auto", *columns], ["---"] * (len(columns) + 2)]
    for steps in options.steps:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"steps-{steps}.yaml"
        path.write_text(yaml.safe_dump(comparison(settings, steps, options), sort_keys=False))
        results = lrc.compare(path, out=options.out / f"steps-{steps}")
        lines.append(row(steps, results, columns))
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        (options.out / "README.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
