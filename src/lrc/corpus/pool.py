"""The processes of a build.

Tokenizing scales best over processes with one thread each, because threads of one process block
each other in Python. The processes are forked from a small server that has imported only what they
need, so they share its memory and start immediately.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from lrc.system.errors import UserError


class Pool:
    """Runs functions in other processes, or in this process if `workers` is 1.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: Executor | None = None
        if workers > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["lrc.corpus.unit"])
            self._executor = ProcessPoolExecutor(workers, context, initializer=_start)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Start work; with a single process, it runs immediately."""
        if self._executor is not None:
            return self._executor.submit(work, *arguments)
        future: Future[None] = Future()
        work(*arguments)
        future.set_result(None)
        return future

    @staticmethod
    def wait(future: "Future[None]") -> None:
        """Wait until work is done, and raise any exception that it raised.

        Raises:
            UserError: if a process was killed.
        """
        try:
            future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "A build process was killed, most likely because memory ran out: use fewer "
                "processes (--workers) and run the same command again, which resumes the build."
            ) from error


def default_workers() -> int:
    """One process per core available to this process."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Not on macOS.
        return os.cpu_count() or 1


def _start() -> None:
    """Prepare a process: use one thread, ignore Ctrl-C, and exit when the build process exits."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Exit when the build process is gone, so that a killed build leaves nothing running."""
    connection.wait([sentinel])
    os._exit(1)
