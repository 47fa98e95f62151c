"""`lrc push`."""

from typing import Annotated

import typer

from lrc.cli.console import quiet_libraries
from lrc.exporting.formats import Dtype


def push(
    model: Annotated[str, typer.Argument(help="A run's or tuning's folder, or a model folder.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub: USER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    gguf: Annotated[
        Dtype | None, typer.Option(help="Add a GGUF file of this element type for llama.cpp.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Publish a model on the Hugging Face hub, with a card of what was measured.

    Examples:

    * `lrc push runs/mine me/my-student --dry-run`
    * `lrc push runs/assistant me/my-assistant --private --gguf q8_0`

    Log in once with `hf auth login`. The card gets the results of `lrc eval` and the loss curves of
    the run.
    """
    from lrc.train.push import push

    quiet_libraries()
    push(model, repo, private=private, gguf=gguf, dry_run=dry_run)
