"""Writing files so that a crash, a kill or a full disk never leaves half a file looking whole.

Everything is written under a temporary name beside its place, flushed to the disk, and renamed.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lrc.errors import UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, unwritable or missing disk into a sentence.

    Raises:
        UserError: the operating system could not write to `path`.
    """
    try:
        yield
    except SafetensorError as error:
        if "(os error 28)" not in str(error) and "(os error 122)" not in str(error):
            raise
        raise UserError(
            f"The disk is full while writing {path}: free some space and try again."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full while writing {path}: free some space and try again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{path} cannot be written: choose a folder that you own.") from error
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on leaving without an error it becomes `path`.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving without an error it becomes `path`.

    An older folder of that name is replaced.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # safetensors leaves its files private
                flush(file)
            flush(temporary)
            if path.exists():
                os.rename(path, replaced)
            os.rename(temporary, path)
            flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def is_taken(folder: Path) -> bool:
    """Whether something stands where a new folder is to go; an empty folder does not count."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


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
