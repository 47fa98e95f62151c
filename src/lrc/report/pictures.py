"""Pictures of runs as PNG files."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lrc.system.files import new_file


def save_picture(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as a PNG.

    Args:
        figure: the figure.
        path: the picture; an older one is replaced.
        **options: of matplotlib's `savefig`.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with new_file(path) as temporary, matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(temporary, format="png", **options)


def as_label(name: str) -> str:
    """A name that matplotlib shows as it is: it would take dollars for mathematics, and leave out
    of legends what begins with an underscore."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
