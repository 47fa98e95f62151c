"""The YAML files that ship with the package, by name."""

import os
from importlib import resources
from pathlib import Path

from lrc.system.errors import UserError

KINDS = {
    "recipe": "recipe/recipes",
    "comparison": "comparison/comparisons",
    "mix": "corpus/mixes",
    "sft recipe": "tuning/recipes",
}
"""The kind's name in messages, and the folder of the package that holds its files."""


def shipped(kind: str) -> list[str]:
    """Names of the shipped files of a kind (one of `KINDS`)."""
    folder = resources.files("lrc") / KINDS[kind]
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def find_yaml(source: str | os.PathLike[str], kind: str) -> Path:
    """Return the path of a YAML file, or of the shipped file of that name.

    Args:
        source: a path, or the name of a shipped file.
        kind: kind of the file, one of `KINDS`.

    Raises:
        UserError: if neither exists.
    """
    path = Path(source)
    if path.is_file():
        return path
    names = shipped(kind)
    if str(source) in names:
        return Path(str(resources.files("lrc") / KINDS[kind] / f"{source}.yaml"))
    plural = KINDS[kind].rpartition("/")[2]
    raise UserError(
        f"There is no {kind} '{source}': give a YAML file or one of the shipped {plural} "
        f"({', '.join(names)})."
    )
