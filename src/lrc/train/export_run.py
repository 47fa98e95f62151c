"""Export the student of a run from its newest checkpoint, in either format."""

import logging
from pathlib import Path

import torch

from lrc.exporting.card import front_matter, model_card
from lrc.exporting.formats import TORCH_NAMES, Dtype, Format
from lrc.exporting.gguf_file import About, about_model, gguf_kind, kind_of, write_gguf
from lrc.exporting.modelfile import modelfile
from lrc.exporting.plain import export_student
from lrc.model.teacher import Teacher, describe_teacher, load_model, short_name
from lrc.run import Run, is_run
from lrc.system.errors import UserError
from lrc.system.files import is_taken, write_text
from lrc.system.progress import task
from lrc.train.checkpoint import list_checkpoints
from lrc.train.closing import best_effort
from lrc.train.inputs import check_inputs
from lrc.train.setup import Setup, set_up

MODELFILE = "Modelfile"

logger = logging.getLogger(__name__)


def export_model(
    model: str,
    out: Path,
    dtype: Dtype | None,
    format: Format | None,
    with_modelfile: bool = False,
    teacher: Teacher | None = None,
) -> None:
    """Write the student of a run, or for GGUF any model, and report where it is.

    Args:
        model: a run's folder, or a model named like a teacher.
        out: a new folder, or a new file whose name ends in .gguf.
        dtype: element type of the weights; None: as trained.
        format: the format; None: as the name of `out` says.
        with_modelfile: whether to write Ollama's Modelfile beside a GGUF file.
        teacher: the loaded teacher of a run that began with one.

    Raises:
        UserError: if the format does not fit the name or the element type, the name is taken, the
            run has no checkpoint, or the disk is full.
    """
    if format is Format.gguf or (format is None and out.suffix == ".gguf"):
        target = out.parent / MODELFILE
        if with_modelfile and target.exists():
            raise UserError(f"{target} already exists: remove it, or export to another folder.")
        _export_gguf(model, out, dtype, teacher, target if with_modelfile else None)
        return
    if with_modelfile:
        raise UserError("--modelfile goes with GGUF: give a file name that ends in .gguf.")
    if out.suffix == ".gguf":
        raise UserError(f"{out} is the name of a GGUF file: leave out --format safetensors.")
    if dtype is Dtype.q8_0:
        raise UserError("q8_0 exists only in GGUF: give a file name that ends in .gguf.")
    if not is_run(Path(model)) and Path(model).is_dir():
        raise UserError(
            f"{model} is not a run, so it can only be written as GGUF: give a file name that ends "
            "in .gguf."
        )
    element = getattr(torch, TORCH_NAMES.get(dtype, dtype)) if dtype else None
    step = export_run(Run.open(Path(model)), out, element, teacher)
    logger.info("The student of step %s is in %s.", step, out)


def _export_gguf(
    model: str, out: Path, dtype: Dtype | None, teacher: Teacher | None, target: Path | None
) -> None:
    """Write a GGUF file and, if `target` is given, a Modelfile from the model's tokenizer and
    sampling settings."""
    if out.suffix != ".gguf":
        raise UserError(f"{out} is not a name for a GGUF file: give a name that ends in .gguf.")
    if out.exists():
        raise UserError(f"{out} already exists: choose a new name for the file.")
    if is_run(Path(model)):
        run = Run.open(Path(model))
        setup = _at_checkpoint(run, teacher)
        student, tokenizer = setup.method.student(), setup.teacher.tokenizer
        about = _about(run, student.config.hidden_size)
        result = f"The student of step {setup.state.step} is in {out}."
    else:
        student, tokenizer = load_model(model)
        about, result = about_model(model), f"{model} is in {out}."
    text = modelfile(out.name, tokenizer, student.generation_config) if target else ""
    kind = gguf_kind(dtype) if dtype else kind_of(student.dtype)
    with task(f"Writing {out}", unit="tensors") as shown:
        notes = write_gguf(student, tokenizer, out, kind, about, shown.update)
    for note in notes:
        logger.warning("Note: %s", note)
    logger.info(result)
    if target:
        write_text(target, text)
        logger.info("%s is for `ollama create`.", target)


def _about(run: Run, hidden_size: int) -> About:
    """The metadata of a run's student."""
    teacher, method = run.recipe.teacher, run.recipe.method.name
    described = describe_teacher(teacher)
    front = front_matter(run, described)
    return About(
        f"{short_name(teacher.model)}-{method}-{hidden_size}",
        described.license,
        front.get("base_model", short_name(teacher.model)),
        tuple(front["tags"]),
        described.languages,
        described.license_name,
        described.license_link,
    )


def export_run(
    run: Run, folder: Path, dtype: torch.dtype | None = None, teacher: Teacher | None = None
) -> int:
    """Write the plain student of a run, finished or not.

    Args:
        run: the run.
        folder: a folder that does not exist yet, or is empty.
        dtype: element type of the written weights; None: the student's.
        teacher: a teacher that is already loaded; None: the recipe's.

    Returns:
        The step of the checkpoint that was used.

    Raises:
        UserError: if the run has no checkpoint, the folder is not empty, or the disk is full.
    """
    if is_taken(folder):
        raise UserError(f"{folder} already exists: choose a new folder for the student.")
    setup = _at_checkpoint(run, teacher)
    student = setup.method.student()
    tokens = setup.state.step * run.recipe.step_tokens()
    card = best_effort("the model card", lambda: model_card(run, setup.teacher, student, tokens))
    export_student(student, setup.teacher.tokenizer, card, folder, dtype)
    return setup.state.step


def _at_checkpoint(run: Run, teacher: Teacher | None) -> Setup:
    """Set up a run at its newest checkpoint, with its own teacher or a loaded one.

    Raises:
        UserError: if it has none.
    """
    if not list_checkpoints(run.checkpoints):
        raise UserError(f"{run.folder} has no checkpoint yet; continue it with `lrc resume`.")
    setup = set_up(run, teacher)
    check_inputs(run, setup.teacher)
    return setup
