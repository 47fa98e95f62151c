"""Read and write files so that every failure gives a clear message and loses no data.

Everything is written under a temporary name beside its target, flushed to disk, and renamed. A
crash, a kill or a full disk never leaves a partial file that looks complete. Temporary names are
random and created exclusively, so that no link left there by someone else is followed.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lrc.system.errors import HeldError, UserError, reason, system_errno, system_sentence

LOCK = ".lock"
"""Name of the file that `hold` locks in a folder."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp", re.DOTALL)

_CLAIM_SECONDS = 1.0
"""Age below which the process that writes a temporary file may not have claimed it yet."""

Kind = TypeVar("Kind", dict[str, Any], list[Any])


@contextmanager
def reading(path: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """Turn any error while reading a user's file into a sentence that names the file.

    Args:
        path: the file or folder, or the user's name for it.
        advice: what to do, as the end of the sentence.

    Raises:
        UserError: if the block raises anything.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): {advice}.") from error


def read_json(path: Path, advice: str, kind: type[Kind] = dict) -> Kind:  # type: ignore[assignment]
    """Read a JSON file that holds an object (or an array, if `kind` is list).

    Raises:
        UserError: if it cannot be read, is not JSON, or holds something else.
    """
    with reading(path, advice):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            wanted = "object" if kind is dict else "array"
            raise ValueError(f"it is not a JSON {wanted} but a {type(value).__name__}")
        return value


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any operating-system error while writing `path` into a sentence.

    Raises:
        UserError: if the disk is full, unwritable or missing, too many files are open, a file is in
            the way, ...
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Rust libraries raise their own error types.
        if not isinstance(error, OSError) and system_errno(error) is None:
            raise
        raise UserError(system_sentence(error, _place(error, Path(path)), "written")) from error


def _place(error: Exception, path: Path) -> str:
    """What an error is about: `path`, unless the error names a file outside its folder."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str | os.PathLike):
        return str(path)
    inside = Path(os.fspath(named)).absolute().is_relative_to(path.absolute().parent)
    return str(path) if inside else str(named)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; if there is no error, it becomes `path`.

    Raises:
        UserError: if the disk is full or the path cannot be written.
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
    """Yield a temporary folder to fill; if there is no error, it becomes `path`.

    An older folder of that name is replaced. A folder that cannot be replaced as a whole (the
    current folder, a mount point) is filled instead.

    Raises:
        UserError: if the disk is full or the path cannot be written.
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
                    file.chmod(0o666 & ~_umask())  # safetensors makes its files private
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
    """Return an unpredictable name beside `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _claim(descriptor: int) -> None:
    """Lock a temporary file or folder: the lock lasts as long as the process lives."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_left_over(name: str) -> bool:
    """Whether a file of this name is our lock or one of our temporary files."""
    return name == LOCK or bool(_TEMPORARY.fullmatch(name))


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders whose processes were killed.

    Args:
        folder: folder to search, without its subfolders.
        name: name of the file or folder whose temporary files to remove; None removes all.
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
        return  # its process is still alive
    finally:
        os.close(descriptor)


def _through_links(path: Path) -> Path:
    """Follow the link that a path may be.

    Raises:
        UserError: if it is a link to a missing target.
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
    """Remove a file or a whole folder; raise no error if it is gone or cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def is_taken(folder: Path, ours: Callable[[str], bool] = is_left_over) -> bool:
    """Whether the path of a new folder is already in use.

    Args:
        folder: the new folder.
        ours: test for names of files in it that do not count; default: leftovers of killed
            processes.
    """
    if folder.is_symlink() and not folder.exists():
        return True
    if not folder.exists():
        return False
    with disk_errors(folder):
        return not folder.is_dir() or any(not ours(file.name) for file in folder.iterdir())


@contextmanager
def hold(folder: Path, held: str) -> Iterator[None]:
    """Keep other processes out of a folder; create the folder if it is missing.

    Args:
        folder: the folder.
        held: the error message for a second process.

    Raises:
        HeldError: if another process holds it.
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
            raise HeldError(held)
        yield
    finally:
        os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        UserError: if the disk is full or the path cannot be written.
    """
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to disk."""
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
