"""Keep freed memory in the process, so that the next step can reuse it.

By default, glibc maps every large block separately and unmaps it when it is freed. Each step then
faults its pages in again, which takes half of a step's time on a small CPU machine. If glibc keeps
freed memory, a step reuses the blocks of the one before.
"""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks in the process; return False with another C library."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
