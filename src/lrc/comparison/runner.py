"""Runner of a comparison: one run after another, each in its own run folder.

    OUT/comparison.yaml        the resolved comparison
    OUT/starts/                calibrated initializations, which the runs share
    OUT/grid/NAME-lrRATE/      a try of a learning rate
    OUT/runs/NAME-seedN/       a run on the full budget
    OUT/comparison.json, .md   the table, rewritten after every run
    OUT/curves.png             the held-out curves
    OUT/claims/                which process is working on which run
    OUT/worker-N.log           what the processes of `--parallel` print

Runs that have ended are not run again, and an interrupted run continues from its checkpoint. So the
same command continues a comparison. Several processes share the runs of one folder: each takes the
first one that no other is working on. A run whose loss is no longer finite counts as failed.
"""

import gc
import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import yaml

from lrc.cloning.method import CLONE_LAYERS
from lrc.comparison.curves import draw_comparison
from lrc.comparison.folders import Folders, Job, is_over
from lrc.comparison.plan import Comparison, written_rate
from lrc.comparison.preflight import check_students, need_inputs
from lrc.comparison.results import Results, collect
from lrc.comparison.side_by_side import SideBySide, run_side_by_side
from lrc.comparison.table import markdown
from lrc.model.teacher import Teacher, load_teacher
from lrc.preflight import need_whole_teacher
from lrc.recipe import Recipe, flatten
from lrc.report.curves import ACCURACY
from lrc.run import Run, is_run
from lrc.system.errors import DivergedError, HeldError, UserError, reason
from lrc.system.files import hold, is_taken, new_folder, reading, remove, write_text
from lrc.train.session import Interrupted, train
from lrc.train.setup import find_device
from lrc.train.signals import StopRequest
from lrc.train.starts import Starts

