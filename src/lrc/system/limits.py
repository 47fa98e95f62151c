"""Limits on what a file from someone else can make this process do."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lrc.system.errors import UserError

LONGEST_LINE = 1 << 26
"""Maximum bytes of a line of JSON. A longer line is malformed. This bounds the memory that a file
without line breaks takes."""

LARGEST_SETTINGS = 1 << 24
"""Maximum bytes of a settings file (JSON or YAML): a hundred times as large as any real one."""


@contextmanager
def bounded(seconds: int, gibibytes: float, exceeded: str) -> Iterator[None]:
    """Limit the time and memory of a block that runs what a user's file says.

    This works only in the main thread, the only one that can handle signals. Elsewhere nothing is
    limited.

    Args:
        seconds: limit on wall-clock time.
        gibibytes: limit on memory beyond what the process already has.
        exceeded: the error message.

    Raises:
        UserError: if the block exceeds a limit.
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
        return 1 << 62  # not Linux: no limit
    return pages * resource.getpagesize()


def check_size(path: Path, what: str) -> None:
    """Refuse a settings file that is far larger than any real one.

    Args:
        path: the file.
        what: what the file should be, for the message.

    Raises:
        UserError: if it is too large.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_SETTINGS:
        raise UserError(
            f"{path} has {size >> 20} MiB, far more than any real {what}: give another file."
        )
