"""The output of a finished run: the student, the closing table, samples and the plot."""

import json
import logging
import resource
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from lrc.cloning.cost import matmul_peak
from lrc.cloning.method import CountsFlops
from lrc.evaluation.held_out import Agreement, measure_agreement, perplexity
from lrc.evaluation.sample import continue_tokens
from lrc.exporting.card import model_card
from lrc.exporting.plain import export_student
from lrc.model.precision import forward_dtype
from lrc.model.shapes import shape_of
from lrc.report.curves import draw_curves
from lrc.system.errors import reason
from lrc.system.files import write_text
from lrc.system.progress import task
from lrc.system.tables import Table
from lrc.train.loop import Loop
from lrc.train.muon import orthogonal_flops, orthogonal_parameters
from lrc.train.setup import describe_compute

logger = logging.getLogger(__name__)

STEP_PARTS = ("data", "teacher", "student", "loss", "projection", "optimizer")
"""Parts of the clock that belong to optimizer steps."""

Made = TypeVar("Made")

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 48


def close_run(loop: Loop) -> dict[str, Any]:
    """Export the student, compare it with the teacher, and write the closing table.

    Card, samples and plot are best effort: an error in one of them is reported and affects nothing
    else.

    Args:
        loop: the run at its last step.

    Raises:
        UserError: if the disk is full.
    """
    run, setup = loop.run, loop.setup
    student = setup.method.student()
    if loop.world.leads or setup.teacher.sharded:
        with task("Comparing the student with its teacher"):
            agreement = measure_agreement(
                setup.teacher, student, loop.held_out(), loop.text.sources
            )
            others = {
                name: measure_agreement(setup.teacher, student, batches)
                for name, batches in loop.also_held_out()
            }
    if not loop.world.leads:
        return loop.world.from_first({})
    summary = summarize(loop, agreement, student)
    summary["also_held_out"] = {name: _losses(found) for name, found in others.items()}
    summary["samples"] = best_effort("samples", lambda: samples(loop, student)) or {}
    card = best_effort(
        "the model card",
        lambda: model_card(run, setup.teacher, student, loop.tokens(), summary),
    )
    export_student(student, setup.teacher.tokenizer, card, run.student_folder)
    best_effort("the plot", lambda: draw_curves(run, run.folder / "curves.png", summary))
    # Last, since it marks the output as complete.
    write_text(run.summary_file, json.dumps(summary, indent=2))
    return loop.world.from_first(summary)


def best_effort(what: str, make: Callable[[], Made]) -> Made | None:
    """Call a function that makes an optional output. On failure, log a warning and return None.

    Args:
        what: name of the output, for the warning.
        make: the function.
    """
    try:
        return make()
    except Exception as error:
        logger.warning("Could not make %s (%s); the student is complete.", what, reason(error))
        return None


def summarize(loop: Loop, agreement: Agreement, student: PreTrainedModel) -> dict[str, Any]:
    """The closing table of a run, as JSON values."""
    run, setup = loop.run, loop.setup
    steps_rate = loop.tokens() / loop.step_seconds if loop.step_seconds else None
    return {
        "method": run.recipe.method.name,
        "teacher_parameters": shape_of(setup.teacher.model).parameters,
        "student_parameters": shape_of(student).parameters,
        "shapes": {
            "teacher": shape_of(setup.teacher.model).row,
            "student": shape_of(student).row,
        },
        "tokens": loop.tokens(),
        **loop.calibration(),
        "calibration_forwards": calibration_forwards(loop),
        "step_seconds": round(loop.step_seconds, 3),
        "seconds": round(loop.seconds(), 1),
        "tokens_per_second": None if steps_rate is None else round(steps_rate, 1),
        "teacher_held_out_lm": agreement.teacher_loss,
        "student_held_out_lm": agreement.student_loss,
        "teacher_perplexity": perplexity(agreement.teacher_loss),
        "student_perplexity": perplexity(agreement.student_loss),
        "kl": agreement.kl,
        "top1_agreement": agreement.top1,
        "held_out_labels": agreement.tokens,
        "held_out_by_source": {
            name: {"teacher_lm": theirs, "student_lm": ours, "labels": labels}
            for name, (theirs, ours, labels) in agreement.by_source.items()
        },
        "computed_on": describe_compute(run.recipe.train, setup.device),
        "flop_utilization": flop_utilization(loop),
        "peak_memory_gib": peak_memory_gib(setup.device),
        "time_shares": setup.method.clock.shares(),
    }


