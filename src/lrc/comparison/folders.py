"""The run folders of a comparison, and the results of the runs that have ended."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lrc.comparison.plan import Comparison, Entry
from lrc.recipe import Recipe
from lrc.system.files import read_json, reading


@dataclass(frozen=True)
class Folders:
    """The folder of a comparison."""

    comparison: Comparison
    out: Path

    def of_try(self, entry: Entry, rate: float) -> Path:
        """Folder of the run that tries a learning rate."""
        return self.out / "grid" / f"{entry.name}-lr{rate:g}"

    def of_run(self, entry: Entry, seed: int) -> Path:
        """Folder of a run on the full budget."""
        return self.out / "runs" / f"{entry.name}-seed{seed}"

    def all(self, names: Collection[str]) -> Iterator[tuple[Path, int]]:
        """Folder and training tokens of every run of the named entries, tries first."""
        for entry, rate in self.comparison.searches(names):
            yield self.of_try(entry, rate), self.comparison.grid.tokens
        for entry in self.comparison.named(names):
            for seed in self.comparison.seeds:
                yield self.of_run(entry, seed), self.comparison.tokens

    def recipes(self) -> dict[Path, list[Recipe]]:
        """The possible recipes of the run in each folder.

        A run on the full budget may have any rate that its entry tries.
        """
        comparison = self.comparison
        found = {
            self.of_try(entry, rate): [comparison.grid_recipe(entry, rate)]
            for entry, rate in comparison.searches()
        }
        named = {entry.name: entry for entry in comparison.entries}
        for entry in comparison.entries:
            rates = comparison.rates(named[entry.rate_of or entry.name])
            for seed in comparison.seeds:
                found[self.of_run(entry, seed)] = [
                    comparison.run_recipe(entry, rate, seed) for rate in rates
                ]
        return found

    def tries(self, entry: Entry) -> dict[float, float | None]:
        """Held-out loss by rate, for the tries that have ended; None if the loss was not finite."""
        return {
            rate: held_out_of(self.of_try(entry, rate))
            for searching, rate in self.comparison.searches()
            if searching == entry and is_over(self.of_try(entry, rate))
        }

    def chosen(self, entry: Entry) -> float | None:
        """The rate that an entry is trained with; None if all failed."""
        if entry.rate_of is not None:
            entry = next(e for e in self.comparison.entries if e.name == entry.rate_of)
        rates = self.comparison.rates(entry)
        if len(rates) == 1:
            return rates[0]
        losses = {rate: loss for rate, loss in self.tries(entry).items() if loss is not None}
        return min(losses, key=lambda rate: losses[rate]) if losses else None


def is_over(folder: Path) -> bool:
    """Whether a run has ended: all its output exists, or its loss was not finite."""
    leaves = folder / "summary.json", folder / "student"
    return all(path.exists() for path in leaves) or (folder / "diverged.json").exists()


def held_out_of(folder: Path) -> float | None:
    """Held-out loss of a run that has ended; None if it did not stay finite."""
    if (folder / "diverged.json").exists():
        return None
    summary = folder / "summary.json"
    advice = f"remove {folder} to run it again"
    table = read_json(summary, advice)
    with reading(summary, advice):
        loss = float(table["student_held_out_lm"])
    return loss if math.isfinite(loss) else None
