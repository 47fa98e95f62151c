"""`lrc plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.cli.quantities import BYTES, COUNTS, quantity
from lrc.cli.results import prints_results
from lrc.cli.training import Settings, Text
from lrc.system.errors import UserError
from lrc.system.tables import Table, size

if TYPE_CHECKING:
    from lrc.planning.plan import Plan, Row


@prints_results
def plan(
    teacher: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf file or package:NAME; no weights needed.")
    ],
    params: Annotated[
        str | None, typer.Option(help="Parameters of the student: 800M, 1.5B.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the teacher's parameters to keep.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for running it, 2GB: weights in --dtype, and --context tokens."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Element type for --memory: bf16, q8_0 or q4_k_m; default: q4_k_m."),
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens in the cache while decoding.")] = 4096,
    tokens: Annotated[
        str | None, typer.Option(help="Training tokens; default: 10B. --out needs it.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU to train and decode on.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="How many of them train.")] = 1,
    mfu: Annotated[
        float, typer.Option(help="Share of the GPU's peak that training is assumed to reach.")
    ] = 0.35,
    probe: Annotated[
        bool, typer.Option("--probe", help="Solve each start on --text, and rank by its loss.")
    ] = False,
    probe_tokens: Annotated[
        int, typer.Option(min=0, help="With --probe, train each for this many tokens first.")
    ] = 0,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that --probe solves each start from; default: 4096."),
    ] = None,
    text: Text = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the recipe of the chosen shape to this file.")
    ] = None,
    choose: Annotated[
        int, typer.Option(min=1, help="The shape for --out, by its number in the table.")
    ] = 1,
) -> None:
    """Compare shapes of a student before any money is spent: size, speed, training cost.

    All candidates use up the same budget. They differ in what is smaller than the teacher's: the
    hidden size, FFN neurons, key/value heads, layers, or several. docs/shapes.md explains every
    column.

    Examples:

    * `lrc plan Qwen/Qwen3-1.7B --params 800M --tokens 10B --gpu h100 --gpus 8`
    * `lrc plan my-teacher --memory 2GB --dtype q4_k_m`
    * `lrc plan my-teacher --ratio 0.5 --text corpus.jsonl.gz --probe`
    * `lrc plan my-teacher --ratio 0.5 --tokens 20M --text corpus.jsonl.gz --out recipe.yaml`, then
      `lrc train recipe.yaml`
    """
    for flag, value, has, by in (
        ("--dtype", dtype, memory is not None, "--memory"),
        ("--calibration-tokens", calibration_tokens, probe, "--probe"),
    ):
        if value is not None and not has:
            raise UserError(f"{flag} goes with {by}: give both.")
    given = {
        "parameters": None if params is None else quantity(params, COUNTS, "--params"),
        "ratio": ratio,
        "memory": None if memory is None else quantity(memory, BYTES, "--memory"),
    }
    total = None if tokens is None else int(quantity(tokens, COUNTS, "--tokens"))
    from lrc.planning.figures import Conditions
    from lrc.planning.gpus import find_gpu
    from lrc.planning.plan import PlanSettings, make_plan
    from lrc.recipe import parse_overrides

    quiet_libraries()
    flags: dict[str, tuple[str, Any]] = {
        "data.text": ("--text", text),
        "train.tokens": ("--tokens", total),
    }
    recipe = parse_overrides(settings or [], flags)
    if out is not None and not {"train", "train.tokens"} & recipe.keys():
        raise UserError("--out writes how long to train: give --tokens.")
    wanted = PlanSettings(
        teacher=teacher,
        dtype=dtype or "q4_k_m",
        conditions=Conditions(find_gpu(gpu), gpus, mfu, context),
        recipe=recipe,
        probe=probe,
        probe_tokens=probe_tokens,
        calibration_tokens=calibration_tokens or 4096,
        **given,
    )
    made = make_plan(wanted, out, choose)
    chosen = {"chosen": choose, "recipe": str(out)} if out else {}
    console.result({**made.as_json(), **chosen}, _table(made), *_words(made, choose, out))


def _table(made: "Plan") -> Table:
    kinds = list(made.rows[0].figures.file_bytes)
    quantized = [kind for kind in ("bf16", "q4_k_m") if kind in kinds]
    experts = any(row.candidate.shape.experts for row in made.rows)
    header = ["", "smaller", "hidden", "FFN", "kv heads", "layers"]
    header += [*["experts"] * experts, "parameters"]
    header += [f"{kind} file" for kind in kinds]
    header += ["K-quants", "cache/token", *(f"{kind} tokens/s" for kind in quantized)]
    header += ["training", "micro-batch", "GPU hours", "held-out loss"]
    table = Table(header, right=range(2, len(header)))
    for number, row in enumerate(made.rows, 1):
        shape, figures = row.candidate.shape, row.figures
        table.add_row(
            str(number),
            row.candidate.kind.replace("-", ", "),
            *map(str, (shape.hidden, shape.neurons, shape.kv_heads, shape.layers)),
            *[str(shape.experts)] * experts,
            f"{figures.parameters:,}",
            *(size(figures.file_bytes[kind]) for kind in kinds),
            "yes" if figures.k_quants else "no",
            size(figures.cache_bytes),
            *(f"{figures.tokens_per_second[kind]:,.0f}" for kind in quantized),
            size(row.training.bytes),
            str(row.training.micro_batch) if row.training.micro_batch else "too large",
            hours(row.training.gpu_hours),
            _loss(row),
        )
    return table


def _loss(row: "Row") -> str:
    if row.measured is not None:
        return f"{row.measured:.3f}" if isinstance(row.measured, float) else "failed"
    return "" if row.expected.loss is None else f"{row.expected.loss:.2f}"


def _words(made: "Plan", choose: int, out: Path | None) -> list[str]:
    under, teacher = made.settings.conditions, made.teacher
    recipe = made.rows[0].recipe
    words = [
        f"Teacher: {teacher.parameters:,} parameters, {size(teacher.file_bytes['bf16'])} in bf16.",
        f"Ranked by {made.ranked_by}.",
        f"Decoding: at most, one sequence with {under.context:,} tokens in the cache, by the "
        f"bytes that {under.gpu.name} moves at {under.gpu.bandwidth / 1e12:g} TB/s.",
        f"Training: {recipe.train.tokens:,} tokens in sequences of {recipe.data.sequence_length} "
        f"on {under.gpus} x {under.gpu.name}; memory of one GPU with micro-batches of "
        f"{recipe.train.micro_batch}, computed. Hours of all GPUs together, by operations at "
        f"{under.mfu:.0%} of the peak, which is assumed, not measured.",
    ]
    if made.teacher_loss is not None:
        words.append(f"Held-out loss of the teacher: {made.teacher_loss:.3f}.")
    else:
        reasons: dict[str, list[str]] = {}
        for number, row in enumerate(made.rows, 1):
            reasons.setdefault(row.expected.reason, []).append(str(number))
        for reason, numbers in reasons.items():
            which = "" if len(reasons) == 1 else f" of {', '.join(numbers)}"
            words.append(f"Expected held-out loss{which}: {reason}.")
    words += [
        f"{number} failed: {row.measured}"
        for number, row in enumerate(made.rows, 1)
        if isinstance(row.measured, str)
    ]
    words += [
        f"Left out ({kind.replace('-', ', ')}): {why.rstrip('.')}."
        for kind, why in made.left_out.items()
    ]
    words += made.notes
    if out is not None:
        words.append(f"The recipe of {choose} is in {out}: run `lrc train {out}`.")
    return words


def hours(number: float) -> str:
    """Hours with three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
