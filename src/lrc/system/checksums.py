"""Cache results of reading a whole file until the file changes.

Checksums of teachers and token files take seconds to minutes. They are kept in the user's cache by
the file's path, and stay valid as long as its size, inode and times do not change.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lrc.system.errors import UserError
from lrc.system.files import write_text


def cache_root(setting: str | None = None) -> Path:
    """Folder of all caches: `setting`, else $LRC_CACHE, else `lrc` in the user's cache."""
    chosen = setting or os.environ.get("LRC_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrc"


def remembered(path: Path, what: str, find_out: Callable[[Path], Any]) -> Any:
    """Return what `find_out` returns for a file, from the cache if the file is unchanged.

    Args:
        path: the file.
        what: name of the result; it distinguishes several results for one file.
        find_out: function that reads the file and returns JSON values.

    Raises:
        OSError: if the file is missing.
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
    if _state(path) == state:  # the file has not changed meanwhile
        with suppress(UserError):  # an unwritable cache costs only time
            write_text(kept, json.dumps({"state": state, "found": found}))
    return found


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


@cache
def source_sha256() -> str:
    """Checksum of the source code of this package, as this process found it first."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Checksum of JSON values, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
