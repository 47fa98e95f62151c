"""Checksums of what a run learns from: teacher, tokenizer and text.

A new run writes them to inputs.json. Resuming and exporting compare them, because another teacher
or text would silently make it another run.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from lrc.data import Reader
from lrc.data.identity import tokenizer_identity
from lrc.model.gguf import read_header
from lrc.model.locate import ModelFiles
from lrc.model.stored import model_checksums, tensor_checksum
from lrc.model.teacher import Teacher
from lrc.run import Run
from lrc.system.checksums import json_sha256
from lrc.system.errors import UserError
from lrc.system.files import read_json, reading, write_text

COSMETIC = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Configuration keys that do not affect what a teacher computes here."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that a teacher may have been loaded in."""

NAMED = 3
"""Number of differing tensors that a message names."""


def describe_inputs(teacher: Teacher, text: Reader | None) -> dict[str, Any]:
    """Checksums of all inputs of a run, as JSON values. Reads every byte of the teacher once.

    Args:
        teacher: the teacher.
        text: the text; None: omit it.

    Raises:
        UserError: if the teacher's files are damaged.
    """
    files = teacher.files
    found: dict[str, Any] = {
        "teacher": _of_model(teacher) if files is None else _of_files(files),
        "tokenizer": asdict(tokenizer_identity(teacher.tokenizer)),
    }
    if text is not None:
        found["text"] = text.identity
    return found


def check_inputs(
    run: Run, teacher: Teacher, text: Reader | None = None, earlier: Run | None = None
) -> None:
    """Compare the inputs with those that a run began with; for a new run, write them.

    Args:
        run: the run.
        teacher: its teacher.
        text: its text; None: compare only teacher and tokenizer, and write nothing.
        earlier: a run that a new one must have the inputs of; None: a new one may have any.

    Raises:
        UserError: if teacher, tokenizer or text differ; the message says what differs.
    """
    found = describe_inputs(teacher, text)
    began = run if run.inputs_file.is_file() else earlier
    if began is not None:
        advice = f"remove it to skip the check of {run.folder}"
        kept = read_json(began.inputs_file, advice)
        with reading(began.inputs_file, advice):
            changed = list(differences(kept, found, teacher))
        if changed:
            restore = "Restore them"
            if kept["teacher"]["of"] == "model" and teacher.files is not None:
                restore = "Pass the loaded teacher to lrc.resume or lrc.export"
            here, new = ("it", "run") if began is run else (run.folder, "comparison")
            raise UserError(
                f"{began.folder} began with other inputs ({'; '.join(changed)}), so {here} cannot "
                f"continue. {restore}, or start a new {new}."
            )
    if began is not run and text is not None:
        write_text(run.inputs_file, json.dumps(found, indent=1) + "\n")


def differences(before: dict[str, Any], now: dict[str, Any], teacher: Teacher) -> Iterator[str]:
    """Name each difference between two descriptions. A part that one of them lacks is ignored.

    Args:
        before: the first description.
        now: the second one.
        teacher: the teacher of the second one.
    """
    ours, theirs = before["teacher"], now["teacher"]
    if ours["of"] == theirs["of"]:
        names = {**ours["tensors"], **theirs["tensors"]}
        changed = [n for n in names if ours["tensors"].get(n) != theirs["tensors"].get(n)]
    else:
        changed = list(_changed_values(teacher, ours["tensors"]))
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        yield f"the teacher's {', '.join(changed[:NAMED])}{more}"
    if ours["of"] == theirs["of"] and ours["settings"] != theirs["settings"]:
        yield "the teacher's configuration"
    if before["tokenizer"] != now["tokenizer"]:
        yield "the tokenizer"
    if "text" in before and "text" in now and before["text"] != now["text"]:
        yield "the text"


def _changed_values(teacher: Teacher, checksums: dict[str, str]) -> Iterator[str]:
    """Names of a teacher's tensors that have none of their element types' checksum: a model may
    have been loaded in another one than its files have. Names of quantized files are not compared.
    """
    if getattr(teacher.config, "quantization_config", None) is not None:
        return
    for name, value in teacher.model.state_dict().items():
        if name in checksums and not value.is_meta:
            types = {value.dtype, *(FLOATS if value.is_floating_point() else ())}
            if all(tensor_checksum(value.to(dtype)) != checksums[name] for dtype in types):
                yield name


def _of_model(teacher: Teacher) -> dict[str, Any]:
    """Describe a teacher that was passed as a loaded model."""
    tensors = {
        name: tensor_checksum(value)
        for name, value in teacher.model.state_dict().items()
        if not value.is_meta
    }
    return {
        "of": "model",
        "settings": _settings_sha256(teacher.config.to_dict()),
        "tensors": tensors,
    }


def _of_files(files: ModelFiles) -> dict[str, Any]:
    """Describe a teacher's files. Checksums are per tensor, so the files may be moved, copied or
    split differently."""
    tensors = model_checksums(files)
    if files.gguf_path is not None:
        settings, _ = read_header(files.gguf_path)
        kept = {k: v for k, v in settings.items() if not k.startswith(("general.", "tokenizer."))}
    else:
        kept = read_json(files.folder / "config.json", "give a valid model folder")
    return {"of": "files", "settings": _settings_sha256(kept), "tensors": tensors}


def _settings_sha256(settings: dict[str, Any]) -> str:
    kept = {name: value for name, value in settings.items() if name not in COSMETIC}
    return json_sha256(json.loads(json.dumps(kept, default=str)))
