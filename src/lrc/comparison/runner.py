"""Running a comparison: one run after the other, each in a run folder of its own.

    OUT/comparison.yaml        the comparison as it was resolved
    OUT/starts/                starts from calibration tokens, which the runs share
    OUT/grid/NAME-lrRATE/      a try of a learning rate
    OUT/runs/NAME-seedN/       a run on the whole budget
    OUT/comparison.json, .md   the table, written anew after every run
    OUT/curves.png             the held-out curves

Runs that have ended are not run again, and one that was interrupted goes on from its checkpoint, so
that the same command continues a comparison. A run whose loss is no longer finite counts as failed.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import yaml
from rich.console import Console

from lrc.comparison.figure import draw_comparison
from lrc.comparison.folders import Folders, is_over
from lrc.comparison.plan import Comparison
from lrc.comparison.results import Results, collect
from lrc.comparison.table import comparison_table, markdown
from lrc.data.sources import STDLIB_DOCS
from lrc.model.locate import PACKAGE_PREFIX
from lrc.model.teacher import Teacher, load_teacher
from lrc.preflight import check_recipe, need_whole_teacher
from lrc.recipe import Recipe, flatten
from lrc.run import Run, is_run
from lrc.system.errors import DivergedError, UserError
from lrc.system.files import is_taken, reading, write_text
from lrc.train.session import Interrupted, train
from lrc.train.setup import find_device
from lrc.train.starts import Starts


def compare(
    comparison: Comparison, out: Path, console: Console, only: Sequence[str] = ()
) -> Results:
    """Run what is left of a comparison, and write and print its table.

    Args:
        comparison: what is compared.
        out: folder of the comparison, new or of an earlier start of it.
        console: where progress and the table are shown.
        only: names of the entries that are run now; none: all.

    Raises:
        UserError: an entry cannot be run or is not there, or `out` holds something else.
        Interrupted: SIGINT or SIGTERM asked to stop.
    """
    names = [entry.name for entry in comparison.entries]
    for name in only:
        if name not in names:
            raise UserError(f"The comparison has no entry '{name}'; it has {', '.join(names)}.")
    marker = out / "comparison.yaml"
    if is_taken(out) and not marker.is_file():
        raise UserError(f"{out} holds something else; choose another folder with --out.")
    folders = Folders(comparison, out)
    need_inputs(comparison)
    refuse_other_runs(folders)
    plan = comparison.model_dump(mode="json", by_alias=True)
    write_text(marker, yaml.safe_dump(plan, sort_keys=False))
    results = Runner(folders, console, only or names).go()
    console.print(comparison_table(results))
    console.print(f"Everything is in {out}.")
    return results


def need_inputs(comparison: Comparison) -> None:
    """Refuse a comparison whose teacher or text is not there, and say how it is made.

    Raises:
        UserError: so it is.
    """
    for entry in comparison.entries:
        recipe = comparison.grid_recipe(entry, 1e-4)
        if comparison.preparation:
            for name in (recipe.teacher.model, *recipe.data.text):
                local = not name.startswith(PACKAGE_PREFIX) and name != STDLIB_DOCS
                if local and not Path(name).exists():
                    raise UserError(
                        f"'{name}' is not there: make it with `{comparison.preparation}`, or name "
                        "another with --teacher and --text (docs/compare.md)."
                    )
        check_recipe(recipe)


def refuse_other_runs(folders: Folders) -> None:
    """Refuse a folder whose runs are not this comparison's, before anything in it is replaced.

    Raises:
        UserError: a run there has other settings than this comparison gives it, or is none of it.
    """
    expected = folders.recipes()
    found = [path.parent for path in folders.out.glob("*/*/recipe.yaml")]
    for folder in sorted(found):
        if folder.parent.name not in ("grid", "runs"):
            continue
        recipes = expected.get(folder)
        if recipes is None:
            raise UserError(
                f"{folder} is a run of another comparison: choose another folder with --out, or "
                "remove that run."
            )
        refuse_other_recipe(Run.open(folder), recipes)


def refuse_other_recipe(run: Run, recipes: Sequence[Recipe]) -> None:
    """Refuse a run that has none of some recipes.

    Raises:
        UserError: the message names the settings that differ from the first.
    """
    if run.recipe not in recipes:
        changed = ", ".join(differences(run.recipe, recipes[0]))
        raise UserError(
            f"{run.folder} was run with other settings ({changed}): choose another --out, or "
            "remove that folder to run it again."
        )


@dataclass
class Runner:
    """One process's stretch of a comparison."""

    folders: Folders
    console: Console
    only: Sequence[str]
    """Names of the entries that are run."""
    _teachers: dict[str, Teacher] = field(default_factory=dict)
    _tokens: int = 0
    """Tokens trained by this process."""
    _seconds: float = 0.0
    """Seconds that they took, with all that belongs to their runs."""

    def go(self) -> Results:
        """Search the rates, then run every seed of every entry."""
        folders, comparison = self.folders, self.folders.comparison
        for entry, rate in comparison.searches(self.only):
            recipe = comparison.grid_recipe(entry, rate)
            self._finish(folders.of_try(entry, rate), recipe, f"{entry.name}, rate {rate:g}")
        for seed in comparison.seeds:
            for entry in comparison.named(self.only):
                chosen = folders.chosen(entry)
                if chosen is None:
                    self.console.print(f"{entry.name}: no rate of the grid stayed finite.")
                    continue
                recipe = comparison.run_recipe(entry, chosen, seed)
                what = f"{entry.name}, rate {chosen:g}, seed {seed}"
                if self._finish(folders.of_run(entry, seed), recipe, what):
                    self._write()
        return self._write()

    def _write(self) -> Results:
        """Write the table and the picture of what is there."""
        out = self.folders.out
        with reading(out, "a run of it may be damaged: remove that run to run it again"):
            results = collect(self.folders)
        write_text(out / "comparison.json", json.dumps(results.as_json(), indent=2))
        write_text(out / "comparison.md", markdown(results))
        draw_comparison(results, out / "curves.png")
        return results

    def _finish(self, folder: Path, recipe: Recipe, what: str) -> bool:
        """Bring one run to its end; false where it is there already."""
        need_whole_teacher(recipe)
        run = open_run(folder, recipe)
        if is_over(folder):
            return False
        self.console.rule(f"{what}: {self._position()}", style="dim")
        started = time.perf_counter()
        try:
            starts = Starts(self.folders.out / "starts")
            train(run, self.console, self._teacher(recipe), report=False, starts=starts)
        except DivergedError as error:
            write_text(folder / "diverged.json", json.dumps({"message": str(error)}))
            self.console.print(str(error), style="yellow")
        except Interrupted as stop:
            raise Interrupted(
                stop.signal, f"Stopped in {folder}; the same command goes on from there."
            ) from None
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
        self._tokens += recipe.train.tokens
        self._seconds += time.perf_counter() - started
        return True

    def _position(self) -> str:
        """Number of the next run, and the time left at the pace so far."""
        plan = list(self.folders.all(self.only))
        left = [tokens for folder, tokens in plan if not is_over(folder)]
        text = f"run {len(plan) - len(left) + 1} of {len(plan)}"
        if not self._tokens:
            return text
        seconds = sum(left) * self._seconds / self._tokens
        return f"{text}, about {timedelta(seconds=round(seconds))} left"

    def _teacher(self, recipe: Recipe) -> Teacher:
        """The teacher of a run; the last one is kept."""
        key = recipe.teacher.model_dump_json() + recipe.train.device
        if key not in self._teachers:
            self._teachers.clear()
            self._teachers[key] = load_teacher(recipe.teacher, find_device(recipe.train.device))
        return self._teachers[key]


def open_run(folder: Path, recipe: Recipe) -> Run:
    """The run of a recipe in a folder of the comparison, new or begun earlier.

    Raises:
        UserError: the folder holds a run of another recipe.
    """
    if not is_run(folder):
        return Run.create(folder, recipe)
    run = Run.open(folder)
    refuse_other_recipe(run, [recipe])
    return run


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ."""
    ours, theirs = flatten(a.model_dump()), flatten(b.model_dump())
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
