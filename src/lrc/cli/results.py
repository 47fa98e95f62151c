"""`--quiet` and `--json` of commands that print results."""

import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import wraps
from typing import Annotated, Any

import typer

from lrc.cli.console import console
from lrc.cli.display import show_library

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only warnings and results, no progress.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the results as JSON; everything else goes to standard error."
    ),
]


def prints_results(command: Callable[..., None]) -> Callable[..., None]:
    """Add --quiet and --json to a command, which prints its results with `console.result`."""

    @wraps(command)
    def wrapped(*, quiet: bool, as_json: bool, **options: Any) -> None:
        console.as_json = as_json
        show_library(console, quiet)
        # With --json, what other libraries print does not go between the results either.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            command(**options)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("as_json", Json))
    ]
    signature = inspect.signature(command)
    parameters = [*signature.parameters.values(), *added]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped
