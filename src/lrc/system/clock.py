"""Measure where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall-clock seconds by named part.

    Parts can be nested: the outer part does not count the inner part's time. On CUDA, kernels run
    after the call that starts them returns, so shares are only approximate there. The clock forces
    no synchronization, since that would slow the run.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the `with` block as `name`."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            nested = self._inner.pop()
            self._inner[-1] += elapsed
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - nested

    def shares(self) -> dict[str, float]:
        """Each part's share of the time of all parts, largest first."""
        total = sum(self.seconds.values()) or 1.0
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {name: seconds / total for name, seconds in ordered}
