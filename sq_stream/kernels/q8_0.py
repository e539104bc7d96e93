"""Encode Q8_0: blocks of 32 values, x ≈ d·q with an fp16 d and codes q in −127..127.

Source of the layout: `block_q8_0` in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from sq_stream.formats.blocks import Q8_0
from sq_stream.kernels.floats import fp16_value, storable_bits
from sq_stream.kernels.jit import jit
from sq_stream.kernels.trials import TRIALS, best_scales, reciprocal

# Whole levels are among them, so that what has been decoded is encoded without loss.
_LEVELS = (127 - np.arange(TRIALS) / 2).astype(np.float32)
_HIGHEST = np.float32(127)


def encode_q8_0(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q8_0 blocks of `x` with a small squared error.

    Args:
        x: float32 [n_rows, n_in], finite, n_in a multiple of 32. Values beyond the format's range are clipped.
        importance: not used, as in llama.cpp: the error is small everywhere.

    Returns:
        uint8 [n_rows, n_in / 32 · 34].

    Raises:
        ValueError: n_in is not a multiple of 32.
    """
    n_rows, n_in = x.shape
    data = np.empty((n_rows, Q8_0.row_bytes(n_in)), np.uint8)
    _encode_rows(x.reshape(n_rows, n_in // 32, 32), data.reshape(n_rows, n_in // 32, 34))
    return data


@jit(parallel=True)
def _encode_rows(x, blocks):
    """Encode x [n_rows, n_blocks, 32] into blocks [n_rows, n_blocks, 34]."""
    for row in prange(len(x)):
        _encode_row(x[row], blocks[row])


@jit()
def _encode_row(x, blocks):
    d, d_bits = np.empty(len(x), np.float32), np.empty(len(x), np.uint16)
    best_scales(x, _LEVELS, _HIGHEST, d)
    for b in range(len(x)):
        d_bits[b] = storable_bits(abs(d[b]))
        d[b] = fp16_value(d_bits[b])
    for b in range(len(x)):
        inverse = reciprocal(d[b])
        blocks[b, 0], blocks[b, 1] = d_bits[b] & 0xFF, d_bits[b] >> 8
        for i in range(32):
            code = min(max(np.rint(x[b, i] * inverse), -_HIGHEST), _HIGHEST)
            blocks[b, 2 + i] = np.uint8(np.int32(code))
