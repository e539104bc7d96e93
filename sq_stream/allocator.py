"""What the C library keeps of freed memory, given back: so that what is resident is what is in use."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

LARGE_BYTES = 2**22
"""Of an array that goes back to the system as soon as it is freed."""
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


@cache
def _c_library() -> ctypes.CDLL | None:
    """The C library that this process allocates with, if it is glibc."""
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        if library.mallopt and library.malloc_trim:
            return library
    return None


def return_large_arrays() -> None:
    """Have glibc give back large arrays when they are freed.

    By itself it keeps those of up to 32 MiB, each thread its own, so that what is resident exceeds by a quarter what is
    allocated, and depends on chance.
    """
    if library := _c_library():
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


def release_freed() -> None:
    """Have it give back the rest of what is freed: what is resident then does not depend on the stages before."""
    if library := _c_library():
        library.malloc_trim(0)
