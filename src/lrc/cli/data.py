"""`lrc data build` and `lrc data inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli.console import INTERRUPTED, console, quiet_libraries
from lrc.cli.quantities import MAX_SEED
from lrc.cli.results import prints_results
from lrc.system.errors import UserError

if TYPE_CHECKING:
    from lrc.data.shards import Shards

app = typer.Typer(
    help="Build token shards from mixed, filtered text, and inspect them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command(no_args_is_help=True)
@prints_results
def build(
    mix: Annotated[str, typer.Argument(help="A mix's YAML file, or the name of a shipped one.")],
    out: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting that overrides the mix's."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The teacher whose tokenizer and chat template to use.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Base folder of the mix's relative paths.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="Folder of evaluation sets (JSONL) that no document may overlap."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one per core.")
    ] = None,
) -> None:
    """Mix, filter, deduplicate and tokenize text into shards for training.

    Examples:

    * `lrc data build local-small shards/small --root ../data`
    * `lrc data build mixed-1.1 shards/mixed --teacher meta-llama/Llama-3.2-3B-Instruct`
    * `lrc data build my.yaml shards/mine --evaluation eval --set sources.web.tokens=500M`

    The same command continues a stopped build. `summary.json` and `summary.png` in the folder show
    what every filter dropped.
    """
    from lrc.corpus.mix import absolute, load_mix
    from lrc.corpus.pool import default_workers
    from lrc.recipe import parse_overrides

    flags: dict[str, tuple[str, Any]] = {
        "teacher": ("--teacher", teacher),
        "root": ("--root", root),
        "decontaminate.folder": ("--evaluation", evaluation and absolute(evaluation)),
    }
    loaded = load_mix(mix, parse_overrides(settings or [], flags))
    from lrc.corpus.run import build_shards
    from lrc.model.teacher import load_tokenizer

    quiet_libraries()
    tokenizer = load_tokenizer(loaded.teacher, loaded.revision)
    try:
        shards = build_shards(loaded, tokenizer, out, workers or default_workers())
    except KeyboardInterrupt:
        console.print("Stopped; the same command continues from here.")
        raise typer.Exit(INTERRUPTED) from None
    _print_summary(shards)


@app.command(no_args_is_help=True)
@prints_results
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder of the shards.")],
    documents: Annotated[int, typer.Option(min=0, help="Random documents to show.")] = 3,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the choice of documents.")
    ] = 0,
    characters: Annotated[
        int, typer.Option(min=0, help="Characters to show of a document; 0: all of it.")
    ] = 500,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer to compare and decode with."),
    ] = None,
    checksums: Annotated[
        bool, typer.Option("--checksums/--no-checksums", help="Read and check every byte.")
    ] = True,
) -> None:
    """Show what shards hold, some random documents, and whether every file is intact.

    Examples:

    * `lrc data inspect shards/small`
    * `lrc data inspect shards/mixed --teacher meta-llama/Llama-3.2-3B-Instruct --no-checksums`

    If a file's content has changed, the command names the file and exits with code 2.
    """
    from lrc.corpus.inspect import check_files, count_sources, own_tokenizer, sample_documents
    from lrc.data.shards import open_shards
    from lrc.model.teacher import load_tokenizer
    from lrc.system.progress import task
    from lrc.system.tables import Table

    quiet_libraries()
    shards = open_shards(folder)
    if checksums:
        damaged: list[Path] = []
        with task("Checking every file") as shown:
            for name, found in check_files(shards):
                damaged += found
                shown.describe(name)
        if damaged:
            names = ", ".join(map(str, damaged))
            raise UserError(f"Damaged files: {names}; copy them again or rebuild the shards.")
    table = Table(["split", "source", "documents", "tokens", "share"], right=range(2, 5))
    counts = count_sources(shards)
    for row in counts:
        numbers = (f"{row.documents:,}", f"{row.tokens:,}", f"{row.share:.1%}")
        table.add_row(row.split, row.source, *numbers)
    count = len(shards.shards)
    if not console.as_json:
        console.print(table)
        words = f"{count} shard{'s' * (count > 1)} of {shards.dtype}, tokenizer of {shards.teacher}"
        console.print(words)
    if checksums:
        console.print("Every file is intact.")
    if teacher is None:
        tokenizer = own_tokenizer(shards) if documents else None
    else:
        tokenizer = load_tokenizer(teacher)
        shards.require_tokenizer(tokenizer, teacher)
    drawn = list(sample_documents(shards, tokenizer, documents, seed)) if tokenizer else []
    if console.as_json:
        samples = [{**s._asdict(), "text": s.text[: characters or None]} for s in drawn]
        sources = [row._asdict() for row in counts]
        about = {"shards": count, "dtype": str(shards.dtype), "teacher": shards.teacher}
        about |= {"intact": checksums or None, "sources": sources, "samples": samples}
        console.result(about)
        return
    for sample in drawn:
        where = f"{sample.shard}, document {sample.document}"
        console.rule(f"{where}: {sample.source}, {sample.tokens:,} tokens")
        text = sample.text[: characters or None]
        more = " ..." if len(text) < len(sample.text) else ""
        console.print(text + more)


def _print_summary(shards: "Shards") -> None:
    from lrc.corpus.summary import SUMMARY, tables, warnings_of
    from lrc.system.files import read_json

    summary = read_json(shards.folder / SUMMARY, "remove the folder and build the shards again")
    count = len(shards.of_split("train"))
    files = f"{count} shard{'s' * (count > 1)}"
    console.result(
        {"folder": str(shards.folder), **summary},
        *tables(summary),
        *(f"Note: {warning}" for warning in warnings_of(summary)),
        f"{summary['tokens']['train']:,} training tokens in {files} are in {shards.folder}; "
        f"inspect them with `lrc data inspect {shards.folder}`.",
    )
