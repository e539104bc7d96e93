"""Encode Q5_0 and Q5_1: blocks of 32 values, x ≈ d·q + m with codes q in 0..31, fp16 d and m; Q5_0 has m = −16·d.

Source of the layouts: `block_q5_0`, `block_q5_1` in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from sq_stream.formats.blocks import Q5_0, Q5_1
from sq_stream.kernels.floats import FP16_MAX, fp16_bits, fp16_nearest, fp16_value, storable_bits
from sq_stream.kernels.importance import column_weights
from sq_stream.kernels.jit import jit
from sq_stream.kernels.q5_search import X_MAX, search_affine, search_centered
from sq_stream.kernels.trials import TRIALS, best_scales, extremes, reciprocal

# Whole levels are among them, so that what has been decoded is encoded without loss.
_LEVELS = (np.arange(TRIALS) / 5 - 16.4).astype(np.float32)
_CENTER = np.float32(16)
_ZERO = np.float32(0)
_HIGHEST = np.float32(31)
_FRACTION = np.float32(2.0**16)  # rounding residues are summed as integers in these units: exact, so in any order

_leaf = jit(inline="always")
_stage = jit()
_driver = jit(parallel=True)


def encode_q5_0(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q5_0 blocks of `x` with a small squared error, weighted by column where `importance` is given.

    Args:
        x: float32 [n_rows, n_in], finite, n_in a multiple of 32. Values beyond the format's range are clipped.
        importance: float32 [n_in], not negative. None weighs all columns alike, and goes a much quicker way.

    Returns:
        uint8 [n_rows, n_in / 32 · 22].

    Raises:
        BadInputError: a value of `importance` is negative, infinite or NaN.
        ValueError: n_in is not a multiple of 32, or `importance` is not of shape [n_in].
    """
    n_rows, n_in = x.shape
    data = np.empty((n_rows, Q5_0.row_bytes(n_in)), np.uint8)
    weights = column_weights(importance, n_in).reshape(n_in // 32, 32)
    _encode_q5_0(x.reshape(n_rows, n_in // 32, 32), weights, importance is None, data.reshape(n_rows, n_in // 32, 22))
    return data


def encode_q5_1(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q5_1 blocks of `x`, uint8 [n_rows, n_in / 32 · 24]; all else as `encode_q5_0`."""
    n_rows, n_in = x.shape
    data = np.empty((n_rows, Q5_1.row_bytes(n_in)), np.uint8)
    weights = column_weights(importance, n_in).reshape(n_in // 32, 32)
    _encode_q5_1(x.reshape(n_rows, n_in // 32, 32), weights, importance is None, data.reshape(n_rows, n_in // 32, 24))
    return data


@_driver
def _encode_q5_0(x, weights, alike, blocks):
    """Encode x [n_rows, n_blocks, 32] with weights [n_blocks, 32], all alike or not, into [n_rows, n_blocks, 22]."""
    for row in prange(len(x)):
        _encode_row_q5_0(x[row], weights, alike, blocks[row])


@_stage
def _encode_row_q5_0(x, weights, alike, blocks):
    d, d_bits = np.empty(len(x), np.float32), np.empty(len(x), np.uint16)
    if alike:
        best_scales(x, _LEVELS, _HIGHEST - _CENTER, d)
    else:
        search_centered(x, weights, d)
    for b in range(len(x)):
        d_bits[b] = storable_bits(d[b])
        d[b] = fp16_value(d_bits[b])
    for b in range(len(x)):
        blocks[b, 0], blocks[b, 1] = d_bits[b] & 0xFF, d_bits[b] >> 8
        _write_codes(x[b], d[b], -_CENTER * d[b], blocks[b, 2:])


@_driver
def _encode_q5_1(x, weights, alike, blocks):
    """Encode x [n_rows, n_blocks, 32] with weights [n_blocks, 32], all alike or not, into [n_rows, n_blocks, 24]."""
    for row in prange(len(x)):
        _encode_row_q5_1(x[row], weights, alike, blocks[row])


@_stage
def _encode_row_q5_1(x, weights, alike, blocks):
    d, m = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    d_bits, m_bits = np.empty(len(x), np.uint16), np.empty(len(x), np.uint16)
    if alike:
        _fit_affine(x, d, m)
    else:
        search_affine(x, weights, d, m)
    for b in range(len(x)):
        d_bits[b], m_bits[b] = storable_bits(d[b]), fp16_bits(m[b])
        d[b] = fp16_value(d_bits[b])
    for b in range(len(x)):
        blocks[b, 0], blocks[b, 1] = d_bits[b] & 0xFF, d_bits[b] >> 8
        blocks[b, 2], blocks[b, 3] = m_bits[b] & 0xFF, m_bits[b] >> 8
        _write_codes(x[b], d[b], m[b], blocks[b, 4:])


@_stage
def _fit_affine(x, d, m):
    """Set d and m [n_blocks] to the least squares for the codes that x [n_blocks, 32] has on its full span.

    m is an fp16 value, and d the best for it. Where m must be clipped the span is kept, as far as it can be stored.
    """
    bits = x.view(np.uint32)
    for b in range(len(x)):
        bottom, top = extremes(bits[b], 32)
        if bottom < -FP16_MAX or top > FP16_MAX:
            m[b] = fp16_nearest(bottom)
            d[b] = (max(min(top, X_MAX), m[b]) - m[b]) / _HIGHEST
            continue
        d[b] = (top - bottom) / _HIGHEST
        inverse = reciprocal(d[b])
        q_sum = qq_sum = rest_sum = rest_q_sum = np.uint32(0)
        for i in range(32):
            u = (x[b, i] - bottom) * inverse
            code = np.rint(u)
            q, rest = np.uint32(np.int32(code)), np.uint32(np.int32((u - code) * _FRACTION))
            q_sum = np.uint32(q_sum + q)
            qq_sum = np.uint32(qq_sum + np.uint32(q * q))
            rest_sum = np.uint32(rest_sum + rest)
            rest_q_sum = np.uint32(rest_q_sum + np.uint32(rest * q))
        n, sq, sqq = np.float32(32), np.float32(q_sum), np.float32(qq_sum)
        rests = np.float32(np.uint32(rest_sum).view(np.int32)) / _FRACTION
        rests_q = np.float32(np.uint32(rest_q_sum).view(np.int32)) / _FRACTION
        scaling = reciprocal(n * sqq - sq * sq)
        ideal = bottom + d[b] * scaling * (sqq * rests - sq * rests_q)
        m[b] = fp16_nearest(ideal)
        d[b] += d[b] * scaling * (n * rests_q - sq * rests) + (ideal - m[b]) * sq * reciprocal(sqq)


@_leaf
def _write_codes(x, d, m, packed):
    """Write the codes of x [32]: 4 bytes of their highest bits, then 16 bytes of nibbles."""
    inverse = reciprocal(d)
    fifths = np.uint32(0)
    for i in range(16):
        low = np.uint32(np.int32(min(max(np.rint((x[i] - m) * inverse), _ZERO), _HIGHEST)))
        high = np.uint32(np.int32(min(max(np.rint((x[16 + i] - m) * inverse), _ZERO), _HIGHEST)))
        packed[4 + i] = np.uint8(np.uint32(low & np.uint32(15)) | np.uint32(high << np.uint32(4)))
        fifths |= np.uint32(np.uint32(low >> np.uint32(4)) << np.uint32(i))
        fifths |= np.uint32(np.uint32(high >> np.uint32(4)) << np.uint32(16 + i))
    for k in range(4):
        packed[k] = np.uint8(fifths >> np.uint32(8 * k))
