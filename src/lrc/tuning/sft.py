"""Tune a model on conversations and export it. The folder of a tuning holds:

sft.yaml            its settings
environment.json    versions, commit, machine
inputs.json         checksums of the model, the teacher and the conversations
before.json         the held-out losses before the first step
metrics.jsonl       one line per logged step
checkpoints/        TRL's checkpoints, to resume from
summary.json        the final table
curves.png          the losses over the steps
student/            the tuned model, a plain transformers model
"""

import copy
import json
import logging
import math
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from lrc.exporting.card_changes import tuned_card
from lrc.exporting.plain import export_student
from lrc.model.families import check_supported, family_of
from lrc.model.locate import locate, locate_locally
from lrc.model.stored import model_checksums
from lrc.model.teacher import Teacher, load_model, load_teacher, load_tokenizer, short_name
from lrc.model.tokenizer import end_tokens
from lrc.preflight import check_installed
from lrc.run import ENVIRONMENT, student_of
from lrc.system.checksums import json_sha256
from lrc.system.distributed import World, join, lost_peers, may_restart
from lrc.system.environment import describe_environment
from lrc.system.errors import UserError
from lrc.system.files import hold, is_taken, read_json, write_text
from lrc.system.installed import is_installed
from lrc.system.progress import Task, task
from lrc.system.tables import Table
from lrc.train.closing import best_effort
from lrc.train.session import Interrupted, refuse_differences, refuse_remainder
from lrc.train.setup import find_device
from lrc.train.signals import stop_on_signals
from lrc.tuning.report import draw_tuning
from lrc.tuning.settings import (
    BEFORE,
    METRICS,
    SETTINGS,
    SUMMARY,
    Tuning,
    is_tuning,
    open_tuning,
)

if TYPE_CHECKING:
    from lrc.tuning.conversations import Conversations
    from lrc.tuning.trainers import HeldOutLoss

logger = logging.getLogger(__name__)

STUDENT, INPUTS = "student", "inputs.json"


def default_folder(model: str) -> Path:
    """Choose a new folder below `runs/`, named after the model and the time; the first process
    chooses for all.

    Raises:
        UserError: if the launcher may restart processes, which would then choose another.
    """
    if may_restart():
        raise UserError("A launcher that restarts processes needs a folder: give one with --out.")
    return join().from_first(
        Path("runs") / f"{short_name(model)}-sft-{datetime.now():%Y%m%d-%H%M%S}"
    )


def sft(tuning: Tuning, folder: Path) -> dict[str, Any]:
    """Tune a model from its newest checkpoint or from the beginning.

    If a launcher started several processes, all of them call this and tune the model together.

    Args:
        tuning: the settings.
        folder: a new folder, or that of an earlier tuning with the same settings.

    Returns:
        The final table, as in summary.json.

    Raises:
        UserError: if the model, the teacher or the data is not usable, the folder holds something
            else, or a library is missing.
        DivergedError: if the loss is not finite.
        Interrupted: if SIGINT or SIGTERM stops it; the same call continues.
    """
    _check(tuning, folder)
    world = join()
    refuse_remainder("accumulate", tuning.accumulate, world)
    held = f"Another process is working on {folder}: wait for it, or stop it first."
    with hold(folder, held) if world.leads else nullcontext():
        ended = (folder / SUMMARY).is_file() and (folder / STUDENT).is_dir()
        if world.from_first(ended):
            logger.info("%s has ended.", folder)
            return read_json(folder / SUMMARY, "remove it and tune again")
        return _tune(tuning, folder, world)


def _check(tuning: Tuning, folder: Path) -> None:
    """Refuse what can be refused before anything slow."""
    missing = [name for name in ("trl", "peft") if not is_installed(name)]
    if missing:
        raise UserError(f"Chat tuning needs {missing[0]}; run `pip install 'low-rank-clone[sft]'`.")
    from lrc.tuning.conversations import check_sources

    check_sources(tuning.data)
    check_installed(tuning.report_to)
    for name in (tuning.model, tuning.teacher):
        if name is not None:
            locate_locally(student_of(name))
    if is_tuning(folder):
        if open_tuning(folder).model_dump() != tuning.model_dump():
            raise UserError(
                f"{folder} holds a tuning with other settings: choose another folder with --out, "
                f"or continue it with `lrc resume {folder}`."
            )
    elif is_taken(folder):
        raise UserError(f"{folder} already exists: choose another folder with --out.")


