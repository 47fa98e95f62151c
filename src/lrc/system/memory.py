"""Memory that the C library gives back to the system, and that the next step asks for again.

glibc maps every large block anew and unmaps it when it is freed, so each step would fault its
pages in again: half of the time of a step on a small CPU machine. Told to keep freed memory, a step
reuses the blocks of the one before.
"""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks in the process; false where the C library is another one."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
