"""Runner of a comparison: one run after another, each in its own run folder.

    OUT/comparison.yaml        the resolved comparison
    OUT/starts/                calibrated initializations, which the runs share
    OUT/grid/NAME-lrRATE/      a try of a learning rate
    OUT/runs/NAME-seedN/       a run on the full budget
    OUT/comparison.json, .md   the table, rewritten after every run
    OUT/curves.png             the held-out curves

Runs that have ended are not run again, and an interrupted run continues from its checkpoint. So the
same command continues a comparison. A run whose loss is no longer finite counts as failed.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import yaml

from lrc.comparison.curves import draw_comparison
from lrc.comparison.folders import Folders, is_over
from lrc.comparison.plan import Comparison
from lrc.comparison.results import Results, collect
from lrc.comparison.table import markdown
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

logger = logging.getLogger(__name__)


def compare(comparison: Comparison, out: Path, only: Sequence[str] = ()) -> Results:
    """Run the remaining runs of a comparison, and write its table.

    Args:
        comparison: the comparison.
        out: folder of the comparison, new or from an earlier call.
        only: names of the entries to run now; none: all.

    Raises:
        UserError: if an entry does not exist or cannot be run, or `out` holds something else.
        Interrupted: if SIGINT or SIGTERM arrived.
    """
    names = [entry.name for entry in comparison.entries]
    for name in only:
        if name not in names:
            raise UserError(f"The comparison has no entry '{name}'; it has {', '.join(names)}.")
    marker = out / "comparison.yaml"
    if is_taken(out) and not marker.is_file():
        raise UserError(f"{out} is not a comparison's folder; choose another folder with --out.")
    folders = Folders(comparison, out)
    need_inputs(comparison)
    refuse_other_runs(folders)
    plan = comparison.model_dump(mode="json", by_alias=True)
    write_text(marker, yaml.safe_dump(plan, sort_keys=False))
    return Runner(folders, only or names).go()


def need_inputs(comparison: Comparison) -> None:
    """Refuse a comparison whose teacher or text is missing, and say how to make it.

    Raises:
        UserError: if the teacher or the text is missing.
    """
    for entry in comparison.entries:
        recipe = comparison.grid_recipe(entry, 1e-4)
        if comparison.preparation:
            for name in (recipe.teacher.model, *recipe.data.text):
                local = not name.startswith(PACKAGE_PREFIX) and name != STDLIB_DOCS
                if local and not Path(name).exists():
                    raise UserError(
                        f"'{name}' does not exist: make it with `{comparison.preparation}`, or "
                        "name another one with --teacher and --text (docs/compare.md)."
                    )
        check_recipe(recipe)


def refuse_other_runs(folders: Folders) -> None:
    """Refuse a folder with runs of another comparison, before anything in it is replaced.

    Raises:
        UserError: if a run in it has different settings or does not belong to this comparison.
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
    """Refuse a run whose recipe is not one of the given recipes.

    Raises:
        UserError: if it is not; the message names the settings that differ from the first recipe.
    """
    if run.recipe not in recipes:
        changed = ", ".join(differences(run.recipe, recipes[0]))
        raise UserError(
            f"{run.folder} was run with other settings ({changed}): choose another --out, or "
            "remove that folder to run it again."
        )


@dataclass
class Runner:
    """The part of a comparison that one process runs."""

    folders: Folders
    only: Sequence[str]
    """Names of the entries to run."""
    _teachers: dict[str, Teacher] = field(default_factory=dict)
    _tokens: int = 0
    """Tokens trained by this process."""
    _seconds: float = 0.0
    """Seconds that these runs took in total."""

    def go(self) -> Results:
        """Search for the learning rates, then run every seed of every entry."""
        folders, comparison = self.folders, self.folders.comparison
        for entry, rate in comparison.searches(self.only):
            recipe = comparison.grid_recipe(entry, rate)
            self._finish(folders.of_try(entry, rate), recipe, f"{entry.name}, rate {rate:g}")
        for seed in comparison.seeds:
            for entry in comparison.named(self.only):
                chosen = folders.chosen(entry)
                if chosen is None:
                    logger.warning("%s: no rate of the grid stayed finite.", entry.name)
                    continue
                recipe = comparison.run_recipe(entry, chosen, seed)
                what = f"{entry.name}, rate {chosen:g}, seed {seed}"
                if self._finish(folders.of_run(entry, seed), recipe, what):
                    self._write()
        return self._write()

    def _write(self) -> Results:
        """Write the table and the picture of the results so far."""
        out = self.folders.out
        with reading(out, "one of its runs may be damaged: remove that run to run it again"):
            results = collect(self.folders)
        write_text(out / "comparison.json", json.dumps(results.as_json(), indent=2))
        write_text(out / "comparison.md", markdown(results))
        draw_comparison(self.folders.comparison, results, out / "curves.png")
        return results

    def _finish(self, folder: Path, recipe: Recipe, what: str) -> bool:
        """Finish one run; false if it has already ended."""
        need_whole_teacher(recipe)
        run = open_run(folder, recipe)
        if is_over(folder):
            return False
        logger.info("%s: %s", what, self._position())
        started = time.perf_counter()
        try:
            starts = Starts(self.folders.out / "starts")
            train(run, self._teacher(recipe), starts=starts)
        except DivergedError as error:
            write_text(folder / "diverged.json", json.dumps({"message": str(error)}))
            logger.warning(str(error))
        except Interrupted as stop:
            raise Interrupted(
                stop.signal, f"Stopped in {folder}; the same command continues from there."
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
        """The teacher of a run; the last one stays in memory."""
        key = recipe.teacher.model_dump_json() + recipe.train.device
        if key not in self._teachers:
            self._teachers.clear()
            self._teachers[key] = load_teacher(recipe.teacher, find_device(recipe.train.device))
        return self._teachers[key]


def open_run(folder: Path, recipe: Recipe) -> Run:
    """The run of a recipe in a folder of the comparison, new or already started.

    Raises:
        UserError: if the folder holds a run of another recipe.
    """
    if not is_run(folder):
        return Run.create(folder, recipe)
    run = Run.open(folder)
    refuse_other_recipe(run, [recipe])
    return run


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys that differ between two recipes."""
    ours, theirs = flatten(a.model_dump()), flatten(b.model_dump())
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
