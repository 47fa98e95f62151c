"""Low-Rank Clone: make a much smaller model of the teacher's class that behaves like it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrc.api import (
        build_shards,
        clone,
        compare,
        compress,
        evaluate,
        export,
        plan,
        prune,
        push,
        resume,
        sft,
        write_report,
    )
    from lrc.model.teacher import Teacher, as_teacher, load_teacher
    from lrc.recipe import Recipe, load_recipe
    from lrc.run import Run
    from lrc.system.errors import UserError

_HOME = {
    "Recipe": "lrc.recipe",
    "Run": "lrc.run",
    "Teacher": "lrc.model.teacher",
    "UserError": "lrc.system.errors",
    "as_teacher": "lrc.model.teacher",
    "build_shards": "lrc.api",
    "clone": "lrc.api",
    "compare": "lrc.api",
    "compress": "lrc.api",
    "evaluate": "lrc.api",
    "export": "lrc.api",
    "plan": "lrc.api",
    "prune": "lrc.api",
    "push": "lrc.api",
    "resume": "lrc.api",
    "sft": "lrc.api",
    "write_report": "lrc.api",
    "load_recipe": "lrc.recipe",
    "load_teacher": "lrc.model.teacher",
}

__all__ = [
    "Recipe",
    "Run",
    "Teacher",
    "UserError",
    "__version__",
    "as_teacher",
    "build_shards",
    "clone",
    "compare",
    "compress",
    "evaluate",
    "export",
    "load_recipe",
    "load_teacher",
    "plan",
    "prune",
    "push",
    "resume",
    "sft",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `lrc --help` need not load torch."""
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("low-rank-clone")
        except metadata.PackageNotFoundError:  # the source is on the path, but not installed
            return "0+unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'lrc' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
