"""Shortens the end of a run: an empty picture, a short sample, and no measurement of the machine.
All that takes two thirds of a tiny run's time."""

from pathlib import Path

from lrc.train import closing

SHORT = {
    "draw_curves": lambda _run, path, _summary: path.touch(),
    "matmul_peak": lambda *_: 1e13,
    "SAMPLE_TOKENS": 8,
}
"""What replaces parts of `lrc.train.closing`."""


def shorten() -> None:
    """Shorten all runs of this process from now on."""
    for name, value in SHORT.items():
        setattr(closing, name, value)


SHORT_CLOSING = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
__import__("short_closing").shorten()
"""
"""Code before other code that does it in another process."""
