"""Encode Q6_K: super-blocks of 16 groups of 16 values, x ≈ d·sc·q, fp16 d, 8-bit scales sc, codes q in −32..31.

For a given d each group tries 16 of its possible scales, by exact error: those that put its peak, the value of
greatest magnitude, just inside the code range at either end, and the next ones. One search thus settles scales and
codes together, for a few d; then d moves to the least-squares fit of all groups and the search runs again.

Source of the layout: `block_q6_K` in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from sq_stream.formats.blocks import Q6_K
from sq_stream.kernels.floats import FP16_MAX, fp16_bits, fp16_value, storable_bits
from sq_stream.kernels.importance import column_weights
from sq_stream.kernels.jit import jit
from sq_stream.kernels.trials import TRIALS, lowest, signed_peak

GROUP = 16
GROUPS = 16

_ZERO = np.float32(0)
_ONE = np.float32(1)
_LOWEST, _HIGHEST = np.float32(-32), np.float32(31)
_MARGIN = np.float32(0.5)  # how far beyond the code range the first trials put the peak
_LEAST_SCALE, _GREATEST_SCALE = np.float32(-128), np.float32(127)
_FIRST_SCALES = (116, 123)  # of the group with the greatest peak: whole, and with room for trials above
_REFITS = 2
_X_MAX = np.float32(FP16_MAX * 32 * 128)  # beyond all that can be stored

_leaf = jit()


def encode_q6_k(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q6_K blocks of `x` with a small squared error, weighted by column where `importance` is given.

    Args:
        x: float32 [n_rows, n_in], finite, n_in a multiple of 256. Values beyond the format's range are clipped.
        importance: float32 [n_in], not negative; None weighs all columns alike.

    Returns:
        uint8 [n_rows, n_in / 256 · 210].

    Raises:
        BadInputError: a value of `importance` is negative, infinite or NaN.
        ValueError: n_in is not a multiple of 256, or `importance` is not of shape [n_in].
    """
    n_rows, n_in = x.shape
    data = np.empty((n_rows, Q6_K.row_bytes(n_in)), np.uint8)
    n_blocks = n_in // Q6_K.block_size
    weights = column_weights(importance, n_in).reshape(n_blocks, Q6_K.block_size)
    blocks = data.reshape(n_rows, n_blocks, Q6_K.block_bytes)
    _encode_rows(x.reshape(n_rows, n_blocks, Q6_K.block_size), weights, blocks)
    return data


@jit(parallel=True)
def _encode_rows(x, weights, blocks):
    """Encode x [n_rows, n_blocks, 256] with weights [n_blocks, 256] into blocks [n_rows, n_blocks, 210]."""
    for row in prange(len(x)):
        values, scales = np.empty(GROUPS * GROUP, np.float32), np.empty(GROUPS, np.float32)
        scratch, codes = np.empty((5, TRIALS), np.float32), np.empty(GROUPS * GROUP, np.uint8)
        for b in range(x.shape[1]):
            for i in range(GROUPS * GROUP):
                values[i] = min(max(x[row, b, i], -_X_MAX), _X_MAX)
            d = _fit(values, weights[b], scales, scratch)
            _write_codes(values, d, scales, codes)
            _pack(codes, d, scales, blocks[row, b])


@_leaf
def _fit(x, w, scales, scratch):
    """Choose d, returned, and scales for a small Σ w·(x − decoded)².

    Args:
        x: float32 [256].
        w: float32 [256], positive.
        scales: out, float32 [16], whole numbers in −128..127, not 0.
        scratch: float32 [5, 16].
    """
    peaks, trial_scales, trials = scratch[0], scratch[1], scratch[2:]
    bits = x.view(np.uint32)
    peak = _ZERO
    for group in range(GROUPS):
        peaks[group] = signed_peak(bits[GROUP * group : GROUP * (group + 1)], GROUP)
        peak = max(peak, abs(peaks[group]))
    best, best_error = _ZERO, np.float32(np.inf)
    for first_scale in _FIRST_SCALES:
        d = fp16_value(storable_bits(peak / (-_LOWEST * np.float32(first_scale))))
        error = _choose_scales(x, w, peaks, d, trial_scales, trials)
        if error < best_error:
            best, best_error, scales[:] = d, error, trial_scales
    for _ in range(_REFITS):
        d = fp16_value(storable_bits(_least_squares(x, w, best, scales)))
        if d == best:
            break
        error = _choose_scales(x, w, peaks, d, trial_scales, trials)
        if error < best_error:
            best, best_error, scales[:] = d, error, trial_scales
    return best


