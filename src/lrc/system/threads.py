"""How the threads of a computation wait for each other on a CPU.

OpenMP's threads spin while they wait. If another process needs a core, a spinning thread keeps it
from the thread that it waits for, and a step takes five times as long and more. Threads that sleep
after a short spin cost a step little on a quiet machine (benchmarks/README.md).
"""

import os

SPINS = "4000"
"""Turns that a thread of GNU's OpenMP, torch's on Linux, waits before it sleeps."""


def sleep_while_waiting() -> None:
    """Let threads sleep after a short wait, unless the user has chosen a policy. Call it before
    torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
