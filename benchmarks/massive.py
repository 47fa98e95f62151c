"""Massive activations of students compared with their teacher's: missed first tokens and invented
ones.

Held-out text is cut into sequences of 32 tokens. They run through teacher and students up to the
layer after which the ratio of the teacher's largest activation to its median is largest. A first
token is missed if its norm there is less than 0.3 of the teacher's. A token is invented if its norm
is at least 8 times the teacher's median and the teacher's is not.

    lrc compress my.yaml --out runs/start
    python benchmarks/massive.py runs/start runs/trained
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from lrc.data import open_text
from lrc.run import Run
from lrc.train.setup import set_up

LENGTH = 32
SEQUENCES = 64
"""Held-out sequences of the first run's length that are cut."""

MISSED, MASSIVE = 0.3, 8.0


@torch.no_grad()
def norms(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Norms of the residual stream after every layer except the last,
    [layers - 1, sequences, 32]."""
    found = []
    for part in ids.split(64):
        states = model.base_model(part, output_hidden_states=True, use_cache=False).hidden_states
        found.append(torch.stack([state.norm(dim=-1) for state in states[1:-1]]))
    return torch.cat(found, 1)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs with the same teacher.")],
) -> None:
    run = Run.open(runs[0])
    first = set_up(run)
    text = open_text(run.recipe, first.teacher.tokenizer)
    batches = text.held_out_batches(SEQUENCES, 8)
    ids = torch.cat([batch.input_ids.reshape(-1, LENGTH) for batch in batches]).to(first.device)
    theirs = norms(first.teacher.model, ids)
    beside = theirs.flatten(1).amax(1) / theirs.flatten(1).median(1).values
    layer = int(beside.argmax())
    teacher, least = theirs[layer], MASSIVE * theirs[layer].median()
    table = Table("run", "missed", "invented")
    for folder in runs:
        setup = set_up(Run.open(folder), first.teacher)
        student = norms(setup.method.student(), ids)[layer]
        missed = int((student[:, 0] < MISSED * teacher[:, 0]).sum())
        table.add_row(
            str(folder), str(missed), str(int(((student >= least) & (teacher < least)).sum()))
        )
    place = f"after layer {layer} ({beside[layer]:.0f} medians)"
    print(f"{len(ids)} sequences of {LENGTH} tokens, {place}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
