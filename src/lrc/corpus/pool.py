"""The processes of a build.

Tokenizing scales best over processes with one thread each: threads of one process would wait for
each other's Python. The processes are forked from a small server that has imported what they need
and nothing else, so that they share its memory and start at once.
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
    """Runs functions in other processes, or in this one where there is to be only one.

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
        """Start some work; in one process it is done at once."""
        if self._executor is not None:
            return self._executor.submit(work, *arguments)
        future: Future[None] = Future()
        work(*arguments)
        future.set_result(None)
        return future

    @staticmethod
    def wait(future: "Future[None]") -> None:
        """Wait until some work is done, and raise what it raised.

        Raises:
            UserError: a process was killed.
        """
        try:
            future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "A process of the build was killed, most likely for want of memory: give it fewer "
                "processes (--workers) and run the same command again, which goes on from here."
            ) from error


def default_workers() -> int:
    """One process a core that this one may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Not on macOS.
        return os.cpu_count() or 1


def _start() -> None:
    """Prepare a process: one thread, no answer to Ctrl-C, and an end when the build's ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this process when the build's is gone: a killed build leaves nothing running."""
    connection.wait([sentinel])
    os._exit(1)
