"""Encode Q5_1: blocks of 32 values, x ≈ d·q + m with fp16 d and m and codes q in 0..31.

Source of the layout: `block_q5_1` in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from sq_stream.formats.blocks import Q5_1
from sq_stream.kernels.floats import FP16_MAX, fp16_bits, fp16_value, storable_bits
from sq_stream.kernels.symmetric import BLOCK, encode_rows, pack_5_bits
from sq_stream.kernels.trials import reciprocal

_ZERO = np.float32(0)
_HIGHEST = np.float32(31)

_leaf = njit(cache=True, error_model="numpy")
_driver = njit(cache=True, parallel=True, error_model="numpy")


def encode_q5_1(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q5_1 blocks of `x` with a small squared error.

    Args:
        x: float32 [n_rows, n_in], finite, n_in a multiple of 32. Values beyond the format's range are clipped.
        importance: accepted for the sake of a common signature, and not used.

    Returns:
        uint8 [n_rows, n_in / 32 · 24].

    Raises:
        ValueError: n_in is not a multiple of 32.
    """
    return encode_rows(x, Q5_1, _encode_q5_1)


@_driver
def _encode_q5_1(x, blocks):
    """Encode x [n_rows, n_blocks, 32] into blocks [n_rows, n_blocks, 24]."""
    n_blocks, x_bits = x.shape[1], x.view(np.int32)
    for row in prange(len(x)):
        codes = np.empty(BLOCK, np.int32)
        d, m = np.empty(n_blocks, np.float32), np.empty(n_blocks, np.float32)
        d_bits, m_bits = np.empty(n_blocks, np.uint16), np.empty(n_blocks, np.uint16)
        for b in range(n_blocks):
            m[b], d[b] = _extremes(x_bits[row, b])
        for b in range(n_blocks):
            smallest = min(max(m[b], -FP16_MAX), FP16_MAX)
            m_bits[b] = fp16_bits(smallest)
            m[b] = fp16_value(m_bits[b])
            d_bits[b] = storable_bits(max(d[b] - m[b], _ZERO) / _HIGHEST)
            d[b] = fp16_value(d_bits[b])
        for b in range(n_blocks):
            inverse = reciprocal(d[b])
            for i in range(BLOCK):
                codes[i] = np.int32(min(max(np.rint((x[row, b, i] - m[b]) * inverse), _ZERO), _HIGHEST))
            blocks[row, b, 0], blocks[row, b, 1] = d_bits[b] & 0xFF, d_bits[b] >> 8
            blocks[row, b, 2], blocks[row, b, 3] = m_bits[b] & 0xFF, m_bits[b] >> 8
            pack_5_bits(codes, blocks[row, b, 4:8], blocks[row, b, 8:24])


@_leaf
def _extremes(x_bits):
    """Least and greatest value (float32) among x_bits, int32 [32] of float32 values.

    Turning the lower bits of negative values over gives integers of the same order: their extremes vectorize.
    """
    least, greatest = np.int32(0x7FFF_FFFF), np.int32(-0x8000_0000)
    for i in range(BLOCK):
        ordered = np.int32(x_bits[i] ^ ((x_bits[i] >> np.int32(31)) & np.int32(0x7FFF_FFFF)))
        least, greatest = min(least, ordered), max(greatest, ordered)
    return _value(least), _value(greatest)


@_leaf
def _value(ordered):
    return np.int32(ordered ^ ((ordered >> np.int32(31)) & np.int32(0x7FFF_FFFF))).view(np.float32)
