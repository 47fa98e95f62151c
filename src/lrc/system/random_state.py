"""Random numbers that go on as if nothing had been drawn."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def same_random_state() -> Iterator[None]:
    """Context after which Python, numpy and torch draw what they would have drawn before it."""
    others = random.getstate(), numpy.random.get_state()
    # A process of several may not open the GPUs of the others.
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(used):
            yield
    finally:
        random.setstate(others[0])
        numpy.random.set_state(others[1])
