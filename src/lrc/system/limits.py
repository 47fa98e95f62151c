"""Limits on what a file that somebody else made can make this process do."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lrc.system.errors import UserError

LONGEST_LINE = 1 << 26
"""Bytes of a line of JSON; a longer one is malformed, which bounds the memory that a file without
line ends takes."""

LARGEST_SETTINGS = 1 << 24
"""Bytes of a file of settings (JSON or YAML): a hundred times as large as any real one."""


@contextmanager
def bounded(seconds: int, gibibytes: float, exceeded: str) -> Iterator[None]:
    """Bound the time and the memory of a block that runs what a user's file says.

    Only in the main thread, where alone signals can be handled; elsewhere nothing is bounded.

    Args:
        seconds: of wall-clock time.
        gibibytes: of memory that the process may take beside what it has.
        exceeded: the sentence for what went beyond.

    Raises:
        UserError: the block took longer or more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise UserError(exceeded)

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _address_space() + int(gibibytes * 2**30)
    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        yield
    except MemoryError as error:
        raise UserError(exceeded) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of this process's address space."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 1 << 62  # not Linux: no bound
    return pages * resource.getpagesize()


def check_size(path: Path, what: str) -> None:
    """Refuse a file of settings that is far larger than any real one.

    Args:
        path: the file.
        what: what it should be, for the message.

    Raises:
        UserError: it is.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_SETTINGS:
        raise UserError(
            f"{path} has {size >> 20} MiB, far more than any {what}: give another file."
        )
