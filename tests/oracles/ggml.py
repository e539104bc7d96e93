"""llama.cpp's own quantizer, called in the shared object of the xllamacpp wheel, which is never imported."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.formats.blocks import BlockType

_FLOATS = ctypes.POINTER(ctypes.c_float)


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("xllamacpp is not installed: pip install 'sq-stream[test]'")
    library = ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "xllamacpp.abi3.so"))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        _FLOATS,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        _FLOATS,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def ggml_encode(
    x: NDArray[np.float32], block_type: BlockType, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """What `ggml_quantize_chunk` makes of `x` [n_rows, n_in] with `importance` [n_in]: uint8 [n_rows, row_bytes]."""
    x = np.ascontiguousarray(x, np.float32)
    n_rows, n_in = x.shape
    data = np.empty((n_rows, block_type.row_bytes(n_in)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    library = _library()
    library.ggml_quantize_init(block_type.ggml_id)
    written = library.ggml_quantize_chunk(
        block_type.ggml_id,
        x.ctypes.data_as(_FLOATS),
        data.ctypes.data,
        0,
        n_rows,
        n_in,
        None if weights is None else weights.ctypes.data_as(_FLOATS),
    )
    if written != data.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {block_type.name}, not {data.nbytes}")
    return data
