"""llama.cpp's own reading of a GGUF file's structure."""

from __future__ import annotations

import ctypes
from pathlib import Path

from oracles.llamacpp import load_library


class _Parameters(ctypes.Structure):
    """`gguf_init_params` of gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def llamacpp_opens(path: Path) -> bool:
    """Whether `gguf_init_from_file` accepts the header of `path`; it does not look whether the data is all there."""
    library = load_library()
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_free.argtypes = [ctypes.c_void_p]
    context = library.gguf_init_from_file(str(path).encode(), _Parameters(no_alloc=True, ctx=None))
    if context:
        library.gguf_free(context)
    return bool(context)
