"""Random numbers that are the same on every machine and in every numpy version."""

import numpy as np
from numpy.typing import NDArray

from lrc.corpus.words import mix


def draw(numbers: NDArray[np.uint64], seed: int, again: int = 0) -> NDArray[np.uint64]:
    """A random 64-bit value for each number.

    Args:
        numbers: numbers to draw values for.
        seed: seed of the values.
        again: counter; each value gives an independent draw for the same numbers.
    """
    start = mix(mix(np.array([seed], np.uint64)) + np.uint64(again))
    return mix(mix(numbers + np.uint64(1)) ^ start)
