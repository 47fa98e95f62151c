"""The run folders of a comparison, and the results of the runs that have ended."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from lrc.comparison.plan import Comparison, Entry, Rate, written_rate
from lrc.recipe import Recipe
from lrc.run import Run
from lrc.system.files import read_json, reading


class Job(NamedTuple):
    """A run of a comparison."""

    folder: Path
    entry: Entry
    rate: Rate | None
    """The rate that it tries; None for a run on the full budget."""
    seed: int | None
    """The seed of a run on the full budget; None for a try."""

    @property
    def title(self) -> str:
        """Its name for people."""
        what = f"seed {self.seed}" if self.rate is None else f"rate {written_rate(self.rate)}"
        return f"{self.entry.name}, {what}"


@dataclass(frozen=True)
class Folders:
    """The folder of a comparison."""

    comparison: Comparison
    out: Path

    def of_try(self, entry: Entry, rate: Rate) -> Path:
        """Folder of the run that tries a learning rate."""
        return self.out / "grid" / f"{entry.name}-lr{written_rate(rate)}"

    def of_run(self, entry: Entry, seed: int) -> Path:
        """Folder of a run on the full budget."""
        return self.out / "runs" / f"{entry.name}-seed{seed}"

    def jobs(self, names: Collection[str]) -> Iterator[Job]:
        """Every run of the named entries in the order to run them: one seed after the other, in it
        one entry after the other, and before its first run the tries that choose its rate."""
        comparison, tried = self.comparison, set()
        for seed in comparison.all_seeds():
            for entry in comparison.named(names):
                if seed not in comparison.seeds_of(entry):
                    continue
                searching = comparison.searching(entry)
                if searching.name not in tried:
                    tried.add(searching.name)
                    for rate in comparison.tried_rates(searching):
                        yield Job(self.of_try(searching, rate), searching, rate, None)
                yield Job(self.of_run(entry, seed), entry, None, seed)

    def alike(self, recipe: Recipe) -> Run | None:
        """A run that has begun with the teacher and the text of a recipe."""
        for path in sorted(self.out.glob("*/*/inputs.json")):
            run = Run.open(path.parent)
            if (run.recipe.teacher, run.recipe.data) == (recipe.teacher, recipe.data):
                return run
        return None

    def claim(self, job: Job) -> Path:
        """Folder that a process holds while it works on a job."""
        return self.out / "claims" / job.folder.name

    def tokens(self, job: Job) -> int:
        """Training tokens of a job."""
        grid = self.comparison.grid
        return self.comparison.tokens if job.rate is None or grid is None else grid.tokens

    def recipe(self, job: Job) -> Recipe | None:
        """The recipe of a job; None if no rate is chosen yet, or none can be."""
        if job.rate is not None:
            return self.comparison.grid_recipe(job.entry, job.rate)
        rate = self.chosen(job.entry) if self.has_searched(job.entry) else None
        if rate is None or job.seed is None:
            return None
        return self.comparison.run_recipe(job.entry, rate, job.seed)

    def recipes(self) -> dict[Path, list[Recipe]]:
        """The possible recipes of the run in each folder.

        A run on the full budget may have any rate that its entry tries.
        """
        comparison = self.comparison
        found = {
            self.of_try(entry, rate): [comparison.grid_recipe(entry, rate)]
            for entry, rate in comparison.searches()
        }
        for entry in comparison.entries:
            rates = comparison.rates(comparison.searching(entry))
            for seed in comparison.seeds_of(entry):
                found[self.of_run(entry, seed)] = [
                    comparison.run_recipe(entry, rate, seed) for rate in rates
                ]
        return found

    def outdated(self, names: Collection[str]) -> list[Path]:
        """Runs of the named entries that have ended, with another rate than their tries choose now:
        the grid has got more rates since."""
        ended = [job for job in self.jobs(names) if job.rate is None and is_over(job.folder)]
        return [job.folder for job in ended if self.is_outdated(job.entry, job.folder)]

    def is_outdated(self, entry: Entry, folder: Path) -> bool:
        """Whether a run on the full budget has another rate than its entry's tries choose now."""
        rate = getattr(Run.open(folder).recipe.train, entry.tries)
        return self.chosen(entry) not in (None, rate)

    def tries(self, entry: Entry) -> dict[Rate, float | None]:
        """Held-out loss by rate, for the tries that have ended; None if the loss was not finite."""
        return {
            rate: held_out_of(self.of_try(entry, rate))
            for searching, rate in self.comparison.searches()
            if searching == entry and is_over(self.of_try(entry, rate))
        }

    def has_searched(self, entry: Entry) -> bool:
        """Whether all tries that choose an entry's rate have ended."""
        searching = self.comparison.searching(entry)
        rates = self.comparison.tried_rates(searching)
        return all(is_over(self.of_try(searching, rate)) for rate in rates)

    def chosen(self, entry: Entry) -> Rate | None:
        """The rate that an entry is trained with; None if all failed."""
        entry = self.comparison.searching(entry)
        rates = self.comparison.rates(entry)
        if len(rates) == 1:
            return rates[0]
        losses = {rate: loss for rate, loss in self.tries(entry).items() if loss is not None}
        return min(losses.items(), key=itemgetter(1))[0] if losses else None


def is_over(folder: Path) -> bool:
    """Whether a run has ended: it has its summary, which is written last, or its loss was not
    finite."""
    return any((folder / name).exists() for name in ("summary.json", "diverged.json"))


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