def _tune(tuning: Tuning, folder: Path, world: World) -> dict[str, Any]:
    from lrc.tuning.conversations import Encoder, encode_all, read_conversations
    from lrc.tuning.trainers import (
        HeldOutLoss,
        Reporter,
        make_trainer,
        plain_model,
        refuse_not_finite,
    )

    with task(f"Loading {tuning.model}"):
        model, tokenizer = load_model(student_of(tuning.model))
        family = check_supported(model.config)
        if tuning.packing and not family.keeps_documents_apart:
            raise UserError(
                f"packing is set, but {family.model_type} models cannot keep the conversations of "
                "a sequence apart: set it to false."
            )
    with task(f"Reading the conversations of {', '.join(tuning.data)}"):
        conversations = encode_all(
            read_conversations(tuning.data, tuning.split),
            Encoder(tokenizer, tuning.max_length),
            tuning.held_out_fraction,
            tuning.held_out_conversations,
            tuning.seed,
            keep_messages=tuning.on_policy,
        )
    for why, count in conversations.left_out.items():
        logger.warning(f"{count:,} conversations were left out: {why}.")
    _end_answers(model, tokenizer, conversations.answer_end(tokenizer))
    teacher = None if tuning.teacher is None else _teacher(tuning, model, tokenizer)
    inputs = _inputs(tuning, conversations)
    mine = {"settings": tuning.to_yaml(), "folder": str(folder.resolve())}
    refuse_differences(mine | {"conversations": inputs["conversations"]}, world)
    if world.leads:
        _begin(tuning, folder, inputs)
    world.wait()

    dtype, was = model.dtype, _kept(model)
    model.float()
    started, checkpoints = time.perf_counter(), folder / "checkpoints"
    with stop_on_signals() as stop, task("Tuning") as shown:
        reporter = Reporter(folder / METRICS, stop, lambda line: _show(line, shown), world)
        trainer = make_trainer(
            tuning, model, tokenizer, teacher, conversations, checkpoints, reporter, world
        )
        held_out = HeldOutLoss(conversations.held_out, tokenizer, tuning.micro_batch, world)
        before = _before(folder, held_out, plain_model(trainer.model), teacher)
        if not math.isfinite(before["held_out_lm"]):
            raise UserError(
                f"The held-out loss of {tuning.model} is not finite before tuning: its weights are "
                "damaged, so give another model."
            )
        logger.info("Held-out loss on answers before tuning: %.4f", before["held_out_lm"])
        newest = world.from_first(_newest(checkpoints))
        with lost_peers():
            trainer.train(resume_from_checkpoint=newest)
        if stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                stop.signal,
                f"Stopped after step {trainer.state.global_step}; continue with "
                f"`lrc resume {folder}`.",
            )
    tuned = trainer.model
    if tuning.lora_rank:
        tuned = tuned.merge_and_unload()
    _restore(tuned, was)
    with task("Measuring and exporting"):
        after = held_out.measure(tuned)
        refuse_not_finite(after, trainer.state.global_step)
        summary = {
            "model": tuning.model,
            "data": tuning.data,
            "teacher": tuning.teacher,
            "training_conversations": len(conversations.training),
            "held_out_conversations": len(conversations.held_out),
            "training_answer_tokens": sum(int(one.learned.sum()) for one in conversations.training),
            "steps": trainer.state.global_step,
            "held_out_lm_before": before["held_out_lm"],
            "held_out_lm": after,
            "teacher_held_out_lm": before["teacher_held_out_lm"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        if world.leads:
            _export(tuned, tuning, summary, folder / STUDENT, dtype)
            write_text(folder / SUMMARY, json.dumps(summary, indent=2))
            best_effort("the plot", lambda: draw_tuning(folder))
    return world.from_first(summary)


def _export(
    tuned: PreTrainedModel,
    tuning: Tuning,
    summary: dict[str, Any],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write the tuned model with its card."""
    name = student_of(tuning.model)
    settings = tuning.model_dump(mode="json")
    card = best_effort("the model card", lambda: tuned_card(name, settings, summary))
    export_student(tuned, load_tokenizer(name), card, folder, dtype)


def _newest(checkpoints: Path) -> str | None:
    """The newest whole checkpoint; TRL writes the trainer's state last."""
    whole = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _end_answers(model: PreTrainedModel, tokenizer: Any, end: int | None) -> None:
    """Let generation stop at the token by which the chat template ends answers."""
    known = end_tokens(tokenizer, model.generation_config)
    if end is None or end in known:
        return
    model.generation_config.eos_token_id = sorted([*known, end])
    logger.info(
        "Answers end with %s, so it ends a text from now on (generation_config.json).",
        tokenizer.convert_ids_to_tokens(end),
    )


def _teacher(tuning: Tuning, model: PreTrainedModel, tokenizer: Any) -> Teacher:
    """Load the teacher and refuse one whose logits cannot be compared."""
    assert tuning.teacher is not None
    with task(f"Loading {tuning.teacher}"):
        teacher = load_teacher(student_of(tuning.teacher), find_device(tuning.device))
    if teacher.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"The tokenizers of {tuning.model} and its teacher {tuning.teacher} differ: give a "
            "teacher with the same tokenizer."
        )
    ours = family_of(model.config.model_type).logit_softcap(model.config)
    if ours != teacher.logit_softcap and not tuning.on_policy:
        raise UserError(
            f"{tuning.model} and its teacher {tuning.teacher} cap their logits in different ways, "
            "so they cannot be compared: give another teacher."
        )
    return teacher


def _inputs(tuning: Tuning, conversations: "Conversations") -> dict[str, str]:
    """Checksums of what a tuning learns from."""
    found = {"conversations": conversations.fingerprint()}
    for role, name in (("model", tuning.model), ("teacher", tuning.teacher)):
        if name is not None:
            found[role] = json_sha256(model_checksums(locate(student_of(name))))
    return found


def _begin(tuning: Tuning, folder: Path, inputs: dict[str, str]) -> None:
    """Write the settings of a new tuning, or refuse other inputs than it began with."""
    if not is_tuning(folder):
        write_text(folder / INPUTS, json.dumps(inputs))
        write_text(folder / ENVIRONMENT, json.dumps(describe_environment(), indent=2))
        write_text(folder / SETTINGS, tuning.to_yaml())
        return
    kept = read_json(folder / INPUTS, "start a new tuning")
    changed = [f"the {name}" for name, value in inputs.items() if kept.get(name, value) != value]
    if changed:
        raise UserError(
            f"{folder} began with other inputs ({', '.join(changed)}): restore them, or start a "
            "new tuning."
        )


def _before(
    folder: Path, held_out: "HeldOutLoss", model: PreTrainedModel, teacher: Teacher | None
) -> dict[str, Any]:
    """The held-out losses before the first step, measured once."""
    path, world = folder / BEFORE, held_out.world
    if not world.from_first(path.is_file()):
        theirs = None if teacher is None else held_out.measure(teacher.model)
        found = {"held_out_lm": held_out.measure(model), "teacher_held_out_lm": theirs}
        if world.leads:
            write_text(path, json.dumps(found))
    return world.from_first(read_json(path, "remove it") if world.leads else {})


def _kept(model: PreTrainedModel) -> tuple[Any, Any]:
    """Copies of what TRL changes beside the weights."""
    return copy.deepcopy(model.config), copy.deepcopy(model.generation_config)


def _restore(model: PreTrainedModel, was: tuple[Any, Any]) -> None:
    """Undo what TRL changed: configurations, its patch of the forward pass, and tags."""
    model.config, model.generation_config = was
    vars(model).pop("forward", None)
    model.model_tags = None
    model.requires_grad_(False)
    model.eval()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(line: dict[str, Any], shown: Task) -> None:
    of = f"step {line['step']} of {line['steps']}"
    if "eval_loss" in line:
        logger.info("%s: held-out loss on answers %.4f", of, line["eval_loss"])
    elif "loss" in line:
        terms = [f"{name} {line[name]:.3f}" for name in ("loss", "lm", "kl") if name in line]
        shown.update(line["step"], line["steps"], ", ".join(terms))


def closing_table(summary: dict[str, Any]) -> Table:
    """The final table of a tuning, from its summary."""
    table = Table(["", "before", "after"])
    before, after = summary["held_out_lm_before"], summary["held_out_lm"]
    table.add_row("held-out loss on answers", f"{before:.4f}", f"{after:.4f}")
    if (theirs := summary["teacher_held_out_lm"]) is not None:
        table.add_row("the teacher's", f"{theirs:.4f}", "")
    return table
