"""Files of metrics, with one JSON object per logged step. A crash may damage lines."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from lrc.system.files import disk_errors, new_file, reading

logger = logging.getLogger(__name__)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the logged steps, oldest first, without damaged lines; none if there is no file.

    Raises:
        UserError: if the file cannot be read.
    """
    return [line for line in _lines(file) if line is not None]


def keep_metrics_until(file: Path, step: int) -> None:
    """Drop the lines after a step, which a resumed run writes again, and damaged ones.

    A crash may cut the last line short. If any other line is damaged, the original file is kept
    beside the new one, with a warning.

    Raises:
        UserError: if the file cannot be read, or the disk is full.
    """
    if not file.exists():
        return
    lines = _lines(file)
    if None in lines[:-1]:
        numbers = (n for n in range(1, len(lines) + 2))
        places = (file.with_suffix(f".damaged-{n}.jsonl") for n in numbers)
        aside = next(place for place in places if not place.exists())
        with disk_errors(aside):
            os.rename(file, aside)
        logger.warning(
            "%s had damaged lines, which were removed. The original is kept as %s.", file, aside
        )
    kept = [line for line in lines if line is not None and line["step"] <= step]
    with new_file(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def _lines(file: Path) -> list[dict[str, Any] | None]:
    """The lines of a file; None for a damaged one."""
    if not file.is_file():
        return []
    with reading(file, "check the file"):
        texts = file.read_bytes().splitlines()
    return [_line(text) for text in texts]


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if isinstance(step, int) else None
