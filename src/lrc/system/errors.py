"""Errors that a user can fix, and one-sentence messages for all other errors."""

import errno
import json
import os
import re

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How Rust libraries (safetensors, tokenizers) name an error of the operating system."""

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNUSABLE = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

ADVICE = {
    **dict.fromkeys(_FORBIDDEN, "choose a folder that you own"),
    **dict.fromkeys(_UNUSABLE, "choose another path"),
}
"""What to do about errors of a path, by their numbers."""

LONGEST_REASON = 300
"""Maximum characters to repeat from a library's own message."""


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class DivergedError(UserError):
    """The loss or its gradient is not finite."""


class HeldError(UserError):
    """Another process works in the folder."""


def reason(error: BaseException) -> str:
    """Summarize a library's error in a few words on one line, without a final period."""
    if isinstance(error, UnicodeError):
        return "not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than this machine has"
    if isinstance(error, KeyError):
        return f"there is no {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines.pop(0) if lines else type(error).__name__
    while text.endswith(":") and lines:  # the message itself is on the next line
        text = f"{text} {lines.pop(0)}"
    return text[:LONGEST_REASON].rstrip(".:")


def system_errno(error: BaseException) -> int | None:
    """Return the number of the operating system's error behind an error; None if there is none."""
    if isinstance(error, OSError):
        return error.errno
    found = SYSTEM_ERROR.search(str(error))
    return int(found[1]) if found else None


def system_sentence(
    error: BaseException, place: str | os.PathLike[str] | None = None, done: str = "read or written"
) -> str:
    """Describe an operating-system error in one sentence that says what to do.

    Args:
        error: the error.
        place: what was read or written; None means the file that the error names.
        done: what could not be done to it, as a participle.
    """
    place = place or getattr(error, "filename", None) or "A file"
    number = system_errno(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full while writing {place}: free some space and try again."
    if number == errno.EFBIG:
        return f"{place} exceeds this system's file size limit: raise `ulimit -f` and try again."
    if number in (errno.EMFILE, errno.ENFILE):
        return "Too many files are open: raise the limit with `ulimit -n 1024` and try again."
    advice = ADVICE.get(number or 0, "check it and try again")
    return f"{place} cannot be {done} ({reason(error)}): {advice}."