def _losses(found: Agreement) -> dict[str, float]:
    return {
        "teacher_lm": found.teacher_loss,
        "student_lm": found.student_loss,
        "labels": found.tokens,
    }


def samples(loop: Loop, student: PreTrainedModel) -> dict[str, str]:
    """Greedy continuations by both models of the beginning of the held-out text."""
    teacher, tokenizer = loop.setup.teacher, loop.setup.teacher.tokenizer
    start = loop.held_out()[0].input_ids[0, :PROMPT_TOKENS]
    prompt = tokenizer.decode(start, skip_special_tokens=True)
    theirs = "(not written: this process does not have the whole teacher)"
    if not (teacher.on_disk or teacher.sharded):
        theirs = continue_tokens(teacher.model, tokenizer, start.tolist(), SAMPLE_TOKENS)
    return {
        "prompt": prompt,
        "teacher": theirs,
        "student": continue_tokens(student, tokenizer, start.tolist(), SAMPLE_TOKENS),
    }


def closing_table(summary: dict[str, Any]) -> Table:
    """The closing table of a run, from its summary."""
    table = Table(["", "teacher", "student"])
    table.add_row(
        "parameters", f"{summary['teacher_parameters']:,}", f"{summary['student_parameters']:,}"
    )
    _add_row(table, "held-out LM loss", summary, "held_out_lm", ".4f")
    for name, losses in summary["held_out_by_source"].items():
        _add_row(table, f"  of {name}", losses, "lm", ".4f")
    for name, losses in summary.get("also_held_out", {}).items():
        _add_row(table, f"held-out LM loss, {name}", losses, "lm", ".4f")
    _add_row(table, "held-out perplexity", summary, "perplexity", ",.2f")
    table.add_row("same top-1 prediction", "", f"{summary['top1_agreement']:.1%}")
    table.add_row("KL(teacher, student)", "", f"{summary['kl']:.4f}")
    if ratio := summary.get("calibration_forwards"):
        table.add_row("calibration / teacher forward", "", f"{ratio:.1f}x the time")
    table.add_row("training tokens", "", f"{summary['tokens']:,}")
    if summary["tokens"]:
        table.add_row("tokens per second (steps)", "", f"{summary['tokens_per_second']:,.0f}")
    if summary["flop_utilization"] is not None:
        table.add_row("share of measured peak FLOP/s", "", f"{summary['flop_utilization']:.0%}")
    table.add_row("peak memory", "", f"{summary['peak_memory_gib']:.1f} GiB")
    return table


def _add_row(table: Table, label: str, values: dict[str, Any], key: str, form: str) -> None:
    """Add a row for a figure that both models have."""
    table.add_row(label, *(format(values[f"{who}_{key}"], form) for who in ("teacher", "student")))


def calibration_forwards(loop: Loop) -> float | None:
    """Time of the calibration, as a multiple of the time that the teacher's layers alone need for
    the same tokens; None if that was not measured."""
    if not loop.forward_seconds:
        return None
    return round(loop.calibration_seconds / loop.forward_seconds, 2)


def flop_utilization(loop: Loop) -> float | None:
    """Matrix-product operations per second of the steps, as a share of this machine's measured
    peak.

    None if this process made no step, if the method's operations are not known, or if the peak was
    measured on a busy machine (the steps were faster than it)."""
    recipe, setup = loop.run.recipe, loop.setup
    size = recipe.step_tokens(), recipe.data.sequence_length
    steps = range(loop.first_step, setup.state.step)
    method = setup.method
    if not steps or not isinstance(method, CountsFlops):
        return None
    by_step = [method.step_flops(step, *size) for step in steps]
    if None in by_step:
        return None
    flops = sum(value or 0.0 for value in by_step)
    if recipe.train.optimizer == "muon":  # the last stage's matrices
        flops += len(steps) * orthogonal_flops(orthogonal_parameters(method).values())
    spent = setup.method.clock.seconds
    seconds = sum(spent.get(part, 0.0) for part in STEP_PARTS)
    dtype = forward_dtype(recipe.train.precision, setup.device)
    share = flops / seconds / matmul_peak(setup.device, dtype)
    return share if share <= 1 else None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the device on cuda, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
