"""PNG pictures of runs."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lrc.system.files import new_file


def save_picture(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as a PNG.

    Args:
        figure: the figure.
        path: the picture; an existing one is replaced.
        **options: options of matplotlib's `savefig`.

    Raises:
        UserError: if the disk is full or the file cannot be written.
    """
    with new_file(path) as temporary, matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(temporary, format="png", **options)


def as_label(name: str) -> str:
    """A name escaped so that matplotlib shows it unchanged.

    matplotlib reads dollar signs as mathematics and omits legend entries that begin with an
    underscore.
    """
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
