"""The harness's own tasks on JSONL files of one folder, where there is no hub.

Every task is the harness's definition with another place to read its rows from: a YAML file that
includes the harness's own one and replaces the data set and the splits. Nothing of a prompt or a
metric is written here.

A folder holds `TASK.jsonl` or `TASK.jsonl.gz` for each task, with the fields of the harness's data
set. Where there is a `TASK_full` too, `TASK` is a sample of it, which a limited evaluation takes.
The members of some groups stand in one file, told apart by a field (mmlu: `subject`).
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
"""Groups whose rows stand in one file, and the field that tells their members apart by what the
harness calls the member's `dataset_name`."""

SUFFIXES = (".jsonl", ".jsonl.gz")


def use_folder(
    manager: "TaskManager", names: list[str], folder: Path, limited: bool, scratch: Path
) -> dict[str, dict[str, str]]:
    """Let tasks read their rows from a folder.

    Args:
        manager: the harness's tasks; its entries of these tasks are replaced.
        names: tasks and groups.
        folder: the folder with the files.
        limited: whether a sample of a task will do.
        scratch: an empty folder for what the harness reads, to be kept while the tasks are used.

    Returns:
        The files that each task reads, with their SHA-256.

    Raises:
        UserError: a file is missing, or is not JSONL of equal fields.
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
        UserError: it is not JSONL, is empty, or its rows differ in their fields.
    """
    rows: list[dict[str, Any]] = []
    for number, row in json_lines(path):
        if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
            raise UserError(
                f"Line {number} of {path} is not a row with the fields of the first one; give one "
                "JSON object a line, all with the same fields."
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows; give one JSON object a line.")
    return rows


def _find(folder: Path, name: str, limited: bool) -> Path:
    """The file of a task: the whole set before a sample of it, the other way round if limited."""
    stems = [name, f"{name}_full"] if limited else [f"{name}_full", name]
    for path in (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES):
        if path.is_file():
            return path
    raise UserError(
        f"{folder} has no file of the task '{name}': add {name}.jsonl (or .jsonl.gz), or leave "
        "the task out with --tasks."
    )


def _members(manager: "TaskManager", name: str) -> Iterator[str]:
    """The tasks of a group, through groups and tags; of a task itself."""
    entry = manager.task_index.get(name)
    if entry is None:
        raise UserError(
            f"The task '{name}' has no definition of its own in the harness and cannot be pointed "
            "at local files; leave it out, or leave out --data."
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
    """Write the rows of each member of a group to a file of its own."""
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
                f"{source} has no rows whose {field} is '{value}'; give rows of all of them, since "
                "the result is their weighted mean."
            )
        paths[member] = scratch / f"{member}.jsonl"
        paths[member].write_text("".join(rows[value]))
    return paths


def _redirect(manager: "TaskManager", name: str, path: Path, scratch: Path) -> None:
    """Replace a task's definition by one that includes it and reads its rows from a file."""
    entry = manager.task_index[name]
    config = entry.cfg or {}
    place = "test_split" if config.get("test_split") else "validation_split"
    if "class" in config or not config.get(place) or config.get("num_fewshot"):
        raise UserError(
            f"The task '{name}' is more than a prompt over rows (it is written in Python or shows "
            "solved examples) and cannot be pointed at local files; leave it out, or leave out "
            "--data."
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
