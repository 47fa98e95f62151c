"""`lrc chat`."""

from typing import TYPE_CHECKING, Annotated

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.cli.models import ModelArgument
from lrc.cli.quantities import MAX_SEED
from lrc.system.errors import UserError

if TYPE_CHECKING:
    from lrc.evaluation.chatting import Chat

HELP = (
    "/reset forgets the conversation, /system TEXT starts over with a system message, /exit ends."
)


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum length of an answer. Default: 512, or half of a shorter context.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: the most likely token. Default: the model's settings."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a model in its own chat template.

    Examples:

    * `lrc chat runs/assistant`
    * `lrc chat my-student --system "Answer in one sentence." --temperature 0.7`

    /reset forgets the conversation, /system TEXT starts over with a system message, and /exit or
    Ctrl-D ends.
    Ctrl-C stops an answer.
    """
    import torch

    from lrc.evaluation.chatting import Chat
    from lrc.model.teacher import load_model
    from lrc.run import student_of
    from lrc.train.setup import find_device

    quiet_libraries()
    loaded, tokenizer = load_model(student_of(model))
    loaded.to(find_device("auto"))
    torch.manual_seed(seed)
    try:
        talk = Chat(loaded, tokenizer, max_new_tokens, temperature, system)
    except UserError as error:
        raise UserError(f"`lrc chat` does not work with {model}. {error}") from error
    console.print(HELP)
    while True:
        try:
            line = console.input("> ").strip()
        except EOFError:
            console.print()
            return
        if line == "/exit":
            return
        if line:
            _take(line, talk)


def _take(line: str, talk: "Chat") -> None:
    """Obey a command, or show the answer to a turn."""
    from lrc.train.signals import stop_on_signals

    command, _, rest = line.partition(" ")
    if command == "/reset":
        talk.reset()
    elif command == "/system":
        talk.system = rest.strip() or None
        talk.reset()
        console.print("The conversation starts over with this system message.", style="yellow")
    elif command.startswith("/"):
        console.print(HELP, style="yellow")
    else:
        try:
            with stop_on_signals() as stop:
                talk.answer(line, _show, lambda: bool(stop))
        except UserError as error:
            console.print(str(error), style="yellow")
        console.print()


def _show(piece: str) -> None:
    console.file.write(piece)
    console.file.flush()
