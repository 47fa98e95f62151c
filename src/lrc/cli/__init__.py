"""The command line: a thin layer that parses, calls and prints."""

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lrc.cli import analyze, data
from lrc.cli.chat import chat
from lrc.cli.compare import compare
from lrc.cli.console import INTERRUPTED, console, lost_output
from lrc.cli.display import show_library
from lrc.cli.environment import env
from lrc.cli.evaluate import evaluate
from lrc.cli.models import export, generate, info
from lrc.cli.plan import plan
from lrc.cli.prune import prune
from lrc.cli.push import push
from lrc.cli.reporting import report
from lrc.cli.sft import sft
from lrc.cli.training import compress, resume, train
from lrc.system.distributed import PeerError, joined, launched, leave, rank
from lrc.system.errors import UserError, reason, system_errno, system_sentence
from lrc.system.threads import sleep_while_waiting

DISTRIBUTED = ("train", "resume", "compress", "prune", "sft")
"""Commands that several processes run together."""

READ_ONLY = ("info", "plan", "env")
"""Commands that write nothing, so that a launcher's variables do not matter."""

MISTAKE, FAULT = 2, 1
"""Exit codes: a mistake that the user can fix, and a bug in lrc."""


class Commands(TyperGroup):
    """The commands, which say so if Ctrl-C stops them."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer itself would end without a word
            typer.secho("Stopped.", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    help="Clone a decoder LLM into a much smaller one of the same class, for little compute.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
for command in (
    plan,
    train,
    compress,
    resume,
    prune,
    sft,
    compare,
    export,
    push,
    report,
    info,
    generate,
    chat,
):
    app.command(no_args_is_help=True)(command)
app.command("eval", no_args_is_help=True)(evaluate)
app.command()(env)
app.add_typer(data.app, name="data")
app.add_typer(analyze.app, name="analyze")


def _show_version(wanted: bool) -> None:
    if wanted:
        from lrc import __version__

        typer.echo(f"lrc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; before or after a command."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of every command."""
    console.as_json = False
    show_library(console)
    if rank():  # of several processes, the first one talks to the user
        console.quiet = True
    command = context.invoked_subcommand
    if launched() > 1 and command not in (*DISTRIBUTED, *READ_ONLY):
        raise UserError(
            f"`lrc {command}` runs in one process, but a launcher started {launched()}: call it "
            "without torchrun, or unset WORLD_SIZE."
        )


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a bug in lrc, 2 a mistake the user can fix, 128 + N stopped by signal N
    after writing a checkpoint.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sleep_while_waiting()
    _print_anything()
    debug = _take_debug()
    try:
        _refuse_bytes(sys.argv[1:])
        try:
            app(prog_name="lrc")
            leave()
        finally:
            console.file.flush()
            if problem := lost_output():
                raise UserError(system_sentence(problem, "This command's output", "written"))
    except Exception as error:
        if debug:
            traceback.print_exc()
        sentence, code = explain(error)
        if is_news(error):
            typer.secho(f"Error: {sentence}", fg="red", err=True)
        sys.exit(code)
    except KeyboardInterrupt:
        typer.secho("Stopped.", err=True)
        sys.exit(INTERRUPTED)


def explain(error: Exception) -> tuple[str, int]:
    """Turn an exception into a sentence for the user and an exit code."""
    if isinstance(error, UserError):
        return str(error), MISTAKE
    if system_errno(error) is not None:
        return system_sentence(error), MISTAKE
    if is_out_of_memory(error):
        return (
            "There is not enough memory: use a smaller train.micro_batch (--batch-size of `lrc "
            "eval`), train.gradient_checkpointing, shorter sequences, or a smaller model.",
            MISTAKE,
        )
    return (
        f"lrc failed ({type(error).__name__}: {reason(error)}). This is a bug in lrc: please "
        "report it to the developers with the output of `lrc env`, and of the same command with "
        "--debug.",
        FAULT,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or its GPU has too little memory. On a CPU, torch says so in words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    words = "can't allocate memory", "not enough memory", "out of memory"
    return isinstance(error, RuntimeError) and any(word in said for word in words)


def is_news(error: Exception) -> bool:
    """Whether an error is worth printing: of several processes, only two say that another one has
    ended, and only the first one reports a mistake that all have found before they joined."""
    return not rank() or (rank() == 1 if isinstance(error, PeerError) else joined())


def _print_anything() -> None:
    """Make unprintable characters, and file names that are not UTF-8, not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _take_debug() -> bool:
    """Remove --debug from the arguments; return whether it was given."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    kept = [argument for argument in given[:end] if argument != "--debug"]
    sys.argv[1:] = kept + given[end:]
    return len(kept) < end or bool(os.environ.get("LRC_DEBUG"))


def _refuse_bytes(arguments: list[str]) -> None:
    """Refuse arguments that are not UTF-8: recipes and metrics cannot hold them.

    Raises:
        UserError: if there is one.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode(errors="backslashreplace").decode()
            raise UserError(f"The argument '{shown}' is not UTF-8: rename it.") from None
