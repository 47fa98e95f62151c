"""End a run cleanly on Ctrl-C and SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lrc.system.distributed import World


class StopRequest:
    """Whether the run should stop after its current step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Note the first SIGINT or SIGTERM as a request to stop; a second one acts at once.

    Only the main thread can handle signals. In other threads the request stays false.
    """
    request = StopRequest() if request is None else request
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()


def agree(request: StopRequest, world: World) -> bool:
    """Whether a signal asked any of the processes to stop. All then stop at the same step."""
    asked = [signal for signal in world.gather(request.signal) if signal is not None]
    if asked:
        request.signal = asked[0]
    return bool(asked)
