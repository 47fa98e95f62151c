"""Reading and writing files, so that whatever goes wrong ends in a sentence and loses nothing.

Everything is written under a temporary name beside its place, flushed to the disk, and renamed: a
crash, a kill or a full disk never leaves half a file that looks whole. Temporary names are random
and created exclusively, so that no link that somebody left there is followed.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lrc.system.errors import UserError, reason, system_errno, system_sentence

LOCK = ".lock"
"""Name of the file in a folder that `hold` locks."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp", re.DOTALL)

_CLAIM_SECONDS = 1.0
"""A temporary file that is younger may not be claimed yet by the process that writes it."""

Kind = TypeVar("Kind", dict[str, Any], list[Any])


@contextmanager
def reading(path: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """Turn whatever goes wrong while a user's file is read into a sentence that names it.

    Args:
        path: the file or folder, or how the user calls it.
        advice: what to do, as the end of the sentence.

    Raises:
        UserError: anything was raised in the block.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): {advice}.") from error


def read_json(path: Path, advice: str, kind: type[Kind] = dict) -> Kind:  # type: ignore[assignment]
    """Read a JSON file that holds an object (or, where `kind` is list, an array).

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    with reading(path, advice):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            wanted = "object" if kind is dict else "array"
            raise ValueError(f"it is not a JSON {wanted} but a {type(value).__name__}")
        return value


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever the operating system says while `path` is written into a sentence.

    Raises:
        UserError: a full, unwritable or missing disk, too many open files, a file in the way, ...
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries in Rust raise errors of their own types.
        if not isinstance(error, OSError) and system_errno(error) is None:
            raise
        raise UserError(system_sentence(error, _place(error, Path(path)), "written")) from error


def _place(error: Exception, path: Path) -> str:
    """What an error is about: `path`, unless the error names a file that is not below it."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str | os.PathLike):
        return str(path)
    inside = Path(os.fspath(named)).absolute().is_relative_to(path.absolute().parent)
    return str(path) if inside else str(named)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on leaving without an error it becomes `path`.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with disk_errors(path):
        path = _through_links(path)
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file that can be replaced: choose another name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(path.parent, path.name)
        temporary = _temporary(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _claim(descriptor)
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving without an error it becomes `path`.

    An older folder of that name is replaced. One that cannot be replaced as a whole (the current
    folder, a mount point) is filled instead.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with disk_errors(path):
        path = _through_links(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another name for the folder.")
        stays = path.is_dir() and (path.resolve() == Path.cwd() or path.is_mount())
        beside = path / "content" if stays else path
        beside.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(beside.parent, beside.name)
        temporary, replaced = _temporary(beside), _temporary(beside)
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            _claim(descriptor)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # safetensors leaves its files private
                flush(file)
            flush(temporary)
            if stays:
                for file in temporary.iterdir():
                    os.replace(file, path / file.name)
            else:
                if path.exists():
                    os.rename(path, replaced)
                os.rename(temporary, path)
            flush(path.parent)
        finally:
            if replaced.exists() and not path.exists():
                os.rename(replaced, path)  # the new folder could not take its place
            for left in (temporary, replaced):
                shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody can foresee."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _claim(descriptor: int) -> None:
    """Mark a temporary file or folder as one whose process is alive; a kill ends the mark."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_left_over(name: str) -> bool:
    """Whether a file of this name is a lock, or a temporary one of ours."""
    return name == LOCK or bool(_TEMPORARY.fullmatch(name))


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders whose processes were killed.

    Args:
        folder: where they are; folders below it are not searched.
        name: only those of the file or folder of this name.
    """
    try:
        found = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    except OSError:
        return
    for path in found:
        if name is None or path.name[1:].rpartition(".tmp")[0][:-13] == name:
            _remove_unclaimed(path)


def _remove_unclaimed(path: Path) -> None:
    try:
        if path.is_symlink() or time.time() - path.stat().st_mtime < _CLAIM_SECONDS:
            return
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # its own process has just removed it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path)
    except OSError:
        return  # its process is alive
    finally:
        os.close(descriptor)


def _through_links(path: Path) -> Path:
    """The place that a path means, links followed.

    Raises:
        UserError: it is a link to nothing.
    """
    if path.is_symlink():
        if not path.exists():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist: remove the link, "
                "or choose another name."
            )
        return path.resolve()
    return path


def remove(path: Path) -> None:
    """Remove a file or a whole folder; no error where it is gone or cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_taken(folder: Path, ours: Callable[[str], bool] = is_left_over) -> bool:
    """Whether something stands where a new folder is to go.

    Args:
        folder: the folder.
        ours: names of files in it that do not count; default: what killed processes left.
    """
    if folder.is_symlink() and not folder.exists():
        return True
    if not folder.exists():
        return False
    with disk_errors(folder):
        return not folder.is_dir() or any(not ours(file.name) for file in folder.iterdir())


@contextmanager
def hold(folder: Path, held: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where it is not there.

    Args:
        folder: the folder.
        held: the sentence for a process that comes second.

    Raises:
        UserError: another process holds it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(lock), (folder / LOCK).stat())
        except OSError:
            same = False
        if not same:  # another process holds it, or has just removed it
            raise UserError(held)
        yield
    finally:
        os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file at once.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
