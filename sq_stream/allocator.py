"""What the C library keeps of freed memory, given back: so that what is resident is what is in use."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

LARGE_BYTES = 2**22
"""Of an array that goes back to the system as soon as it is freed."""
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of mallopt(3)


@cache
def _c_library() -> ctypes.CDLL | None:
    """The C library that this process allocates with, if it is glibc."""
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        if library.mallopt and library.malloc_trim:
            return library
    return None


def return_freed_arrays() -> None:
    """Have glibc give back freed arrays: large ones at once, others with `release_freed`.

    By itself it keeps those of up to 32 MiB, so that what is resident exceeds by a quarter what is allocated, and
    depends on chance; and it keeps what each thread has freed in an arena of that thread's, which is never trimmed.
    """
    if library := _c_library():
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        library.mallopt(_M_ARENA_MAX, 1)


def release_freed() -> None:
    """Have it give back the rest of what is freed: what is resident then does not depend on the stages before."""
    if library := _c_library():
        library.malloc_trim(0)