logger = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds to wait for runs of other processes."""

MEASURED = {"held_out_lm", ACCURACY}
"""Keys of a line of metrics that holds results."""

NOT_RESULTS = ("starts", "claims", "checkpoints", "student", "*.log", ".lock", "*.tmp")
"""What a folder of results does not keep in git."""


def compare(
    comparison: Comparison,
    out: Path,
    only: Sequence[str] = (),
    results_only: bool = False,
    side_by_side: SideBySide | None = None,
) -> Results:
    """Run the remaining runs of a comparison, and write its table.

    Args:
        comparison: the comparison.
        out: folder of the comparison, new or from an earlier call. Other processes may work in it.
        only: names of the entries to run now; none: all.
        results_only: keep only the results of runs that have ended, no students and checkpoints.
        side_by_side: run in processes of their own, for a limited time; None: in this one, to the
            end.

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
    check_students(folders, only or names)
    plan = comparison.model_dump(mode="json", by_alias=True)
    write_text(marker, yaml.safe_dump(plan, sort_keys=False))
    if results_only:
        write_text(out / ".gitignore", "".join(f"{name}\n" for name in NOT_RESULTS))
    if side_by_side is not None:
        run_side_by_side(folders, only or names, results_only, side_by_side)
        return write_results(folders)
    return Runner(folders, only or names, results_only).go()


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
    """Refuse a run whose recipe is not one of the given recipes, apart from what changes no result
    (`differences`).

    Raises:
        UserError: if it is not; the message names the settings that differ from the first recipe.
    """
    if all(differences(run.recipe, recipe) for recipe in recipes):
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
    results_only: bool
    """Whether a run that has ended keeps only its results."""
    _teachers: dict[str, Teacher] = field(default_factory=dict)
    _given_up: set[Path] = field(default_factory=set)
    """Folders of runs that this process cannot finish."""
    _errors: list[Exception] = field(default_factory=list)
    """Why not."""
    _tokens: int = 0
    """Tokens trained by this process."""
    _seconds: float = 0.0
    """Seconds that these runs took in total."""

    def go(self) -> Results:
        """Run everything that has not ended and that no other process is running.

        Raises:
            Exception: the first error of a run that cannot be finished, after all other runs.
            UserError: if runs have another rate than their entry's tries choose now.
            Interrupted: if a signal arrived.
        """
        if self.results_only:
            self._reduce()
        while jobs := [job for job in self._unfinished() if job.folder not in self._given_up]:
            if not any(self._finish(job) for job in jobs):
                time.sleep(PAUSE)
        results = write_results(self.folders)
        if self._errors:
            raise self._errors[0]
        if outdated := self.folders.outdated(self.only):
            raise UserError(
                "The grid now chooses other learning rates than these runs have, so the table "
                f"leaves them out: {', '.join(map(str, outdated))}. Remove them to run them again."
            )
        return results

    def _reduce(self) -> None:
        """Keep only the results of runs that ended when this was not asked for, or were stopped
        right after their end."""
        for job in self.folders.jobs(self.only):
            run = Run.open(job.folder) if is_over(job.folder) else None
            if run is not None and (run.checkpoints.exists() or run.student_folder.exists()):
                with (
                    suppress(HeldError),
                    hold(self.folders.claim(job), "Another process is working on it."),
                ):
                    keep_results(run)

    def _unfinished(self) -> list[Job]:
        return [job for job in self.folders.jobs(self.only) if not is_over(job.folder)]

    def _finish(self, job: Job) -> bool:
        """Finish one run; false if nothing was done, since another process does it, or it needs
        tries that have not ended."""
        recipe = self.folders.recipe(job)
        if recipe is None:
            if self.folders.has_searched(job.entry):
                logger.warning("%s: no rate of the grid stayed finite.", job.entry.name)
                self._given_up.add(job.folder)
            return False
        try:
            with hold(self.folders.claim(job), "Another process is working on it."):
                return not is_over(job.folder) and self._run(job, recipe)
        except HeldError:
            return False
        except Interrupted:
            raise
        except UserError as error:
            named = UserError(f"{job.title}: {error}")
            logger.error("%s", named)
            self._give_up(job, named)
            return False
        except Exception as error:
            logger.exception("%s: %s", job.title, reason(error))
            self._give_up(job, error)
            return False

    def _run(self, job: Job, recipe: Recipe) -> bool:
        """Run a job that this process holds."""
        if (same := self._same_try(job, recipe)) is not None:
            logger.info("%s: taken from %s, the same run", job.title, same)
            with new_folder(job.folder) as folder:
                ignore = shutil.ignore_patterns(".lock", "*.tmp")
                shutil.copytree(same, folder, ignore=ignore, dirs_exist_ok=True)
            run = Run.open(job.folder)
        else:
            run = self._train(job, recipe)
        if self.results_only:
            keep_results(run)
        if job.seed is not None:
            write_results(self.folders)
        return True

    def _train(self, job: Job, recipe: Recipe) -> Run:
        """Train the run of a job."""
        need_whole_teacher(recipe)
        run = open_run(job.folder, recipe)
        rate = written_rate(getattr(recipe.train, job.entry.tries))
        logger.info("%s, rate %s: %s", job.title, rate, self._position())
        started = time.perf_counter()
        starts = Starts(self.folders.out / "starts", self.folders.alike(recipe))
        stop = StopRequest()
        try:
            train(run, self._teacher(recipe), starts=starts, stop=stop)
        except DivergedError as error:
            write_text(run.folder / "diverged.json", json.dumps({"message": str(error)}))
            logger.warning(str(error))
        except Interrupted as stopped:
            raise Interrupted(
                stopped.signal, f"Stopped in {run.folder}; the same command continues from there."
            ) from None
        finally:
            gc.collect()  # hooks and what they belong to refer to each other
        if stop.signal is not None:
            if self.results_only:
                keep_results(run)
            raise Interrupted(
                stop.signal, f"Stopped after {run.folder}; the same command continues from there."
            )
        self._tokens += recipe.train.tokens
        self._seconds += time.perf_counter() - started
        return run

    def _same_try(self, job: Job, recipe: Recipe) -> Path | None:
        """Folder of a try that has ended with the recipe of a run that has not begun: its grid has
        the whole budget."""
        searching = self.folders.comparison.searching(job.entry)
        if job.seed is None or searching != job.entry or is_run(job.folder):
            return None
        for rate in self.folders.comparison.tried_rates(searching):
            folder = self.folders.of_try(searching, rate)
            if (folder / "summary.json").is_file() and Run.open(folder).recipe == recipe:
                return folder
        return None

    def _give_up(self, job: Job, error: Exception) -> None:
        """Leave out a run that cannot be finished, and those that need it."""
        self._errors.append(error)
        self._given_up.add(job.folder)
        if job.rate is not None:
            comparison = self.folders.comparison
            self._given_up |= {
                other.folder
                for other in self.folders.jobs(self.only)
                if other.seed is not None and comparison.searching(other.entry) == job.entry
            }

    def _position(self) -> str:
        """Number of the next run, and the time left at the pace so far."""
        plan = list(self.folders.jobs(self.only))
        left = [job for job in plan if not is_over(job.folder)]
        text = f"run {len(plan) - len(left) + 1} of {len(plan)}"
        if not self._tokens:
            return text
        tokens = sum(self.folders.tokens(job) for job in left)
        return (
            f"{text}, about {timedelta(seconds=round(tokens * self._seconds / self._tokens))} left"
        )

    def _teacher(self, recipe: Recipe) -> Teacher:
        """The teacher of a run; the last one stays in memory."""
        key = recipe.teacher.model_dump_json() + recipe.train.device
        if key not in self._teachers:
            self._teachers.clear()
            self._teachers[key] = load_teacher(recipe.teacher, find_device(recipe.train.device))
        return self._teachers[key]


def write_results(folders: Folders) -> Results:
    """Write the table and the picture of the results so far."""
    out = folders.out
    with reading(out, "one of its runs may be damaged: remove that run to run it again"):
        results = collect(folders)
    write_text(out / "comparison.json", json.dumps(results.as_json(), indent=2))
    write_text(out / "comparison.md", markdown(results))
    draw_comparison(folders.comparison, results, out / "curves.png")
    return results


def keep_results(run: Run) -> None:
    """Keep of a run that has ended its recipe, its inputs, its held-out measurements and its
    summary: some kilobytes."""
    measured = (line for line in run.metrics() if not line.keys().isdisjoint(MEASURED))
    lines = [{k: v for k, v in line.items() if k != CLONE_LAYERS} for line in measured]
    write_text(run.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))
    for path in (run.checkpoints, run.student_folder, run.folder / "curves.png"):
        remove(path)


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
    """Dotted keys that differ between two recipes, apart from how often and how fast the tasks of
    `train.evaluate` are measured, and whether any are."""
    both = a.train.evaluate is not None and b.train.evaluate is not None
    left_out = {"train": {"evaluate": {"every_tokens", "batch_size"} if both else True}}
    ours, theirs = (flatten(recipe.model_dump(exclude=left_out)) for recipe in (a, b))
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
