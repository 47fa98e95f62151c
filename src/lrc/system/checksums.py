"""What was found out by reading a whole file, remembered until the file changes.

Checksums of teachers and token files take seconds to minutes; they are kept in the user's cache by
the file's path, and hold as long as its size, inode and times are what they were.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lrc.system.errors import UserError
from lrc.system.files import write_text


def cache_root(setting: str | None = None) -> Path:
    """The folder of all caches: the recipe's, else $LRC_CACHE, else `lrc` in the user's cache."""
    chosen = setting or os.environ.get("LRC_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrc"


def remembered(path: Path, what: str, find_out: Callable[[Path], Any]) -> Any:
    """What `find_out` gives for a file, JSON values; from the cache where the file is unchanged.

    Args:
        path: the file.
        what: name of what is found out; it tells several of one file apart.
        find_out: reads the file.

    Raises:
        OSError: the file is not there.
    """
    state = _state(path)
    key = hashlib.sha256(f"{what}\n{path.resolve()}".encode(errors="surrogateescape")).hexdigest()
    kept = cache_root() / "checksums" / f"{key[:32]}.json"
    try:
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if entry["state"] == state:
            return entry["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = find_out(path)
    if _state(path) == state:  # not written meanwhile
        with suppress(UserError):  # a cache that cannot be written costs time alone
            write_text(kept, json.dumps({"state": state, "found": found}))
    return found


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Checksum of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
