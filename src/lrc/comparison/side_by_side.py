"""Processes that fill the folder of one comparison side by side, for a limited time."""

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lrc.comparison.folders import Folders, held_out_of, is_over
from lrc.system.errors import UserError
from lrc.system.progress import task
from lrc.train.session import Interrupted
from lrc.train.signals import stop_on_signals

logger = logging.getLogger(__name__)

PAUSE = 0.2
"""Seconds between two looks at the processes."""

CLOSING = 30.0
"""Seconds of the time limit, at most a tenth of it, in which the processes end their step and write
their checkpoints after they are asked to stop."""

PATIENCE = 600.0
"""Seconds until those whose step takes longer are killed, which loses what they did since their
last checkpoint."""


@dataclass(frozen=True)
class SideBySide:
    """How to run a comparison in processes of their own."""

    parallel: int = 1
    """Number of processes, on one device or on the CPU."""
    minutes: float | None = None
    """Time limit; None: none."""


def run_side_by_side(
    folders: Folders, only: Sequence[str], results_only: bool, how: SideBySide
) -> None:
    """Start the processes, report every run that ends, and stop them when the time is over.

    Each writes what it prints to `worker-N.log`. One that cannot finish a run goes on with others.

    Args:
        folders: the comparison's folder, which holds comparison.yaml.
        only: names of the entries to run.
        results_only: whether runs that have ended keep only their results.
        how: number of processes and time limit.

    Raises:
        UserError: if all processes have ended and not all runs.
        Interrupted: if SIGINT or SIGTERM arrived.
    """
    began = time.monotonic()
    seconds = math.inf if how.minutes is None else 60 * how.minutes
    limit = seconds - min(CLOSING, seconds / 10)
    command = [sys.executable, "-m", "lrc", "compare", str(folders.out / "comparison.yaml")]
    command += ["--out", str(folders.out), *(f"--only={name}" for name in only)]
    command += ["--results-only"] if results_only else []
    logs = [folders.out / f"worker-{number}.log" for number in range(1, how.parallel + 1)]
    before = {job.folder for job in folders.jobs(only) if is_over(job.folder)}
    with stop_on_signals() as stop, task("Comparing", len(list(folders.jobs(only)))) as shown:
        shown.update(len(before))
        workers = [start(command, log, how.parallel) for log in logs]
        try:
            over = False
            while not (over or stop) and any(worker.poll() is None for worker in workers):
                time.sleep(PAUSE)
                over = time.monotonic() - began > limit
                for job in folders.jobs(only):
                    if is_over(job.folder) and job.folder not in before:
                        before.add(job.folder)
                        loss = held_out_of(job.folder)
                        value = "not finite" if loss is None else f"{loss:.4f}"
                        logger.info("%s: held-out LM loss %s", job.title, value)
                shown.update(len(before))
        finally:
            end(workers)
    if stop.signal is not None:
        raise Interrupted(
            stop.signal, f"Stopped in {folders.out}; the same command continues from there."
        )
    if not over and any(worker.returncode for worker in workers):
        log = next(log for log, worker in zip(logs, workers, strict=True) if worker.returncode)
        raise UserError(f"Not all runs could be finished: {last_line(log)} (all of it is in {log})")


def start(command: Sequence[str], log: Path, parallel: int) -> subprocess.Popen[bytes]:
    """Start a process with its share of the cores. Ctrl-C does not reach it: its parent ends it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // parallel)), **os.environ}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            process_group=0,
        )


def end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop after their step, and kill those that still run after `PATIENCE`, or
    when a signal interrupts the wait."""
    try:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        limit = time.monotonic() + PATIENCE
        for worker in workers:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, limit - time.monotonic()))
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def last_line(log: Path) -> str:
    """The last line of a log."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")
