"""The command line: thin; parse, call, print."""

import os
import sys

import typer

from lrc.cli import analyse, data
from lrc.cli.compare import compare
from lrc.cli.evaluate import evaluate
from lrc.cli.models import export, generate, info
from lrc.cli.prune import prune
from lrc.cli.reporting import report
from lrc.cli.training import init, resume, train
from lrc.errors import UserError

app = typer.Typer(
    help="Clone a decoder LLM into a much smaller one of the same class, for little compute.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
for command in (train, init, resume, prune, compare, export, report, info, generate):
    app.command(no_args_is_help=True)(command)
app.command("eval", no_args_is_help=True)(evaluate)
app.add_typer(data.app, name="data")
app.add_typer(analyse.app, name="analyse")


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options of every command."""
    if debug:
        os.environ["LRC_DEBUG"] = "1"


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake the user can mend, 128 + N stopped by
    signal N after writing a checkpoint."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except UserError as error:
        if os.environ.get("LRC_DEBUG"):
            raise
        typer.secho(f"Error: {error}", fg="red", err=True)
        sys.exit(2)