@_leaf
def _choose_scales(x, w, peaks, d, scales, trials):
    """Set scales [16] to the best for this d; the weighted squared error. Scratch: trials, float32 [3, TRIALS]."""
    candidates, inverses, errors = trials[0], trials[1], trials[2]
    total = _ZERO
    for group in range(GROUPS):
        sign = _ONE if peaks[group] > _ZERO else -_ONE
        steps = abs(peaks[group]) / d if d > _ZERO else _ZERO
        at_lowest = max(np.floor(steps / (_MARGIN - _LOWEST)), _ONE)
        at_highest = max(np.floor(steps / (_MARGIN + _HIGHEST)), _ONE)
        for k in range(TRIALS // 2):
            candidates[k] = min(max(-sign * (at_lowest + np.float32(k)), _LEAST_SCALE), _GREATEST_SCALE)
            candidates[8 + k] = min(max(sign * (at_highest + np.float32(k)), _LEAST_SCALE), _GREATEST_SCALE)
        for k in range(TRIALS):
            inverses[k] = _ONE / (d * candidates[k]) if d > _ZERO else _ZERO
        _try_scales(x[GROUP * group :], w[GROUP * group :], inverses, errors)
        for k in range(TRIALS):
            errors[k] *= candidates[k] * candidates[k]
        best = lowest(errors)
        scales[group] = candidates[best]
        total += errors[best]
    return total * d * d


@_leaf
def _try_scales(x, w, inverses, errors):
    """Errors of the group x [16] weighted by w [16] in each trial, in units of the squared step."""
    for k in range(TRIALS):
        front = back = _ZERO
        for i in range(8):
            front += w[i] * _squared_rest(x[i] * inverses[k])
            back += w[8 + i] * _squared_rest(x[8 + i] * inverses[k])
        errors[k] = front + back


@_leaf
def _code(u):
    return min(max(np.rint(u), _LOWEST), _HIGHEST)


@_leaf
def _squared_rest(u):
    rest = u - _code(u)
    return rest * rest


@_leaf
def _least_squares(x, w, d, scales):
    """The best real d for the codes that x [256] has at this one."""
    projection, norm = _ZERO, _ZERO
    for group in range(GROUPS):
        inverse = _ONE / (d * scales[group]) if d > _ZERO else _ZERO
        moment, square = _ZERO, _ZERO
        for i in range(GROUP * group, GROUP * (group + 1)):
            code = _code(x[i] * inverse)
            moment += w[i] * code * x[i]
            square += w[i] * code * code
        projection += scales[group] * moment
        norm += scales[group] * scales[group] * square
    return max(projection / norm, _ZERO) if norm > _ZERO else d


@_leaf
def _write_codes(x, d, scales, codes):
    """Codes of x [256], 32 added, in codes, uint8 [256]."""
    for group in range(GROUPS):
        inverse = _ONE / (d * scales[group]) if d > _ZERO else _ZERO
        for i in range(GROUP * group, GROUP * (group + 1)):
            codes[i] = np.uint8(np.int32(_code(x[i] * inverse)) + 32)


@_leaf
def _pack(codes, d, scales, block):
    """Write the block, uint8 [210]: 128 pairs of low nibbles of the codes, 64 times four pairs of high bits, sc, d."""
    for half in range(2):
        start = 128 * half
        first, second, third, fourth = codes[start:], codes[start + 32 :], codes[start + 64 :], codes[start + 96 :]
        for i in range(32):
            block[64 * half + i] = (first[i] & 15) | (third[i] & 15) << 4
            block[64 * half + 32 + i] = (second[i] & 15) | (fourth[i] & 15) << 4
            highs = first[i] >> 4 | second[i] >> 4 << 2 | third[i] >> 4 << 4 | fourth[i] >> 4 << 6
            block[128 + 32 * half + i] = highs
    for group in range(GROUPS):
        block[192 + group] = np.uint8(np.int32(scales[group]))
    bits = fp16_bits(d)
    block[208], block[209] = bits & 0xFF, bits >> 8
