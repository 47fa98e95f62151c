"""The harness's own tasks on JSONL files in a local folder, for use without the hub.

Every task keeps the harness's definition and reads its rows from another place. A YAML file
includes the harness's definition and replaces the data set and the splits. This module defines no
prompts or metrics.

The folder holds `TASK.jsonl` or `TASK.jsonl.gz` for each task, with the fields of the harness's
data set. If there is also a `TASK_full`, then `TASK` is a sample of it, and a limited evaluation
reads the sample. Some groups keep all members in one file, where a field names the member (mmlu:
`subject`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lrc.data.text_files import json_lines
from lrc.system.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

POOLED = {"mmlu": "subject"}
"""Groups that keep all rows in one file, with the field that names the member. Its values are the
`dataset_name`s of the members in the harness."""

SUFFIXES = (".jsonl", ".jsonl.gz")


def use_folder(
    manager: "TaskManager", names: list[str], folder: Path, limited: bool, scratch: Path
) -> dict[str, dict[str, str]]:
    """Make tasks read their rows from a folder.

    Args:
        manager: the harness's tasks; the entries of the given tasks are replaced.
        names: tasks and groups.
        folder: the folder with the files.
        limited: whether a sample of a task is enough.
        scratch: an empty folder for the files that the harness reads; it must exist as long as the
            tasks are in use.

    Returns:
        The files that each task reads, with their SHA-256.

    Raises:
        UserError: if a file is missing, or is not JSONL with the same fields in every row.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder '{folder}'; give --data a folder of JSONL files.")
    return {name: _use_task(manager, name, folder, limited, scratch) for name in names}


def _use_task(
    manager: "TaskManager", name: str, folder: Path, limited: bool, scratch: Path
) -> dict[str, str]:
    members = list(dict.fromkeys(_members(manager, name)))
    if name in POOLED:
        source = _find(folder, name, limited)
        sources = [source]
        paths = _split(manager, members, source, POOLED[name], scratch)
    else:
        paths = {member: _find(folder, member, limited) for member in members}
        sources = list(paths.values())
        for path in sources:
            read_rows(path)
    for member, path in paths.items():
        _redirect(manager, member, path, scratch)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, plain or .gz.

    Raises:
        UserError: if the file is not JSONL, is empty, or its rows have different fields.
    """
    rows: list[dict[str, Any]] = []
    for number, row in json_lines(path):
        if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
            raise UserError(
                f"Line {number} of {path} does not have the fields of the first line; give one "
                "JSON object per line, all with the same fields."
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows; give one JSON object per line.")
    return rows


def _find(folder: Path, name: str, limited: bool) -> Path:
    """The file of a task: the full set if there is one, or the sample first if limited."""
    stems = [name, f"{name}_full"] if limited else [f"{name}_full", name]
    for path in (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES):
        if path.is_file():
            return path
    raise UserError(
        f"{folder} has no file for the task '{name}': add {name}.jsonl (or .jsonl.gz), or leave "
        "the task out of --tasks."
    )


def _members(manager: "TaskManager", name: str) -> Iterator[str]:
    """The tasks of a group or tag, resolved recursively; a plain task yields itself."""
    entry = manager.task_index.get(name)
    if entry is None:
        raise UserError(
            f"The task '{name}' has no definition of its own in the harness and cannot read local "
            "files; leave it out, or leave out --data."
        )
    if name in manager.all_groups:
        for member in (entry.cfg or {})["task"]:
            own = member if isinstance(member, str) else member.get("group", member.get("task"))
            yield from _members(manager, own)
    elif name in manager.all_tags:
        for member in sorted(entry.tags):
            yield from _members(manager, member)
    else:
        yield name


def _split(
    manager: "TaskManager", members: list[str], source: Path, field: str, scratch: Path
) -> dict[str, Path]:
    """Write the rows of each member of a group to a separate file."""
    rows: dict[str, list[str]] = {}
    for row in read_rows(source):
        if field not in row:
            raise UserError(f"The rows of {source} lack the field '{field}'; add it.")
        rows.setdefault(row[field], []).append(json.dumps(row) + "\n")
    paths = {}
    for member in members:
        value = (manager.task_index[member].cfg or {})["dataset_name"]
        if value not in rows:
            raise UserError(
                f"{source} has no rows whose {field} is '{value}'; the result is a weighted mean, "
                f"so give rows for every {field}."
            )
        paths[member] = scratch / f"{member}.jsonl"
        paths[member].write_text("".join(rows[value]))
    return paths


def _redirect(manager: "TaskManager", name: str, path: Path, scratch: Path) -> None:
    """Replace a task's definition with one that includes it and reads the rows from a file."""
    entry = manager.task_index[name]
    config = entry.cfg or {}
    place = "test_split" if config.get("test_split") else "validation_split"
    if "class" in config or not config.get(place) or config.get("num_fewshot"):
        raise UserError(
            f"The task '{name}' is written in Python or shows solved examples, so it cannot read "
            "local files; leave it out, or leave out --data."
        )
    splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    definition = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {config[place]: str(path.resolve())},
            "cache_dir": str(scratch / "cache"),
        },
        **splits,
        place: config[place],
    }
    own = scratch / f"{name}.yaml"
    own.write_text(yaml.safe_dump(definition))
    manager.task_index[name] = dataclasses.replace(entry, yaml_path=own)
